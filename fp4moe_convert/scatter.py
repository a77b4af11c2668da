"""Carries out a plan's moves: the only room that writes tensor bytes.

A shard is made at its final size under a temporary name, filled in any order by a crew of
threads, synced, and only then given its name. A worker owns its scratch for life, so memory does
not depend on the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .blockio import (
    ReadFile,
    WriteFile,
    aligned_buffer,
    partial_path,
    publish,
    read_room,
    write_buffer,
    write_view,
)
from .crew import Checksum, Crew
from .errors import CheckpointError
from .layouts import Bytes, arrange, holds_nan
from .plan import Move, PlannedShard
from .progress import OnMove

OPEN_FILES = 64
"""Files kept open for reading; a plan reads forwards, so older ones are rarely wanted again."""

Opener = Callable[[Path], ReadFile]


def file_opener(*, direct: bool) -> Opener:
    """Opens files and keeps the latest open; a dropped one closes after its last read."""

    @lru_cache(maxsize=OPEN_FILES)
    def open_file(path: Path) -> ReadFile:
        return ReadFile(path, direct=direct)

    return open_file


class Scratch:
    """The memory of one worker: a move's sources, side by side, and what they become."""

    def __init__(self, moves: Iterable[Move]) -> None:
        moves = list(moves)
        self._sources = aligned_buffer(max(map(_source_room, moves), default=0))
        self._out = write_buffer(max((move.nbytes for move in moves), default=0))

    def fill(self, move: Move, open_source: Opener, offset: int) -> Bytes:
        """Read a move's sources and arrange them.

        Args:
            move: which sources, and how.
            open_source: from `file_opener`.
            offset: where in its file the result will go; its memory is placed to suit.

        Returns:
            [move.nbytes] uint8, valid until the next call.
        """
        out = write_view(self._out, move.nbytes, offset)
        if move.layout is None:
            position = 0
            for source in move.sources:
                out[position : position + source.nbytes] = open_source(source.path).read(
                    self._sources, source.offset, source.nbytes
                )
                position += source.nbytes
            return out
        parts = []
        rest = self._sources
        for source in move.sources:
            parts.append(open_source(source.path).read(rest, source.offset, source.nbytes))
            rest = rest[read_room(source.nbytes) :]
        if move.layout.tiled:
            for source, part in zip(move.sources, parts, strict=True):
                if holds_nan(part, self._out):
                    raise CheckpointError(
                        f"{source.path.name}: {source.tensor!r} has a NaN block scale "
                        "(0x7F or 0xFF)"
                    )
        arrange(parts, out, move.layout)
        return out


def _source_room(move: Move) -> int:
    """Scratch for a move's sources; what is only gathered passes through one after the other."""
    rooms = [read_room(source.nbytes) for source in move.sources]
    return max(rooms, default=0) if move.layout is None else sum(rooms)


@dataclass
class _OpenShard:
    planned: PlannedShard
    file: WriteFile
    moves_left: int
    lock: threading.Lock = field(default_factory=threading.Lock)


def scatter(
    shards: Sequence[PlannedShard],
    out_dir: Path,
    *,
    direct: bool,
    threads: int,
    confirmation: Future[Any],
    on_move: OnMove,
    on_synced: Callable[[PlannedShard, dict[str, str]], None],
) -> None:
    """Write shards into ``out_dir``.

    Args:
        shards: what to write, in this order.
        out_dir: an existing folder without files of the plan's names.
        direct: bypass the page cache where the file systems allow.
        threads: number of workers; each takes about 17 MB.
        confirmation: no shard gets its final name before this has a result; if it has an
            exception instead, that is raised.
        on_move: told of progress.
        on_synced: told, from any thread, of a shard that is on the disk under its temporary name,
            with the XXH3-128 of each of its tensors; it gets its final name afterwards.

    Raises:
        CheckpointError: a source cannot be read, or has a NaN block scale.
        OutputError: a shard cannot be written.
    """
    crew = Crew(threads)
    checksums = {name: Checksum(crew) for shard in shards for name in shard.tensors}
    open_source = file_opener(direct=direct)

    def jobs() -> Iterator[tuple[_OpenShard, Move]]:
        for planned in shards:
            file = WriteFile(partial_path(out_dir / planned.name), planned.nbytes, direct=direct)
            header = aligned_buffer(len(planned.header))
            header[:] = np.frombuffer(planned.header, np.uint8)
            file.write(header, 0)
            shard = _OpenShard(planned, file, len(planned.moves))
            if not planned.moves:
                seal(shard)
            for move in planned.moves:
                yield shard, move

    def seal(shard: _OpenShard) -> None:
        shard.file.sync()
        crew.wait_for(confirmation.done)
        confirmation.result()
        digests = {name: checksums[name].hexdigest() for name in shard.planned.tensors}
        on_synced(shard.planned, digests)
        publish(shard.file.path, out_dir / shard.planned.name)

    def make_worker() -> Callable[[tuple[_OpenShard, Move]], None]:
        own = Scratch(move for shard in shards for move in shard.moves)

        def work(job: tuple[_OpenShard, Move]) -> None:
            shard, move = job
            offset = shard.planned.offsets[move.tensor] + move.offset
            data = own.fill(move, open_source, offset)
            shard.file.write(data, offset)
            checksums[move.tensor].update(move.offset, data)
            on_move(move.tensor, move.nbytes)
            with shard.lock:
                shard.moves_left -= 1
                last = shard.moves_left == 0
            if last:
                seal(shard)

        return work

    confirmation.add_done_callback(lambda _: crew.announce())
    crew.run(jobs(), make_worker)
