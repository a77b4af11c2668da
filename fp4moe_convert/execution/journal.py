"""The record of an unfinished conversion, which makes it resumable.

One file in the output folder, of JSON lines, only ever appended to. It is also what the folder's
lock is held on. Each run adds a line on itself and one with the names of the files that it may
leave; each shard adds a line once its bytes are on the disk and before it gets its name. A shard
with its final name *and* a line that fits it is finished; any other is written again. A line that a
crash cut short does not parse and counts for nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import msgspec

from ..errors import OutputError, naming
from ..format.files import JOURNAL_NAME
from ..format.manifest import Identity, ShardRecord
from ..format.untrusted import decode
from ..storage.durable import remove_file, sync_folder
from .lock import open_locked


class FinishedShard(msgspec.Struct, frozen=True, tag_field="line", tag="shard"):
    """A shard whose bytes are on the disk, and what it was made from."""

    name: str
    record: ShardRecord
    format_version: int
    row_order: str
    plan: str
    """The shard's fingerprint: which bytes go where, from which offsets of which files."""
    sources: dict[str, Identity]
    """Of each source file it was read from."""


class _Run(msgspec.Struct, frozen=True, tag_field="line", tag="run"):
    """A run has the lock."""

    owner: str


class _Files(msgspec.Struct, frozen=True, tag_field="line", tag="files"):
    """Files of these names may be there from now on."""

    files: list[str]


class _Forget(msgspec.Struct, frozen=True, tag_field="line", tag="forget"):
    """No shard on record so far is to be kept."""


_Line: TypeAlias = FinishedShard | _Run | _Files | _Forget


class Journal:
    """The journal of one output folder, locked until `close`."""

    def __init__(self, out_dir: Path) -> None:
        """Open or create, and lock.

        Raises:
            OutputError: another process holds the folder, or the file cannot be used.
        """
        self._out_dir = out_dir
        self._path = out_dir / JOURNAL_NAME
        self.finished: dict[str, FinishedShard] = {}
        """The last line on each shard."""
        self.files: set[str] = set()
        """Names that runs so far may have left in the folder."""
        self.forgotten = False
        """Whether records have been taken back; a manifest then proves nothing either."""
        self._appending = threading.Lock()
        with naming(self._path, OutputError):
            self._fd = open_locked(self._path, lambda: _owner(self._path))
            self.is_new = os.fstat(self._fd).st_size == 0
            """Whether this run has created it."""
            for line in _lines(self._path):
                self._apply(line)
        # The line tells a later run who holds the lock. A full disk is no reason to stop: running
        # on a finished folder must still work.
        with contextlib.suppress(OutputError):
            self._append([_Run(_whoami())])

    def declare(self, files: Iterable[str]) -> None:
        """Record names of files before they are created, so that a later run knows them as ours."""
        self._append([_Files(sorted(files))])
        with naming(self._path, OutputError):
            sync_folder(self._out_dir)

    def add(self, shards: Iterable[FinishedShard]) -> None:
        """Record shards whose bytes are on the disk, before they get their names."""
        self._append(shards)

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
        finally:
            os.close(fd)

    def _append(self, lines: Iterable[_Line]) -> None:
        lines = list(lines)
        for line in lines:
            self._apply(line)
        with naming(self._path, OutputError):
            # The leading line feed: a line that a crash cut short must not swallow the next.
            texts = (json.dumps(msgspec.to_builtins(line)) for line in lines)
            data = "".join(f"\n{text}\n" for text in texts).encode()
            with self._appending:
                if self._fd < 0:  # a thread that outlives its run, after a second Ctrl-C
                    raise OutputError(f"{self._path}: is closed")
                while data:
                    data = data[os.write(self._fd, data) :]
                os.fsync(self._fd)

    def _apply(self, line: _Line) -> None:
        match line:
            case FinishedShard():
                self.finished[line.name] = line
            case _Files():
                self.files.update(line.files)
            case _Forget():
                self.forgotten = True
                self.finished.clear()


def _lines(path: Path) -> Iterator[_Line]:
    for text in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            yield decode(text, _Line)  # type: ignore[arg-type]  # a union is no class, to mypy


def _owner(path: Path) -> str:
    """Who wrote the latest line of a run on itself."""
    with contextlib.suppress(OSError):
        owners = [line.owner for line in _lines(path) if isinstance(line, _Run)]
        if owners:
            return owners[-1]
    return "another process"


def _whoami() -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {os.getpid()} on {socket.gethostname()}, at work since {now}"
