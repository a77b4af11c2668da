"""Reads that a plan foresees, fetched before they are asked for.

A plan names thousands of small ranges, in the order in which workers read them. Those of a few
moves at a time are joined where they touch, so that one request brings what many reads take. As
many requests are under way as the store has connections; workers find the bytes in memory.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np

from .buffers import Bytes
from .reader import Identity, Opener, Store, keep_open
from .remote import RemoteReader, RemoteStore, StoppedError

REQUEST_NBYTES = 8 * 2**20
"""Of the longest request."""
BATCH_NBYTES = 32 * 2**20
"""Moves are looked at together up to this. An expert of DeepSeek-V3 has 25 MB: three matrices that
lie one after the other, and their scales."""
SMALL_NBYTES = 64 * 2**10
"""A move below this never begins a batch: the scalars of a layer's experts lie together, and
several moves gather them."""


class Range(NamedTuple):
    """Contiguous bytes of a file."""

    file: str
    offset: int
    nbytes: int


@contextmanager
def open_ahead(store: Store, moves: Iterable[Sequence[Range]], *, direct: bool) -> Iterator[Opener]:
    """Open files for reads that are known beforehand.

    Args:
        store: where they lie.
        moves: the ranges that will be read, each once, by moves in their order.
        direct: as for `Store.open`.
    """
    if not isinstance(store, RemoteStore):
        yield keep_open(partial(store.open, direct=direct))
        return
    ahead = _Ahead(store, moves)
    try:
        yield keep_open(ahead.open)
    finally:
        ahead.stop()


class _Joined:
    """Ranges that touch, as one."""

    __slots__ = ("buffer", "failure", "file", "missing", "start", "stop", "unread")

    def __init__(self, file: str, start: int, stop: int, unread: int) -> None:
        self.file, self.start, self.stop = file, start, stop
        self.unread = unread
        """Bytes that no worker has asked for yet."""
        self.missing = stop - start
        """Bytes that have not come yet."""
        self.buffer: Bytes | None = None
        self.failure: BaseException | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


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


def _joined(batch: Iterable[Range]) -> list[_Joined]:
    """In the order in which they are needed first."""
    found: list[tuple[int, _Joined]] = []
    for number, (file, offset, nbytes) in sorted(enumerate(batch), key=lambda item: item[1]):
        last = found[-1][1] if found else None
        if not nbytes:
            continue
        if last is not None and (last.file, last.stop) == (file, offset):
            last.stop, last.missing = offset + nbytes, last.missing + nbytes
            last.unread += nbytes
            found[-1] = (min(found[-1][0], number), last)
        else:
            found.append((number, _Joined(file, offset, offset + nbytes, nbytes)))
    return [joined for _, joined in sorted(found, key=lambda item: item[0])]


class _Ahead:
    """Threads that fetch, and what they have fetched."""

    def __init__(self, store: RemoteStore, moves: Iterable[Sequence[Range]]) -> None:
        self._store = store
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._held = 0
        """Bytes of buffers."""
        self._room = store.connections * REQUEST_NBYTES
        joined = []
        for batch in _batches(moves):
            found = _joined(batch)
            # A worker may need all of its batch before it gives any of it back.
            self._room = max(self._room, 2 * sum(each.nbytes for each in found))
            joined += found
        self._by_file: dict[str, list[_Joined]] = defaultdict(list)
        for each in joined:
            self._by_file[each.file].append(each)
        for own in self._by_file.values():
            own.sort(key=lambda each: each.start)
        self._requests = self._in_order(joined)
        self._taking = threading.Lock()
        self._threads = [
            threading.Thread(target=self._fetch, name=f"fetch-{n}", daemon=True)
            for n in range(store.connections)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Fetch no more."""
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def open(self, name: str) -> _AheadReader:
        return _AheadReader(self, self._store.open(name))

    def _in_order(self, joined: Iterable[_Joined]) -> Iterator[tuple[_Joined, int, int]]:
        """Requests, each once there is room for its bytes."""
        for each in joined:
            with self._changed:
                while not self._stopped.is_set() and self._held + each.nbytes > self._room:
                    self._changed.wait()
                if self._stopped.is_set():
                    return
                self._held += each.nbytes
                each.buffer = np.empty(each.nbytes, np.uint8)
            for start in range(each.start, each.stop, REQUEST_NBYTES):
                yield each, start, min(start + REQUEST_NBYTES, each.stop)

    def _fetch(self) -> None:
        while True:
            with self._taking:
                request = next(self._requests, None)
            if request is None:
                return
            joined, start, stop = request
            failure: BaseException | None = None
            assert joined.buffer is not None
            into = joined.buffer[start - joined.start : stop - joined.start]
            try:
                self._store.fetch(joined.file, start, into, self._stopped)
            except StoppedError:
                return
            except BaseException as error:
                failure = error
            with self._changed:
                joined.missing -= stop - start
                joined.failure = joined.failure or failure
                if failure or not joined.missing:
                    self._changed.notify_all()

    def take(self, file: str, offset: int, nbytes: int) -> Bytes | None:
        """Bytes that have been fetched ahead, once they are there; None if that is not planned."""
        own = self._by_file.get(file, [])
        index = bisect_right(own, offset, key=lambda each: each.start) - 1
        if index < 0 or offset + nbytes > own[index].stop:
            return None
        joined = own[index]
        with self._changed:
            if not joined.unread:  # it has been given back
                return None
            self._changed.wait_for(lambda: joined.failure is not None or not joined.missing)
            if joined.failure is not None:
                raise joined.failure
            assert joined.buffer is not None
            data = joined.buffer[offset - joined.start :][:nbytes]
            joined.unread -= nbytes
            if not joined.unread:
                joined.buffer = None
                self._held -= joined.nbytes
                self._changed.notify_all()
            return data


class _AheadReader:
    """A `reader.Reader` of what has been fetched, and of the rest by requests of its own."""

    def __init__(self, ahead: _Ahead, reader: RemoteReader) -> None:
        self._ahead, self._reader = ahead, reader
        self.name, self.nbytes = reader.name, reader.nbytes
        self.identity: Identity = reader.identity

    def read(self, buffer: Bytes, offset: int, nbytes: int) -> Bytes:
        data = self._ahead.take(self.name, offset, nbytes)
        return self._reader.read(buffer, offset, nbytes) if data is None else data
