"""SGLang: what it cannot serve, its tensor-parallel rule and its serve command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..format.contract import GROUP_SIZE
from ..source.description import (
    algorithm_of,
    ignored_modules,
    is_compressed_tensors,
    is_fp8_hybrid,
    is_mixed_precision,
    settings_of,
)
from .engine import NO_LIST, Engine, KnownModels, Model

_NO_NAMES = ("HunYuanMoEV1ForCausalLM", "Grok1ForCausalLM", "Grok1ModelForCausalLM")
"""Models that give their FusedMoE no prefix (models/hunyuan.py:156, grok.py:160 in 0.5.23)."""

_UNFUSED = (
    "AfmoeForCausalLM",
    "DbrxForCausalLM",
    "DeepseekForCausalLM",
    "MiniCPM3ForCausalLM",
    "MiniCPMForCausalLM",
    "MiniCPMSALAForCausalLM",
    "UnlimitedOCRForCausalLM",
    "XverseMoeForCausalLM",
)
"""Models with a module for each expert, with parameters of their own, or with no experts at all
(models/deepseek.py:132, dbrx.py:126, minicpm.py:527 in 0.5.23)."""

_DEEPSEEK_OCR = "DeepseekOCRForCausalLM"
"""Takes one of them for its text model where that has no MLA (models/deepseek_ocr.py:1489)."""

_KIMI_K3 = {"KimiK3ForConditionalGeneration", "KimiK3LinearForCausalLM"}

NO_UNGATED = "SGLang lays out experts of compressed-tensors as if they had a gate"
"""schemes/compressed_tensors_w4a4_nvfp4_moe.py:77 and :215 in 0.5.23."""


def _why_not(model: Model) -> str | None:
    # model_loader/utils.py:209 in 0.5.23: QuantMixtralForCausalLM, with a module for each expert.
    is_modelopt = not is_compressed_tensors(model.section)
    if is_modelopt and "MixtralForCausalLM" in model.architectures:
        return "SGLang has no fused MoE layers for a Mixtral that is quantized by ModelOpt"
    # models/mllama4.py:616 in 0.5.23 permutes the rows of q and k as if they were not packed.
    if (
        is_modelopt
        and "Llama4ForConditionalGeneration" in model.architectures
        and any(
            each.dtype == "U8" and each.name.endswith(("q_proj", "k_proj"))
            for each in model.linears
        )
    ):
        return "SGLang does not load a Llama 4 whose attention is NVFP4, too"
    if not is_modelopt and not model.gated:
        return NO_UNGATED
    # models/kimi_k3.py:3209 in 0.5.23 looks for packed weights under other names, and
    # schemes/compressed_tensors_w4a4_nvfp4_moe.py:269 knows no SiTU.
    if not is_modelopt and _KIMI_K3 & set(model.architectures):
        return "SGLang does not load a Kimi K3 whose NVFP4 experts are of compressed-tensors"
    if spelling := _unknown_spelling(model.section):
        return f"SGLang does not know the spelling {spelling}"
    if is_fp8_hybrid(model.section):
        # configs/model_config.py:788 in 0.5.23.
        is_mixed = algorithm_of(model.section) == "MIXED_PRECISION"
        if not is_mixed or model.section.get("group_size") is None:
            return "SGLang wants MIXED_PRECISION and a group_size beside moe_quant_algo"
    elif is_mixed_precision(model.section):
        if _names_no_experts(model):
            return "SGLang looks for experts in mixed precision among modules named experts"
    # quantization/modelopt_quant.py:1682 in 0.5.23.
    elif not isinstance(ignored_modules(model.section), list):
        return NO_LIST.format(SGLANG.title)
    elif is_modelopt and type(_group_size(model)) is not int:
        return f"SGLang wants a number for the group_size, not {_group_size(model)!r}"
    for name in _NO_NAMES:
        if name in model.architectures:
            return f"SGLang's {name} does not tell a plugin which of its MoE layers is which"
    unfused = (*_UNFUSED, *([] if model.text.get("use_mla", True) else [_DEEPSEEK_OCR]))
    for name in unfused:
        if name in model.architectures:
            return f"SGLang's {name} has no fused MoE layers"
    # models/laguna.py:813 in 0.5.23.
    if "LagunaForCausalLM" in model.architectures:
        return "SGLang's LagunaForCausalLM insists on having loaded tensors of each expert"
    return None


def _unknown_spelling(section: Mapping[str, Any]) -> str | None:
    """A name that vLLM takes for the one that SGLang knows (configs/model_config.py:1735 and :1852
    in 0.5.23)."""
    method = str(section.get("quant_method", "modelopt"))
    algorithm = settings_of(section).get("quant_algo")
    if is_compressed_tensors(section):
        return method if "_" in method else None
    if method != "modelopt" and method.lower() == "modelopt":
        return method
    if not isinstance(algorithm, str) or algorithm.isupper() or is_fp8_hybrid(section):
        return None
    return algorithm


def _group_size(model: Model) -> object:
    """Where SGLang looks for it (quantization/modelopt_quant.py:1640 in 0.5.23)."""
    settings = settings_of(model.section)
    groups = settings.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    for each in (settings, first.get("weights") if isinstance(first, dict) else None):
        if isinstance(each, dict) and each.get("group_size") is not None:
            return each["group_size"]
    return GROUP_SIZE


def _names_no_experts(model: Model) -> bool:
    """Whether quantized_layers has no name with ``experts`` in it, by which SGLang finds its fused
    layers (quantization/modelopt_quant.py:1002 in 0.5.23). Step-3.5 has moe.gate_proj."""
    layers = settings_of(model.section).get("quantized_layers")
    if not isinstance(layers, dict) or not layers:  # hf_quant_config.json may have them
        return False
    return not any("experts" in name.split(".") for name in layers)


# SGLang rounds I/T up to a multiple of 64, or of 128 without a gate, cuts there and fills with
# zeros, as the slices do.
SGLANG = Engine(
    name="sglang",
    title="SGLang",
    models=KnownModels.read(Path(__file__).with_name("sglang_models.txt")),
    why_not=_why_not,
    can_cut=lambda _geometry, _size: True,
    least_share=lambda _: 1,
    # layers/vocab_parallel_embedding.py:273 in 0.5.23 pads until T divides it.
    can_cut_vocabulary=lambda _rows, _size: True,
    serve_command=lambda folder: (
        f"python -m sglang.launch_server --model-path {folder} "
        "--moe-runner-backend flashinfer_trtllm"
    ),
)
