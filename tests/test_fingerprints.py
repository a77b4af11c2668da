"""FlashInfer's row order: what is on record, and what the installed release answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fp4moe_convert.errors import RowOrderError
from fp4moe_convert.format.contract import Geometry
from fp4moe_convert.layouts import fingerprints
from fp4moe_convert.layouts.fingerprints import RECORDED, Rows
from fp4moe_convert.layouts.trtllm_nvfp4 import TRTLLM_NVFP4, written_rows

Install = Callable[[str | None], None]

# DeepSeek-V3, Qwen3-235B, an I that is padded, and Nemotron-3 Nano, whose experts have no gate.
GEOMETRIES = [
    Geometry(256, 7168, 2048),
    Geometry(128, 4096, 1536),
    Geometry(4, 256, 96),
    Geometry(128, 2688, 1856, gated=False),
]


@pytest.mark.parametrize("release", RECORDED)
def test_a_release_on_record_is_not_imported(install_flashinfer: Install, release: str) -> None:
    install_flashinfer(release)
    order = TRTLLM_NVFP4.authority(GEOMETRIES)
    assert (order.flashinfer, order.fingerprint) == (release, RECORDED[release])
    assert order.installed


def test_without_flashinfer_the_newest_on_record_counts(install_flashinfer: Install) -> None:
    install_flashinfer(None)
    order = TRTLLM_NVFP4.authority(GEOMETRIES)
    assert order.flashinfer == list(RECORDED)[-1]
    assert not order.installed


def test_a_release_that_is_not_on_record_is_asked(install_flashinfer: Install) -> None:
    install_flashinfer("99.0")
    with pytest.raises(RowOrderError, match="flashinfer: cannot be imported"):
        TRTLLM_NVFP4.authority(GEOMETRIES)


def test_a_matrix_larger_than_those_on_record_is_compared(install_flashinfer: Install) -> None:
    install_flashinfer(list(RECORDED)[-1])
    with pytest.raises(RowOrderError, match="flashinfer: cannot be imported"):
        TRTLLM_NVFP4.authority([Geometry(8, 4096, 14336)])


def test_a_release_with_another_order_on_record_is_refused(
    install_flashinfer: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flashinfer("99.0")
    monkeypatch.setattr(fingerprints, "RECORDED", {"99.0": "xxh3_128:00"})
    with pytest.raises(RowOrderError, match=r"flashinfer 99\.0: its row order is xxh3_128:00, "):
        TRTLLM_NVFP4.authority(GEOMETRIES)


@pytest.mark.parametrize(
    ("geometry", "counts"),
    [
        (Geometry(4, 256, 96), {(256, True), (256, False)}),
        (Geometry(4, 384, 96), {(256, True), (384, False)}),
        (Geometry(4, 384, 448, gated=False), {(512, False), (384, False)}),
    ],
)
def test_the_matrices_that_are_compared(
    geometry: Geometry, counts: set[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(fingerprints, "row_order", lambda _, counts: asked.append(counts))
    TRTLLM_NVFP4.authority(iter([geometry]))
    assert asked == [counts]


@pytest.mark.flashinfer
def test_the_installed_release_is_on_record_and_agrees() -> None:
    order = fingerprints.compare(written_rows, fingerprints.RECORDED_COUNTS)
    assert RECORDED[order.flashinfer] == order.fingerprint == fingerprints.ask().fingerprint
    assert order.fingerprint == TRTLLM_NVFP4.fingerprint


@pytest.mark.flashinfer
def test_another_row_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashinfer.shuffle_matrix_a", lambda matrix, _: matrix)
    with pytest.raises(RowOrderError, match=r"puts row 1 of 256 rows at 1, expected row 4"):
        fingerprints.compare(written_rows, [])


def test_the_fingerprint_tells_orders_apart() -> None:
    def swapped(count: int, gated: bool) -> Rows:
        rows = written_rows(count, gated)
        return rows if not gated else rows[::-1].copy()

    assert fingerprints.fingerprint(swapped) != fingerprints.fingerprint(written_rows)
