"""A model of which something is missing is refused, or converted with a word.

Each case takes tensors out of a whole model and writes an index of what is left, or none: a shard
that never arrived leaves no other trace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.folders import INDEX, edit_json
from support.make_checkpoint import Spec, make_checkpoint
from support.model_zoo import FAMILIES, make
from support.tensors import StoredTensor, read_tensors, write_tensors
from typer.testing import CliRunner

from fp4moe_convert import CheckpointError, inspect, preview
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
        preview(folder)
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
        preview(folder)


def test_layers_of_experts_alone(without: Callable[..., Path]) -> None:
    folder = without(r"^model\.layers\.[14](?!.*\.experts\.)")
    refuses(folder, f"no shard has anything but experts of model.layers.1, 4; {ALL_THERE}")


def test_nothing_around_the_layers(without: Callable[..., Path]) -> None:
    folder = without(r"^(?!model\.layers)")
    message = "no shard has embeddings, a head, or anything outside the layers"
    refuses(folder, f"{message}; {ALL_THERE}")


def test_multi_token_prediction_is_not_what_is_around_the_layers(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder, SPEC)
    tensors = read_tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    left = {n: t for n, t in tensors.items() if n.startswith("model.layers.")}
    renamed = {f"mtp.{n}": t for n, t in tensors.items() if n not in left}
    write(folder, left | renamed, indexed=True)
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

NOT_BOTH = (
    "no shard has both embeddings and a head, and config.json says that they are not the same"
)
WARNED: dict[str, tuple[str, str]] = {
    "a layer without attention": (
        r"layers\.2\.self_attn",
        "model.layers.2: no self_attn in any shard, unlike other layers",
    ),
    "two layers without attention": (
        r"layers\.[13]\.self_attn",
        "model.layers.1, 3: no self_attn in any shard, unlike other layers",
    ),
    "a layer without a router": (
        r"layers\.3\.mlp\.gate\.",
        "model.layers.3: no mlp.gate in any shard, unlike other layers",
    ),
    "a layer without shared experts": (
        r"layers\.3\.mlp\.shared",
        "model.layers.3: no mlp.shared_experts in any shard, unlike other layers",
    ),
    "a layer without experts": (
        r"layers\.4\.mlp\.experts",
        "model.layers.4: no mlp.experts in any shard, unlike other layers",
    ),
    "a layer without several things": (
        r"layers\.4\.(self_attn|input_layernorm)",
        "model.layers.4: no input_layernorm, self_attn in any shard, unlike other layers",
    ),
    "no attention": (r"\.self_attn\.", "model.layers: no attention in any shard"),
    "no embeddings and no head": (
        r"embed_tokens|lm_head",
        "no shard has embeddings: config.json counts 300 tokens",
    ),
    "no embeddings": ("embed_tokens", NOT_BOTH),
    "no head": ("lm_head", NOT_BOTH),
    "no norm at the end": (r"^model\.norm", "no shard has a norm after the layers"),
}
FIRST = "model.layers.1.mlp.experts: has"
OTHERWISE = {
    "experts of another width": (
        {"moe_intermediate_size": 32},
        f"{FIRST} I = 64, config.json says moe_intermediate_size 32, and 3 more",
    ),
    "experts of another hidden size": (
        {"hidden_size": 512},
        f"{FIRST} H = 256, config.json says hidden_size 512, and 3 more",
    ),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_seems_to_be_missing_is_named(without: Callable[..., Path], case: str) -> None:
    pattern, line = WARNED[case]
    warns(without(pattern), line)


def test_the_documented_warnings_are_those_that_are_tested() -> None:
    text = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
    documented = re.findall(r"^\| (.*?) \| `warning: (.*)` \|$", text, re.MULTILINE)
    tested = {**WARNED, **OTHERWISE}
    assert documented == [(case, line) for case, (_, line) in tested.items()]


@pytest.mark.parametrize("case", OTHERWISE)
def test_sizes_that_config_has_otherwise_are_named(tmp_path: Path, case: str) -> None:
    changes, line = OTHERWISE[case]
    folder = tmp_path / "model"
    make_checkpoint(folder, SPEC)
    edit_json(folder / "config.json", **changes)
    warns(folder, line)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 512, "moe_latent_size": 256},
        {"hidden_size": 512, "routed_expert_hidden_size": 256},
        {"hidden_size": None, "moe_intermediate_size": None},
        {"moe_intermediate_size": [64, 32]},  # ERNIE's of text and of vision
    ],
    ids=str,
)
def test_sizes_that_config_has_alike_or_not_are_no_matter(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder, SPEC)
    edit_json(folder / "config.json", **changes)
    warns(folder)


def test_one_of_two_layers_may_be_the_broken_one(without: Callable[..., Path]) -> None:
    folder = without(r"layers\.2\.self_attn", QWEN)
    warns(folder, "model.layers.2: no self_attn in any shard, unlike other layers")


@pytest.mark.parametrize("broken", [False, True])
def test_some_layers_may_have_more_than_most(tmp_path: Path, broken: bool) -> None:
    """Such as an n-gram memory. What one lacks is told by the layers that are most like it."""
    folder = tmp_path / "model"
    make_checkpoint(folder, replace(SPEC, layers=6))
    tensors = read_tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    for number in (4, 5):
        tensors[f"model.layers.{number}.engram.weight"] = tensors["model.norm.weight"]
    if broken:
        tensors = {n: t for n, t in tensors.items() if not n.startswith("model.layers.6.self_attn")}
    write(folder, tensors, indexed=True)
    said = "model.layers.6: no self_attn in any shard, unlike other layers"
    warns(folder, *[said] * broken)


def test_attention_is_not_in_the_name_of_a_norm(without: Callable[..., Path]) -> None:
    warns(without(r"\.self_attn\.", QWEN), "model.layers: no attention in any shard")


@pytest.mark.parametrize("tied", [True, None])
def test_the_head_may_be_the_embedding(without: Callable[..., Path], tied: bool | None) -> None:
    warns(without("lm_head", tie_word_embeddings=tied))


@pytest.mark.parametrize(("kept", "more"), [((1, 3), ""), ((2,), ", and 1 more")])
def test_names_that_count_a_shard_that_nobody_has(
    tmp_path: Path, kept: tuple[int, ...], more: str
) -> None:
    """The index was made without it. What was in it may be in another file."""
    folder = tmp_path / "model"
    make_checkpoint(folder, SPEC)
    tensors = read_tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    files = {names[number - 1]: {} for number in kept} | {names[kept[0] - 1]: tensors}
    for name in files:
        write_tensors(folder / name, files[name] or {"extra": tensors["model.norm.weight"]})
    weight_map = {tensor: name for name in files for tensor in files[name] or ["extra"]}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    missing = next(name for name in names if name not in files)
    warns(
        folder,
        f"{missing}: {INDEX} does not name it, nor is it there, though the names of other shards "
        f"count it{more}",
    )
    write_tensors(folder / missing, {"stray": tensors["model.norm.weight"]})
    assert inspect(folder).warnings[0] == f"{missing}: is not named by {INDEX}, left out"


def test_a_config_without_a_vocabulary_tells_nothing(without: Callable[..., Path]) -> None:
    warns(without("lm_head", vocab_size=None))


# --- not a word -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_are_whole(tmp_path: Path, family: str) -> None:
    """Dense layers, linear attention, shared experts, vision, MTP: a layer may differ from its
    neighbours by what it is."""
    make(tmp_path / "model", family)
    found = inspect(tmp_path / "model")
    assert (found.state, found.warnings) == ("source", [])
