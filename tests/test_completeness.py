"""A model of which something is missing is refused, or converted with a word.

Each case takes tensors out of a whole model and writes an index of what is left, or none: a shard
that never arrived leaves no other trace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.folders import INDEX, edit_json
from support.make_checkpoint import Spec, make_checkpoint
from support.model_zoo import FAMILIES, make
from support.tensors import StoredTensor, read_tensors, write_tensors
from typer.testing import CliRunner

from fp4moe_convert import CheckpointError, inspect, prepare
from fp4moe_convert.cli.commands import app

SPEC = Spec(layers=4, dense_layers=1, experts=2, hidden=256, intermediate=64, vocab_size=300)
QWEN = Spec(layers=2, experts=2, hidden=256, intermediate=64, vocab_size=300, style="qwen3_moe")


@pytest.fixture(params=[True, False], ids=["indexed", "not indexed"])
def without(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Makes a model without the tensors that match a pattern."""

    def take_out(pattern: str, spec: Spec = SPEC, **config: Any) -> Path:
        folder = tmp_path / "model"
        make_checkpoint(folder, spec)
        everything = read_tensors(folder)
        left = {n: t for n, t in everything.items() if not re.search(pattern, n)}
        assert len(left) < len(everything)
        for path in folder.glob("model*"):
            path.unlink()
        write(folder, left, indexed=request.param)
        edit_json(folder / "config.json", **config)
        return folder

    return take_out


def write(folder: Path, tensors: dict[str, StoredTensor], *, indexed: bool) -> None:
    """In one file, whose name tells nothing of others."""
    write_tensors(folder / "weights.safetensors", tensors)
    if indexed:
        index = {"weight_map": dict.fromkeys(tensors, "weights.safetensors")}
        (folder / INDEX).write_text(json.dumps(index))


def refuses(folder: Path, message: str) -> None:
    """Converting and inspecting say the same."""
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{folder}: {message}')}$"):
        prepare(folder)
    found = inspect(folder)
    assert (found.state, found.reason) == ("unsupported", f"{folder}: {message}")


def warns(folder: Path, *lines: str) -> None:
    """So do they where it is only a warning."""
    assert inspect(folder).warnings == list(lines)
    out = str(folder.parent / "out")
    result = CliRunner().invoke(app, ["convert", str(folder), out, "--quiet"])
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [f"warning: {line}" for line in lines]
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert all(line in result.stdout for line in lines)


# --- refused --------------------------------------------------------------------------------------

ALL_THERE = "are all shards there?"


@pytest.mark.parametrize(
    ("layers", "said"),
    [("0", "0"), ("2", "2"), ("4", "4"), ("[13]", "1, 3"), ("[01234]", None)],
    ids=["first", "middle", "last", "two", "all"],
)
def test_layers_without_a_tensor(
    without: Callable[..., Path], layers: str, said: str | None
) -> None:
    folder = without(rf"^model\.layers\.{layers}\.")
    if said is None:
        refuses(folder, "has no layer with NVFP4 experts to convert")
    else:
        refuses(
            folder,
            "config.json counts 5 layers, but no shard has a tensor of "
            f"model.layers.{said}; {ALL_THERE}",
        )


def test_of_many_layers_the_first_are_named(without: Callable[..., Path]) -> None:
    refuses(
        without(r"^lm_head", num_hidden_layers=20),
        "config.json counts 20 layers, but no shard has a tensor of "
        f"model.layers.5, 6, 7, 8, 9 and 10 more; {ALL_THERE}",
    )


def test_a_huge_number_of_layers_is_refused_at_once(without: Callable[..., Path]) -> None:
    folder = without(r"^lm_head", num_hidden_layers=10**17)
    with pytest.raises(CheckpointError, match=r"layers\.5, 6, 7, 8, 9 and 9{16}0 more"):
        prepare(folder)


def test_layers_of_experts_alone(without: Callable[..., Path]) -> None:
    folder = without(r"^model\.layers\.[14](?!.*\.experts\.)")
    refuses(folder, f"no shard has anything but experts of model.layers.1, 4; {ALL_THERE}")


def test_nothing_around_the_layers(without: Callable[..., Path]) -> None:
    folder = without(r"^(?!model\.layers)")
    message = "no shard has embeddings, a head, or anything outside the layers"
    refuses(folder, f"{message}; {ALL_THERE}")


def test_a_shard_that_the_index_does_not_name_is_pointed_at(tmp_path: Path) -> None:
    """As where the index was made from what had arrived by then."""
    folder = tmp_path / "model"
    make_checkpoint(folder, SPEC)
    tensors = read_tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    late = {n: t for n, t in tensors.items() if n.startswith("model.layers.2.")}
    write(folder, {n: t for n, t in tensors.items() if n not in late}, indexed=True)
    write_tensors(folder / "late.safetensors", late)
    refuses(
        folder,
        "config.json counts 5 layers, but no shard has a tensor of model.layers.2; is it in "
        f"late.safetensors, which {INDEX} does not name?",
    )


# --- warned of ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"layers\.2\.self_attn", "model.layers.2: no self_attn"),
        (r"layers\.[13]\.self_attn", "model.layers.1, 3: no self_attn"),
        (r"layers\.3\.mlp\.gate\.", "model.layers.3: no mlp.gate"),
        (r"layers\.3\.mlp\.shared", "model.layers.3: no mlp.shared_experts"),
        (r"layers\.4\.mlp\.experts", "model.layers.4: no mlp.experts"),
        (
            r"layers\.4\.(self_attn|input_layernorm)",
            "model.layers.4: no input_layernorm, self_attn",
        ),
    ],
)
def test_a_layer_that_differs_from_its_neighbours(
    without: Callable[..., Path], pattern: str, said: str
) -> None:
    warns(without(pattern), f"{said} in any shard, unlike other layers")


def test_one_of_two_layers_may_be_the_broken_one(without: Callable[..., Path]) -> None:
    folder = without(r"layers\.2\.self_attn", QWEN)
    warns(folder, "model.layers.2: no self_attn in any shard, unlike other layers")


@pytest.mark.parametrize("spec", [SPEC, QWEN], ids=["deepseek", "qwen"])
def test_a_model_without_attention(without: Callable[..., Path], spec: Spec) -> None:
    warns(without(r"\.self_attn\.", spec), "model.layers: no attention in any shard")


def test_a_model_without_embeddings(without: Callable[..., Path]) -> None:
    folder = without(r"embed_tokens|lm_head")
    warns(folder, "no shard has embeddings: config.json counts 300 tokens")


NOT_BOTH = (
    "no shard has both embeddings and a head, and config.json says that they are not the same"
)


@pytest.mark.parametrize("pattern", ["embed_tokens", "lm_head"])
def test_a_model_without_embeddings_or_without_a_head(
    without: Callable[..., Path], pattern: str
) -> None:
    warns(without(pattern), NOT_BOTH)


@pytest.mark.parametrize("tied", [True, None])
def test_the_head_may_be_the_embedding(without: Callable[..., Path], tied: bool | None) -> None:
    warns(without("lm_head", tie_word_embeddings=tied))


def test_a_model_without_a_last_norm(without: Callable[..., Path]) -> None:
    warns(without(r"^model\.norm"), "no shard has a norm after the layers")


def test_a_config_without_a_vocabulary_tells_nothing(without: Callable[..., Path]) -> None:
    warns(without("lm_head", vocab_size=None))


# --- not a word -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES if "nemotron" not in name])
def test_whole_models_are_whole(tmp_path: Path, family: str) -> None:
    """Dense layers, linear attention, shared experts, vision, MTP: a layer may differ from its
    neighbours by what it is."""
    make(tmp_path / "model", family)
    found = inspect(tmp_path / "model")
    assert (found.state, found.warnings) == ("source", [])
