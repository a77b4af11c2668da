"""Experts as one product of batches takes them, as ModelOpt exports Llama 4: all of a layer in one
tensor, transposed, and one scalar for all of them.

They are compared with the same weights in tensors of each expert, whose conversion is compared
with the engines' own code.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import model_zoo
from support.batched import rewrite_each_by_itself
from support.folders import edit_json
from support.tensors import StoredTensor, read_header, read_tensors, write_tensors

from fp4moe_convert import CheckpointError, VerifyError, convert, inspect, preview, restore, verify
from fp4moe_convert.format.contract import Geometry
from fp4moe_convert.source.checkpoint import open_checkpoint
from fp4moe_convert.source.experts import find_layers
from fp4moe_convert.source.names import original_layer
from fp4moe_convert.storage.local import LocalFolder

E, H, I = 8, 256, 80  # noqa: E741 (the letters of the format); I is padded, to 128
PREFIX = "language_model.model.layers.1.feed_forward.experts"
ROW = "experts.{gate_up,down}_proj"

Tensors = dict[str, StoredTensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source`` and its conversion ``out``, the same in the other form; for reading only."""
    folder = tmp_path_factory.mktemp("batched")
    family = model_zoo.LLAMA4
    spec = replace(family.spec, intermediate=I)
    model_zoo.write_family(folder / "source", replace(family, spec=spec))
    shutil.copytree(folder / "source", folder / "each")
    rewrite_each_by_itself(folder / "each", E)
    for name in ("source", "each"):
        convert(folder / name, folder / f"{name}-out")
    return folder


def with_data(folder: Path) -> Tensors:
    return {name: tensor for name, tensor in read_tensors(folder).items() if tensor.data}


def test_they_become_what_experts_by_themselves_become(folders: Path) -> None:
    assert with_data(folders / "source-out") == with_data(folders / "each-out")
    found = inspect(folders / "source")
    assert found.families == dict.fromkeys(found.layers, ROW)
    assert found.layers == inspect(folders / "each").layers
    assert found.layers[PREFIX] == Geometry(E, H, I)
    assert list(found.layers) == [PREFIX, PREFIX.replace("1", "3")]  # the others are dense
    assert found.warnings == []


def test_each_layer_has_a_stop_tensor_under_the_name_of_all_down_weights(folders: Path) -> None:
    empty = {n for n, tensor in read_tensors(folders / "source-out").items() if not tensor.data}
    assert empty == {f"{layer}.down_proj" for layer in inspect(folders / "source").layers}
    assert {original_layer(name) for name in empty} == set(inspect(folders / "source-out").layers)


def test_they_come_back(folders: Path, tmp_path: Path) -> None:
    restore(folders / "source-out", tmp_path / "back", verify=True)
    names = [path.name for path in (folders / "source").iterdir()]
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (folders / "source" / name).read_bytes()
    assert len(names) == len(list((tmp_path / "back").iterdir()))
    convert(tmp_path / "back", tmp_path / "again")
    for shard in (folders / "source-out").glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()
    verify(tmp_path / "again", folders / "source")


def test_all_names_are_known_as_those_of_an_original(folders: Path) -> None:
    """And no others of the layer: the gate before an engine's model tells them apart."""
    names = [
        name
        for path in (folders / "source").glob("*.safetensors")
        for name in read_header(path)[0]
        if name.startswith(PREFIX.removesuffix(".experts"))
    ]
    experts = [name for name in names if original_layer(name) is not None]
    assert sorted(experts) == sorted(name for name in names if ".experts." in name)
    assert len(experts) == 8
    assert {original_layer(name) for name in experts} == {PREFIX}
    assert original_layer(f"{PREFIX}.gate_up_proj_bias") is None


def test_other_layouts_cannot_take_them_for_rows(folders: Path) -> None:
    (layer, *_), _ = find_layers(open_checkpoint(LocalFolder(folders / "source")))
    gate = layer.matrices[2, "gate", "weight"]
    assert (gate.shape, gate.beside) == ((I, H // 2), (0, 2))
    assert gate.span_of_all() == layer.matrices[2, "up", "weight"].span_of_all()
    assert gate.span_of_all().nbytes == I * H
    with pytest.raises(AssertionError, match="its bytes lie among those of others"):
        gate.span(0, gate.nbytes)


def test_an_engine_that_looks_for_other_names_is_told(folders: Path, tmp_path: Path) -> None:
    folder = edited(folders, tmp_path / "source", lambda _: None)
    edit_json(folder / "config.json", architectures=["MiniMaxM2ForCausalLM"])
    assert "looks for the w2 of experts, not for their down_proj" in str(inspect(folder).reason)


def edited(folders: Path, folder: Path, edit: Callable[[Tensors], None]) -> Path:
    """The model with other tensors, in one file."""
    folder.mkdir()
    shutil.copy(folders / "source" / "config.json", folder)
    tensors = read_tensors(folders / "source")
    edit(tensors)
    write_tensors(folder / "model.safetensors", dict(sorted(tensors.items())))
    return folder


def reshaped(name: str, dtype: str, *shape: int) -> Callable[[Tensors], None]:
    """An edit that gives a tensor of the layer another form."""
    nbytes = int(np.prod(shape)) * {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]

    def edit(tensors: Tensors) -> None:
        tensors[f"{PREFIX}.{name}"] = StoredTensor(dtype, shape, bytes(nbytes))

    return edit


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(f"{PREFIX}.{name}") and None


SIZES = f"(H = {H}, I = {I}, as in expert 0)"
SWAPPED = "(H = 320, I = 64, as in expert 0)"
SCALES = f"expected F8_E4M3 [256, 5] {SIZES}"
KNOWN = "(gate_up_proj, down_proj with weight, weight_scale, weight_scale_2, input_scale)"

REFUSED: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "rows of the output first": (
        reshaped("gate_up_proj", "U8", E, 2 * I, H // 2),
        f"'{PREFIX}.down_proj' is U8 [256, 40], transposed, expected U8 [320, 32] {SWAPPED}",
    ),
    "down as it is": (
        reshaped("down_proj", "U8", E, H, I // 2),
        f"'{PREFIX}.down_proj' is U8 [40, 256], transposed, expected U8 [256, 40] {SIZES}",
    ),
    "gate alone": (
        reshaped("gate_up_proj", "U8", E, H // 2, I),
        f"'{PREFIX}.gate_up_proj' gives intermediate size I = 40, which is not a multiple of 16",
    ),
    "an odd number of columns": (
        reshaped("gate_up_proj", "U8", E, H // 2, 2 * I - 1),
        f"'{PREFIX}.gate_up_proj': [128, 159] does not split into 2 side by side",
    ),
    "of two dimensions": (
        reshaped("down_proj", "U8", E * I // 2, H),
        f"'{PREFIX}.down_proj': [256] does not split into 1 side by side",
    ),
    "fewer experts": (
        reshaped("down_proj", "U8", E - 1, I // 2, H),
        f"'{PREFIX}.down_proj' has no expert {E - 1}",
    ),
    "other scales": (
        reshaped("down_proj_weight_scale", "F8_E4M3", E, I // 32, H),
        f"'{PREFIX}.down_proj_weight_scale' is F8_E4M3 [256, 2], transposed, {SCALES}",
    ),
    "a scalar of each expert": (
        reshaped("gate_up_proj_weight_scale_2", "F32", E),
        f"'{PREFIX}.gate_up_proj_weight_scale_2' is F32 [8], expected F32 [] {SIZES}",
    ),
    "no scalar": (
        without("down_proj_input_scale"),
        f"'{PREFIX}.down_proj_input_scale' is missing from every shard",
    ),
    "no gate and up": (
        without("gate_up_proj"),
        f"'{PREFIX}.gate_up_proj' is missing from every shard",
    ),
    "a bias, as gpt-oss has it": (
        lambda tensors: tensors.update(
            {f"{PREFIX}.down_proj_bias": StoredTensor("BF16", (E, H), bytes(2 * E * H))}
        ),
        f"'{PREFIX}.down_proj_bias' is not a tensor of a ModelOpt NVFP4 expert {KNOWN}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_otherwise_is_refused(case: str, folders: Path, tmp_path: Path) -> None:
    edit, message = REFUSED[case]
    folder = edited(folders, tmp_path / "source", edit)
    with pytest.raises(CheckpointError, match=f"^model.safetensors: {re.escape(message)}$"):
        preview(folder)


def test_more_experts_than_config_says_are_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "source", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    text = config["text_config"] | {"num_local_experts": E - 1}
    edit_json(tmp_path / "source" / "config.json", text_config=text)
    with pytest.raises(CheckpointError, match=f"is of expert {E - 1}, config.json allows {E - 1}"):
        preview(tmp_path / "source")


def test_those_of_other_precision_pass(folders: Path, tmp_path: Path) -> None:
    def as_bf16(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{PREFIX}.")]:
            del tensors[name]
            if name.endswith("_proj"):
                tensors[name] = StoredTensor("BF16", (E, 16, 16), bytes(2 * E * 256))

    plan = preview(edited(folders, tmp_path / "source", as_bf16)).work.plan
    assert plan.passed_reasons == {PREFIX: "its experts are BF16, not NVFP4"}
    assert len(plan.layers) == 1


def test_a_nan_block_scale_is_named(folders: Path, tmp_path: Path) -> None:
    def set_nan(tensors: Tensors) -> None:
        name = f"{PREFIX}.gate_up_proj_weight_scale"
        data = bytearray(tensors[name].data)
        data[len(data) // 3] = 0x7F
        tensors[name] = replace(tensors[name], data=bytes(data))

    folder = edited(folders, tmp_path / "source", set_nan)
    with pytest.raises(CheckpointError, match="gate_up_proj_weight_scale' has a NaN block scale"):
        convert(folder, tmp_path / "out")


def test_values_that_differ_where_the_source_has_one_are_damage(
    folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "source-out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    entries, start = read_header(path)
    name = f"{PREFIX}.w2_weight_scale_2"
    with path.open("r+b") as file:
        file.seek(start + entries[name]["data_offsets"][0] + 4)
        file.write(b"\x01")
    line = f"'{name}' holds different values where its source has one"
    with pytest.raises(VerifyError, match=line):
        verify(tmp_path / "out", folders / "source")
    with pytest.raises(VerifyError, match=line):
        restore(tmp_path / "out", tmp_path / "back")
