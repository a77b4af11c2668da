"""Experts without a gate, from a whole model of Nemotron-H: converted, stopped, resumed, verified.

That the bytes are those of the engines is what test_golden.py and tests/engines compare.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from support import model_zoo
from support.folders import contents, write_byte
from support.tensors import range_of, read_tensors

from fp4moe_convert import OutputError, VerifyError, convert, inspect, verify
from fp4moe_convert.format.contract import Geometry

LAYERS = ("backbone.layers.1.mixer.experts", "backbone.layers.3.mixer.experts")
FAMILY = "experts.N.{up,down}_proj"
SMALL = 600_000  # bytes of a shard; this makes several

families = pytest.mark.parametrize("family", model_zoo.UNGATED)


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("ungated") / name for name in model_zoo.UNGATED}
    for name, folder in folders.items():
        model_zoo.make(folder, name)
    return folders


@families
def test_inspect_names_the_row(source_of: dict[str, Path], family: str) -> None:
    """H of the experts is not that of the model where they have a latent size."""
    found = inspect(source_of[family])
    hidden = 128 if family.endswith("latent") else 256
    assert (found.state, found.warnings) == ("source", [])
    assert found.families == dict.fromkeys(LAYERS, FAMILY)
    assert found.layers == dict.fromkeys(LAYERS, Geometry(8, hidden, 448, gated=False))
    assert found.prospects.tensor_parallel == {"sglang": [1, 2, 4], "vllm": [1, 2, 4]}


def test_the_layers_may_be_counted_by_a_list_of_their_types(source_of: dict[str, Path]) -> None:
    config = json.loads((source_of["nemotron_h-latent"] / "config.json").read_text())
    assert "num_hidden_layers" not in config
    assert len(config["layers_block_type"]) == 4


@families
def test_what_becomes_of_a_layer(source_of: dict[str, Path], family: str, tmp_path: Path) -> None:
    """One scale for w13, and no name of a gate; the rest of the model is as it was."""
    source = source_of[family]
    convert(source, tmp_path / "out", verify=True)
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    for layer in LAYERS:
        for leaf in ("weight_scale_2", "input_scale"):
            for ours, theirs, shape in (("w13", "up", (8, 1)), ("w2", "down", (8,))):
                values = [before[f"{layer}.{e}.{theirs}_proj.{leaf}"].as_floats() for e in range(8)]
                found = after[f"{layer}.{ours}_{leaf}"].as_floats()
                assert found.shape == shape
                assert np.array_equal(found.reshape(8), np.stack(values))
    others = {n: t for n, t in before.items() if not re.search(r"\.experts\.", n)}
    assert others.items() <= after.items()
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert all(sizes["gated"] is False for sizes in section["layers"].values())


@families
def test_a_run_that_was_stopped_is_taken_up(
    source_of: dict[str, Path], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, whole = source_of[family], tmp_path / "out", tmp_path / "whole"
    convert(source, whole, max_shard_nbytes=SMALL)
    rename, left = os.rename, [2]

    def failing(old: Path, new: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, os.strerror(28))
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(OutputError, match="No space left"):
            convert(source, out, max_shard_nbytes=SMALL, threads=1)
    kept = len(list(out.glob("*.safetensors")))
    report = convert(source, out, max_shard_nbytes=SMALL, verify=True)
    assert report.shards_kept == kept > 0
    assert contents(out) == contents(whole)


@families
@pytest.mark.parametrize("leaf", ["w13_weight", "w13_weight_scale", "w2_weight_scale"])
def test_a_changed_byte_is_found(
    source_of: dict[str, Path], family: str, leaf: str, tmp_path: Path
) -> None:
    source, out = source_of[family], tmp_path / "out"
    convert(source, out)
    assert verify(out, source).tensors > 0
    path, (start, stop) = next(
        (path, range_of(path, f"{LAYERS[1]}.{leaf}")) for path in out.glob("*.safetensors")
    )
    position = (start + stop) // 2
    old = write_byte(path, position, 0)
    write_byte(path, position, old ^ 1)
    with pytest.raises(VerifyError, match=rf"{LAYERS[1]}\.{leaf}"):
        verify(out, source)
