"""What the converter says of engines that are not installed: which can serve a model, at which
sizes, and how. That the reasons are true is for tests/engines/reasons.py."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import model_zoo
from support.folders import edit_json
from support.golden import CASES, runs_of
from support.make_checkpoint import Spec, make_checkpoint
from support.specs import MANY_SHARDS
from support.tensors import StoredTensor, read_tensors, write_tensors
from typer.testing import CliRunner

from fp4moe_convert import CheckpointError, convert, inspect
from fp4moe_convert.cli.commands import app
from fp4moe_convert.engines import ENGINES, tensor_parallel_sizes
from fp4moe_convert.engines.engine import Engine, Model
from fp4moe_convert.engines.sglang import SGLANG
from fp4moe_convert.engines.vllm import VLLM
from fp4moe_convert.format.contract import Geometry
from fp4moe_convert.prospects import CannotServe, CanServe, Prospects
from fp4moe_convert.source.checkpoint import open_checkpoint
from fp4moe_convert.source.linears import Linear, blocks_of, decoder_linears
from fp4moe_convert.storage.local import LocalFolder

ANY = Model((), {}, {})

NAMES = [engine.name for engine in ENGINES]

by_engine = pytest.mark.parametrize("engine", ENGINES, ids=NAMES)


def sizes_of(engine: Engine, case: str) -> list[int]:
    spec = CASES[case]
    geometry = Geometry(spec.experts, spec.hidden, spec.intermediate, gated=not spec.ungated)
    return engine.tensor_parallel_sizes(geometry)


@by_engine
@pytest.mark.parametrize("case", CASES)
def test_the_rule_of_an_engine_agrees_with_its_recorded_runs(engine: Engine, case: str) -> None:
    """What it refused is not listed, and nothing is listed that it was not seen to load. That each
    rank then is a slice of the file is what test_golden.py compares."""
    listed = sizes_of(engine, case)
    runs = list(runs_of(case, engine.name))
    refused = {run["tp_size"] for run in runs if "refused" in run}
    assert not refused & set(listed)
    for size in {run["tp_size"] for run in runs} & set(listed):
        ranks = {run["tp_rank"] for run in runs if run["tp_size"] == size}
        assert ranks == set(range(size))
    assert {size for size in listed if size <= 4} <= {run["tp_size"] for run in runs} - refused
    if engine.name == "sglang":  # it cuts as the file is cut: all that it loads is served
        assert {run["tp_size"] for run in runs} - refused <= set(listed)


@pytest.mark.parametrize(
    ("intermediate", "sglang", "vllm"),
    [
        (2048, [1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64]),  # DeepSeek-V3
        (1536, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]),
        (768, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]),
        (1856, [1, 2, 4, 8, 16, 29, 32, 58, 64], [1, 2, 4, 29, 58]),  # Nemotron-3 Nano
        (80, [1, 2, 4, 5, 8, 10, 16, 20, 40], [1, 5]),
        (64, [1, 2, 4, 8, 16, 32, 64], [1, 2, 4]),
    ],
)
def test_sizes_that_engines_can_serve(
    intermediate: int, sglang: list[int], vllm: list[int]
) -> None:
    geometry = Geometry(64, 256, intermediate)
    assert tensor_parallel_sizes(ANY, [geometry]) == {"sglang": sglang, "vllm": vllm}


def test_a_size_must_suit_all_layers() -> None:
    layers = [Geometry(64, 256, 192), Geometry(64, 256, 128), Geometry(128, 256, 192)]
    sizes = tensor_parallel_sizes(ANY, layers)
    assert sizes == {"sglang": [1, 2, 4, 8, 16, 32, 64], "vllm": [1, 2, 4]}
    assert tensor_parallel_sizes(ANY, iter(layers)) == sizes


@pytest.mark.parametrize(
    ("text", "vllm"),
    [
        ({}, [1, 2, 3, 4, 6, 8, 12]),
        ({"min_moe_intermediate_per_partition": 512}, [1, 2, 3, 4, 6]),
        ({"min_moe_intermediate_per_partition": 9999}, [1]),
    ],
)
def test_shares_that_vllm_would_pad_are_no_sizes(text: dict[str, Any], vllm: list[int]) -> None:
    kimi = Model(("KimiK3ForConditionalGeneration",), text, {})
    sizes = tensor_parallel_sizes(kimi, [Geometry(896, 3584, 3072)])
    assert sizes["vllm"] == vllm
    assert 64 in sizes["sglang"]


def test_without_layers_there_are_no_sizes() -> None:
    assert tensor_parallel_sizes(ANY, []) == {}


EVERYWHERE = Prospects({name: CanServe([1]) for name in NAMES})


@by_engine
@pytest.mark.parametrize(
    "folder", ["/models/out", "my model", "it's", "$(reboot)", "a;b", "-x", "modèle", 'two "words"']
)
def test_the_serve_command_names_the_folder_to_a_shell(engine: Engine, folder: str) -> None:
    """As one word, whatever is in it."""
    command = EVERYWHERE.commands(folder)[engine.name]
    words = shlex.split(command)
    assert words.count(folder) == 1
    assert "\n" not in command
    assert words[-1] == "flashinfer_trtllm"


def test_serve_commands() -> None:
    assert EVERYWHERE.commands("/models/my out") == {
        "sglang": "python -m sglang.launch_server --model-path '/models/my out' "
        "--moe-runner-backend flashinfer_trtllm",
        "vllm": "vllm serve '/models/my out' --moe-backend flashinfer_trtllm",
    }
    outlook = Prospects({"vllm": CanServe([1]), "sglang": CannotServe("why")})
    assert outlook.commands("x").keys() == {"vllm"}


# --- why an engine cannot serve a model -----------------------------------------------------------


def group(**activations: Any) -> dict[str, Any]:
    return {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, **activations}


W4A4, W4A16 = group(input_activations={"num_bits": 4}), group()
NESTED = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None}


@pytest.mark.parametrize(
    ("section", "served"),
    [
        ({"config_groups": {"group_0": W4A4}}, True),
        ({"config_groups": {"group_0": W4A16}}, False),
        ({"config_groups": {"group_0": group(input_activations=None)}}, False),
        ({"config_groups": {"group_0": group(input_activations={})}}, True),
        ({"config_groups": {"group_0": W4A16, "group_1": W4A4}}, True),
        ({"config_groups": {"group_0": W4A16, "group_1": W4A16}}, False),
        ({"config_groups": {}}, True),
        ({}, True),
        ({"quantization": {**NESTED, "exclude_modules": []}}, True),
        ({"quantization": NESTED}, False),
        ({"quantization": {}}, False),
        ({"quantization": {"quant_algo": "MIXED_PRECISION"}}, True),
        ({"quant_algo": "MIXED_PRECISION", "config_groups": {"group_0": W4A16}}, True),
    ],
    ids=str,
)
def test_sections_that_vllm_cannot_serve(section: dict[str, Any], served: bool) -> None:
    """SGLang takes an NVFP4 section without a word on activations for W4A4."""
    model = Model(("DeepseekV3ForCausalLM",), {}, section)
    assert SGLANG.why_not(model) is None
    assert (VLLM.why_not(model) is None) == served


HYBRID = {
    "quant_method": "fp8",
    "quant_algo": "MIXED_PRECISION",
    "moe_quant_algo": "NVFP4",
    "group_size": 16,
}


@pytest.mark.parametrize(
    ("changes", "model_type", "cannot"),
    [
        ({}, "deepseek_v4", set()),
        ({"group_size": None}, "deepseek_v4", {"sglang"}),
        ({"quant_algo": "MIXED"}, "deepseek_v4", {"sglang"}),
        ({}, "deepseek_v3", {"vllm"}),
        ({"moe_quant_algo": "MXFP4", "group_size": None}, "deepseek_v3", set()),
    ],
    ids=str,
)
def test_engines_look_for_nvfp4_amid_fp8_where_all_is_said(
    changes: dict[str, Any], model_type: str, cannot: set[str]
) -> None:
    model = Model(("DeepseekV4ForCausalLM",), {"model_type": model_type}, HYBRID | changes)
    assert {engine.name for engine in ENGINES if engine.why_not(model)} == cannot


COMPRESSED = {"quant_method": "compressed-tensors"}
MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
PLAIN = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


@pytest.mark.parametrize(
    ("section", "cannot"),
    [
        (PLAIN | {"group_size": "16"}, {"sglang": "wants a number for the group_size, not '16'"}),
        (
            {"config_groups": {"a": W4A4 | {"weights": {"group_size": "16"}}}},
            {"sglang": "wants a number"},
        ),
        (PLAIN | {"group_size": 16, "config_groups": {"a": group(input_activations={})}}, {}),
        (PLAIN | {"quant_algo": "nvfp4"}, {"sglang": "does not know the spelling nvfp4"}),
        (PLAIN | {"quant_method": "ModelOpt"}, {"sglang": "does not know the spelling ModelOpt"}),
        (PLAIN | {"quant_method": "MODELOPT_FP4"}, {}),
        (PLAIN | {"ignore": None}, dict.fromkeys(("sglang", "vllm"), "wants a list")),
        (PLAIN | {"ignore": "lm_head"}, dict.fromkeys(("sglang", "vllm"), "wants a list")),
        (
            {"quantization": NESTED | {"exclude_modules": None}},
            dict.fromkeys(("sglang", "vllm"), "wants a list"),
        ),
        (MIXED | {"group_size": "16"}, {}),
        (MIXED | {"quant_algo": "mixed_precision"}, {"sglang": "does not know the spelling"}),
        (MIXED | {"ignore": None}, {"vllm": "wants a list"}),
        (COMPRESSED | {"ignore": None}, dict.fromkeys(("sglang", "vllm"), "wants a list")),
        (COMPRESSED | {"quant_method": "Compressed-Tensors"}, {}),
        (
            COMPRESSED | {"quant_method": "compressed_tensors"},
            {"sglang": "does not know the spelling compressed_tensors"},
        ),
        (HYBRID | {"moe_quant_algo": "nvfp4", "quant_algo": "mixed_precision"}, {}),
        (HYBRID | {"group_size": "16", "ignore": None}, {}),
    ],
    ids=str,
)
def test_settings_in_another_form(section: dict[str, Any], cannot: dict[str, str]) -> None:
    """What both engines make of each was seen where they load a model with it."""
    model = Model(("DeepseekV4ForCausalLM",), {"model_type": "deepseek_v4"}, section)
    reasons = {engine: engine.why_not(model) for engine in ENGINES}
    found = {engine.name: reason for engine, reason in reasons.items() if reason is not None}
    assert found.keys() == cannot.keys()
    for engine in ENGINES:
        assert found.get(engine.name, "").startswith(
            f"{engine.title} {cannot[engine.name]}" if engine.name in cannot else ""
        )


@pytest.mark.parametrize(
    ("modules", "served"),
    [
        (["model.layers.1.moe.gate_proj", "model.layers.1.shared_experts.up_proj"], False),
        (["model.layers.1.moe.gate_proj", "model.layers.1.moe.experts"], True),
        (["model.layers.1.mlp.experts.0.up_proj"], True),
        ([], True),
        (None, True),
    ],
    ids=str,
)
def test_sglang_looks_for_experts_by_the_name_of_its_own_module(
    modules: list[str] | None, served: bool
) -> None:
    layers = modules if modules is None else {name: {"quant_algo": "NVFP4"} for name in modules}
    section = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    for each in (section, {"quantization": section}):
        model = Model(("Step3p5ForCausalLM",), {}, each)
        assert VLLM.why_not(model) is None
        assert (SGLANG.why_not(model) is None) == served
    assert SGLANG.why_not(Model((), {}, section | {"quant_algo": "NVFP4"})) is None


def test_sglang_has_another_mixtral_for_compressed_tensors() -> None:
    compressed = Model(("MixtralForCausalLM",), {}, {"quant_method": "compressed-tensors"})
    assert SGLANG.why_not(compressed) is None
    assert SGLANG.why_not(replace(compressed, gated=False))
    assert SGLANG.why_not(Model(("MixtralForCausalLM",), {}, {"quant_method": "modelopt"}))


def pack(names: str) -> Callable[[Path], None]:
    """Makes NVFP4 of the weights whose names match."""

    def change(model_dir: Path) -> None:
        tensors = read_tensors(model_dir)
        for path in model_dir.glob("*.safetensors*"):
            path.unlink()
        for name in [name for name in tensors if re.fullmatch(names, name)]:
            rows, cols = tensors[name].shape
            tensors[name] = StoredTensor("U8", (rows, cols // 2), bytes(rows * cols // 2))
            scales = StoredTensor("F8_E4M3", (rows, cols // 16), bytes(rows * cols // 16))
            tensors[f"{name}_scale"] = scales
        write_tensors(model_dir / "model.safetensors", tensors)

    return change


@pytest.mark.parametrize(
    ("packed", "served"),
    [
        (r"language_model\..*self_attn\.[qkvo]_proj\.weight", False),
        (r"vision_model\..*self_attn\.[qkvo]_proj\.weight", True),
        (r"language_model\..*self_attn\.[vo]_proj\.weight", True),
    ],
)
@pytest.mark.parametrize("ignored", ["*vision_model*self_attn*", "*router*"])
def test_sglang_loads_no_llama_4_with_attention_in_nvfp4(
    tmp_path: Path, packed: str, served: bool, ignored: str
) -> None:
    """Whatever the list of what is not quantized says."""
    model = tmp_path / "model"
    model_zoo.make(model, "llama4")
    pack(packed)(model)
    section = json.loads((model / "config.json").read_text())["quantization_config"]
    edit_json(model / "config.json", quantization_config=section | {"ignore": [ignored]})
    found = inspect(model).prospects
    assert "vllm" in found.tensor_parallel
    assert ("sglang" in found.tensor_parallel) == served


def test_attention_of_compressed_tensors_may_be_nvfp4() -> None:
    linear = Linear("self_attn.q_proj", "U8", (256, 256), (1, 16))
    llama = Model(("Llama4ForConditionalGeneration",), {}, {}, linears=frozenset([linear]))
    assert SGLANG.why_not(llama)
    assert SGLANG.why_not(replace(llama, architectures=("Qwen3MoeForCausalLM",))) is None
    assert SGLANG.why_not(replace(llama, section={"quant_method": "compressed-tensors"})) is None


@pytest.mark.parametrize(
    ("architecture", "text", "cannot"),
    [
        ("DeepseekV3ForCausalLM", {}, set()),
        ("MixtralForCausalLM", {}, {"sglang"}),
        ("HunYuanMoEV1ForCausalLM", {}, {"sglang"}),
        ("Grok1ForCausalLM", {}, {"sglang"}),
        ("Step3p5ForCausalLM", {"swiglu_limits": [0, None, 7.0]}, {"vllm"}),
        ("Step3p7ForConditionalGeneration", {"swiglu_limits": [7.0]}, {"vllm"}),
        ("Step3p5ForCausalLM", {"swiglu_limits": [0, None]}, set()),
        ("Step3p5ForCausalLM", {"swiglu_limits": "7"}, set()),
        ("Gemma4ForConditionalGeneration", {}, set()),
        ("AfmoeForCausalLM", {}, {"sglang"}),
        ("DeepseekForCausalLM", {}, {"sglang"}),
        ("XverseMoeForCausalLM", {}, {"sglang"}),
        ("MiniCPMForCausalLM", {}, {"sglang", "vllm"}),
        ("DeepseekOCRForCausalLM", {"use_mla": False}, {"sglang"}),
        ("DeepseekOCRForCausalLM", {"use_mla": True}, set()),
        ("KimiK25ForConditionalGeneration", {}, set()),
    ],
)
def test_models_that_an_engine_cannot_serve(
    architecture: str, text: dict[str, Any], cannot: set[str]
) -> None:
    model = Model((architecture,), text, {})
    reasons = {engine: engine.why_not(model) for engine in ENGINES}
    found = {engine: reason for engine, reason in reasons.items() if reason is not None}
    assert {engine.name for engine in found} == cannot
    assert all(reason.startswith(engine.title) for engine, reason in found.items())


LOOKS_FOR_W2 = "looks for the w2 of experts, not for their down_proj"


@pytest.mark.parametrize(
    ("architectures", "down", "cannot"),
    [
        (("MiniMaxM2ForCausalLM",), "w2", []),
        (("MiniMaxM2ForCausalLM",), "down_proj", ["sglang", "vllm"]),
        (("MixtralForCausalLM",), "down_proj", ["sglang"]),
        (("DeepseekV4ForCausalLM",), "w2", []),
        (("Qwen3MoeForCausalLM",), "w2", ["sglang", "vllm"]),
        (("Qwen3MoeForCausalLM",), "down_proj", []),
        (("NobodysForCausalLM", "MiniMaxM2ForCausalLM"), "down_proj", ["sglang", "vllm"]),
        (("Qwen3MoeForCausalLM", "MiniMaxM2ForCausalLM"), "down_proj", []),
        (("NobodysForCausalLM",), "w2", []),
    ],
    ids=str,
)
def test_a_loader_looks_for_experts_by_their_names(
    architectures: tuple[str, ...], down: str, cannot: list[str]
) -> None:
    model = Model(architectures, {}, {}, downs=frozenset([down]))
    assert [each.name for each in ENGINES if each.why_not_by_names(model)] == cannot


def test_names_that_no_loader_looks_for_are_found(model_dir: Path, tmp_path: Path) -> None:
    """Before the conversion by the experts, after it by the stop tensors."""
    convert(model_dir, tmp_path / "out")
    for folder in (model_dir, tmp_path / "out"):
        call_it("MiniMaxM2ForCausalLM")(folder)
    assert inspect(tmp_path / "out").prospects.cannot_serve == {
        engine.name: f"{engine.title}'s MiniMaxM2ForCausalLM {LOOKS_FOR_W2}" for engine in ENGINES
    }
    with pytest.raises(CheckpointError, match=f"no engine could serve it .*{LOOKS_FOR_W2}"):
        convert(model_dir, tmp_path / "other")


def test_what_layers_that_pass_call_their_experts_does_not_matter(tmp_path: Path) -> None:
    spec = Spec(1, 0, 2, 256, 64, vocab_size=16, mtp=True, layout="single")
    make_checkpoint(tmp_path, spec)
    path = tmp_path / "model.safetensors"
    mtp = "model.layers.1.mlp.experts."
    tensors = read_tensors(tmp_path)
    write_tensors(
        path,
        {
            name.replace("down_proj", "w2") if name.startswith(mtp) else name: tensor
            for name, tensor in tensors.items()
        },
    )
    found = inspect(tmp_path)
    assert found.passed_layers.keys() == {mtp[:-1]}
    assert found.prospects.cannot_serve == {}


@by_engine
def test_an_engine_knows_its_models(engine: Engine) -> None:
    known = {"DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM", "HunYuanMoEV1ForCausalLM"}
    assert known <= engine.models.downs.keys()
    assert engine.models.release in {"0.5.23", "0.33.0"}


# --- as the commands say it -----------------------------------------------------------------------


def fp4moe(*arguments: object) -> Any:
    """The JSON object that a command prints."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def only(engine: str, of: dict[str, Any]) -> Any:
    assert of.keys() == {engine}
    return of[engine]


def make_weight_only(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    section = config["quantization_config"]
    for each in section["config_groups"].values():
        del each["input_activations"]
    edit_json(model_dir / "config.json", quantization_config=section)


def call_it(*names: str) -> Callable[[Path], None]:
    return lambda model_dir: edit_json(model_dir / "config.json", architectures=list(names) or None)


CASES_OF_ONE = {
    "weight-only": (make_weight_only, "sglang", "cannot_serve", "weight-only (W4A16)"),
    "mixtral": (call_it("MixtralForCausalLM"), "vllm", "cannot_serve", "no fused MoE layers for a"),
    "not in vllm": (
        call_it("BailingMoeV2ForCausalLMNextN", "LLaDA2MoeModelLM"),
        "sglang",
        "not_tried",
        "vLLM 0.33.0 has no model BailingMoeV2ForCausalLMNextN or LLaDA2MoeModelLM",
    ),
    "not in sglang": (
        call_it("AXK1ForCausalLM"),
        "vllm",
        "not_tried",
        "SGLang 0.5.23 has no model AXK1ForCausalLM",
    ),
}


@pytest.mark.parametrize("case", CASES_OF_ONE)
def test_only_engines_that_can_are_named(model_dir: Path, tmp_path: Path, case: str) -> None:
    change, can, kind, why = CASES_OF_ONE[case]
    change(model_dir)
    out = tmp_path / "out"
    planned = fp4moe("convert", model_dir, out, "--dry-run")
    converted = fp4moe("convert", model_dir, out, "--quiet")
    inspected, source = fp4moe("inspect", out), fp4moe("inspect", model_dir)
    assert source["state"] == "source"
    assert source["serve"] == {}
    for said in (planned, converted, inspected, source):
        assert said["tensor_parallel"].keys() == {can}
        other = next(name for name in NAMES if name != can)
        assert why in only(other, said[kind])
        assert said["not_tried" if kind == "cannot_serve" else "cannot_serve"] == {}
    for said in (planned, converted, inspected):
        assert f" {out} " in only(can, said["serve"])
    for arguments in (
        ["convert", model_dir, out, "--dry-run"],
        ["convert", model_dir, out, "--quiet"],
        ["inspect", out],
        ["inspect", model_dir],
    ):
        shown = CliRunner().invoke(app, [str(argument) for argument in arguments]).stdout
        assert why in shown
        assert f"{kind.replace('_', ' ')}  " in shown
        commands = {"sglang": "python -m sglang.launch_server ", "vllm": "vllm serve "}
        serving = {name for name, command in commands.items() if command in shown}
        assert serving == (set() if arguments[-1] is model_dir else {can})


@pytest.mark.parametrize("names", [(), ("NobodysForCausalLM",)], ids=str)
def test_a_model_that_no_engine_is_known_to_have_is_converted(
    model_dir: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """A later release may have it."""
    call_it(*names)(model_dir)
    report = convert(model_dir, tmp_path / "out")
    assert report.serve == report.prospects.tensor_parallel == {}
    assert report.prospects.not_tried.keys() == set(NAMES)


def test_a_model_that_no_engine_can_serve_is_refused(model_dir: Path, tmp_path: Path) -> None:
    make_weight_only(model_dir)
    call_it("MixtralForCausalLM")(model_dir)
    message = (
        r"no engine could serve it once it is converted: SGLang has no .*; vLLM takes .*; serve .*"
    )
    with pytest.raises(CheckpointError, match=message):
        convert(model_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, ["convert", str(model_dir), "out", "--dry-run"])
    assert result.exit_code == 1
    found = inspect(model_dir)
    assert found.state == "unsupported"
    assert "no engine could serve it" in str(found.reason)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"),
    [
        (4, None, [1, 2, 4]),
        (6, None, [1, 2, 3, 6]),
        ("6", None, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]),
        (0, -1, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]),
        (48, 8, [1, 2, 4, 8, 16, 24, 48]),  # MiniMax-M2
        (96, 8, [1, 2, 4, 8, 16, 24, 32, 48]),  # GLM-4.6
        (6, 2, [1, 2, 6]),
        (64, 1, [1, 2, 4, 8, 16, 32, 64]),  # DeepSeek-V4
        (48, 48, [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]),
    ],
)
def test_attention_is_cut_by_heads(heads: object, kv_heads: object, sizes: list[int]) -> None:
    model = Model((), {"num_attention_heads": heads, "num_key_value_heads": kv_heads}, {})
    cut = [size for size in sizes if size <= 48]  # I is 1536
    geometry = Geometry(64, 256, 1536)
    assert tensor_parallel_sizes(model, [geometry]) == {"sglang": sizes, "vllm": cut}


POWERS = [1, 2, 4, 8, 16, 32, 64]


def powers(text: dict[str, Any], *linears: Linear, experts: int = 256) -> dict[str, list[int]]:
    """The powers of two at which a model can be cut whose I is no matter."""
    model = Model((), text, {}, linears=frozenset(linears))
    sizes = tensor_parallel_sizes(model, [Geometry(experts, 256, 2**20)])
    return {name: [size for size in POWERS if size in own] for name, own in sizes.items()}


def up_to(size: int) -> dict[str, list[int]]:
    return {name: [power for power in POWERS if power <= size] for name in NAMES}


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ({"num_attention_heads": 64, "o_groups": 8}, 8),  # DeepSeek-V4-Flash
        ({"linear_num_key_heads": 16, "linear_num_value_heads": 64}, 16),  # Qwen3.5
        ({"mamba_num_heads": 64, "n_groups": 8}, 8),  # Nemotron-3 Nano
        ({"mamba_num_heads": 64, "n_groups": 1}, 64),
        ({"linear_attn_config": {"num_heads": 32}}, 32),  # Kimi K3
        ({"attention_other_setting": {"num_attention_heads": 4}}, 4),  # Step-3.5
        ({"swa_num_attention_heads": 32, "swa_num_key_value_heads": 8}, 32),  # MiMo-V2
        ({"num_global_key_value_heads": 2, "num_attention_groups": 8}, 64),
        ({"num_global_key_value_heads": 6}, 2),
        ({"n_group": 2, "index_n_heads": 2, "vision_config": {"num_heads": 2}}, 64),
        ({"linear_attn_config": None, "n_groups": "8", "o_groups": True}, 64),
    ],
    ids=str,
)
def test_what_else_config_counts_is_cut(text: dict[str, Any], most: int) -> None:
    assert powers(text) == up_to(most)


@pytest.mark.parametrize(
    ("linear", "most"),
    [
        (Linear("mlp.shared_experts.down_proj", "U8", (7168, 2048), (1, 16)), 64),
        (Linear("mlp.shared_expert.down_proj", "U8", (3072, 512), (1, 16)), 32),
        (Linear("mlp.down_proj", "U8", (2816, 2112), (1, 16)), 4),  # Gemma 4
        (Linear("mlp.down_proj", "BF16", (2816, 2112), (1, 1)), 64),
        (Linear("mlp.down_proj", "BF16", (2816, 48), (1, 1)), 16),
        (Linear("ffn.shared_experts.w2", "F8_E4M3", (4096, 2048), (128, 128)), 16),
        (Linear("ffn.shared_experts.w1", "F8_E4M3", (2048, 4096), (128, 128)), 16),
        (Linear("self_attn.q_b_proj", "F8_E4M3", (96 * 192, 1536), (128, 128)), 16),
        (Linear("mixer.out_proj", "U8", (2688, 4096), (1, 16)), 64),
        (Linear("self_attn.q_a_proj", "F8_E4M3", (128, 7168), (128, 128)), 64),
        (Linear("attn.indexer.wq_b", "F8_E4M3", (128, 1024), (128, 128)), 64),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_blocks_of_linear_layers_stay_whole(linear: Linear, most: int) -> None:
    assert powers({}, linear) == up_to(most)


def test_there_are_no_more_ranks_than_experts() -> None:
    assert powers({}, experts=8) == up_to(8)


def test_linear_layers_are_those_of_the_decoder(tmp_path: Path) -> None:
    model_zoo.make(tmp_path / "model", "deepseek_v4")
    checkpoint = open_checkpoint(LocalFolder(tmp_path / "model"))
    prefixes = inspect(tmp_path / "model").layers
    found = {each.name: each[1:] for each in decoder_linears(checkpoint, prefixes)}
    assert found["ffn.shared_experts.w2"] == ("F8_E4M3", (256, 512), (128, 128))
    assert found["attn.wq_b"] == ("F8_E4M3", (2048, 128), (128, 128))
    assert found["ffn.gate"] == ("BF16", (8, 256), (1, 1))
    assert not any("expert" in name and "shared" not in name for name in found)
    assert decoder_linears(checkpoint, []) == frozenset()


@pytest.mark.parametrize(
    ("features", "scales", "block"),
    [
        ((2048, 7168), None, (1, 1)),
        ((2048, 7168), (2048, 448), (1, 16)),
        ((2048, 7168), (16, 56), (128, 128)),
        ((2112, 192), (17, 2), (128, 128)),
        ((2048, 7168), (2048, 1), (1, 1)),  # one for each row
        ((2048, 7168), (2048, 224), (1, 32)),
        ((2048, 7168), (0, 1), (1, 1)),
    ],
    ids=str,
)
def test_blocks_are_told_by_the_number_of_scales(
    features: tuple[int, int], scales: tuple[int, int] | None, block: tuple[int, int]
) -> None:
    assert blocks_of(features, scales) == block


def test_a_shared_expert_in_nvfp4_sets_a_limit(tmp_path: Path) -> None:
    """Where I is 48, SGLang itself loads the original at T = 1 alone."""
    model, out = tmp_path / "model", tmp_path / "out"
    make_checkpoint(model, replace(MANY_SHARDS, intermediate=48, experts=8))
    convert(model, out)
    for each in (model, out):
        assert inspect(each).prospects.tensor_parallel == {"sglang": [1], "vllm": [1]}


@pytest.mark.parametrize(
    ("rows", "vllm"),
    [
        (200064, [1, 2, 3, 4, 6, 8, 16]),  # MiniMax-M2: 64 * 3 * 1042
        (151936, [1, 2, 4, 8, 16]),  # Qwen3
        (383, [1, 2, 3, 4, 6, 8, 16]),
        (385, [1, 2, 4, 8, 16]),
        ("385", [1, 2, 3, 4, 6, 8, 16]),
    ],
)
def test_vllm_cuts_the_vocabulary_in_equal_parts(rows: object, vllm: list[int]) -> None:
    sizes = tensor_parallel_sizes(Model((), {"vocab_size": rows}, {}), [Geometry(64, 256, 768)])
    assert [size for size in sizes["vllm"] if size in {1, 2, 3, 4, 6, 8, 16}] == vllm
    assert {3, 6} <= set(sizes["sglang"])


def test_heads_are_those_of_the_text_model(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    outer = {"architectures": config["architectures"], "num_attention_heads": 3}
    vision = {"num_hidden_layers": 2, "num_attention_heads": 5}
    nested = {**outer, "text_config": config, "vision_config": vision}
    (model_dir / "config.json").write_text(json.dumps(nested))
    assert inspect(model_dir).prospects.tensor_parallel["sglang"] == [1, 2, 4]
