"""The row order of the installed FlashInfer, asked of FlashInfer itself.

Mis-laid weights do not crash, they answer nonsense, so the order is never taken on trust: the
converter compares its own with FlashInfer's and records a fingerprint, which a serving engine
compares with that of its own FlashInfer. The only module that imports FlashInfer, and torch with
it, and only inside `ask_flashinfer`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from .contract import EPILOGUE_TILE_M, Geometry
from .errors import RowOrderError
from .layouts import Layout, arrange

_FINGERPRINT_ROWS = 256  # two epilogue tiles

Rows = npt.NDArray[np.int32]
RowFunction = Callable[[int, bool], Rows]


@dataclass(frozen=True, slots=True)
class RowOrder:
    """What a FlashInfer release does to rows."""

    fingerprint: str
    """``xxh3_128:`` and the hash of the row numbers, int32 little-endian, of 256 rows: shuffled,
    then interleaved and shuffled."""
    flashinfer: str
    """Its version."""


def our_rows(count: int, gated: bool) -> Rows:
    """[count] numbers of the source rows that `layouts.arrange` puts at rows 0, 1, ...

    Gated: rows count from the first of up, and on from the first of gate.
    """
    numbers = np.arange(count, dtype="<i4").view(np.uint8)
    out = np.empty_like(numbers)
    sources = np.split(numbers, 2) if gated else [numbers]
    rows = count // len(sources)
    arrange(sources, out, Layout(rows, 4, rows, 4, tiled=False))
    return out.view("<i4")


def fingerprint(rows: RowFunction) -> str:
    """Fingerprint of an order, given as a function like `our_rows`."""
    digest = xxhash.xxh3_128()
    for gated in (False, True):
        digest.update(rows(_FINGERPRINT_ROWS, gated).astype("<i4").tobytes())
    return f"xxh3_128:{digest.hexdigest()}"


def ask_flashinfer(geometries: Iterable[Geometry]) -> RowOrder:
    """Import FlashInfer and compare its order with ours, for every matrix of these layers.

    Raises:
        RowOrderError: FlashInfer cannot be imported, or orders rows differently.
    """
    rows, version = _flashinfer_rows()
    counts = {(_FINGERPRINT_ROWS, False), (_FINGERPRINT_ROWS, True)}
    for geometry in geometries:
        counts |= {(2 * geometry.padded_intermediate, True), (geometry.hidden, False)}
    for count, gated in sorted(counts):
        theirs, ours = rows(count, gated), our_rows(count, gated)
        if not np.array_equal(theirs, ours):
            row = int(np.flatnonzero(theirs != ours)[0]) if theirs.shape == ours.shape else 0
            raise RowOrderError(
                f"flashinfer {version}: puts row {theirs[row]} of {count} "
                f"{'interleaved ' if gated else ''}rows at {row}, expected row {ours[row]}: "
                "this release of fp4moe-convert does not know its layout"
            )
    return RowOrder(fingerprint(rows), version)


def flashinfer_row_order() -> RowOrder:
    """Import FlashInfer and fingerprint its order, whatever it is.

    Raises:
        RowOrderError: FlashInfer cannot be imported.
    """
    rows, version = _flashinfer_rows()
    return RowOrder(fingerprint(rows), version)


def _flashinfer_rows() -> tuple[RowFunction, str]:
    try:
        import torch
        from flashinfer import reorder_rows_for_gated_act_gemm, shuffle_matrix_a
    except Exception as error:  # an import can fail in any way
        raise RowOrderError(
            f"flashinfer: cannot be imported ({type(error).__name__}: {error}); "
            "the row order is checked against it, install flashinfer-python"
        ) from error

    def rows(count: int, gated: bool) -> Rows:
        # An engine may be loading under a default device that is not this one.
        column = torch.arange(count, dtype=torch.int32, device="cpu").reshape(count, 1)
        if gated:
            column = reorder_rows_for_gated_act_gemm(column)
        shuffled = shuffle_matrix_a(column, EPILOGUE_TILE_M)
        return np.asarray(shuffled.reshape(count).numpy(), np.int32)

    return rows, importlib.metadata.version("flashinfer-python")
