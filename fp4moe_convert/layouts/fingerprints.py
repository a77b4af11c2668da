"""FlashInfer's word on the order of rows.

Weights that are laid out wrongly do not crash, they answer nonsense, so the order is never taken on
trust. Releases of FlashInfer that have been asked are on record here; `python -m
tests.support.record_flashinfer` asks the installed one and prints its row. An installed release
that is not on record is asked when a conversion starts. A serving engine always asks its own. This
module alone imports FlashInfer, and torch with it, and only inside its functions.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import RowOrderError
from .base import RowOrder

PACKAGE = "flashinfer-python"

_RELEASES = (
    *("0.6.0", "0.6.1", "0.6.2", "0.6.3", "0.6.4", "0.6.5", "0.6.6"),
    *("0.6.7", "0.6.7.post1", "0.6.7.post2", "0.6.7.post3", "0.6.8", "0.6.8.post1", "0.6.9"),
    *("0.6.10", "0.6.10.post1", "0.6.11", "0.6.11.post1", "0.6.11.post2", "0.6.11.post3"),
    *("0.6.12", "0.6.13", "0.6.14", "0.6.15", "0.6.15.post1", "0.6.16", "0.6.16.post1"),
    *("0.6.16.post2", "0.6.16.post3", "0.6.16.post4", "0.6.17", "0.6.18", "0.6.18.post1"),
    *("0.7.0", "0.7.0.post1", "0.7.1", "0.7.2", "0.7.2.post1"),
)
RECORDED: Mapping[str, str] = dict.fromkeys(_RELEASES, "xxh3_128:2e5bc60c6ed3a43fe3e0b7d32b3aab69")
"""Fingerprint by release, oldest first; all releases so far have the same. Each was compared with
the order that this package writes for all of `RECORDED_COUNTS`, not only for the rows of the
fingerprint."""

RECORDED_COUNTS = frozenset(
    (rows, gated) for rows in range(128, 8193, 128) for gated in (False, True)
)
"""(number of rows, gated). Larger matrices are compared when a conversion starts, where FlashInfer
is installed."""

EPILOGUE_TILE_M = 128
_FINGERPRINT_ROWS = 256  # two epilogue tiles

Rows = npt.NDArray[np.int32]
RowFunction = Callable[[int, bool], Rows]
"""(count, gated) -> [count] int32: the source rows at rows 0, 1, ... Gated: the rows of two
matrices, one after the other, that interleave."""


def fingerprint(rows: RowFunction) -> str:
    """``xxh3_128:`` and the hash of the row numbers, int32 little-endian, of 256 rows: shuffled,
    then interleaved and shuffled."""
    digest = xxhash.xxh3_128()
    for gated in (False, True):
        digest.update(rows(_FINGERPRINT_ROWS, gated).astype("<i4").tobytes())
    return f"xxh3_128:{digest.hexdigest()}"


def row_order(ours: RowFunction, counts: Collection[tuple[int, bool]]) -> RowOrder:
    """The order of the FlashInfer that is installed, or of the newest on record.

    Args:
        ours: the order that is written.
        counts: (number of rows, gated) of every matrix that will be.

    Raises:
        RowOrderError: FlashInfer orders rows differently, or cannot be imported.
    """
    try:
        release = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        release, installed = list(RECORDED)[-1], False
    else:
        installed = True
    if release not in RECORDED or (installed and not RECORDED_COUNTS.issuperset(counts)):
        return compare(ours, counts)
    if RECORDED[release] != fingerprint(ours):
        raise RowOrderError(
            f"flashinfer {release}: its row order is {RECORDED[release]}, this release of "
            f"fp4moe-convert writes {fingerprint(ours)}"
        )
    return RowOrder(RECORDED[release], release, installed)


def compare(ours: RowFunction, counts: Collection[tuple[int, bool]]) -> RowOrder:
    """Import FlashInfer and compare its order with ours.

    Raises:
        RowOrderError: FlashInfer cannot be imported, or orders rows differently.
    """
    theirs, release = _flashinfer_rows()
    own = {(_FINGERPRINT_ROWS, False), (_FINGERPRINT_ROWS, True)}
    for count, gated in sorted(own.union(counts)):
        found, expected = theirs(count, gated), ours(count, gated)
        if not np.array_equal(found, expected):
            row = int(np.flatnonzero(found != expected)[0]) if found.shape == expected.shape else 0
            raise RowOrderError(
                f"flashinfer {release}: puts row {found[row]} of {count} "
                f"{'interleaved ' if gated else ''}rows at {row}, expected row {expected[row]}: "
                "this release of fp4moe-convert does not know its layout"
            )
    return RowOrder(fingerprint(theirs), release)


def ask() -> RowOrder:
    """Import FlashInfer and fingerprint its order.

    Raises:
        RowOrderError: FlashInfer cannot be imported.
    """
    rows, release = _flashinfer_rows()
    return RowOrder(fingerprint(rows), release)


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

    return rows, importlib.metadata.version(PACKAGE)
