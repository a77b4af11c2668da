"""The tensors of a converted checkpoint, read back: what `verify` and `restore` have in common.

The moves of the conversion are carried out the other way round, in the same order. Each reads a
range of a converted tensor, takes the range's checksum, undoes the arrangement and hands over the
bytes of each source span: to be compared, or to be written. So each byte is read once, forwards in
its tensor, and has been compared with the manifest when a tensor is done.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from .errors import VerifyError
from .execution.checksum import Checksum
from .execution.crew import Crew, crew_size
from .format.manifest import ShardRecord
from .layouts.base import MOVE_NBYTES, Move
from .progress import OnBytes
from .source.spans import Shard
from .storage.buffers import Bytes, block_buffer, view_at
from .storage.local import LocalReader
from .storage.reader import Opener, keep_open

Take: TypeAlias = Callable[[Move, Sequence[Bytes], Bytes], None]
"""Given a move, the bytes of each of its sources, and memory that is free, such as `block_buffer`
makes for the whole move. Called by one thread."""


def read_back(
    shards: Sequence[Shard],
    moves: Sequence[Move],
    records: Mapping[str, ShardRecord],
    open_shard: Opener,
    *,
    make_take: Callable[[], Take] | None = None,
    threads: int,
    on_bytes: OnBytes,
    on_tensor: Callable[[str], None] | None = None,
    on_stop: Callable[[], None] | None = None,
) -> int:
    """Read tensors of a converted checkpoint and compare them with their records.

    Args:
        shards: of the checkpoint.
        moves: cover the tensors that are to be read, each from its first byte to its last.
        records: of these shards.
        open_shard: opens one by name.
        make_take: called on each thread, for what takes the bytes of the moves' sources; None to
            undo nothing.
        threads: number of workers; each takes about 17 MB. Fewer work at moves that take more.
        on_bytes: told of each move, by tensor.
        on_tensor: told of each tensor that has been read, taken, and found to be as recorded; from
            any thread.
        on_stop: as for `Crew`.

    Returns:
        How many tensors that are; those without data are among them.

    Raises:
        VerifyError: a tensor is not as recorded.
        CheckpointError: a file cannot be read.
    """
    largest = max((move.nbytes for move in moves), default=0)
    crew = Crew(crew_size(threads, largest if make_take is None else 2 * largest), on_stop)
    counting = threading.Lock()
    home = {tensor.name: shard for shard in shards for tensor in shard.header.tensors}
    starts = {
        tensor.name: shard.header.nbytes + tensor.start
        for shard in shards
        for tensor in shard.header.tensors
    }
    moves_left = Counter(move.tensor for move in moves)
    empty = [
        tensor.name
        for shard in shards
        for tensor in shard.header.tensors
        if not tensor.nbytes and tensor.name not in moves_left
    ]
    checksums = {name: Checksum(crew) for name in (*moves_left, *empty)}

    def finish(tensor: str) -> None:
        shard, found = home[tensor].name, checksums.pop(tensor).hexdigest()
        expected = records[shard].tensors[tensor]
        if found != expected:
            raise VerifyError(f"{shard}: {tensor!r} has checksum {found}, expected {expected}")
        if on_tensor is not None:
            on_tensor(tensor)

    def make_worker() -> Callable[[Move], None]:
        buffer = block_buffer(largest)
        take = None if make_take is None else make_take()
        scratch = block_buffer(largest if take else 0)

        def work(move: Move) -> None:
            shard = home[move.tensor].name
            offset = starts[move.tensor] + move.offset
            data = open_shard(shard).read(buffer, offset, move.nbytes)
            checksums[move.tensor].update(move.offset, data)
            if take is not None:
                _hand_over(move, data, shard, take, buffer, scratch)
            on_bytes(move.tensor, move.nbytes)
            with counting:
                moves_left[move.tensor] -= 1
                last = moves_left[move.tensor] == 0
            if last:
                finish(move.tensor)

        return work

    count = len(checksums)
    for name in empty:
        finish(name)
    crew.run(iter(moves), make_worker)
    return count


def _hand_over(
    move: Move, data: Bytes, shard: str, take: Take, buffer: Bytes, scratch: Bytes
) -> None:
    """Undo a move and let ``take`` have its parts.

    Args:
        move: undone.
        data: its bytes, in ``buffer``.
        shard: for messages.
        take: as for `read_back`.
        buffer: free once the move is undone.
        scratch: where it is undone to.
    """
    if move.arrangement is None:
        ends = np.cumsum([source.nbytes for source in move.sources])
        take(move, np.split(data, ends[:-1]), scratch)
        return
    # Where the first source lies in its file, so that it can be written as it stands.
    place = view_at(scratch, move.nbytes, move.sources[0].offset if move.sources else 0)
    try:
        parts = move.arrangement.undo(data, place)
    except ValueError as error:
        raise VerifyError(f"{shard}: {move.tensor!r} {error}") from None
    take(move, parts, buffer)


def open_shards(path: Path, *, direct: bool) -> Opener:
    """An `Opener` of the shards in a folder."""
    return keep_open(lambda name: LocalReader(path / name, direct=direct))


def whole_tensors(shards: Sequence[Shard]) -> tuple[Move, ...]:
    """Moves that cover every tensor and come from nothing."""

    def pieces() -> Iterator[Move]:
        for shard in shards:
            for tensor in shard.header.tensors:
                for start in range(0, tensor.nbytes, MOVE_NBYTES):
                    nbytes = min(MOVE_NBYTES, tensor.nbytes - start)
                    yield Move(tensor.name, start, nbytes, (), None)

    return tuple(pieces())
