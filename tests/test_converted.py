"""A folder is converted as a whole or not at all, whatever its config.json says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.folders import INDEX, MANIFEST, edit_json
from support.make_checkpoint import make_checkpoint
from support.model_zoo import FAMILIES, write_family
from support.specs import TINY
from support.tensors import StoredTensor, read_tensors, write_tensors

from fp4moe_convert import CheckpointError, convert, inspect, preview

SINGLE = "model.layers.1.mlp.experts.0.down_proj.weight"
MARKER = "fp4moe.layout"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original and what it is converted to, for reading only."""
    folder = tmp_path_factory.mktemp("folders")
    make_checkpoint(folder / "original", TINY)
    convert(folder / "original", folder / "converted")
    return folder


def merge(folders: Path, out: Path, config: str, tensors: dict[str, StoredTensor]) -> Path:
    """A folder with the config.json of one of the two and some tensors."""
    out.mkdir()
    shutil.copy(folders / config / "config.json", out)
    write_tensors(out / "model.safetensors", tensors)
    return out


def first(tensors: dict[str, StoredTensor], part: str) -> str:
    """The first four-bit tensor in whose name there is ``part``. In converted layers there is an
    empty one besides."""
    return next(n for n, t in tensors.items() if part in n and t.dtype == "U8" and t.data)


def refuses(folder: Path, message: str) -> None:
    """Converting and inspecting say the same."""
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        convert(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()
    found = inspect(folder)
    assert (found.state, found.reason) == ("unsupported", message)


@pytest.fixture(params=["original", "converted"])
def config(request: pytest.FixtureRequest) -> str:
    """Whose config.json it is."""
    return str(request.param)


def test_a_converted_folder_is_not_converted_again(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/converted: is already converted$"):
        convert(folders / "converted", tmp_path / "out")
    assert inspect(folders / "converted").state == "converted"


def test_a_converted_folder_with_the_config_of_the_original(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "converted", tmp_path / "model"))
    shutil.copy(folders / "original" / "config.json", folder)
    refuses(
        folder,
        f"{folder}: is already converted, as model-00001-of-00001.safetensors: {MARKER!r} says, "
        "but config.json is not its own; put back the one that the conversion wrote",
    )


def test_an_original_with_the_config_of_a_converted_one(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "original", tmp_path / "model"))
    shutil.copy(folders / "converted" / "config.json", folder)
    refuses(
        folder,
        "config.json: is that of a converted checkpoint, but model-00002-of-00003.safetensors: "
        f"{SINGLE!r} is as in an original; put back the original's config.json",
    )


def test_shards_of_both(folders: Path, tmp_path: Path, config: str) -> None:
    """One layer converted, another not."""
    original, converted = (read_tensors(folders / name) for name in ("original", "converted"))
    kept = {n: t for n, t in original.items() if not n.startswith("model.layers.2.mlp.experts.")}
    added = {n: t for n, t in converted.items() if n.startswith("model.layers.2.mlp.experts.")}
    for number, tensors in enumerate(
        ({**kept, **added}, {**kept, **added, MARKER: converted[MARKER]})
    ):
        folder = merge(folders, tmp_path / f"model{number}", config, tensors)
        refuses(
            folder,
            f"{folder}: holds shards of an original and of a converted checkpoint: "
            f"model.safetensors: {first(kept, '.experts.')!r} is of the one, "
            f"model.safetensors: {first(added, '.experts.')!r} of the other; take all of them from "
            "one",
        )


def test_names_of_a_converted_layer_without_the_marker(folders: Path, tmp_path: Path) -> None:
    """Somebody else may use them for all experts in the order of the source."""
    tensors = read_tensors(folders / "converted")
    del tensors[MARKER]
    folder = merge(folders, tmp_path / "model", "original", tensors)
    refuses(
        folder,
        f"model.safetensors: {first(tensors, '.experts.')!r} is named as in a converted "
        f"checkpoint, but no {MARKER!r} tells the order of its rows; convert the original",
    )


def test_a_config_of_a_converted_checkpoint_beside_no_experts(
    folders: Path, tmp_path: Path
) -> None:
    tensors = {n: t for n, t in read_tensors(folders / "original").items() if "experts." not in n}
    folder = merge(folders, tmp_path / "model", "converted", tensors)
    refuses(
        folder,
        f"config.json: is that of a converted checkpoint, but no shard has {MARKER!r}; put back "
        "the original's config.json",
    )


def test_layers_that_are_never_converted_may_have_single_experts(
    folders: Path, tmp_path: Path
) -> None:
    tensors = read_tensors(folders / "converted")
    single = read_tensors(folders / "original")[SINGLE]
    for prefix in ("mtp.layers.0", "model.layers.3"):
        tensors[f"{prefix}.mlp.experts.0.down_proj.weight"] = single
    folder = merge(folders, tmp_path / "model", "converted", tensors)
    weight_map: dict[str, Any] = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / INDEX).write_text(json.dumps(weight_map))
    shutil.copy(folders / "converted" / MANIFEST, folder)
    assert inspect(folder).state == "converted"
    edit_json(folder / "config.json", num_hidden_layers=4)
    assert inspect(folder).state == "unsupported"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """An original of which one layer is weight-only, so that it passes through."""
    folder = tmp_path / "mixed"
    write_family(folder, FAMILIES["deepseek_v3-ct"])
    dropped = re.compile(r"model\.layers\.1\.mlp\.experts\..*\.input_global_scale")
    for path in folder.glob("*.safetensors"):
        tensors = read_tensors(path)
        write_tensors(path, {n: t for n, t in tensors.items() if not dropped.fullmatch(n)})
    index = json.loads((folder / INDEX).read_text())
    for name in [*filter(dropped.fullmatch, index["weight_map"])]:
        del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_layers_that_have_passed_through_are_as_in_an_original(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert(mixed, out, verify=True)
    assert list(report.passed_layers) == ["model.layers.1.mlp.experts"]
    found = inspect(out)
    # All layers share one backend, which has no kernels for that one.
    for each in (inspect(mixed), preview(mixed), report, found):
        assert each.prospects.commands("out") == each.prospects.cannot_serve == {}
        for reason in each.prospects.not_tried.values():
            assert "weight-only (W4A16)" in reason
            assert "model.layers.1.mlp.experts" in reason
    assert len(found.prospects.not_tried) == 2
    assert (found.state, found.passed_layers) == ("converted", report.passed_layers)
    assert list(found.layers) == ["model.layers.2.mlp.experts"]
    with pytest.raises(CheckpointError, match=r"/out: is already converted$"):
        convert(out, tmp_path / "again")


def test_a_layer_that_is_said_to_have_passed_through_and_need_not(
    folders: Path, tmp_path: Path
) -> None:
    """Shards of another conversion, of fewer layers."""
    original, converted = (read_tensors(folders / name) for name in ("original", "converted"))
    kept = {n: t for n, t in original.items() if not n.startswith("model.layers.2.mlp.experts.")}
    added = {n: t for n, t in converted.items() if n.startswith("model.layers.2.mlp.experts.")}
    folder = merge(
        folders, tmp_path / "model", "converted", {**kept, **added, MARKER: converted[MARKER]}
    )
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["layers"]["model.layers.1.mlp.experts"]
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(folder)
    assert found.state == "unsupported"
    assert "'model.layers.1.mlp.experts' is as in an original" in str(found.reason)
