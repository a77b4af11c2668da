"""Where a model's files lie, as two protocols: a store of files, and a reader of one of them.

`local` implements them for folders, `remote` for what lies on other machines. The plan and its
execution need no more than this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from ..errors import CheckpointError
from ..format.manifest import FileIdentity, Provenance
from .buffers import Bytes, block_buffer


class Reader(Protocol):
    """One file, open for reading by any number of threads."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def nbytes(self) -> int:
        """Size when it was opened."""

    @property
    def identity(self) -> FileIdentity:
        """As of when it was opened."""

    def read(self, buffer: Bytes, offset: int, nbytes: int) -> Bytes:
        """Read a range.

        Args:
            buffer: starts on a block; of at least `buffers.spanned_nbytes` (nbytes).
            offset: from the start of the file.
            nbytes: of the range.

        Returns:
            [nbytes] uint8, a view of ``buffer``.

        Raises:
            CheckpointError: the file cannot be read, or ends inside the range.
        """


@dataclass(frozen=True, slots=True)
class Listing:
    """What a store holds."""

    files: tuple[str, ...]
    """Sorted paths relative to the store, sub-folders included."""
    folders: tuple[str, ...]
    """Names of the folders at the top."""
    left_out: Mapping[str, str]
    """What is there and is no file of the model, with the reason."""


class Store(Protocol):
    """The files of one model."""

    @property
    def location(self) -> str:
        """For messages."""

    @property
    def local_path(self) -> Path | None:
        """The folder, where the store is one on this machine."""

    @property
    def connections(self) -> int:
        """How many of its files, or parts of them, are best asked for at once."""

    def check_exists(self) -> None:
        """Raises CheckpointError: there is no such store."""

    def listing(self) -> Listing:
        """Raises CheckpointError: the store cannot be read."""

    def open(self, name: str, *, direct: bool = False) -> Reader:
        """Open a file of the store.

        Args:
            name: as in `listing`.
            direct: bypass the page cache where that is possible.

        Raises:
            MissingFileError: there is no such file.
            CheckpointError: it cannot be read, or is not a file of the store's own.
        """

    def provenance(self) -> Provenance:
        """Where it is, as a manifest records it."""


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], *, width: int
) -> Iterator[Result]:
    """``map``, with at most ``width`` results under way or waiting."""
    if width == 1:
        yield from map(function, items)
        return
    left = iter(items)
    with ThreadPoolExecutor(width) as pool:
        while batch := tuple(islice(left, width)):
            yield from pool.map(function, batch)


Opener: TypeAlias = Callable[[str], Reader]
"""Opens a file by name, or returns the reader that is open already."""

OPEN_FILES = 64
"""Files kept open for reading. A plan reads forwards, so older ones are rarely needed again."""


def keep_open(open_file: Opener) -> Opener:
    """``open_file`` with the latest readers kept; a dropped one closes after its last read."""
    return lru_cache(maxsize=OPEN_FILES)(open_file)


def read_bytes(reader: Reader, offset: int, nbytes: int) -> memoryview:
    """A range of a file, in memory of its own."""
    return reader.read(block_buffer(nbytes), offset, nbytes).data


def read_all(reader: Reader, max_nbytes: int) -> bytes:
    """All bytes of a small file.

    Raises:
        CheckpointError: it cannot be read, or has more than ``max_nbytes``.
    """
    if reader.nbytes > max_nbytes:
        raise CheckpointError(
            f"{reader.name}: has {reader.nbytes} bytes, the limit is {max_nbytes}"
        )
    return bytes(read_bytes(reader, 0, reader.nbytes))
