"""Every row of the table of families converts to the bytes that other names give.

The worked example of CONTRIBUTING: a family with a known structure is one row, and one case here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.folders import INDEX, edit_json
from support.make_checkpoint import Spec, make_checkpoint
from support.tensors import read_header, read_tensors

from fp4moe_convert import convert
from fp4moe_convert.source.families import FAMILIES

SPEC = Spec(layers=2, experts=3, hidden=256, intermediate=80, vocab_size=16, shards=3)

# What becomes of a tensor of the usual name: a regular expression and its replacement each.
NAMES: dict[str, dict[str, str]] = {
    "experts.N.{gate,up,down}_proj": {},
    "experts.N.{w1,w3,w2}": {
        r"\.mlp\.": ".block_sparse_moe.",
        r"(\.experts\.\d+)\.gate_proj": r"\1.w1",
        r"(\.experts\.\d+)\.up_proj": r"\1.w3",
        r"(\.experts\.\d+)\.down_proj": r"\1.w2",
    },
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
    assert list(NAMES) == [family.name for family in FAMILIES]


@pytest.mark.parametrize("exporter", ["ModelOpt", "llm-compressor"])
@pytest.mark.parametrize("family", NAMES)
def test_a_family_gives_the_same_layers_as_the_usual_names(
    family: str, exporter: str, tmp_path: Path
) -> None:
    for name in ("usual", "other"):
        make_checkpoint(tmp_path / name, SPEC)
    rename(tmp_path / "other", NAMES[family])
    if exporter == "llm-compressor":  # the same values, as divisors
        rename(tmp_path / "other", COMPRESSED_TENSORS)
        path = tmp_path / "other" / "config.json"
        edit_json(path, quantization_config=COMPRESSED_TENSORS_SECTION)
    outcomes = []
    for name in ("usual", "other"):
        out = tmp_path / f"{name}-out"
        assert convert(tmp_path / name, out, verify=True).layers == SPEC.layers
        tensors = read_tensors(out).items()  # but for the empty one, which keeps its name
        outcomes.append({n.replace(".block_sparse_moe.", ".mlp."): t for n, t in tensors if t.data})
    assert outcomes[0] == outcomes[1]
