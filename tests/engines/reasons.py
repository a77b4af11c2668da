#!/usr/bin/env python3
"""Ask an engine whether what the converter says of it without it is true.

    PYTHONPATH=tests ~/.cache/fp4moe-engines/vllm/bin/python tests/engines/reasons.py RESULTS_JSON

`test_drivers.py` runs it in both engines' environments. No model is loaded.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from driver import Outcomes, main
from support import model_zoo, record_models
from support.cpu_engines import sglang_cpu
from support.folders import edit_json

from fp4moe_convert.engines.engine import Engine, Model
from fp4moe_convert.engines.sglang import SGLANG
from fp4moe_convert.engines.vllm import VLLM
from fp4moe_convert.source.linears import Linear

W4A4 = {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 4}}
W4A16 = {"weights": {"num_bits": 4}}
SIZE_IN_QUOTES = {**W4A4, "weights": {"num_bits": 4, "group_size": "16"}}
NESTED = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None}
SECTIONS: dict[str, dict[str, Any]] = {
    "no groups": {},
    "no group": {"config_groups": {}},
    "W4A4": {"config_groups": {"group_0": W4A4}},
    "W4A16": {"config_groups": {"group_0": W4A16}},
    "W4A16 by a null": {"config_groups": {"group_0": {**W4A16, "input_activations": None}}},
    "an empty object": {"config_groups": {"group_0": {**W4A16, "input_activations": {}}}},
    "one of two": {"config_groups": {"group_0": W4A16, "group_1": W4A4}},
    "nested": {"quantization": {**NESTED, "exclude_modules": []}},
    "nested without exclude_modules": {"quantization": NESTED},
    "a group size in quotes": {"group_size": "16"},
    "a group's size in quotes": {"config_groups": {"group_0": SIZE_IN_QUOTES}},
    "a size beside a group's in quotes": {
        "group_size": 16,
        "config_groups": {"group_0": SIZE_IN_QUOTES},
    },
    "small letters": {"quant_algo": "nvfp4"},
    "no list": {"ignore": None},
    "a module for a list": {"ignore": "lm_head"},
    "no list, nested": {"quantization": {**NESTED, "exclude_modules": None}},
    "nested without group_size": {
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "exclude_modules": []}
    },
}

HYBRID = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "quant_algo": "MIXED_PRECISION",
    "moe_quant_algo": "NVFP4",
    "group_size": 16,
}

MAKES_FUSED_LAYERS = re.compile(
    r"FusedMoE\(|FusedMoEFactory|get_moe_impl_class|(?<!def )init_vllm_registered_model"
)
IMPORTED = re.compile(r"from (?:\.|sglang\.srt\.models\.|vllm\.model_executor\.models\.)(\w+)")


def models_on_record(engine: Any) -> None:
    """The list of architectures is that of this release."""
    printed = subprocess.run(
        [sys.executable, record_models.__file__, engine.name],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (
        printed
        == Path(record_models.__file__)
        .parents[2]
        .joinpath("fp4moe_convert", "engines", f"{engine.name}_models.txt")
        .read_text()
    )


def models_of(engine: str, folder: str) -> Path:
    spec = importlib.util.find_spec(engine)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], folder)


def unfused_by(engine: Engine) -> set[str]:
    """The architectures that the converter says have no fused MoE layers."""
    reasons = {name: engine.why_not(Model((name,), {}, {})) for name in engine.models.downs}
    return {name for name, reason in reasons.items() if (reason or "").endswith("fused MoE layers")}


def unfused(models: Path) -> Iterator[Path]:
    """Modules of models that speak of experts, and neither make fused layers nor import a module
    that does."""
    texts: dict[str, str] = {}
    for path in models.rglob("*.py"):
        name = path.relative_to(models).parts[0].removesuffix(".py")
        texts[name] = texts.get(name, "") + path.read_text()
    makers = {name for name, text in texts.items() if MAKES_FUSED_LAYERS.search(text)}
    while more := {n for n in texts.keys() - makers if makers & set(IMPORTED.findall(texts[n]))}:
        makers |= more
    for name in texts.keys() - makers:
        path = models / f"{name}.py"
        if path.exists() and re.search(r"\b(num_)?experts\b", texts[name]):
            yield path


def cuts_linears(engine: Engine, nvfp4: Callable[[int], None], fp8: Callable[..., None]) -> None:
    """The engine refuses just those shares that the converter says it cannot cut.

    Args:
        engine: which.
        nvfp4: makes a layer's weights for one of two ranks, given the inputs of that.
        fp8: checks those of FP8 in blocks of 128, given the outputs and inputs of both ranks and
            of one.
    """

    def accepts(check: Callable[..., None], *sizes: int) -> bool:
        try:
            check(*sizes)
        except ValueError as error:
            if re.search("not multiple of 16|not divisible by", str(error)):
                return False
            raise
        return True

    def says(name: str, dtype: str, features: tuple[int, int], block: tuple[int, int]) -> bool:
        linears = frozenset([Linear(f"mlp.{name}", dtype, features, block)])
        return engine.can_cut_rest(Model((), {}, {}, linears=linears), 2)

    for share in (16, 24, 64, 192, 256):
        whole = 2 * share
        assert accepts(nvfp4, share) == says("down_proj", "U8", (512, whole), (1, 16)), share
        down, up = (512, whole, 512, share), (whole, 512, share, 512)
        assert accepts(fp8, *down) == says("down_proj", "F8_E4M3", down[:2], (128, 128)), share
        assert accepts(fp8, *up) == says("q_b_proj", "F8_E4M3", up[:2], (128, 128)), share


# --- vLLM -----------------------------------------------------------------------------------------


def section_in_vllm(section: dict[str, Any]) -> None:
    """vLLM refuses a section, or takes it for one that the backend has no kernels for, exactly
    where the converter says so."""
    from vllm.model_executor.layers.fused_moe.experts.trtllm_nvfp4_moe import (
        TrtLlmNvFp4ExpertsBase,
    )
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        kNvfp4Dynamic,
        kNvfp4Static,
    )

    flat = {} if "quantization" in section else {"quant_algo": "NVFP4"}
    try:
        config = ModelOptNvFp4Config.from_config({"quant_method": "modelopt", **flat, **section})
    except ValueError:
        served = False
    else:
        activations = None if config.quant_method == "W4A16_NVFP4" else kNvfp4Dynamic
        served = TrtLlmNvFp4ExpertsBase._supports_quant_scheme(kNvfp4Static, activations)
    assert (VLLM.why_not(Model((), {}, section)) is None) == served


def amid_fp8_in_vllm() -> None:
    """vLLM takes a section for one with experts of their own just for those models."""
    from vllm.models.deepseek_v41.quant_config import DeepseekV4FP8Config

    for model_type in (
        *("deepseek_v3", "deepseek_v4", "deepseek_v4_text", "deepseek_v41", "deepseek_v41_text"),
        *("deepseek_mtp", "glm4_moe", None),
    ):
        method = DeepseekV4FP8Config.override_quantization_method(
            HYBRID, None, SimpleNamespace(model_type=model_type)
        )
        why_not = VLLM.why_not(Model((), {"model_type": model_type}, HYBRID))
        assert (method is None) == (why_not is not None), model_type


def swiglu_step_in_vllm() -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.trtllm_nvfp4_moe import (
        TrtLlmNvFp4ExpertsBase,
    )

    assert not TrtLlmNvFp4ExpertsBase._supports_activation(MoEActivation.SWIGLUSTEP)
    assert TrtLlmNvFp4ExpertsBase._supports_activation(MoEActivation.SILU)


def unfused_in_vllm() -> None:
    from vllm.model_executor.models import registry

    stems = {path.stem for path in unfused(models_of("vllm", "model_executor/models"))}
    tables = registry._TEXT_GENERATION_MODELS | registry._MULTIMODAL_MODELS
    assert {name for name, (module, _) in tables.items() if module in stems} == unfused_by(VLLM)


def linears_in_vllm() -> None:
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.utils.fp8_utils import validate_fp8_block_shape

    def nvfp4(inputs: int) -> None:
        shapes = SimpleNamespace(
            input_size_per_partition=inputs, output_size_per_partition=64, num_partitions=1
        )
        scheme = modelopt.KNvfp4Static()
        with mock.patch.object(type(scheme), "register_params"):  # they ask for their rank
            scheme.create_weights(
                None, modelopt.WEIGHT, SimpleNamespace(group_size=16), shapes, None
            )

    def fp8(outputs: int, inputs: int, own_outputs: int, own_inputs: int) -> None:
        layer: Any = SimpleNamespace(tp_size=2)
        with mock.patch("vllm.distributed.get_tensor_model_parallel_world_size"):
            validate_fp8_block_shape(layer, inputs, outputs, own_inputs, [own_outputs], [128, 128])

    cuts_linears(VLLM, nvfp4, fp8)


# --- SGLang ---------------------------------------------------------------------------------------


def section_in_sglang(section: dict[str, Any]) -> None:
    """SGLang serves as W4A4 what it can read. It divides by the group's size, and matches each
    letter where there should be a list of modules."""
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config

    try:
        config = ModelOptFp4Config.from_config(
            {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                **section.get("quantization", section),
            }
        )
    except ValueError:
        served = False
    else:
        assert not config.is_w4a16
        served = isinstance(config.group_size, int) and isinstance(config.exclude_modules, list)
    assert (SGLANG.why_not(Model((), {}, section)) is None) == served


def spellings_in_sglang() -> None:
    """SGLang takes the quantization for NVFP4, or mixed, just where the converter says so."""
    from sglang.srt.configs.model_config import ModelConfig

    for family, changes in (
        *(("qwen3_moe", {"quant_method": method}) for method in ("ModelOpt", "MODELOPT_FP4")),
        ("qwen3_moe", {"quant_algo": "nvfp4"}),
        ("qwen3_5_moe-mixed", {"quant_algo": "mixed_precision"}),
        ("qwen3_moe-ct", {"quant_method": "compressed_tensors"}),
        ("qwen3_moe-ct", {"quant_method": "Compressed-Tensors"}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            model_zoo.make(Path(folder, "model"), family)
            path = Path(folder, "model", "config.json")
            section = json.loads(path.read_text())["quantization_config"] | changes
            edit_json(path, quantization_config=section)
            try:
                found = ModelConfig(f"{folder}/model").quantization
            except ValueError:
                found = None
        served = found in ("modelopt_fp4", "modelopt_mixed", "compressed-tensors")
        assert (SGLANG.why_not(Model((), {}, section)) is None) == served, changes


def amid_fp8_in_sglang() -> None:
    """SGLang finds the experts just in such a section."""
    from sglang.srt.configs.model_config import ModelConfig

    for changes in (
        *({}, {"group_size": None}, {"group_size": "16"}),
        *({"quant_algo": "MIXED"}, {"quant_algo": "mixed_precision"}),
        {"moe_quant_algo": "nvfp4"},
    ):
        section = HYBRID | changes
        with tempfile.TemporaryDirectory() as folder:
            model_zoo.make(Path(folder, "model"), "deepseek_v4")
            edit_json(Path(folder, "model", "config.json"), quantization_config=section)
            found = ModelConfig(f"{folder}/model").nvfp4_moe_meta
        assert (found is None) == (SGLANG.why_not(Model((), {}, section)) is not None), changes


def mixed_precision_in_sglang() -> None:
    """It finds the experts of Step-3.5 just where they are named as its own module."""
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptMixedPrecisionConfig

    for module in ("moe.gate_proj", "moe.experts", "moe.experts.gate_proj"):
        section = {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {f"model.layers.1.{module}": {"quant_algo": "NVFP4"}},
        }
        config = ModelOptMixedPrecisionConfig.from_config(section)
        algorithm = config._resolve_quant_algo("model.layers.1.moe.experts")
        assert (algorithm is None) == (SGLANG.why_not(Model((), {}, section)) is not None), module


def mixtral_in_sglang() -> None:
    """It takes another model, whose experts are modules of their own."""
    from sglang.srt.configs.model_config import ModelImpl
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.model_loader.utils import get_model_architecture

    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["MixtralForCausalLM"]),
        quantization="modelopt_fp4",
        model_impl=ModelImpl.AUTO,
    )
    model, _ = get_model_architecture(config)
    assert model.__name__ == "QuantMixtralForCausalLM"
    assert FusedMoE not in vars(sys.modules[model.__module__]).values()
    assert SGLANG.why_not(Model(("MixtralForCausalLM",), {}, {}))


def names_in_sglang() -> None:
    """Just those models give their fused layers no name that the converter says do not."""
    nameless = set()
    for path in models_of("sglang", "srt/models").glob("*.py"):
        tree = ast.parse(path.read_text())
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and makes_fused_layer(call):
                keywords = {keyword.arg for keyword in call.keywords}
                if not keywords & {"prefix", None}:
                    nameless |= set(record_models.entry_classes(tree))
    expert_models = {name for name in nameless if "Dense" not in name}
    assert expert_models
    others = {"LagunaForCausalLM", "MixtralForCausalLM", *unfused_by(SGLANG)}
    for name in SGLANG.models.downs:
        assert bool(SGLANG.why_not(Model((name,), {}, {}))) == (name in expert_models | others), (
            name
        )


def unfused_in_sglang() -> None:
    """Unlimited-OCR's module takes more from others than it uses."""
    found = {
        name
        for path in unfused(models_of("sglang", "srt/models"))
        for name in record_models.entry_classes(ast.parse(path.read_text()))
    }
    expected = unfused_by(SGLANG) - {"UnlimitedOCRForCausalLM"}
    assert found - {"QuantMixtralForCausalLM"} == expected


def laguna_in_sglang() -> None:
    """Laguna alone counts the tensors of each expert."""
    from sglang.srt.models import afmoe

    counting = {
        path.stem
        for path in Path(afmoe.__file__).parent.glob("*.py")
        if "routed-expert tensors were not loaded" in path.read_text()
    }
    assert counting == {"laguna"}


def kimi_k3_in_sglang() -> None:
    """Where experts are of compressed-tensors, it computes the scalars of SwiGLU for SiTU."""
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a4_nvfp4_moe as nvfp4,
    )
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod

    assert "situ" in inspect.getsource(ModelOptNvFp4FusedMoEMethod)
    assert "situ" not in inspect.getsource(nvfp4)
    section = {"quant_method": "compressed-tensors"}
    assert SGLANG.why_not(Model(("KimiK3ForConditionalGeneration",), {}, section))


def linears_in_sglang() -> None:
    import torch
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4LinearMethod

    config = SimpleNamespace(
        is_checkpoint_nvfp4_serialized=True,
        group_size=16,
        is_awq=False,
        weight_block_size=[128, 128],
    )
    method = object.__new__(ModelOptFp4LinearMethod)
    method.quant_config = config

    def nvfp4(inputs: int) -> None:
        layer = torch.nn.Module()
        method.create_weights(layer, inputs, [64], 0, 0, torch.bfloat16, weight_loader=print)

    def fp8(outputs: int, inputs: int, own_outputs: int, own_inputs: int) -> None:
        Fp8LinearMethod.validate_block_quant_shapes(
            SimpleNamespace(tp_group=SimpleNamespace(world_size=2)),
            config,
            inputs,
            own_inputs,
            outputs,
            own_outputs,
            [own_outputs],
        )

    cuts_linears(SGLANG, nvfp4, fp8)


def makes_fused_layer(call: ast.Call) -> bool:
    made_by = call.func.func if isinstance(call.func, ast.Call) else None
    return ast.unparse(call.func) == "FusedMoE" or (
        isinstance(made_by, ast.Name) and made_by.id == "get_moe_impl_class"
    )


CASES: dict[str, dict[str, Callable[[], None]]] = {
    "vllm": {
        "models on record": lambda: models_on_record(VLLM),
        **{f"section: {k}": lambda s=s: section_in_vllm(s) for k, s in SECTIONS.items()},
        "experts amid FP8": amid_fp8_in_vllm,
        "clamped SwiGLU of Step-3.5": swiglu_step_in_vllm,
        "experts that are not fused": unfused_in_vllm,
        "shares of linear layers": linears_in_vllm,
    },
    "sglang": {
        "models on record": lambda: models_on_record(SGLANG),
        **{f"section: {k}": lambda s=s: section_in_sglang(s) for k, s in SECTIONS.items()},
        "spellings": spellings_in_sglang,
        "experts amid FP8": amid_fp8_in_sglang,
        "mixed precision": mixed_precision_in_sglang,
        "Mixtral": mixtral_in_sglang,
        "layers without names": names_in_sglang,
        "experts that are not fused": unfused_in_sglang,
        "Laguna": laguna_in_sglang,
        "shares of linear layers": linears_in_sglang,
        "Kimi K3": kimi_k3_in_sglang,
    },
}


def case_names(engine: str) -> list[str]:
    return [*CASES[engine]]


def run(_work: Path, _families: Sequence[str]) -> Outcomes:
    engine = next(name for name in CASES if importlib.util.find_spec(name))
    if engine == "sglang":
        sglang_cpu.bootstrap()
    outcomes = Outcomes()
    for name, case in CASES[engine].items():
        try:
            case()
        except Exception:
            outcomes.record(name, False, traceback.format_exc())
        else:
            outcomes.record(name, True, "")
    return outcomes


if __name__ == "__main__":
    main(run)
