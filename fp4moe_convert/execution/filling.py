"""Shards of an original while a converted checkpoint is read back into them.

A converted tensor holds parts of many source tensors, and these may lie in any number of shards.
So all shards are made at the start, at their final size, and written wherever the reading leads. A
shard is finished when each converted tensor that has parts of it has been read to its end and found
to be as the manifest records it: no shard gets its name that damaged bytes have gone into.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..format.sizes import round_up
from ..layouts.base import Move
from ..storage.buffers import BLOCK, Bytes, view_at
from ..storage.durable import WriteFile, partial_path
from ..storage.reader import OPEN_FILES
from .scatter import create_shard
from .work import Target

MAX_EDGES_NBYTES = 8 * 2**20
"""Bytes of all shards that wait for others to fill a block with them. A part of an original seldom
starts or ends on one. Written as they came, between direct writes to the same file, they waited
19 ms each, and a run took 14.7 s instead of 9.9 (4 GB, a busy machine with 2 cores, ext4)."""
EDGE_NBYTES = 150
"""What keeping one takes besides."""


class Filling:
    """The shards that a run writes, until they are full."""

    def __init__(
        self,
        shards: Sequence[Target],
        fills: Mapping[str, Collection[str]],
        out_dir: Path,
        *,
        direct: bool,
        on_filled: Callable[[Target, WriteFile, dict[str, str]], None],
    ) -> None:
        """Make the files, and finish those that have no data.

        Args:
            shards: what to write.
            fills: names of the shards that hold parts of a converted tensor, by tensor.
            out_dir: an existing folder without files of the shards' names.
            direct: bypass the page cache where the file system allows.
            on_filled: called for each shard, from any thread, as in `scatter`, without checksums.

        Raises:
            OutputError: a file cannot be written.
        """
        self._shards = {shard.name: shard for shard in shards}
        self._fills = fills
        self._tensors_left = Counter(name for names in fills.values() for name in names)
        self._on_filled = on_filled
        self._lock = threading.Lock()
        self._edges: dict[str, dict[int, bytes]] = {shard.name: {} for shard in shards}
        self._edges_nbytes = 0
        self._writing = {shard.name: threading.Lock() for shard in shards}

        def reopen(name: str) -> WriteFile:
            return WriteFile(partial_path(out_dir / name), None, direct=direct)

        # Few are written at a time, and a checkpoint may have more shards than a process may have
        # files open.
        self._open = lru_cache(maxsize=OPEN_FILES)(reopen)
        for shard in shards:
            file = create_shard(shard, out_dir, direct=direct)
            if not self._tensors_left[shard.name]:
                on_filled(shard, file, {})

    def take(self, move: Move, parts: Sequence[Bytes], spare: Bytes) -> None:
        """Write the parts of a move where they came from; fits `readback.Take`.

        Raises:
            OutputError: naming the file and the system's reason.
        """
        for source, part in zip(move.sources, parts, strict=True):
            if source.file not in self._shards:  # an earlier run has finished it
                continue
            file = self._open(source.file)
            data = _placed(part, source.offset, spare)
            first = min(round_up(source.offset, BLOCK) - source.offset, data.size)
            last = max(first, (source.offset + data.size) // BLOCK * BLOCK - source.offset)
            if first < last:
                file.write(data[first:last], source.offset + first)
            self._keep(source.file, source.offset, data[:first])
            self._keep(source.file, source.offset + last, data[last:])

    def _keep(self, name: str, offset: int, data: Bytes) -> None:
        """Take bytes that do not fill a block."""
        if not data.size:
            return
        with self._lock:
            self._edges[name][offset] = data.tobytes()
            self._edges_nbytes += data.size + EDGE_NBYTES
            full = self._edges_nbytes > MAX_EDGES_NBYTES
            names = [name for name, edges in self._edges.items() if edges] if full else []
        for each in names:
            self._write_edges(each)

    def _write_edges(self, name: str) -> None:
        # One thread at a time, so that whoever finishes the shard waits for one that was before.
        with self._writing[name]:
            with self._lock:
                edges, self._edges[name] = self._edges[name], {}
                self._edges_nbytes -= sum(map(len, edges.values())) + EDGE_NBYTES * len(edges)
            for offset, data in _joined(edges):
                self._open(name).write(np.frombuffer(data, np.uint8), offset)

    def tensor_done(self, tensor: str) -> None:
        """Every part of a converted tensor has been written, and it was as recorded."""
        for name in self._fills[tensor]:
            if name not in self._shards:
                continue
            with self._lock:
                self._tensors_left[name] -= 1
                last = self._tensors_left[name] == 0
            if last:
                self._write_edges(name)
                self._on_filled(self._shards[name], self._open(name), {})


def _joined(edges: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
    """Edges in order, those that touch as one."""
    run: list[bytes] = []
    start = stop = 0
    for offset, data in sorted(edges.items()):
        if run and offset != stop:
            yield start, b"".join(run)
            run = []
        start = start if run else offset
        run.append(data)
        stop = offset + len(data)
    if run:
        yield start, b"".join(run)


def _placed(part: Bytes, offset: int, spare: Bytes) -> Bytes:
    """[nbytes] of a part, contiguous, and in memory as direct I/O wants it at this offset."""
    if part.flags.c_contiguous and (
        part.size < BLOCK or part.ctypes.data % BLOCK == offset % BLOCK
    ):
        return part.reshape(-1)
    placed = view_at(spare, part.size, offset)
    placed.reshape(part.shape)[...] = part
    return placed
