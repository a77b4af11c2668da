"""The record of an unfinished conversion, which makes it resumable.

One file in the output folder, of JSON lines, only ever appended to. It is also what the folder's
lock is held on. Each run adds a line on itself and one with the names of the files that it may
leave; each shard adds a line once its bytes are on the disk and before it gets its name. A shard
with its final name *and* a line that fits it is finished; any other is written again. A line that a
crash cut short does not parse and counts for nothing.

What comes over a network is not to be fetched twice. So each move of an unfinished shard adds a
line, too, once its bytes are in the shard's file. It has their checksum, and the next run believes
that, not the line: lines need not be on the disk before the bytes, nor the bytes before the lines.

Where several machines share a conversion, each part of it has a journal of its own, which its run
alone writes to and holds the lock on. Such runs also share the lock on the folder's journal. A run
of the whole has that lock to itself, and takes over what the parts have recorded.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import msgspec

from ..errors import OutputError, naming
from ..format.files import JOURNAL_NAME, is_journal, part_journal_name
from ..format.manifest import Manifest, ShardIdentity, ShardRecord, SourceRecord
from ..format.untrusted import decode
from ..plan import Part
from ..storage.durable import remove_file, sync_folder
from ..storage.files import open_regular
from .lock import open_locked


class FinishedShard(msgspec.Struct, frozen=True, tag_field="line", tag="shard"):
    """A shard whose bytes are on the disk, and what it was made from."""

    name: str
    record: ShardRecord
    format_version: int
    row_order: str
    plan: str
    """The shard's fingerprint: which bytes go where, from which offsets of which files."""
    sources: dict[str, ShardIdentity]
    """Of each source file it was read from."""


class Division(msgspec.Struct, frozen=True, tag_field="line", tag="division"):
    """What a part is a part of. All parts of a conversion must say the same."""

    parts: int
    plan: str
    """Fingerprint of the whole plan."""
    max_shard_nbytes: int
    source: str
    """Where it lies; on another machine that may be elsewhere."""
    sources: dict[str, ShardIdentity]
    """Of each source file."""
    origin: str | None = None
    """The model and the commit, where they are known."""

    def difference(self, other: Division) -> str | None:
        """How ``other`` differs; None if both are of one conversion."""
        if other.parts != self.parts:
            return f"is of {other.parts} parts, not {self.parts}"
        if other.max_shard_nbytes != self.max_shard_nbytes:
            return f"has files of at most {other.max_shard_nbytes:,} bytes"
        if None not in (self.origin, other.origin) and other.origin != self.origin:
            return f"was begun from {other.origin}, not {self.origin}"
        for name in sorted(self.sources.keys() | other.sources.keys()):
            if self.sources.get(name) != other.sources.get(name):
                return f"was made from another {name}"
        return None if other.plan == self.plan else "was planned by another release"


class FilledMove(msgspec.Struct, frozen=True, tag_field="line", tag="filled"):
    """A move whose bytes have been written into an unfinished shard."""

    name: str
    """Of the shard."""
    key: str
    """What the shard is made of (`work.Work.keys`)."""
    move: int
    """Its number among the shard's moves."""
    checksum: str
    """XXH3-64 of its bytes."""


class _Dropped(msgspec.Struct, frozen=True, tag_field="line", tag="dropped"):
    """From now on shards of the source may be deleted: each once all that is read from it is on the
    disk and on record."""

    source: SourceRecord


class _Origin(msgspec.Struct, frozen=True, tag_field="line", tag="origin"):
    """What runs read from now on."""

    origin: str


class _Run(msgspec.Struct, frozen=True, tag_field="line", tag="run"):
    """A run has the lock."""

    owner: str


class _Files(msgspec.Struct, frozen=True, tag_field="line", tag="files", omit_defaults=True):
    """Files of these names may be there from now on."""

    files: list[str]
    restored: bool = False
    """They are of an original, not of a conversion."""


class _Forget(msgspec.Struct, frozen=True, tag_field="line", tag="forget"):
    """No shard on record so far is to be kept."""


_Line: TypeAlias = (
    FinishedShard | FilledMove | Division | _Dropped | _Origin | _Run | _Files | _Forget
)


@dataclass
class Records:
    """What the journals of a folder say."""

    finished: dict[str, FinishedShard] = field(default_factory=dict)
    """The last line on each shard."""
    filled: defaultdict[tuple[str, str], dict[int, str]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    """Checksums of the moves of unfinished shards, by the shard's name and key."""
    files: set[str] = field(default_factory=set)
    """Names that runs so far may have left in the folder."""
    restored: set[bool] = field(default_factory=set)
    """Whether these runs have restored an original; both, where files were brought together."""
    forgotten: bool = False
    """Whether records have been taken back; a manifest then proves nothing either."""
    origin: str | None = None
    """What earlier runs have read, where that has a revision."""
    dropped: SourceRecord | None = None
    """The source, where shards of it may have been deleted."""
    divisions: dict[str, Division] = field(default_factory=dict)
    """The last of each journal, by the journal's name."""

    @classmethod
    def of(cls, out_dir: Path) -> Records:
        """Read the journals of a folder, without a lock.

        Raises:
            OutputError: one cannot be read.
        """
        records = cls()
        records.read(out_dir)
        return records

    def read(self, out_dir: Path) -> None:
        """Read all journals of the folder, once more where that has been done before.

        Raises:
            OutputError: one cannot be read.
        """
        for path in _journals(out_dir):
            for line in _lines(path):
                self.apply(line, path.name)

    def source_dropped(self, manifest: Manifest | None) -> SourceRecord | None:
        """The source, where shards of it may have been deleted; the manifest of a finished folder
        may be alone in knowing."""
        if self.dropped is not None:
            return self.dropped
        return manifest.source if manifest is not None and manifest.source.dropped else None

    def apply(self, line: _Line, journal: str) -> None:
        """Take in a line of the journal of this name."""
        match line:
            case FinishedShard():
                self.finished[line.name] = line
            case FilledMove():
                self.filled[line.name, line.key][line.move] = line.checksum
            case _Origin():
                self.origin = line.origin
            case _Dropped():
                self.dropped = line.source
            case Division():
                self.divisions[journal] = line
            case _Files():
                self.files.update(line.files)
                self.restored.add(line.restored)
            case _Forget():
                self.forgotten = True
                self.finished.clear()


class Journal:
    """The journal of one output folder, or of a part's run in it, locked until `close`."""

    def __init__(self, out_dir: Path, part: Part | None = None) -> None:
        """Open or create, and lock.

        Raises:
            InUseError: another process holds the folder, or the part.
            OutputError: the file cannot be used.
        """
        self._out_dir = out_dir
        self._path = out_dir / JOURNAL_NAME
        self._shared_fd: int | None = None
        self.records = Records()
        """What has been recorded, as far as it has been read."""
        self._appending = threading.Lock()
        with naming(self._path, OutputError), contextlib.ExitStack() as opened:
            if part is not None:
                self._shared_fd = open_locked(self._path, self._owner, shared=True)
                opened.callback(os.close, self._shared_fd)
                self._path = out_dir / part_journal_name(part.number, part.count)
            self._fd = open_locked(self._path, self._owner)
            opened.callback(os.close, self._fd)
            self.is_new = os.fstat(self._fd).st_size == 0
            """Whether this run has created it."""
            self.read()
            opened.pop_all()
        # The line tells a later run who holds the lock. A full disk is no reason to stop: running
        # on a finished folder must still work.
        with contextlib.suppress(OutputError):
            self._append([_Run(_whoami(part))])

    def read(self) -> None:
        """Read all journals of the folder, the other parts' too: what is recorded by now."""
        self.records.read(self._out_dir)

    def declare(self, files: Iterable[str], *, restored: bool = False) -> None:
        """Record names of files before they are created, so that a later run knows them as ours."""
        self._append([_Files(sorted(files), restored)])
        with naming(self._path, OutputError):
            sync_folder(self._out_dir)

    def join(self, division: Division) -> None:
        """Record what this part is a part of."""
        self._append([division])

    def add(self, shards: Iterable[FinishedShard]) -> None:
        """Record shards whose bytes are on the disk, before they get their names."""
        self._append(shards)

    def begin(self, origin: str) -> None:
        """Record what this run reads."""
        self._append([_Origin(origin)])

    def allow_dropping(self, source: SourceRecord) -> None:
        """Record that shards of the source may be deleted from now on, and all that is known of
        it."""
        self._append([_Dropped(source)])

    def note(self, move: FilledMove) -> None:
        """Record a move; that need not be durable before `sync`."""
        self._append([move], durable=False)

    def sync(self) -> None:
        """Return once all records are on the disk."""
        self._append([])

    def take_over(self, shards: Iterable[FinishedShard]) -> None:
        """Record finished shards unless they are on record here. The folder's journal also takes
        over the parts': their records of shards have to be among these or are void, those of moves
        stay, and their journals go."""
        own = {line.name for line in _lines(self._path) if isinstance(line, FinishedShard)}
        lines: list[_Line] = [shard for shard in shards if shard.name not in own]
        parts = [path for path in _journals(self._out_dir) if path.name != JOURNAL_NAME]
        if self._shared_fd is None and parts:
            lines += list(self.records.divisions.values())[:1]
            lines += [
                FilledMove(name, key, move, checksum)
                for (name, key), moves in self.records.filled.items()
                for move, checksum in moves.items()
            ]
        self._append(lines)
        if self._shared_fd is None:
            for path in parts:
                with naming(path, OutputError):
                    remove_file(path)

    def forget(self) -> None:
        """Take back all records of shards."""
        self._append([_Forget()])

    def close(self, *, remove: bool) -> None:
        """Unlock; ``remove`` when nothing is left to resume."""
        with self._appending:
            fd, self._fd = self._fd, -1
        try:
            if remove:
                remove_file(self._path)
                if self._shared_fd is not None:
                    self._remove_lock()
        finally:
            os.close(fd)
            if self._shared_fd is not None:
                os.close(self._shared_fd)

    def _remove_lock(self) -> None:
        """Remove the folder's journal if nothing but this part's lock has been there."""
        assert self._shared_fd is not None
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._shared_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._shared_fd).st_size == 0:
                remove_file(self._out_dir / JOURNAL_NAME)

    def _owner(self) -> str:
        """Who wrote the latest line of a run on itself: of this part, or of any where the folder is
        held."""
        whole = self._path.name == JOURNAL_NAME
        with contextlib.suppress(OSError, OutputError):
            journals = _journals(self._out_dir) if whole else [self._path]
            for path in sorted(journals, key=os.path.getmtime, reverse=True):
                if owners := [line.owner for line in _lines(path) if isinstance(line, _Run)]:
                    return owners[-1]
        return "another process"

    def _append(self, lines: Iterable[_Line], *, durable: bool = True) -> None:
        lines = list(lines)
        for line in lines:
            self.records.apply(line, self._path.name)
        with naming(self._path, OutputError):
            # The leading line feed: a line that a crash cut short must not swallow the next.
            texts = (json.dumps(msgspec.to_builtins(line)) for line in lines)
            data = "".join(f"\n{text}\n" for text in texts).encode()
            with self._appending:
                if self._fd < 0:  # a thread that outlives its run, after a second Ctrl-C
                    raise OutputError(f"{self._path}: is closed")
                while data:
                    data = data[os.write(self._fd, data) :]
                if durable:
                    os.fsync(self._fd)


def check_same(division: Division, others: Mapping[str, Division], out_dir: Path) -> None:
    """Make sure that all parts in a folder are of one conversion.

    Raises:
        OutputError: naming the journal that differs.
    """
    for name, other in others.items():
        if (difference := division.difference(other)) is not None:
            way = ""
            if division.sources.items() & other.sources.items():  # nothing of it fits otherwise
                size = other.max_shard_nbytes
                way = f", or convert with --max-shard-size {size} and without --part, which keeps "
                way += "what fits"
            raise OutputError(
                f"{out_dir}: {name} {difference}; give all parts the same number of parts, options "
                f"and source{way}"
            )


def _journals(out_dir: Path) -> list[Path]:
    """The folder's own comes first: what parts have recorded is later."""
    with naming(out_dir, OutputError):
        names = [name for name in os.listdir(out_dir) if is_journal(name)]
    return [out_dir / name for name in sorted(names, key=lambda name: (name != JOURNAL_NAME, name))]


def _lines(path: Path) -> Iterator[_Line]:
    texts = []
    with (
        naming(path, OutputError),
        contextlib.suppress(FileNotFoundError),  # another part may have just removed its own
        open(path, "rb", opener=open_regular) as file,
    ):
        texts = file.read().split(b"\n")
    for text in texts:
        with contextlib.suppress(ValueError):
            yield decode(text, _Line)  # type: ignore[arg-type]  # a union is no class, to mypy


def _whoami(part: Part | None) -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    which = "" if part is None else f", {part}"
    return f"process {os.getpid()} on {socket.gethostname()}{which}, at work since {now}"
