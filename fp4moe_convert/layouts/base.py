"""What a kernel layout is. The plan and its execution know no more of one than this module says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..format.contract import Geometry, TensorSpec
from ..source.experts import MoeLayer
from ..source.spans import Span
from ..storage.buffers import Bytes
from ..storage.prefetch import Range

MOVE_NBYTES = 8 * 2**20
"""Moves are cut to about this, so that scratch memory is the same for every model. Direct reads
and writes of 8 MiB ran at the speed of the disk; smaller ones did not gain, larger ones cost
memory."""


class BadSourceError(Exception):
    """A move's source holds a value that no kernel can use."""

    def __init__(self, source: int, reason: str) -> None:
        super().__init__(reason)
        self.source = source
        """Index among the move's sources."""


class Arrangement(Protocol):
    """How the bytes of a move's sources lie in the output."""

    @property
    def key(self) -> str:
        """Identifies the arrangement in a plan's fingerprint: equal keys give equal bytes. A key
        that changes makes unfinished conversions start afresh."""

    def arrange(self, sources: Sequence[Bytes], out: Bytes) -> None:
        """Write the output bytes of one move.

        Args:
            sources: the move's spans, uint8, contiguous.
            out: [move.nbytes] uint8, contiguous, overwritten whole.

        Raises:
            BadSourceError: a source holds a value that the layout cannot carry.
        """

    def undo(self, data: Bytes, scratch: Bytes) -> list[Bytes]:
        """The inverse of `arrange`.

        Args:
            data: [move.nbytes] uint8.
            scratch: at least as many bytes; overwritten.

        Returns:
            The bytes of each source, as views of ``scratch`` of any shape; they need not be
            contiguous.

        Raises:
            ValueError: ``data`` is not what `arrange` writes: its padding is not zero.
        """


@dataclass(frozen=True, slots=True)
class Move:
    """Read ``sources``, arrange them, fill one range of ``tensor``."""

    tensor: str
    """Of the output."""
    offset: int
    """From the first byte of the tensor."""
    nbytes: int
    sources: tuple[Span, ...]
    arrangement: Arrangement | None
    """None: the sources' bytes, one after the other."""


def source_ranges(moves: Iterable[Move]) -> Iterator[list[Range]]:
    """What each move reads."""
    for move in moves:
        yield [Range(source.file, source.offset, source.nbytes) for source in move.sources]


@dataclass(frozen=True, slots=True)
class RowOrder:
    """The authority's word on how rows are ordered."""

    fingerprint: str
    flashinfer: str
    """The release of FlashInfer whose order it is."""
    installed: bool = True
    """Whether that release is installed here; otherwise it is the newest on record."""


class Layout(Protocol):
    """One kernel layout."""

    @property
    def name(self) -> str:
        """As config.json of a converted checkpoint records it."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Settings that config.json records beside the name."""

    def check(self, layer: MoeLayer) -> None:
        """Raises CheckpointError: the layer has sizes that the layout cannot take."""

    def tensors(self, prefix: str, geometry: Geometry) -> tuple[TensorSpec, ...]:
        """What a layer becomes.

        Args:
            prefix: the source's, as `MoeLayer.prefix`.
            geometry: the layer's sizes.
        """

    def moves(self, layer: MoeLayer) -> Iterator[Move]:
        """What fills these tensors, each byte once, each tensor's bytes in order; in an order that
        reads the source forwards."""

    def value_warnings(
        self, prefix: str, geometry: Geometry, read: Callable[[TensorSpec], Bytes]
    ) -> Iterator[str]:
        """What a user should know about the values of a converted layer.

        Args:
            prefix: as for `tensors`.
            geometry: the layer's sizes.
            read: returns the bytes of one of the layer's tensors; for small ones.
        """

    @property
    def fingerprint(self) -> str:
        """Identifies the row order that this release writes."""

    def authority(self, geometries: Iterable[Geometry]) -> RowOrder:
        """Make sure that the authority's row order is the one that this release writes.

        Raises:
            RowOrderError: it is not, or the authority cannot be asked.
        """
