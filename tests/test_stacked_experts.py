"""Experts that are stored in another structure: one tensor for all of them, gate and up in one.
Those that are transposed besides are in test_batched_experts.py.

Step-3.5 is a row of the table. Others have gate and up in one besides, which no row has yet; their
rows are given to `find_layers` instead. A stacked tensor is read where each expert's rows lie in
it, and everything after that is the same.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support import model_zoo
from support.folders import edit_json
from support.make_checkpoint import Spec, make_checkpoint
from support.tensors import StoredTensor, read_tensors, write_tensors

from fp4moe_convert import CheckpointError, convert, inspect, plan, preview
from fp4moe_convert.format.contract import Geometry
from fp4moe_convert.layouts.trtllm_nvfp4 import TRTLLM_NVFP4, ShuffledRows
from fp4moe_convert.source.checkpoint import Checkpoint, open_checkpoint
from fp4moe_convert.source.experts import MoeLayer, find_layers
from fp4moe_convert.source.families import (
    FAMILIES,
    LEAVES,
    NUMBERED_EXPERTS,
    Family,
    Leaf,
    Projection,
)
from fp4moe_convert.source.spans import Matrix, Shard, Span
from fp4moe_convert.storage.header import Header, TensorInfo
from fp4moe_convert.storage.local import LocalFolder

STEP = "moe.{gate,up,down}_proj"
E, H, I = 3, 256, 80  # noqa: E741 (the letters of the format)
SPEC = Spec(
    layers=1, dense_layers=0, experts=E, hidden=H, intermediate=I, vocab_size=16, shards=2,
    differing_scales=True,
)  # fmt: skip
USUAL = "model.layers.0.mlp.experts"

Tensors = dict[str, StoredTensor]


class Case(NamedTuple):
    """A family, and how its tensors are made of the usual ones."""

    family: Family
    prefix: str
    restructure: Callable[[Tensors], Tensors]


def stacked(tensors: Tensors, projection: str, leaf: str) -> StoredTensor:
    """[E, ...] of tensors that each expert has one of."""
    own = [tensors[f"{USUAL}.{expert}.{projection}.{leaf}"] for expert in range(E)]
    return StoredTensor(own[0].dtype, (E, *own[0].shape), b"".join(each.data for each in own))


def gate_above_up(tensors: Tensors, leaf: str, expert: int) -> StoredTensor:
    """[2 * rows, ...] of an expert's gate and up."""
    gate, up = (tensors[f"{USUAL}.{expert}.{name}_proj.{leaf}"] for name in ("gate", "up"))
    rows, *rest = gate.shape or (1,)
    return StoredTensor(gate.dtype, (2 * rows, *rest), gate.data + up.data)


def restructured(tensors: Tensors, own: Tensors) -> Tensors:
    """The other tensors as they are."""
    return {n: t for n, t in tensors.items() if not n.startswith(f"{USUAL}.")} | own


def as_step(tensors: Tensors) -> Tensors:
    own = {
        f"model.layers.0.moe.{projection}_proj.{leaf}": stacked(tensors, f"{projection}_proj", leaf)
        for projection in ("gate", "up", "down")
        for leaf in LEAVES
    }
    return restructured(tensors, own)


def as_fused(tensors: Tensors) -> Tensors:
    own = {}
    for leaf in LEAVES:
        own[f"{USUAL}.down_proj.{leaf}"] = stacked(tensors, "down_proj", leaf)
        fused = [gate_above_up(tensors, leaf, expert) for expert in range(E)]
        shape = (E, *fused[0].shape)
        data = b"".join(each.data for each in fused)
        own[f"{USUAL}.gate_up_proj.{leaf}"] = StoredTensor(fused[0].dtype, shape, data)
    return restructured(tensors, own)


def as_fused_per_expert(tensors: Tensors) -> Tensors:
    own = {}
    for expert in range(E):
        for leaf in LEAVES:
            name = f"{USUAL}.{expert}.down_proj.{leaf}"
            own[name] = tensors[name]
            fused = gate_above_up(tensors, leaf, expert)
            own[f"{USUAL}.{expert}.gate_up_proj.{leaf}"] = fused
    return restructured(tensors, own)


FUSED_PARTS: dict[str, tuple[tuple[Projection, ...], Leaf]] = {
    **{f"gate_up_proj.{leaf}": (("gate", "up"), leaf) for leaf in LEAVES},
    **{f"down_proj.{leaf}": (("down",), leaf) for leaf in LEAVES},
}

CASES = {
    **{
        family.name: Case(family, "model.layers.0.moe", as_step)
        for family in FAMILIES
        if "expert" not in family.tensors.groupindex and not family.batched
    },
    "stacked gate_up": Case(
        Family(
            name="experts.{gate_up,down}_proj, as they are",
            tensors=re.compile(r"(?P<prefix>.*\.experts)\.(?P<part>[a-z].*)"),
            parts=FUSED_PARTS,
        ),
        USUAL,
        as_fused,
    ),
    "gate_up of each expert": Case(
        Family(
            name="experts.N.{gate_up,down}_proj",
            tensors=NUMBERED_EXPERTS,
            parts=FUSED_PARTS,
        ),
        USUAL,
        as_fused_per_expert,
    ),
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with tensors of the usual names, and its conversion; for reading only."""
    folder = tmp_path_factory.mktemp("usual")
    make_checkpoint(folder / "source", SPEC)
    convert(folder / "source", folder / "out")
    return folder


def restructure(usual: Path, folder: Path, case: Case) -> dict[str, StoredTensor]:
    """Write the same weights in the structure of a case, in one file."""
    folder.mkdir()
    (folder / "config.json").write_bytes((usual / "source" / "config.json").read_bytes())
    tensors = case.restructure(read_tensors(usual / "source"))
    write_tensors(folder / "model.safetensors", tensors)
    return tensors


def one_layer(checkpoint: Checkpoint, families: Sequence[Family]) -> MoeLayer:
    (layer,), passed = find_layers(checkpoint, families=families)
    assert passed == []
    return layer


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_each_role_is_the_right_range_of_bytes(usual: Path, tmp_path: Path, case: Case) -> None:
    restructure(usual, tmp_path / "source", case)
    file = (tmp_path / "source" / "model.safetensors").read_bytes()
    layer = one_layer(open_checkpoint(LocalFolder(tmp_path / "source")), [case.family])
    assert (layer.prefix, layer.family) == (case.prefix, case.family)
    assert layer.geometry == Geometry(E, H, I)
    before = read_tensors(usual / "source")
    assert len(layer.matrices) == 12 * E
    for (expert, projection, leaf), matrix in layer.matrices.items():
        expected = before[f"{USUAL}.{expert}.{projection}_proj.{leaf}"]
        span = matrix.span(0, matrix.nbytes)
        assert file[span.offset :][: span.nbytes] == expected.data, (expert, projection, leaf)
        assert matrix.shape in (expected.shape, (1,))


def test_each_source_byte_is_read_once(usual: Path, tmp_path: Path, case: Case) -> None:
    restructure(usual, tmp_path / "source", case)
    layer = one_layer(open_checkpoint(LocalFolder(tmp_path / "source")), [case.family])
    reads = defaultdict(list)
    for move in TRTLLM_NVFP4.moves(layer):
        assert isinstance(move.arrangement, ShuffledRows | None)
        for source in move.sources:
            reads[source.tensor].append((source.offset, source.offset + source.nbytes))
    assert reads.keys() == layer.tensors
    for matrix in {matrix.tensor.name: matrix for matrix in layer.matrices.values()}.values():
        position = matrix.shard.header.nbytes + matrix.tensor.start
        for start, stop in sorted(reads[matrix.tensor.name]):
            assert start == position
            position = stop
        assert position == matrix.shard.header.nbytes + matrix.tensor.stop


def test_they_convert_to_the_same_bytes(
    usual: Path, tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first header to reading back, which undoes every arrangement."""
    restructure(usual, tmp_path / "source", case)
    monkeypatch.setattr(plan, "find_layers", partial(find_layers, families=[case.family]))
    convert(tmp_path / "source", tmp_path / "out", verify=True)
    expected, found = read_tensors(usual / "out"), read_tensors(tmp_path / "out")
    expected = {name: t for name, t in expected.items() if t.data}  # the empty one keeps its name
    assert {n.replace(case.prefix, USUAL): t for n, t in found.items() if t.data} == expected


def test_a_layer_is_of_the_family_that_knows_most_of_its_parts(
    usual: Path, tmp_path: Path, case: Case
) -> None:
    families = [*FAMILIES, *(each.family for each in CASES.values() if each.family not in FAMILIES)]
    restructure(usual, tmp_path / "source", case)
    checkpoint = open_checkpoint(LocalFolder(tmp_path / "source"))
    for order in (families, families[::-1]):
        assert one_layer(checkpoint, order).family == case.family
        layer = one_layer(open_checkpoint(LocalFolder(usual / "source")), order)
        assert layer.family == FAMILIES[0]


def test_without_their_row_they_are_refused(usual: Path, tmp_path: Path) -> None:
    """Converting would leave them as they are."""
    restructure(usual, tmp_path / "source", CASES["stacked gate_up"])
    with pytest.raises(CheckpointError, match=" all experts of the layer stacked in one "):
        preview(tmp_path / "source")
    assert "stacked in one tensor" in str(inspect(tmp_path / "source").reason)


@pytest.mark.parametrize("in_file", [True, False])
def test_mixed_precision_names_the_projections_of_all_experts(
    tmp_path: Path, in_file: bool
) -> None:
    step = model_zoo.FAMILIES["step3p5-unclamped"]
    source = tmp_path / "source"
    model_zoo.write_family(source, replace(step, section="mixed by linear", in_file=in_file))
    report = convert(source, tmp_path / "out")
    assert report.passed_layers == {}
    assert report.serve.keys() == {"vllm"}


@pytest.mark.parametrize("name", [n for n in model_zoo.STACKED if n not in model_zoo.BATCHED])
def test_each_layer_of_a_model_that_has_them_has_a_stop_tensor(name: str, tmp_path: Path) -> None:
    model_zoo.make(tmp_path / "source", name)
    convert(tmp_path / "source", tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    tensors = read_tensors(tmp_path / "out")
    empty = {name: tensor for name, tensor in tensors.items() if not tensor.data}
    assert len(section["layers"]) == 2
    assert set(empty) == {f"{layer}.down_proj.weight" for layer in section["layers"]}
    assert not any(re.search(r"\.moe\.(gate|up)_proj", name) for name in tensors)


def with_tensors(folder: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    """A model of the zoo whose tensors ``edit`` changes, in one file."""
    model_zoo.make(folder, "step3p5")
    tensors = edit(read_tensors(folder))
    for path in folder.glob("model*"):
        path.unlink()
    write_tensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("number", [1, 2])
def test_a_router_that_is_missing_beside_them_is_told(number: int, tmp_path: Path) -> None:
    """It lies in the module that they are in."""
    router = f"model.layers.{number}.moe.gate.weight"
    folder = with_tensors(
        tmp_path / "source", lambda tensors: {n: t for n, t in tensors.items() if n != router}
    )
    line = f"model.layers.{number}: no moe.gate in any shard, unlike other layers"
    assert inspect(folder).warnings == [line]


def test_their_router_tells_how_many_there_are(tmp_path: Path) -> None:
    """Where config.json does not."""
    router, rows = "model.layers.1.moe.gate.weight", model_zoo.E + 1
    larger = StoredTensor("BF16", (rows, model_zoo.H), bytes(2 * rows * model_zoo.H))
    folder = with_tensors(tmp_path / "source", lambda tensors: tensors | {router: larger})
    preview(folder)
    edit_json(folder / "config.json", moe_num_experts=None)
    with pytest.raises(CheckpointError, match=f"has {rows - 1} experts, {router} has {rows}, "):
        preview(folder)


def test_shards_of_an_original_and_of_a_converted_one_are_refused(tmp_path: Path) -> None:
    model_zoo.make(tmp_path / "original", "step3p5")
    convert(tmp_path / "original", tmp_path / "out")
    converted = read_tensors(tmp_path / "out")
    folder = with_tensors(tmp_path / "source", lambda tensors: tensors | converted)
    with pytest.raises(CheckpointError, match="holds shards of an original and of a converted"):
        preview(folder)


def refuses(folder: Path, case: Case, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        find_layers(open_checkpoint(LocalFolder(folder)), families=[case.family])


def test_a_stacked_tensor_that_is_missing_is_named(usual: Path, tmp_path: Path) -> None:
    case = CASES[STEP]
    tensors = restructure(usual, tmp_path / "source", case)
    del tensors[f"{case.prefix}.up_proj.input_scale"]
    write_tensors(tmp_path / "source" / "model.safetensors", tensors)
    missing = f"'{case.prefix}.up_proj.input_scale' is missing from every shard"
    refuses(tmp_path / "source", case, f"model.safetensors: {missing}")


def test_a_stacked_tensor_of_more_experts_is_refused(usual: Path, tmp_path: Path) -> None:
    case = CASES[STEP]
    restructure(usual, tmp_path / "source", case)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert config["n_routed_experts"] == E
    edit_json(tmp_path / "source" / "config.json", n_routed_experts=E - 1)
    name = rf"'{case.prefix}\.[a-z_.0-9]+' is of expert {E - 1}, config.json allows {E - 1}"
    refuses(tmp_path / "source", case, f"model.safetensors: {name}")


def test_a_fused_tensor_that_does_not_split_in_two_is_refused(usual: Path, tmp_path: Path) -> None:
    case = CASES["stacked gate_up"]
    tensors = restructure(usual, tmp_path / "source", case)
    name = f"{case.prefix}.gate_up_proj.weight"
    odd = StoredTensor("U8", (E, 2 * I - 1, H // 2), bytes(E * (2 * I - 1) * H // 2))
    write_tensors(tmp_path / "source" / "model.safetensors", tensors | {name: odd})
    shape = re.escape(f"[{2 * I - 1}, {H // 2}]")
    refuses(
        tmp_path / "source", case, f"model.safetensors: '{name}': {shape} does not split into 2"
    )


def test_a_scalar_is_not_taken_for_a_stacked_tensor(usual: Path, tmp_path: Path) -> None:
    case = CASES[STEP]
    tensors = restructure(usual, tmp_path / "source", case)
    name = f"{case.prefix}.gate_proj.weight_scale_2"
    scalar = StoredTensor("F32", (), bytes(4))
    write_tensors(tmp_path / "source" / "model.safetensors", tensors | {name: scalar})
    message = rf"model\.safetensors: '{name}': \[\] does not split into {E}"
    refuses(tmp_path / "source", case, message)


# --- ranges of bytes ------------------------------------------------------------------------------


def matrix(shape: tuple[int, ...], dtype: str = "U8", start: int = 0) -> Matrix:
    """A tensor at byte 1000 of the data of a file whose header has 128 bytes."""
    nbytes = int(np.prod(shape)) * {"U8": 1, "F32": 4}[dtype]
    info = TensorInfo("t", dtype, shape, 1000, 1000 + nbytes)
    shard = Shard("s.safetensors", Header(128, (info,), ""), {})
    return Matrix.whole(shard, info)._replace(start=start)


def test_a_span_counts_from_the_start_of_the_file() -> None:
    assert matrix((4, 8)).span(8, 24) == Span("s.safetensors", "t", 128 + 1000 + 8, 16)
    assert matrix((4, 8), start=16).span(0, 8) == Span("s.safetensors", "t", 1144, 8)


@pytest.mark.parametrize(
    ("shape", "dtype", "count", "starts", "part"),
    [
        ((6, 8), "U8", 2, [0, 24], (3, 8)),
        ((6, 8), "U8", 6, [0, 8, 16, 24, 32, 40], (1, 8)),
        ((6, 8), "U8", 1, [0], (6, 8)),
        ((4, 2, 8), "F32", 2, [0, 128], (2, 2, 8)),
        ((4,), "F32", 4, [0, 4, 8, 12], (1,)),
    ],
)
def test_parts_are_equal_and_follow_one_another(
    shape: tuple[int, ...], dtype: str, count: int, starts: list[int], part: tuple[int, ...]
) -> None:
    parts = matrix(shape, dtype).split(count)
    assert [each.start for each in parts] == starts
    assert {each.shape for each in parts} == {part}
    assert sum(each.nbytes for each in parts) == matrix(shape, dtype).nbytes


def test_parts_of_a_part_lie_within_it() -> None:
    second = matrix((4, 6, 8)).split(4)[1]
    halves = second._replace(shape=second.shape[1:]).split(2)
    assert [half.start for half in halves] == [48, 72]
    assert [half.span(0, half.nbytes).offset for half in halves] == [1176, 1200]


@pytest.mark.parametrize(("shape", "count"), [((5, 8), 2), ((), 1), ((3,), 4), ((0, 8), 0)])
def test_rows_that_do_not_divide_are_refused(shape: tuple[int, ...], count: int) -> None:
    message = re.escape(f"{list(shape)} does not split into {count}")
    with pytest.raises(ValueError, match=message):
        matrix(shape).split(count)
