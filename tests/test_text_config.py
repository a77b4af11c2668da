"""Which object of config.json describes the text model, and what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.folders import edit_json

from fp4moe_convert import CheckpointError, convert
from fp4moe_convert.source.text_config import find_text_config, without_sections

TEXT = {"num_hidden_layers": 3, "n_routed_experts": 4}
VISION = {"num_hidden_layers": 27, "hidden_size": 64}
SECTION = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
OTHER_SECTION = {"quant_method": "fp8"}


def nested(path: str, value: object) -> Any:
    """``value`` below the keys of a dotted path."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def merged(*configs: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


# --- sizes ----------------------------------------------------------------------------------------

PLACES = [
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config.text_config",
    "a_config.of.some.depth",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("vision", ["vision_config", "a_tower", "thinker_config.audio_config"])
def test_experts_tell_the_text_model_from_others(place: str, vision: str) -> None:
    text = find_text_config(merged(nested(vision, VISION), nested(place, TEXT)))
    assert ".".join(text.path) == place
    assert (text.layer_count, text.expert_count(0)) == (3, 4)


def test_a_plain_model_is_its_own_text_model() -> None:
    text = find_text_config({**TEXT, "vision_config": VISION})
    assert (text.path, text.layer_count, text.expert_count(2)) == ((), 3, 4)


@pytest.mark.parametrize("place", PLACES[:-1])
def test_where_none_speaks_of_experts_names_decide(place: str) -> None:
    config = merged({"vision_config": VISION}, nested(place, {"num_hidden_layers": 3}))
    text = find_text_config(config)
    assert (".".join(text.path), text.layer_count) == (place, 3)
    assert text.expert_count(0) is None


def test_of_two_with_experts_the_thinker_is_the_text_model() -> None:
    talker = {"num_hidden_layers": 20, "num_experts": 64}
    config = merged(
        nested("talker_config.text_config", talker), nested("thinker_config.text_config", TEXT)
    )
    assert find_text_config(config).layer_count == 3


def test_a_nested_text_config_is_preferred_to_the_top() -> None:
    """As engines do. Some wrappers repeat numbers of their parts, or of something else."""
    config = {**TEXT, "num_hidden_layers": 99, "text_config": TEXT}
    assert find_text_config(config).layer_count == 3


def test_a_name_tells_more_than_experts() -> None:
    """A draft has experts, too, and keys that nobody has heard of may count the text model's."""
    draft = {"num_hidden_layers": 1, "num_experts": 64}
    text = find_text_config({"text_config": {"num_hidden_layers": 3}, "draft_config": draft})
    assert (text.layer_count, text.expert_count(0)) == (3, None)
    text = find_text_config({"text_config": {"num_hidden_layers": 3, "draft_config": draft}})
    assert (text.layer_count, text.expert_count(0)) == (3, None)


def test_two_of_which_nothing_tells_are_refused() -> None:
    config = {"first": TEXT, "second": {**TEXT, "num_hidden_layers": 5}, "vision_config": VISION}
    message = (
        "config.json: first has 3 layers and second has 5, and nothing tells which of them is the "
        "text model's"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        find_text_config(config)
    assert find_text_config({"first": TEXT, "second": TEXT}).layer_count == 3


@pytest.mark.parametrize(
    "key", ["layers_block_type", "hybrid_override_pattern", "block_configs", "layer_types"]
)
def test_layers_that_are_listed_are_counted(key: str) -> None:
    """Nemotron-H of transformers 5 has no number of layers."""
    entries = {"hybrid_override_pattern": "ME*", "block_configs": [{}, {}, {}]}
    config = {key: entries.get(key, ["mamba", "moe", "attention"]), "n_routed_experts": 4}
    assert find_text_config({"text_config": config, "vision_config": VISION}).layer_count == 3
    assert find_text_config({**config, "num_hidden_layers": 2}).layer_count == 2


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"architectures": ["LongcatFlashForCausalLM"], "num_layers": 3}, 3),  # on the Hub
        ({"model_type": "longcat_flash", "num_layers": 3, "num_hidden_layers": 6}, 3),
        ({"model_type": "longcat_flash", "num_hidden_layers": 3}, 3),
        ({"model_type": "deepseek_v3", "num_layers": 3, "num_hidden_layers": 6}, 6),
        ({"architectures": ["Another"], "num_layers": 3}, None),
        ({"architectures": [None], "model_type": 1, "num_layers": 3}, None),
        ({"architectures": 4, "num_layers": 3}, None),
    ],
    ids=str,
)
def test_longcat_counts_layers_under_another_name(
    config: dict[str, Any], count: int | None
) -> None:
    config = {**config, "n_routed_experts": 4, "vision_config": {"num_layers": 9}}
    assert find_text_config(config).layer_count == count


@pytest.mark.parametrize("attentions", [None, 6])
def test_longcat_is_converted(model_dir: Path, attentions: int | None) -> None:
    edit_json(
        model_dir / "config.json",
        architectures=["LongcatFlashForCausalLM"],
        model_type=None,
        num_layers=json.loads((model_dir / "config.json").read_text())["num_hidden_layers"],
        num_hidden_layers=attentions,
    )
    report = convert(model_dir, model_dir.parent / "out")
    assert report.serve.keys() == {"sglang", "vllm"}


def test_a_config_without_layers_counts_none() -> None:
    assert find_text_config({"vision_config": {"depth": 3}}).layer_count is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"moe": {"num_experts": 8}}, 8),  # Mistral
        ({"ffn_config": {"moe_num_experts": 8}}, 8),  # DBRX
        ({"num_experts": 0, "num_local_experts": 8}, 8),
        ({"moe_num_experts": [64, 64]}, None),  # ERNIE's, of text and of vision
        ({"num_experts": [1, 8, 16]}, 8),
        ({"block_configs": [{}, {"n_routed_experts": 8}], "n_routed_experts": 16}, 8),
        ({"block_configs": [{}], "n_routed_experts": 16}, 16),
        ({}, None),
    ],
)
def test_the_number_of_experts(said: dict[str, Any], expected: int | None) -> None:
    config = {"text_config": {"num_hidden_layers": 3, **said}, "vision_config": VISION}
    assert find_text_config(config).expert_count(1) == expected


def test_the_number_of_experts_may_stand_around_the_layers() -> None:
    config = {"text_config": {"num_hidden_layers": 3}, "num_experts": 8}
    assert find_text_config(config).expert_count(0) == 8


@pytest.mark.parametrize("value", ["8", 8.0, -1, True, {"a": 1}], ids=repr)
def test_a_number_that_is_none_is_named_with_its_place(value: object) -> None:
    text = find_text_config({"text_config": {"num_hidden_layers": 3, "num_experts": value}})
    message = f"config.json: text_config.num_experts is {value!r}, expected a positive integer"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        text.expert_count(0)
    text = find_text_config({"text_config": {"num_hidden_layers": 3, "num_experts": [1, value, 1]}})
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        text.expert_count(1)


# --- quantization ---------------------------------------------------------------------------------


def test_the_section_is_looked_for_from_the_top_down() -> None:
    config = merged(nested("thinker_config.text_config", {**TEXT, "quantization_config": SECTION}))
    assert list(find_text_config(config).sections.values()) == [SECTION]
    config["thinker_config"]["quantization_config"] = OTHER_SECTION
    assert list(find_text_config(config).sections.values()) == [OTHER_SECTION, SECTION]
    config["compression_config"] = SECTION
    assert next(iter(find_text_config(config).sections)) == ((), "compression_config")
    config["quantization_config"] = OTHER_SECTION
    assert next(iter(find_text_config(config).sections)) == ((), "quantization_config")


def test_a_section_of_something_else_is_not_the_text_models() -> None:
    vision = {**VISION, "quantization_config": OTHER_SECTION}
    assert not find_text_config({"text_config": TEXT, "vision_config": vision}).sections


def test_only_the_text_models_sections_are_taken_out() -> None:
    vision = {**VISION, "quantization_config": OTHER_SECTION}
    text = {**TEXT, "quantization_config": SECTION}
    config = {"quantization_config": SECTION, "llm_config": text, "vision_config": vision}
    before = json.dumps(config)
    expected = {"llm_config": TEXT, "vision_config": vision}
    assert without_sections(find_text_config(config)) == expected
    assert json.dumps(config) == before


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "moved", [["quantization_config"], list(TEXT), ["quantization_config", *TEXT]]
)
def test_wherever_it_hangs_the_section_goes_to_the_top(
    model_dir: Path, place: str, moved: list[str]
) -> None:
    """That is where every engine looks first."""
    if moved == ["quantization_config"]:
        place = place.replace("a_config.of.some.depth", "thinker_config")  # known by its name
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    section = config["quantization_config"]
    text = {key: config.pop(key) for key in moved}
    path.write_text(json.dumps(merged(config, nested(place, text))))
    convert(model_dir, model_dir.parent / "out", verify=True)
    converted = json.loads((model_dir.parent / "out" / "config.json").read_text())
    assert converted.pop("quantization_config")["source"] == section
    config.pop("quantization_config", None)
    text.pop("quantization_config", None)
    assert converted == merged(config, nested(place, text))


def test_names_the_place_of_a_section_that_is_none(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", quantization_config=None, text_config=None)
    edit_json(model_dir / "config.json", text_config={"quantization_config": "nvfp4"})
    message = r"^config\.json: text_config\.quantization_config is not an object$"
    with pytest.raises(CheckpointError, match=message):
        convert(model_dir, model_dir.parent / "out")
