"""Carries out a plan's moves.

A shard is made at its final size under a temporary name and filled in any order by a crew of
threads. A worker owns its scratch memory for the whole run, so memory does not depend on the
model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from ..errors import CheckpointError
from ..layouts.base import BadSourceError, Move
from ..plan import PlannedShard
from ..progress import OnBytes
from ..storage.buffers import Bytes, aligned_buffer, block_buffer, spanned_nbytes, view_at
from ..storage.durable import WriteFile, partial_path
from ..storage.local import LocalReader
from ..storage.reader import Opener
from .checksum import Checksum
from .crew import Crew, crew_size
from .work import Target

OnFilled = Callable[[PlannedShard, WriteFile, dict[str, str]], None]
"""Given a shard whose last byte has been written to its file, which has a temporary name and is
not synced, and the XXH3-128 of each of its tensors."""


OnMove = Callable[[PlannedShard, WriteFile, int, Bytes], None]
"""Given a shard, its file, the number of one of its moves, and the move's bytes, which the file
has."""


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """Shards that are to be written, and who is told of it."""

    shards: Sequence[PlannedShard]
    """In the order in which they are to be written."""
    out_dir: Path
    """An existing folder without files of the shards' names."""
    on_bytes: OnBytes
    """Told of progress, by output tensor."""
    on_filled: OnFilled
    """Called for each shard, from any thread."""
    on_move: OnMove | None = None
    """Called for each move, from any thread."""
    filled: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """XXH3-64 of moves that an earlier run has written into files that are there, by number, by
    shard. They are not carried out again, unless the file has other bytes."""


class Scratch:
    """The memory of one worker: a move's sources, side by side, and what they become."""

    def __init__(self, sources_nbytes: int, out_nbytes: int) -> None:
        """Room for moves like those that `scratch_nbytes` was given."""
        self._sources = aligned_buffer(sources_nbytes)
        self._out = block_buffer(out_nbytes)

    def read_again(self, file: LocalReader, move: Move, offset: int) -> Bytes:
        """What a shard's file has where a move belongs; valid until the next call.

        Raises:
            CheckpointError: it cannot be read.
        """
        return file.read(self._out, offset, move.nbytes)

    def fill(self, move: Move, open_source: Opener, offset: int) -> Bytes:
        """Read a move's sources and arrange them.

        Args:
            move: which sources, and how.
            open_source: opens a source file by name.
            offset: where in its file the result will go; its memory is placed to suit.

        Returns:
            [move.nbytes] uint8, valid until the next call.

        Raises:
            CheckpointError: a source cannot be read, or holds a value that no kernel can use.
        """
        out = view_at(self._out, move.nbytes, offset)
        if move.arrangement is None:
            position = 0
            for source in move.sources:
                out[position : position + source.nbytes] = open_source(source.file).read(
                    self._sources, source.offset, source.nbytes
                )
                position += source.nbytes
            return out
        parts = []
        rest = self._sources
        for source in move.sources:
            parts.append(open_source(source.file).read(rest, source.offset, source.nbytes))
            rest = rest[spanned_nbytes(source.nbytes) :]
        try:
            move.arrangement.arrange(parts, out)
        except BadSourceError as error:
            source = move.sources[error.source]
            raise CheckpointError(f"{source.file}: {source.tensor!r} {error}") from None
        return out


def scratch_nbytes(moves: Iterable[Move]) -> tuple[int, int]:
    """The most that any of these moves needs for its sources, and for what they become."""
    sources = out = 0
    for move in moves:
        sources, out = max(sources, _sources_nbytes(move)), max(out, move.nbytes)
    return sources, out


def _sources_nbytes(move: Move) -> int:
    """Memory for a move's sources. Gathered ones pass through it one after the other."""
    nbytes = [spanned_nbytes(source.nbytes) for source in move.sources]
    return max(nbytes, default=0) if move.arrangement is None else sum(nbytes)


@dataclass
class _OpenShard:
    planned: PlannedShard
    file: WriteFile
    moves_left: int
    filled: Mapping[int, str]
    """Checksums of the moves that an earlier run has written."""
    written: LocalReader | None
    """The same file, to read these."""
    lock: threading.Lock = field(default_factory=threading.Lock)


def create_shard(
    shard: Target, out_dir: Path, *, direct: bool, is_there: bool = False
) -> WriteFile:
    """Make a shard's file, under its temporary name and at its final size, and write its header.

    Args:
        shard: what the file is for.
        out_dir: its folder.
        direct: bypass the page cache where the file system allows.
        is_there: an earlier run has made it.

    Raises:
        OutputError: naming the file and the system's reason.
    """
    nbytes = None if is_there else shard.nbytes
    file = WriteFile(partial_path(out_dir / shard.name), nbytes, direct=direct)
    header = aligned_buffer(len(shard.header))
    header[:] = np.frombuffer(shard.header, np.uint8)
    file.write(header, 0)
    return file


def scatter(
    request: WriteRequest,
    *,
    open_source: Opener,
    direct: bool,
    threads: int,
    on_stop: Callable[[], None] | None = None,
) -> None:
    """Write shards.

    Args:
        request: which ones, and where.
        open_source: opens a source file by name.
        direct: bypass the page cache where the file system allows.
        threads: number of workers; each takes about 17 MB. Fewer work at moves that take more.
        on_stop: as for `Crew`.

    Raises:
        CheckpointError: a source cannot be read, or holds a value that no kernel can use.
        OutputError: a shard cannot be written.
    """
    shards, on_move = request.shards, request.on_move
    room = scratch_nbytes(move for shard in shards for move in shard.moves)
    crew = Crew(crew_size(threads, sum(room)), on_stop)
    checksums = {name: Checksum(crew) for shard in shards for name in shard.tensors}

    def jobs() -> Iterator[tuple[_OpenShard, int, Move]]:
        for planned in shards:
            written = request.filled.get(planned.name, {})
            file = create_shard(planned, request.out_dir, direct=direct, is_there=bool(written))
            reader = LocalReader(file.path, direct=direct) if written else None
            shard = _OpenShard(planned, file, len(planned.moves), written, reader)
            if not planned.moves:
                finish(shard)
            for number, move in enumerate(planned.moves):
                yield shard, number, move

    def finish(shard: _OpenShard) -> None:
        digests = {name: checksums[name].hexdigest() for name in shard.planned.tensors}
        request.on_filled(shard.planned, shard.file, digests)

    def make_worker() -> Callable[[tuple[_OpenShard, int, Move]], None]:
        own = Scratch(*room)

        def work(job: tuple[_OpenShard, int, Move]) -> None:
            shard, number, move = job
            offset = shard.planned.offsets[move.tensor] + move.offset
            data = None
            if shard.written is not None and number in shard.filled:
                data = own.read_again(shard.written, move, offset)
                if xxhash.xxh3_64_hexdigest(data.data) != shard.filled[number]:
                    data = None
            if data is None:
                data = own.fill(move, open_source, offset)
                shard.file.write(data, offset)
            if on_move is not None:
                on_move(shard.planned, shard.file, number, data)
            checksums[move.tensor].update(move.offset, data)
            request.on_bytes(move.tensor, move.nbytes)
            with shard.lock:
                shard.moves_left -= 1
                last = shard.moves_left == 0
            if last:
                finish(shard)

        return work

    crew.run(jobs(), make_worker)
