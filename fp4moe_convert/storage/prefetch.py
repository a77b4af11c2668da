"""Reads that a plan foresees, fetched before they are asked for.

A plan names thousands of small ranges, in the order in which workers read them. Those of a few
moves at a time are joined where they touch, so that one request brings what many reads take. As
many requests are under way as the store has connections; workers find the bytes in memory.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np

from .buffers import Bytes
from .reader import Opener, Store, keep_open
from .remote import RemoteReader, RemoteStore, StoppedError

REQUEST_NBYTES = 4 * 2**20
"""Of the longest request. A kill loses what requests under way have brought, and what waits in
memory for the rest of its move. Shorter requests spend a larger share of their time waiting for
the first byte."""
BATCH_NBYTES = 16 * 2**20
"""Of the moves whose ranges are joined. An expert of DeepSeek-V3 has 15 MB of gate and up, which
lie side by side, and 10 MB of down and all the scales."""
SMALL_NBYTES = 64 * 2**10
"""A smaller move never begins a batch. The scalars of a layer's experts lie together, and several
moves gather them."""


class Range(NamedTuple):
    """Contiguous bytes of a file."""

    file: str
    offset: int
    nbytes: int


class Sources(NamedTuple):
    """Files that are read by any number of threads."""

    open: Opener
    stop: Callable[[], None]
    """Ends reads that wait for a network: what they bring is not needed any more."""


@contextmanager
def open_prefetching(
    store: Store, moves: Iterable[Sequence[Range]], *, direct: bool
) -> Iterator[Sources]:
    """Open files for reads that are known beforehand.

    A failure to fetch ends all reads that wait, and each raises it. Readers that stop for another
    reason have to call `Sources.stop`: others may wait for room that these would have made.

    Args:
        store: where they lie.
        moves: the ranges that will be read, each once, by moves in their order.
        direct: as for `Store.open`.
    """
    if not isinstance(store, RemoteStore):
        yield Sources(keep_open(partial(store.open, direct=direct)), lambda: None)
        return
    prefetcher = _Prefetcher(store, moves)
    try:
        prefetcher.start()
        yield Sources(keep_open(prefetcher.open), prefetcher.stop)
    finally:
        prefetcher.close()


class _Piece:
    """What one request brings."""

    __slots__ = ("buffer", "file", "is_there", "start", "stop", "unread")

    def __init__(self, file: str, start: int, stop: int) -> None:
        self.file, self.start, self.stop = file, start, stop
        self.unread = stop - start
        """Bytes that no worker has taken yet."""
        self.buffer: Bytes | None = None
        """While there are some, and the request has been handed out."""
        self.is_there = False

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def room(self) -> int:
        """Of its buffer. Large ones are all of a size, to be used again."""
        return REQUEST_NBYTES if self.nbytes > REQUEST_NBYTES // 4 else self.nbytes


def _batches(moves: Iterable[Sequence[Range]]) -> Iterator[list[Range]]:
    batch: list[Range] = []
    nbytes = 0
    for move in moves:
        own = sum(each.nbytes for each in move)
        if batch and own >= SMALL_NBYTES and nbytes + own > BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
        batch += move
        nbytes += own
    yield batch


def _pieces(batch: Iterable[Range]) -> list[_Piece]:
    """Requests for ranges, those that touch as one, in the order in which they are needed first."""
    runs: list[tuple[int, str, int, int]] = []
    for number, (file, offset, nbytes) in sorted(enumerate(batch), key=lambda item: item[1]):
        if runs and runs[-1][1] == file and runs[-1][3] == offset:
            first, _, start, stop = runs.pop()
            runs.append((min(first, number), file, start, stop + nbytes))
        elif nbytes:
            runs.append((number, file, offset, offset + nbytes))
    return [
        _Piece(file, cut, min(cut + REQUEST_NBYTES, stop))
        for _, file, start, stop in sorted(runs)
        for cut in range(start, stop, REQUEST_NBYTES)
    ]


class _Prefetcher:
    """Threads that fetch, and what they have fetched."""

    def __init__(self, store: RemoteStore, moves: Iterable[Sequence[Range]]) -> None:
        self._store = store
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        """The first, which has stopped all."""
        self._changed = threading.Condition()
        self._spare: list[Bytes] = []
        """Large buffers that are free."""
        self._held = 0
        """Bytes of buffers that are not."""
        pieces: list[_Piece] = []
        largest = 0
        for batch in _batches(moves):
            own = _pieces(batch)
            largest = max(largest, sum(piece.room for piece in own))
            pieces += own
        # Workers need all of a batch before they give any of it back. What waits for the rest of
        # its batch must not take the room of a request.
        self._room = store.connections * REQUEST_NBYTES + 2 * largest
        self._by_file: dict[str, list[_Piece]] = defaultdict(list)
        for piece in pieces:
            self._by_file[piece.file].append(piece)
        for in_file in self._by_file.values():
            in_file.sort(key=lambda piece: piece.start)
        self._requests = self._in_order(pieces)
        self._taking = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        for n in range(self._store.connections):
            thread = threading.Thread(target=self._fetch, name=f"fetch-{n}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Fetch no more, and let nobody wait."""
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()

    def close(self) -> None:
        """`stop`, and return once the threads have ended."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def open(self, name: str) -> _PrefetchedReader:
        with self._saying_why():
            return _PrefetchedReader(self, self._store.open(name, stopped=self._stopped))

    def read(self, reader: RemoteReader, into: Bytes, offset: int) -> None:
        """Fill ``into`` with what has been fetched ahead, or by a request of its own.

        Raises:
            CheckpointError: something could not be fetched, these bytes or others.
            StoppedError: `stop` was called before they were there.
        """
        with self._saying_why():
            if not self._take(reader.name, into, offset):
                reader.read(into, offset, into.size)

    @contextmanager
    def _saying_why(self) -> Iterator[None]:
        """A read that was stopped raises what has stopped it, if that was a failure to fetch."""
        try:
            yield
        except StoppedError:
            raise self._failure or StoppedError  # noqa: B904 (its own cause is to be seen)

    def _in_order(self, pieces: Iterable[_Piece]) -> Iterator[_Piece]:
        """Each piece once there is room for it."""
        for piece in pieces:
            with self._changed:
                while not self._stopped.is_set() and self._held + piece.room > self._room:
                    self._changed.wait()
                if self._stopped.is_set():
                    return
                self._held += piece.room
                is_large = piece.room == REQUEST_NBYTES
                whole = self._spare.pop() if is_large and self._spare else None
                if whole is None:
                    whole = np.empty(piece.room, np.uint8)
                piece.buffer = whole
            yield piece

    def _fetch(self) -> None:
        try:
            while (piece := self._next()) is not None:
                assert piece.buffer is not None
                into = piece.buffer[: piece.nbytes]
                self._store.fetch(piece.file, piece.start, into, self._stopped)
                with self._changed:
                    piece.is_there = True
                    self._changed.notify_all()
        except StoppedError:
            pass
        except BaseException as failure:
            # Readers may wait for pieces that will never have room: those who would have made some
            # end as well.
            with self._changed:
                self._failure = self._failure or failure
                self.stop()

    def _next(self) -> _Piece | None:
        with self._taking:
            return next(self._requests, None)

    def _take(self, file: str, into: Bytes, offset: int) -> bool:
        """Hand out bytes that are fetched ahead, once they are there; False if that is not planned,
        or they have been handed out before."""
        pieces = self._by_file.get(file, [])
        stop = offset + into.size
        first = bisect_right(pieces, offset, key=lambda piece: piece.start) - 1
        last = bisect_left(pieces, stop, key=lambda piece: piece.start)
        own = pieces[max(first, 0) : last]
        with self._changed:
            if sum(min(p.stop, stop) - max(p.start, offset) for p in own if p.unread) != into.size:
                return False
        for piece in own:
            with self._changed:
                while not piece.is_there:
                    if self._stopped.is_set():
                        raise StoppedError
                    self._changed.wait()
                buffer = piece.buffer
            assert buffer is not None
            start, end = max(piece.start, offset), min(piece.stop, stop)
            into[start - offset : end - offset] = buffer[start - piece.start : end - piece.start]
            with self._changed:
                piece.unread -= end - start
                if not piece.unread:
                    piece.buffer = None
                    self._held -= piece.room
                    if piece.room == REQUEST_NBYTES:
                        self._spare.append(buffer)
                    self._changed.notify_all()
        return True


class _PrefetchedReader:
    """A `reader.Reader` of what has been fetched, and of the rest by requests of its own."""

    def __init__(self, prefetcher: _Prefetcher, reader: RemoteReader) -> None:
        self._prefetcher, self._reader = prefetcher, reader
        self.name, self.nbytes = reader.name, reader.nbytes
        self.identity = reader.identity

    def read(self, buffer: Bytes, offset: int, nbytes: int) -> Bytes:
        view = buffer[:nbytes]
        self._prefetcher.read(self._reader, view, offset)
        return view
