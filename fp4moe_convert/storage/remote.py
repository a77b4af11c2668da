"""Stores on other machines: reads are requests, which are counted, and tried again when they fail.

What is read outside of a plan (headers, configurations, the start of other files) stays in memory
and is fetched once. `prefetch` fetches what a plan reads.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TypeVar

import numpy as np

from ..errors import CheckpointError, MissingFileError, UnreachableError
from ..format.files import FOREIGN_FOLDERS
from ..format.manifest import FileIdentity, Provenance
from .buffers import Bytes
from .reader import Listing, Store

TRIES = 8
"""Failures in a row, without a byte between them, until a store counts as unreachable: about two
minutes."""
FIRST_TRIES = 4
"""As many where nothing has come from it yet."""
FIRST_WAIT_SECONDS = 1.0
"""After a failure; doubled after each one more."""
MAX_WAIT_SECONDS = 60.0
MAX_ASKED_WAIT_SECONDS = 600.0
"""As long as a server may tell us to wait. The Hub counts requests in windows of five minutes."""

STALL_SECONDS = 30.0
"""Time until a request has to come at `MIN_BYTES_PER_SECOND`."""
MIN_BYTES_PER_SECOND = 10_000

MAX_KEPT_NBYTES = 250_000_000
"""Memory for what is read outside of a plan. DeepSeek-V3's headers and index have 38 MB."""


T = TypeVar("T")


class TryAgainError(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, reason: str, *, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after
        """Seconds to wait first, where the server says so."""


class StoppedError(Exception):
    """Nobody waits for the bytes any more."""


class Backoff:
    """Counts failures in a row, and waits longer after each."""

    def __init__(self, what: str, *, tries: int | None = None) -> None:
        self._what = what
        self._tries = TRIES if tries is None else tries
        self._failures = 0

    def retry(self, ask: Callable[[], T], stopped: threading.Event | None = None) -> T:
        """What ``ask`` returns, once it does not fail in a way that may pass.

        Raises:
            UnreachableError: it did to the last try.
            StoppedError: ``stopped`` was set meanwhile.
        """
        while True:
            try:
                return ask()
            except TryAgainError as error:
                self.wait_after(error, stopped)

    def reset(self) -> None:
        """Something has come."""
        self._failures = 0

    def wait_after(self, error: TryAgainError, stopped: threading.Event | None = None) -> None:
        """
        Raises:
            UnreachableError: it was the last try.
            StoppedError: ``stopped`` was set meanwhile.
        """
        self._failures += 1
        if self._failures >= self._tries:
            raise UnreachableError(
                f"{self._what}: {error}, {self._failures} times in a row; check the network, and "
                "run the same command again: what is finished is kept"
            ) from error
        wait = min(FIRST_WAIT_SECONDS * 2 ** (self._failures - 1), MAX_WAIT_SECONDS)
        if error.after is not None:
            wait = min(error.after, MAX_ASKED_WAIT_SECONDS)
        if (stopped or threading.Event()).wait(wait):
            raise StoppedError


@dataclass(frozen=True, slots=True)
class Fetched:
    """What has come over the network."""

    requests: int
    nbytes: int
    """Of files."""
    seconds: float
    """In which at least one request was under way."""

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, float]:
        return {
            "requests": self.requests,
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "bytes_per_second": round(self.bytes_per_second),
        }


class Traffic:
    """Counts requests; each is a ``with`` block around one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._nbytes = self._under_way = 0
        self._seconds = self._since = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._requests += 1
            self._under_way += 1
            if self._under_way == 1:
                self._since = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self._seconds += time.monotonic() - self._since

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._nbytes += nbytes

    def so_far(self) -> Fetched:
        with self._lock:
            return Fetched(self._requests, self._nbytes, self._seconds)


class RemoteStore(ABC):
    """A `reader.Store` that is read by requests for ranges."""

    local_path: Path | None = None

    def __init__(
        self,
        location: str,
        files: Mapping[str, FileIdentity],
        *,
        connections: int,
        traffic: Traffic | None = None,
    ) -> None:
        """
        Args:
            location: for messages.
            files: size and further identity of each file, by path.
            connections: requests that may be under way at a time.
            traffic: what it took to list the files.

        Raises:
            CheckpointError: the path of a file leads out of the store.
        """
        self.location = location
        self.connections = connections
        self.traffic = traffic or Traffic()
        for name in files:
            # Names of files become paths in the output folder.
            parts = name.split("/")
            if "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
                raise CheckpointError(f"{location}: holds {name!r}, which is no path of a file")
        self._files = {
            name: identity
            for name, identity in files.items()
            if FOREIGN_FOLDERS.isdisjoint(PurePosixPath(name).parts[:-1])
        }
        self._kept: defaultdict[str, bytearray] = defaultdict(bytearray)
        self._kept_nbytes = 0
        self._keeping = threading.Lock()

    @abstractmethod
    def request(self, name: str, offset: int, into: Bytes) -> Iterator[int]:
        """Fill ``into`` from one request for a range, and yield how many bytes have come, each time
        that some have. An answer that ends early ends the iterator.

        Raises:
            TryAgainError: it failed in a way that may pass.
            CheckpointError: it failed for good.
        """

    @abstractmethod
    def provenance(self) -> Provenance:
        """As `reader.Store` has it."""

    def check_exists(self) -> None:
        """It does: its files are known."""
        assert self._files

    def listing(self) -> Listing:
        folders = {name.partition("/")[0] for name in self._files if "/" in name}
        return Listing(tuple(sorted(self._files)), tuple(sorted(folders)), left_out={})

    def open(
        self,
        name: str,
        *,
        direct: bool = False,  # noqa: ARG002 (of disks)
        stopped: threading.Event | None = None,
    ) -> RemoteReader:
        """As `reader.Store.open`. When ``stopped`` is set, this and all reads raise
        `StoppedError`."""
        if name not in self._files:
            raise MissingFileError(f"{name}: is not in {self.location}")
        return RemoteReader(self, name, self.identity(name, stopped), stopped)

    def identity(
        self,
        name: str,
        stopped: threading.Event | None = None,  # noqa: ARG002 (nothing is asked here)
    ) -> FileIdentity:
        """Of a file of the store, as it is now; raises what `fetch` does."""
        return self._files[name]

    def fetch(
        self, name: str, offset: int, into: Bytes, stopped: threading.Event | None = None
    ) -> None:
        """Fill ``into`` with what a file has at ``offset``. What has come is not asked for again.

        Args:
            name: of the file.
            offset: from its start.
            into: [n] uint8.
            stopped: set when nobody waits for it any more.

        Raises:
            CheckpointError: it cannot be read.
            StoppedError: ``stopped`` was set.
        """
        stopped = stopped or threading.Event()
        backoff = Backoff(f"{self.location}: {name}")
        got = 0
        while got < into.size:
            if stopped.is_set():
                raise StoppedError
            started, before = time.monotonic(), got
            try:
                with self.traffic:
                    for count in self.request(name, offset + got, into[got:]):
                        if stopped.is_set():
                            raise StoppedError
                        got += count
                        self.traffic.add(count)
                        backoff.reset()
                        seconds = time.monotonic() - started
                        if seconds > STALL_SECONDS:
                            _check_rate((got - before) / seconds)
                if got < into.size:
                    raise TryAgainError(f"the answer ends at byte {offset + got}", after=0)
            except TryAgainError as error:
                backoff.wait_after(error, stopped)

    def read(
        self, name: str, offset: int, into: Bytes, stopped: threading.Event | None = None
    ) -> None:
        """As `fetch`, and keep what adjoins the start of the file, as long as there is room."""
        with self._keeping:
            kept = bytes(self._kept[name][offset : offset + into.size])
        into[: len(kept)] = np.frombuffer(kept, np.uint8)
        if len(kept) == into.size:
            return
        self.fetch(name, offset + len(kept), into[len(kept) :], stopped)
        with self._keeping:
            new = into[len(kept) :].tobytes()
            if (
                len(self._kept[name]) == offset + len(kept)
                and self._kept_nbytes + len(new) <= MAX_KEPT_NBYTES
            ):
                self._kept[name] += new
                self._kept_nbytes += len(new)


def fetched_from(store: Store) -> Fetched | None:
    """What has come from a store, if it is a remote one."""
    return store.traffic.so_far() if isinstance(store, RemoteStore) else None


def fill_from(pieces: Iterable[bytes], into: Bytes) -> Iterator[int]:
    """Fill ``into`` with pieces, as `RemoteStore.request` does. What is too much is not taken."""
    got = 0
    for piece in pieces:
        count = min(len(piece), into.size - got)
        into[got : got + count] = np.frombuffer(piece, np.uint8, count)
        got += count
        if len(piece) > count:
            yield count
            return
        yield count


def _check_rate(bytes_per_second: float) -> None:
    if bytes_per_second < MIN_BYTES_PER_SECOND:
        raise TryAgainError(f"comes at {bytes_per_second:.0f} bytes a second", after=0)


@dataclass(frozen=True)
class RemoteReader:
    """A `reader.Reader` of a file in a `RemoteStore`."""

    store: RemoteStore
    name: str
    identity: FileIdentity
    stopped: threading.Event | None = None

    @property
    def nbytes(self) -> int:
        return self.identity.nbytes

    def read(self, buffer: Bytes, offset: int, nbytes: int) -> Bytes:
        if offset + nbytes > self.nbytes:
            raise CheckpointError(
                f"{self.name}: ends at byte {self.nbytes}, expected at least {offset + nbytes}"
            )
        view = buffer[:nbytes]
        self.store.read(self.name, offset, view, self.stopped)
        return view
