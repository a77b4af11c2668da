"""Every row of the table of families converts to the bytes that other names give.

The worked example of CONTRIBUTING: a family with a known structure is one row, and one case here.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support import model_zoo
from support.folders import INDEX, edit_json
from support.make_checkpoint import Spec, make_checkpoint
from support.tensors import read_header, read_tensors

from fp4moe_convert import convert, inspect
from fp4moe_convert.source.families import FAMILIES

USUAL = FAMILIES[0].name
SPEC = Spec(layers=2, experts=3, hidden=256, intermediate=80, vocab_size=16, shards=3)

# The checkpoint, and what becomes of a tensor of the usual name: regular expressions, and a
# replacement for each.
NAMES: dict[str, tuple[Spec, dict[str, str]]] = {
    "experts.N.{gate,up,down}_proj": (SPEC, {}),
    "experts.N.{w1,w3,w2}": (
        SPEC,
        {
            r"\.mlp\.": ".block_sparse_moe.",
            r"(\.experts\.\d+)\.gate_proj": r"\1.w1",
            r"(\.experts\.\d+)\.up_proj": r"\1.w3",
            r"(\.experts\.\d+)\.down_proj": r"\1.w2",
        },
    ),
    "experts.N.{up,down}_proj": (
        replace(SPEC, ungated=True),
        {r"^model\.": "backbone.", r"\.mlp\.": ".mixer."},
    ),
}


COMPRESSED_TENSORS = {
    r"(\.experts\..*)\.weight$": r"\1.weight_packed",
    r"(\.experts\..*)\.weight_scale_2$": r"\1.weight_global_scale",
    r"(\.experts\..*)\.input_scale$": r"\1.input_global_scale",
}
FOUR_BITS = {"num_bits": 4, "type": "float", "group_size": 16}
COMPRESSED_TENSORS_SECTION = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": FOUR_BITS, "input_activations": FOUR_BITS}},
}


def rename(folder: Path, names: dict[str, str]) -> None:
    """Give the tensors of a checkpoint other names, without a change to their bytes."""

    def renamed(name: str) -> str:
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        return name

    for path in folder.glob("*.safetensors"):
        entries, start = read_header(path)
        data = path.read_bytes()[start:]
        text = json.dumps({renamed(name): entry for name, entry in entries.items()}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {renamed(n): file for n, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def test_every_family_has_a_case() -> None:
    """Those that have all experts in one tensor have it in test_stacked_experts.py."""
    numbered = [each.name for each in FAMILIES if "expert" in each.tensors.groupindex]
    assert list(NAMES) == numbered


@pytest.mark.parametrize("exporter", ["ModelOpt", "llm-compressor"])
@pytest.mark.parametrize("family", NAMES)
def test_a_family_gives_the_same_layers_as_the_usual_names(
    family: str, exporter: str, tmp_path: Path
) -> None:
    spec, names = NAMES[family]
    for name in ("usual", "other"):
        make_checkpoint(tmp_path / name, spec)
    rename(tmp_path / "other", names)
    if exporter == "llm-compressor":  # the same values, as divisors
        rename(tmp_path / "other", COMPRESSED_TENSORS)
        path = tmp_path / "other" / "config.json"
        edit_json(path, quantization_config=COMPRESSED_TENSORS_SECTION)
    outcomes = []
    for name in ("usual", "other"):
        out = tmp_path / f"{name}-out"
        assert set(inspect(tmp_path / name).families.values()) <= {family, USUAL}
        assert convert(tmp_path / name, out, verify=True).layers == spec.layers
        tensors = read_tensors(out).items()  # but for the empty one, which keeps its name
        outcomes.append({usual(n): t for n, t in tensors if t.data})
    assert outcomes[0] == outcomes[1]
    assert set(inspect(tmp_path / "other").families.values()) == {family}


def usual(name: str) -> str:
    return re.sub(r"\.(block_sparse_moe|mixer)\.", ".mlp.", name).replace("backbone.", "model.")


def test_experts_without_a_gate_are_up_and_down_of_those_with_one(tmp_path: Path) -> None:
    """Down becomes the same bytes, and so do the scales of up."""
    made = {}
    for kind, spec in ("gated", SPEC), ("ungated", replace(SPEC, ungated=True)):
        make_checkpoint(tmp_path / kind, spec)
        convert(tmp_path / kind, tmp_path / f"{kind}-out")
        made[kind] = read_tensors(tmp_path / f"{kind}-out")
    prefix = "model.layers.1.mlp.experts"
    for leaf in ("weight_scale_2", "input_scale"):
        assert made["ungated"][f"{prefix}.w2_{leaf}"] == made["gated"][f"{prefix}.w2_{leaf}"]
        both = made["gated"][f"{prefix}.w13_{leaf}"].as_floats()
        alone = made["ungated"][f"{prefix}.w13_{leaf}"].as_floats()
        assert both.shape == (SPEC.experts, 2)
        assert alone.shape == (SPEC.experts, 1)
        assert (alone == both[:, 1:]).all()
    padded = {"gated": 128, "ungated": 128}
    for kind, rows in padded.items():
        weights = made[kind][f"{prefix}.w2_weight"].as_bytes()
        assert weights.shape == (SPEC.experts, SPEC.hidden, rows // 2)
    assert made["gated"][f"{prefix}.w2_weight"] == made["ungated"][f"{prefix}.w2_weight"]


def test_amid_fp8_a_layer_may_have_experts_of_another_kind(tmp_path: Path) -> None:
    """As in mixed precision, it passes."""
    model_zoo.make(tmp_path / "model", "deepseek_v4")
    path = tmp_path / "model" / "config.json"
    section = json.loads(path.read_text())["quantization_config"]
    section["quantized_layers"]["layers.2.ffn.experts"]["quant_algo"] = "W4A8_NVFP4_FP8"
    edit_json(path, quantization_config=section)
    found = inspect(tmp_path / "model")
    assert list(found.layers) == ["layers.0.ffn.experts", "layers.1.ffn.experts"]
    assert "W4A8_NVFP4_FP8, not NVFP4" in found.passed_layers["layers.2.ffn.experts"]
