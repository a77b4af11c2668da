"""Plans, from headers alone: every output byte is written once, every source byte read once."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support.make_checkpoint import Spec, make_checkpoint

from fp4moe_convert import convert, preview
from fp4moe_convert.layouts.base import MOVE_NBYTES, Move
from fp4moe_convert.plan import Plan, PlannedShard
from fp4moe_convert.storage.header import DTYPE_BITS

WIDE = Spec(layers=2, experts=3, sparse=True, mtp=True, kv_scales=True)
"""Full width, so that moves are cut, without the data."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    make_checkpoint(folder, WIDE)
    return folder


def assert_tiles(ranges: Iterable[tuple[int, int]], stop: int) -> None:
    """Half-open ranges, sorted, that fill [0, stop) without overlap."""
    position = 0
    for start, end in sorted(ranges):
        assert start == position
        position = end
    assert position == stop


def spans(shard: PlannedShard) -> list[tuple[str, int, int]]:
    """(tensor, start, stop) in the file, header left out; from the offsets alone."""
    starts = [*shard.offsets.values(), shard.nbytes]
    return list(zip(shard.offsets, starts, starts[1:], strict=False))


@pytest.mark.parametrize("max_shard_nbytes", [10**6, 10**8, 5 * 10**9])
def test_every_output_byte_is_written_once(wide: Path, max_shard_nbytes: int) -> None:
    plan = preview(wide, max_shard_nbytes=max_shard_nbytes).work.plan
    for shard in plan.shards:
        moves: dict[str, list[Move]] = defaultdict(list)
        for move in shard.moves:
            moves[move.tensor].append(move)
        assert_tiles([(0, len(shard.header)), *((a, b) for _, a, b in spans(shard))], shard.nbytes)
        for tensor, start, stop in spans(shard):
            assert_tiles(((m.offset, m.offset + m.nbytes) for m in moves[tensor]), stop - start)


def test_every_source_byte_is_read_once(wide: Path) -> None:
    work = preview(wide).work
    checkpoint, plan = work.checkpoint, work.plan
    reads = defaultdict(list)
    for shard in plan.shards:
        for move in shard.moves:
            for source in move.sources:
                reads[source.file].append((source.offset, source.offset + source.nbytes))
    for source_shard in checkpoint.shards:
        header = source_shard.header
        ranges = [(0, header.nbytes), *reads[source_shard.name]]
        assert_tiles(ranges, header.file_nbytes)


def test_a_tensors_bytes_come_in_order(wide: Path) -> None:
    """A checksum waits for its turn; out of order it would wait for ever."""
    plan = preview(wide).work.plan
    for shard in plan.shards:
        position: dict[str, int] = defaultdict(int)
        for move in shard.moves:
            assert move.offset == position[move.tensor]
            position[move.tensor] += move.nbytes


def test_moves_fit_scratch_whatever_the_model(wide: Path) -> None:
    plan = preview(wide).work.plan
    assert max(move.nbytes for shard in plan.shards for move in shard.moves) <= MOVE_NBYTES


def tensors_larger_than(plan: Plan, nbytes: int) -> set[str]:
    return {name for shard in plan.shards for name, a, b in spans(shard) if b - a > nbytes}


@pytest.mark.parametrize("max_shard_nbytes", [10**6, 30 * 10**6, 10**8, 2 * 10**8, 5 * 10**9])
def test_shards_keep_to_the_limit_and_layers_together(wide: Path, max_shard_nbytes: int) -> None:
    plan = preview(wide, max_shard_nbytes=max_shard_nbytes).work.plan
    too_large = tensors_larger_than(plan, max_shard_nbytes - 2 * 4096)
    for shard in plan.shards:
        assert shard.nbytes <= max_shard_nbytes or (
            len(shard.tensors) == 1 and too_large.issuperset(shard.tensors)
        )
    for layer in plan.layers:
        homes = [
            shard.name
            for shard in plan.shards
            for name in shard.tensors
            if name.startswith(f"{layer.prefix}.w")
        ]
        assert len(homes) == 8
        e, h, i = layer.geometry.experts, layer.geometry.hidden, layer.geometry.intermediate
        layer_nbytes = e * 3 * i * h * 9 // 16 + e * 24
        if layer_nbytes + 16384 <= max_shard_nbytes:
            assert len(set(homes)) == 1


def test_tensors_are_aligned_to_their_dtype(wide: Path) -> None:
    """Readers that map the file need it, and large ones start on a block for direct I/O."""
    plan = preview(wide).work.plan
    for shard in plan.shards:
        for tensor in shard.tensors.values():
            assert shard.offsets[tensor.name] % (DTYPE_BITS[tensor.dtype] // 8) == 0
            if tensor.name.endswith((".w13_weight", ".w2_weight")):
                assert shard.offsets[tensor.name] % 4096 == 0


def test_other_tensors_keep_name_dtype_and_shape(wide: Path) -> None:
    work = preview(wide).work
    checkpoint, plan = work.checkpoint, work.plan
    converted = ("fp4moe.layout", *(f"{layer.prefix}." for layer in plan.layers))
    expected = {
        tensor.name: (tensor.dtype, tensor.shape)
        for shard in checkpoint.shards
        for tensor in shard.header.tensors
        if not tensor.name.startswith(converted)
    }
    found = {
        tensor.name: (tensor.dtype, tensor.shape)
        for shard in plan.shards
        for tensor in shard.tensors.values()
        if not tensor.name.startswith(converted)
    }
    assert found == expected
    assert any(".experts." in name for name in found), "the MTP layer's experts pass through"


@pytest.mark.parametrize("max_shard_nbytes", [10**6, 5 * 10**9])
def test_readers_meet_the_marker_first(tmp_path: Path, max_shard_nbytes: int) -> None:
    """By the order of names as by that of the data, and in the first file."""
    make_checkpoint(tmp_path / "model", Spec(layers=1, experts=2, hidden=256, intermediate=128))
    convert(tmp_path / "model", tmp_path / "out", max_shard_nbytes=max_shard_nbytes)
    first, *others = sorted((tmp_path / "out").glob("*.safetensors"))
    with safe_open(first, "np") as shard:
        assert next(iter(shard.keys())) == "fp4moe.layout"
        assert shard.offset_keys()[0] == "fp4moe.layout"
        marker = shard.get_tensor("fp4moe.layout")
    for other in others:
        with safe_open(other, "np") as shard:
            assert "fp4moe.layout" not in shard.keys()  # noqa: SIM118 - a handle, not a mapping
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    layout = {key: value for key, value in section["layout"].items() if key != "flashinfer"}
    assert marker.dtype == np.uint8
    assert json.loads(marker.tobytes()) == {"format_version": 2, "layout": layout}


def test_planning_reads_no_data(tmp_path: Path) -> None:
    """Headers and sizes are all it takes: without a byte of data the plan is the same."""
    spec = Spec(layers=1, experts=2, hidden=256, intermediate=128, vocab_size=16)
    make_checkpoint(tmp_path / "full", spec)
    make_checkpoint(
        tmp_path / "sparse",
        Spec(**{**{f: getattr(spec, f) for f in spec.__slots__}, "sparse": True}),
    )
    plans = [preview(tmp_path / name).work.plan for name in ("full", "sparse")]
    assert plans[0].fingerprint == plans[1].fingerprint


def test_the_fingerprint_tells_plans_apart(wide: Path) -> None:
    plans = [preview(wide, max_shard_nbytes=size).work.plan for size in (10**8, 10**9)]
    assert plans[0].fingerprint != plans[1].fingerprint


@pytest.mark.slow
def test_all_of_deepseek_v3_is_planned_in_little_memory(tmp_path: Path) -> None:
    """61 layers, 163 shards, 180,000 tensors, as sparse files."""
    make_checkpoint(
        tmp_path / "v3",
        Spec(layers=58, dense_layers=3, mtp=True, vocab_size=129280, shards=163, sparse=True),
    )
    # A process of its own: peak memory is the process's.
    program = f"""
import sys
from pathlib import Path
from fp4moe_convert import preview
plan = preview(Path({str(tmp_path / "v3")!r})).work.plan
assert len(plan.layers) == 58 and plan.tensors_in > 180_000
converted = sum(len(s.tensors) for s in plan.shards) - (plan.tensors_in - 178_176)
assert converted == 464 + 58 + 1, converted  # with the stops, and the marker
assert not {{"torch", "flashinfer"}} & set(sys.modules)
from fp4moe_convert.report import peak_rss
print(peak_rss())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    assert int(run.stdout) < 600e6


def test_the_safetensors_library_reads_the_planned_header(wide: Path, tmp_path: Path) -> None:
    plan = preview(wide, max_shard_nbytes=10**8).work.plan
    for shard in plan.shards:
        path = tmp_path / shard.name
        path.write_bytes(shard.header)
        with path.open("r+b") as file:
            file.truncate(shard.nbytes)
        with safe_open(path, "np") as opened:
            assert set(opened.keys()) == set(shard.tensors)
            for name, tensor in shard.tensors.items():
                view = opened.get_slice(name)
                assert (view.get_dtype(), tuple(view.get_shape())) == (tensor.dtype, tensor.shape)
