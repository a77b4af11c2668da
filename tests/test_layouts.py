"""Byte orders, against FlashInfer's CPU functions and the published formula of the tiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4moe_convert import layouts
from fp4moe_convert.errors import FormatError
from fp4moe_convert.format.contract import LayoutRecord
from fp4moe_convert.layouts.base import BadSourceError
from fp4moe_convert.layouts.trtllm_nvfp4 import (
    SharedValues,
    ShuffledRows,
    TransposedRows,
    holds_nan,
)
from fp4moe_convert.storage.buffers import Bytes


def random_bytes(*shape: int, seed: int = 0) -> Bytes:
    """None of them is NaN as a block scale."""
    return np.random.default_rng(seed).integers(0, 0x7F, shape, np.uint8)


def flashinfer_rows(sources: list[Bytes]) -> Bytes:
    """What FlashInfer does to [up; gate], or to down alone, before any tiling."""
    import torch
    from flashinfer import reorder_rows_for_gated_act_gemm, shuffle_matrix_a

    matrix = torch.from_numpy(np.concatenate(sources))
    if len(sources) == 2:
        matrix = reorder_rows_for_gated_act_gemm(matrix)
    return shuffle_matrix_a(matrix, 128).numpy()


def tiled(scales: Bytes) -> Bytes:
    """128x4 tiles, byte by byte: cuBLAS documentation, "1D Block Scaling Factors Layout"."""
    rows, cols = scales.shape
    out = np.empty(rows * cols, np.uint8)
    for (row, col), value in np.ndenumerate(scales):
        tile = (row // 128) * (cols // 4) + col // 4
        out[tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + col % 4] = value
    return out


def arranged(sources: list[Bytes], *, tiles: bool) -> Bytes:
    rows, row_nbytes = sources[0].shape
    out = np.empty(sum(source.size for source in sources), np.uint8)
    arrangement = ShuffledRows.unpadded(rows, row_nbytes, tiled=tiles)
    arrangement.arrange([source.reshape(-1) for source in sources], out)
    return out


SIZES = pytest.mark.parametrize(
    ("count", "rows", "row_nbytes"),
    [(1, 128, 8), (1, 256, 36), (1, 384, 4), (2, 64, 8), (2, 192, 12), (2, 320, 64)],
    ids=lambda value: str(value),
)


@pytest.mark.flashinfer
@SIZES
def test_rows_are_flashinfers(count: int, rows: int, row_nbytes: int) -> None:
    sources = [random_bytes(rows, row_nbytes, seed=n) for n in range(count)]
    assert np.array_equal(arranged(sources, tiles=False), flashinfer_rows(sources).reshape(-1))


@pytest.mark.flashinfer
@SIZES
def test_scales_are_flashinfers_rows_in_128x4_tiles(count: int, rows: int, row_nbytes: int) -> None:
    sources = [random_bytes(rows, row_nbytes, seed=n) for n in range(count)]
    assert np.array_equal(arranged(sources, tiles=True), tiled(flashinfer_rows(sources)))


@pytest.mark.parametrize("phase", [0, 1, 2, 3])
def test_memory_need_not_be_aligned(phase: int) -> None:
    """Sources lie in their buffers as they lie in their file."""
    memory = random_bytes(64 * 8 + 4)
    source = memory[phase : phase + 64 * 8].reshape(64, 8)
    aligned = source.copy()
    assert np.array_equal(
        arranged([source, source], tiles=True), arranged([aligned, aligned], tiles=True)
    )


@given(
    count=st.sampled_from([1, 2]),
    tiles=st.booleans(),
    blocks=st.integers(1, 3),
    width=st.integers(1, 5),
    missing_blocks=st.integers(0, 3),
    missing_words=st.integers(0, 1),
)
def test_padding_is_zero_and_undo_gives_the_source_back(
    count: int, tiles: bool, blocks: int, width: int, missing_blocks: int, missing_words: int
) -> None:
    rows, row_nbytes = blocks * 128 // count, 4 * (width + missing_words)
    source_rows, source_row_nbytes = rows - 16 * missing_blocks, 4 * width
    arrangement = ShuffledRows(
        rows=rows,
        row_nbytes=row_nbytes,
        source_rows=source_rows,
        source_row_nbytes=source_row_nbytes,
        tiled=tiles,
    )
    sources = [random_bytes(source_rows * source_row_nbytes, seed=n) for n in range(count)]
    out = np.full(count * arrangement.nbytes, 0xA5, np.uint8)
    arrangement.arrange(sources, out)

    padded = [np.zeros((rows, row_nbytes), np.uint8) for _ in sources]
    for matrix, source in zip(padded, sources, strict=True):
        matrix[:source_rows, :source_row_nbytes] = source.reshape(source_rows, -1)
    assert np.array_equal(out, arranged(padded, tiles=tiles))

    undone = arrangement.undo(out, np.full(out.size, 0xA5, np.uint8))
    assert all(np.array_equal(u.reshape(-1), s) for u, s in zip(undone, sources, strict=True))
    if arrangement.nbytes > sources[0].size:
        out[int(np.flatnonzero(arranged_ones(arrangement, count) == 0)[-1])] = 1
        with pytest.raises(ValueError, match="is padded with something but zeros"):
            arrangement.undo(out, np.empty(out.size, np.uint8))


def arranged_ones(arrangement: ShuffledRows, count: int) -> Bytes:
    """Ones where a source's byte goes, zeros where padding does."""
    out = np.empty(count * arrangement.nbytes, np.uint8)
    ones = np.ones(arrangement.source_rows * arrangement.source_row_nbytes, np.uint8)
    arrangement.arrange([ones] * count, out)
    return out


def side_by_side(matrices: list[Bytes]) -> Bytes:
    """[cols, count * rows] of [rows, cols] each, as ModelOpt stores gate and up of Llama 4."""
    return np.concatenate([matrix.T for matrix in matrices], axis=1)


@given(
    count=st.sampled_from([1, 2]),
    tiles=st.booleans(),
    blocks=st.integers(1, 9),
    width=st.one_of(st.integers(1, 40), st.sampled_from([128, 129, 300])),
    missing_blocks=st.integers(0, 3),
    missing_bytes=st.integers(0, 3),
    phase=st.integers(0, 7),
)
def test_transposed_rows_lie_as_those_that_are_not(
    count: int,
    tiles: bool,
    blocks: int,
    width: int,
    missing_blocks: int,
    missing_bytes: int,
    phase: int,
) -> None:
    rows, row_nbytes = blocks * 128 // count, 4 * width
    source_rows, source_row_nbytes = rows - 16 * missing_blocks, row_nbytes - missing_bytes
    own = ShuffledRows(
        rows=rows,
        row_nbytes=row_nbytes,
        source_rows=source_rows,
        source_row_nbytes=source_row_nbytes,
        tiled=tiles,
    )
    sources = [random_bytes(source_rows, source_row_nbytes, seed=n) for n in range(count)]
    expected = np.empty(count * own.nbytes, np.uint8)
    own.arrange(sources, expected)

    order = tuple(reversed(range(count)))
    stored = side_by_side([sources[n] for n in order])
    memory = np.empty(stored.size + phase, np.uint8)  # sources lie as they lie in their file
    memory[phase:] = stored.reshape(-1)
    transposed = TransposedRows(own, order)
    out = np.full(expected.size, 0xA5, np.uint8)
    transposed.arrange([memory[phase:]], out)
    assert np.array_equal(out, expected)

    (undone,) = transposed.undo(out, np.full(out.size + phase, 0xA5, np.uint8)[phase:])
    assert np.array_equal(undone.reshape(stored.shape), stored)
    if own.nbytes > sources[0].size:
        out[int(np.flatnonzero(arranged_ones(own, count) == 0)[-1])] = 1
        with pytest.raises(ValueError, match="is padded with something but zeros"):
            transposed.undo(out, np.empty(out.size, np.uint8))


def test_a_nan_in_any_column_is_refused() -> None:
    rows = ShuffledRows.unpadded(320, 4, tiled=True)
    for column in (0, 319, 320, 639):
        stored = side_by_side([random_bytes(320, 4, seed=n) for n in range(2)])
        stored[3, column] = 0x7F
        with pytest.raises(BadSourceError, match="has a NaN block scale") as refusal:
            TransposedRows(rows, (1, 0)).arrange([stored], np.empty(2560, np.uint8))
        assert refusal.value.source == 0


@given(values=st.lists(st.integers(0, 2), min_size=1, max_size=9), data=st.data())
def test_values_that_stand_in_several_places_come_back_as_one(
    values: list[int], data: st.DataObject
) -> None:
    order = tuple({value: n for n, value in enumerate(dict.fromkeys(values))}[v] for v in values)
    sources = list(random_bytes(max(order) + 1, 4))
    arrangement = SharedValues(order)
    out = np.empty(4 * len(order), np.uint8)
    arrangement.arrange(sources, out)
    assert np.array_equal(out.reshape(-1, 4), [sources[n] for n in order])
    undone = arrangement.undo(out, np.empty(out.size, np.uint8))
    assert all(np.array_equal(a, b) for a, b in zip(undone, sources, strict=True))
    if shared := [place for place, n in enumerate(order) if order.count(n) > 1]:
        place = data.draw(st.sampled_from(shared))
        out[4 * place + data.draw(st.integers(0, 3))] ^= 1
        with pytest.raises(ValueError, match="holds different values where its source has one"):
            arrangement.undo(out, np.empty(out.size, np.uint8))


def test_keys_tell_what_bytes_come_out() -> None:
    """Or an unfinished conversion would go on with other bytes."""
    rows = ShuffledRows.unpadded(128, 8, tiled=False)
    keys = [rows.key, TransposedRows(rows, (0,)).key, TransposedRows(rows, (0, 1)).key]
    keys += [TransposedRows(rows, (1, 0)).key, SharedValues((0, 0)).key, SharedValues((0, 1)).key]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_nan_block_scale_is_refused(bad: int) -> None:
    sources = [random_bytes(64 * 4, seed=n) for n in range(2)]
    sources[bad][70] = 0xFF
    out = np.empty(512, np.uint8)
    with pytest.raises(BadSourceError, match="has a NaN block scale") as refusal:
        ShuffledRows.unpadded(64, 4, tiled=True).arrange(sources, out)
    assert refusal.value.source == bad
    ShuffledRows.unpadded(64, 4, tiled=False).arrange(sources, out)  # weights may hold any byte


SCALES = pytest.mark.parametrize(
    ("values", "expected"),
    [([], False), ([0x00, 0x7E, 0xFE, 0x80], False), ([0x10, 0x7F], True), ([0xFF, 0x10], True)],
)


@SCALES
def test_nan_is_0x7f_or_0xff(values: list[int], expected: bool) -> None:
    assert holds_nan(np.array(values, np.uint8), np.empty(8, np.uint8)) is expected


@pytest.mark.flashinfer
@SCALES
def test_torch_takes_the_same_bytes_for_nan(values: list[int], expected: bool) -> None:
    import torch

    as_torch = torch.from_numpy(np.array(values, np.uint8)).view(torch.float8_e4m3fn).float()
    assert bool(as_torch.isnan().any()) is expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("trtllm_nvfp4", {"epilogue_tile_m": 64}),
        ("trtllm_nvfp4", {}),
        ("cutlass", {"epilogue_tile_m": 128}),
    ],
)
def test_an_unknown_layout_is_refused(name: str, parameters: dict[str, int]) -> None:
    layout = layouts.DEFAULT
    known = LayoutRecord(layout.name, layout.parameters, row_order="", flashinfer="")
    assert layouts.layout_of(known) is layout
    with pytest.raises(FormatError, match=f"the layout is {name}.*, this release .* knows trtllm"):
        layouts.layout_of(LayoutRecord(name, parameters, row_order="", flashinfer=""))


def test_an_unknown_layout_is_named_briefly() -> None:
    record = LayoutRecord("x" * 10**6, {"y" * 10**6: 1}, row_order="", flashinfer="")
    with pytest.raises(FormatError) as refusal:
        layouts.layout_of(record)
    assert len(str(refusal.value)) < 1000
