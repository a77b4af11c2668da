"""Byte orders of FlashInfer's TRT-LLM NVFP4 kernels, and their inverses: the only place that
knows them.

Every order is a permutation of axes, so there is one description of it, a pair of views with
equal shapes: `arrange` copies the source's view onto the output's, `undo` the other way round.

Source: FlashInfer 0.7.2.post1, `reorder_rows_for_gated_act_gemm` (fused_moe/core.py),
`shuffle_matrix_a` with an epilogue tile of 128 (quantization/fp4_quantization.py), and the CUDA
kernel behind `block_scale_interleave`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]

TILE_ROWS = 128
"""Rows of one tile of block scales, and the unit in which rows are moved at all."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one or two sources (one: down; two: up, gate) become output bytes."""

    rows: int
    """Rows of each source, padding included."""
    row_nbytes: int
    """Bytes of a row, padding included."""
    source_rows: int
    """Rows that each source has; the others are zero."""
    source_row_nbytes: int
    """Bytes that a source's row has; the others are zero."""
    tiled: bool
    """Block scales: rows are shuffled like the others, then tiled 128x4."""

    @property
    def nbytes(self) -> int:
        """Output bytes for each source."""
        return self.rows * self.row_nbytes


def arrange(sources: Sequence[Bytes], out: Bytes, layout: Layout) -> None:
    """Write the rows of one expert, or some of them, in the kernel's order.

    Args:
        sources: one [layout.source_rows * layout.source_row_nbytes] (down), or two (up, gate)
            whose rows interleave; uint8, contiguous.
        out: [len(sources) * layout.nbytes] uint8, contiguous, overwritten whole.
        layout: sizes with and without padding, and whether rows are tiled.
    """
    padded = [_pad(source, layout) for source in sources]
    for source_view, out_view in _views(padded, out, tiled=layout.tiled):
        out_view[...] = source_view


def undo(data: Bytes, sources: Sequence[Bytes], layout: Layout) -> None:
    """The inverse of `arrange`.

    Args:
        data: [len(sources) * layout.nbytes] uint8, in the kernel's order.
        sources: one or two [layout.rows, layout.row_nbytes] uint8, overwritten whole; rows and
            columns that only pad come out as they lie in ``data``.
        layout: as given to `arrange`.
    """
    for source_view, out_view in _views(sources, data, tiled=layout.tiled):
        source_view[...] = out_view


def _views(
    sources: Sequence[Bytes], out: Bytes, *, tiled: bool
) -> Iterator[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
    """Pairs of views (source, output) with equal shapes that name the same bytes.

    Interleaving puts row j of source w (of n) at s = n*j + w. Shuffling then moves row s of each
    block of 32 to (s % 4) * 8 + s // 4. With j = (L * h + l) and L = 4 / n, the row lands at
    (l, w, h) of (L, n, 8): both steps are one transposition of h and l.

    Tiling takes [128, C] scales, C bytes to a row, as [4, 32, C/4, 4] to [C/4, 32, 4, 4]: the
    last four bytes stay together and are moved as one word.
    """
    n = len(sources)
    low = 4 // n
    for w, source in enumerate(sources):
        rows, row_nbytes = source.shape
        if tiled:
            words = source.view(np.uint32)
            tiles = n * rows // TILE_ROWS
            yield (
                words.reshape(tiles, 4, 8, low, row_nbytes // 4).transpose(0, 4, 3, 2, 1),
                out.view(np.uint32).reshape(tiles, row_nbytes // 4, low, n, 8, 4)[:, :, :, w],
            )
        else:
            blocks = rows // (8 * low)
            yield (
                source.reshape(blocks, 8, low, row_nbytes).transpose(0, 2, 1, 3),
                out.reshape(blocks, low, n, 8, row_nbytes)[:, :, w],
            )


def _pad(source: Bytes, layout: Layout) -> Bytes:
    """``source`` as [layout.rows, layout.row_nbytes], zeros where it falls short."""
    matrix = source.reshape(layout.source_rows, layout.source_row_nbytes)
    if matrix.shape == (layout.rows, layout.row_nbytes):
        return matrix
    padded = np.zeros((layout.rows, layout.row_nbytes), np.uint8)
    padded[: layout.source_rows, : layout.source_row_nbytes] = matrix
    return padded


def holds_nan(scales: Bytes, scratch: Bytes) -> bool:
    """Whether any E4M3 value is NaN (0x7F or 0xFF).

    Args:
        scales: uint8, any shape.
        scratch: uint8, at least as many bytes as ``scales``; overwritten.
    """
    flat = scales.reshape(-1)
    magnitudes = np.bitwise_and(flat, 0x7F, out=scratch[: flat.size])
    return flat.size > 0 and bool(magnitudes.max() == 0x7F)
