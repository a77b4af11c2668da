"""Bytes of source tensors: whole shards, matrices in them, and the ranges that moves read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from ..errors import CheckpointError
from ..format.manifest import FileIdentity, ShardIdentity
from ..storage.header import Header, TensorInfo, spec_nbytes
from ..storage.reader import Store, read_bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of the source."""

    name: str
    header: Header
    file_identity: FileIdentity
    """As of just before its header was read."""

    @property
    def identity(self) -> ShardIdentity:
        return ShardIdentity.of(self.file_identity, self.header.digest)

    def raw_header(self, store: Store) -> bytes:
        """The header's bytes, length word included.

        Raises:
            CheckpointError: the file cannot be read, or has another one by now.
        """
        raw = bytes(read_bytes(store.open(self.name), 0, self.header.nbytes))
        if xxhash.xxh3_128_hexdigest(raw) != self.header.digest:
            raise CheckpointError(f"{self.name}: has changed while it was read")
        return raw

    def check_unchanged(self, store: Store) -> None:
        """Make sure that what has been read since is what the header describes.

        Raises:
            CheckpointError: the file is not what it was, or has gone.
        """
        if store.open(self.name).identity != self.file_identity:
            raise CheckpointError(f"{self.name}: has changed while it was read")


class Span(NamedTuple):
    """Contiguous bytes of one source tensor."""

    file: str
    tensor: str
    offset: int
    """From the start of the file, header included."""
    nbytes: int


class Matrix(NamedTuple):
    """A tensor, or a part of one: what one role of an expert layer is made of."""

    shard: Shard
    tensor: TensorInfo
    start: int
    """From the first byte of the tensor."""
    shape: tuple[int, ...]
    beside: tuple[int, int] | None = None
    """None: its rows lie one after the other. (n, count): it is stored transposed, the n-th of
    ``count`` such that lie side by side, [cols, count * rows] from ``start``."""

    @classmethod
    def whole(cls, shard: Shard, tensor: TensorInfo) -> Matrix:
        return cls(shard, tensor, 0, tensor.shape)

    @property
    def nbytes(self) -> int:
        return spec_nbytes(self.tensor.dtype, self.shape)

    def split(self, count: int) -> list[Matrix]:
        """``count`` equal parts of the rows.

        Raises:
            ValueError: the rows do not divide.
        """
        if count < 1 or not self.shape or self.shape[0] % count:
            raise ValueError(f"{list(self.shape)} does not split into {count}")
        rows = self.shape[0] // count
        nbytes = self.nbytes // count
        return [
            self._replace(start=self.start + n * nbytes, shape=(rows, *self.shape[1:]))
            for n in range(count)
        ]

    def transposed(self, count: int) -> list[Matrix]:
        """The ``count`` matrices whose transposes lie side by side in this one.

        Raises:
            ValueError: the columns do not divide.
        """
        if len(self.shape) != 2 or self.shape[1] % count:
            raise ValueError(f"{list(self.shape)} does not split into {count} side by side")
        cols, rows = self.shape[0], self.shape[1] // count
        return [self._replace(shape=(rows, cols), beside=(n, count)) for n in range(count)]

    def span(self, start: int, stop: int) -> Span:
        """Its bytes [start, stop)."""
        assert self.beside is None, "its bytes lie among those of others"
        offset = self.shard.header.nbytes + self.tensor.start + self.start
        return Span(self.shard.name, self.tensor.name, offset + start, stop - start)

    def span_of_all(self) -> Span:
        """The bytes of all that it lies among, its own included."""
        count = 1 if self.beside is None else self.beside[1]
        return self._replace(beside=None).span(0, count * self.nbytes)
