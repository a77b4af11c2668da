"""What a conversion has finished so far, and who is at it: the file that makes a run resumable.

One file in the output folder, of JSON lines, only ever appended to. Each run adds a line on itself
and one with the names of the files that it may leave; each shard adds a line once its bytes are on
the disk and before it gets its name. A shard with its final name *and* a line that fits it is
finished; anything else is done again. A line that a crash cut short does not parse, and counts for
nothing.

The file is also the lock. The kernel's own lock on it ends with the process that holds it, however
that ends, and network file systems carry it to other hosts; so there are no stale locks to judge.
Only a process that has been killed while a disk keeps it waiting holds it for a while yet.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .blockio import open_regular, remove_file, sync_folder
from .contract import FORMAT_VERSION, JOURNAL_NAME
from .errors import HeaderError, OutputError, naming
from .headers import read_header
from .manifest import ShardRecord
from .plan import PlannedShard

ENDING_SECONDS = 30.0
"""How long to wait for a process that has been killed and still holds the folder."""

_GONE_SECONDS = 0.1

_PF_EXITING = 0x4

Identity = Mapping[str, str | int]
"""Of a source file (`Shard.identity`)."""


@dataclass(frozen=True, slots=True)
class Made:
    """A finished shard, and what it was made from."""

    record: ShardRecord
    format_version: int
    row_order: str
    plan: str
    """The shard's fingerprint: which bytes go where, from which offsets of which files."""
    sources: Mapping[str, Identity]
    """Of each source file it was read from."""


class Journal:
    """The journal of one output folder, locked until `close`."""

    def __init__(self, out_dir: Path) -> None:
        """Open or create, and lock.

        Raises:
            OutputError: another process holds the folder, or the file cannot be used.
        """
        self._out_dir = out_dir
        self._path = out_dir / JOURNAL_NAME
        self.made: dict[str, Made] = {}
        """The last line on each shard."""
        self.files: set[str] = set()
        """Names that runs so far may have left in the folder."""
        self.forgotten = False
        """Whether some line on a shard has been taken back: then a manifest vouches for none."""
        with naming(self._path, OutputError):
            self._fd = _open_locked(self._path)
            self._read()
        # For those who come too late. A full disk is no reason to stop: a finished folder stays so.
        with contextlib.suppress(OutputError):
            self._append([_whoami()])

    def begin(self, files: Iterable[str]) -> None:
        """Say which files there may be from now on."""
        names = sorted(files)
        self.files |= set(names)
        self._append([{"files": names}])
        with naming(self._path, OutputError):
            sync_folder(self._out_dir)

    def add(self, shards: Mapping[str, Made]) -> None:
        """Record shards whose bytes are on the disk, before they get their names."""
        self._append(_entry(name, made) for name, made in shards.items())
        self.made.update(shards)

    def forget(self) -> None:
        """Let no line so far vouch for a shard."""
        self.forgotten = True
        self.made.clear()
        self._append([{"forget": True}])

    def close(self, *, remove: bool) -> None:
        """Unlock; ``remove`` when nothing is left to resume."""
        try:
            if remove:
                remove_file(self._path)
        finally:
            os.close(self._fd)

    def _append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        with naming(self._path, OutputError):
            # A line cut short by a crash must not swallow the next.
            data = "".join(f"\n{json.dumps(entry)}\n" for entry in entries).encode()
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)

    def _read(self) -> None:
        for entry in _entries(self._path):
            match entry:
                case {"forget": True}:
                    self.forgotten = True
                    self.made.clear()
                case {"files": list(names)}:
                    self.files |= {name for name in names if isinstance(name, str)}
                case {
                    "shard": str(name),
                    "bytes": int(nbytes),
                    "header": str(header),
                    "tensors": dict(tensors),
                    "format_version": int(format_version),
                    "row_order": str(row_order),
                    "plan": str(plan),
                    "sources": dict(sources),
                }:
                    record = ShardRecord(nbytes, header, tensors)
                    self.made[name] = Made(record, format_version, row_order, plan, sources)


def _entry(name: str, made: Made) -> dict[str, Any]:
    return {
        "shard": name,
        "bytes": made.record.nbytes,
        "header": made.record.header,
        "tensors": dict(made.record.tensors),
        "format_version": made.format_version,
        "row_order": made.row_order,
        "plan": made.plan,
        "sources": dict(made.sources),
    }


def why_redo(
    planned: PlannedShard,
    made: Made | None,
    out_dir: Path,
    *,
    row_order: str,
    sources: Mapping[str, Identity],
) -> str | None:
    """Why a shard with its final name cannot be taken as it is; None if it can.

    Cheap: its size and its header are looked at, its data is not.

    Args:
        planned: what should be there.
        made: what the journal says of it.
        out_dir: where.
        row_order: fingerprint of the order that would be written now.
        sources: identity of each source file now.
    """
    if made is None:
        return "no run has finished it"
    if made.format_version != FORMAT_VERSION:
        return f"it has format version {made.format_version}, not {FORMAT_VERSION}"
    if made.row_order != row_order:
        return "it was written for another row order"
    for name, identity in made.sources.items():
        if sources.get(name) != identity:
            return f"{name} has changed since"
    if made.plan != planned.fingerprint:
        return "the options or the layout of shards have changed since"
    try:
        header = read_header(out_dir / planned.name)
    except HeaderError as error:
        return f"it is damaged ({error})"
    if header.digest != made.record.header or header.file_nbytes != made.record.nbytes:
        return "its header has been changed"
    return None


def _open_locked(path: Path) -> int:
    started = time.monotonic()
    while True:
        # O_NOFOLLOW: a link planted here would have us write where it leads.
        fd = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = _holder(path)
                patience = _patience_with(holder)
                if time.monotonic() < started + patience:
                    time.sleep(0.1)  # each look reads the whole journal
                    continue
                name = holder.get("run", "another process")
                if patience == ENDING_SECONDS:
                    name += "; it has been killed, but still waits for a disk"
                raise OutputError(f"{path.parent}: is in use by {name}") from None
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise OutputError(
                    f"{path.parent}: its file system has no locks ({error.strerror}), so a second "
                    "run could not be kept out; mount it with locks (Lustre: -o flock), or "
                    "convert to another one"
                ) from None
            raise
        # Whoever held it before may have removed the file just after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def _holder(path: Path) -> Mapping[str, Any]:
    """The latest line of a run on itself."""
    with contextlib.suppress(OSError, StopIteration):
        entries = reversed(_entries(path))
        return next(entry for entry in entries if isinstance(entry.get("run"), str))
    return {}


def _whoami() -> dict[str, str | int]:
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    pid = os.getpid()
    run = f"process {pid} on {socket.gethostname()}, at work since {now}"
    return {"run": run, "pid": pid, "pid_namespace": _pid_namespace()}


def _pid_namespace() -> str:
    """Within which process ids mean the same; "" where there is no /proc."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _patience_with(holder: Mapping[str, Any]) -> float:
    """Seconds for which it is worth waiting for a process to let a folder go.

    0 if it is alive, or cannot be seen from here. One that has been killed keeps its locks for
    as long as one of its threads waits for a disk. One that is gone has ended just now, or somebody
    else holds the folder who has not left a line yet.
    """
    match holder:
        case {"pid": int(pid), "pid_namespace": str(space)} if space and space == _pid_namespace():
            try:
                stat = Path(f"/proc/{pid}/stat").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                return _GONE_SECONDS
            except OSError:
                return 0
            # proc(5): fields from the third on; the second, a name, may hold anything.
            fields = stat.rpartition(b")")[2].split()
            state, flags, pending = fields[0], int(fields[6]), int(fields[28])
            killed = pending >> (signal.SIGKILL - 1) & 1
            if state in b"ZX" or killed or flags & _PF_EXITING:
                return ENDING_SECONDS
    return 0
