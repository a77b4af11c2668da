"""vLLM: what it cannot serve, its tensor-parallel rule and its serve command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..format.contract import GROUP_SIZE, Geometry
from ..source.description import ignored_modules, is_fp8_hybrid, is_mixed_precision
from .engine import NO_LIST, Engine, KnownModels, Model

_REQUIRED = ("group_size", "kv_cache_quant_algo", "exclude_modules")
"""Keys of hf_quant_config.json (quantization/modelopt.py:829 in 0.33.0)."""

_STEP = ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration")

_FP8_HYBRIDS = ("deepseek_v4", "deepseek_v4_text", "deepseek_v41", "deepseek_v41_text")

_UNFUSED = ("HfMoondream", "MiniCPMForCausalLM", "Moondream3ForCausalLM")
"""Models whose experts are parameters of their own (models/minicpm.py:85, moondream3.py:422 in
0.33.0)."""


def _why_not(model: Model) -> str | None:
    for name in _UNFUSED:
        if name in model.architectures:
            return f"vLLM's {name} has no fused MoE layers"
    # models/step3p5.py:365 in 0.33.0: SWIGLUSTEP is not among the backend's activations.
    limits = model.text.get("swiglu_limits")
    is_step = any(name in _STEP for name in model.architectures)
    if is_step and isinstance(limits, list) and any(limits):
        return "vLLM's clamped SwiGLU of Step-3.5 is not among those of flashinfer_trtllm"
    # models/deepseek_v41/quant_config.py:171 in 0.33.0.
    if is_fp8_hybrid(model.section) and model.text.get("model_type") not in _FP8_HYBRIDS:
        return "vLLM looks for NVFP4 experts amid FP8 in DeepSeek-V4 alone"
    # quantization/modelopt.py:340 in 0.33.0. Amid FP8 it reads no such list.
    if not is_fp8_hybrid(model.section) and not isinstance(ignored_modules(model.section), list):
        return NO_LIST.format(VLLM.title)
    if is_mixed_precision(model.section):  # each layer has its own algorithm there
        return None
    nested = model.section.get("quantization")
    if isinstance(nested, dict) and (missing := [key for key in _REQUIRED if key not in nested]):
        return f"vLLM wants {' and '.join(missing)} in hf_quant_config.json"
    # quantization/modelopt.py:797 in 0.33.0.
    groups = model.section.get("config_groups")
    if isinstance(groups, dict) and groups and all(map(_is_weight_only, groups.values())):
        return (
            "vLLM takes experts for weight-only (W4A16) where no group of config_groups has "
            "input_activations, and flashinfer_trtllm has no such kernels"
        )
    return None


def _is_weight_only(group: Any) -> bool:
    return isinstance(group, dict) and group.get("input_activations") is None


def _can_cut(geometry: Geometry, size: int) -> bool:
    """vLLM cuts at I/T and pads after that. Where that is within a block, it loses scales."""
    return geometry.intermediate % (size * GROUP_SIZE) == 0


def _least_share(model: Model) -> int:
    # models/kimi_k3/nvidia/model.py:419 in 0.33.0. With expert parallelism it does not pad.
    if not any(name.startswith("KimiK3") for name in model.architectures):
        return 1
    least = model.text.get("min_moe_intermediate_per_partition", 256)
    return least if type(least) is int else 1


VLLM = Engine(
    name="vllm",
    title="vLLM",
    models=KnownModels.read(Path(__file__).with_name("vllm_models.txt")),
    why_not=_why_not,
    can_cut=_can_cut,
    least_share=_least_share,
    # layers/vocab_parallel_embedding.py:286 and :304 in 0.33.0: it pads to a multiple of 64.
    can_cut_vocabulary=lambda rows, size: -(-rows // 64) * 64 % size == 0,
    serve_command=lambda folder: f"vllm serve {folder} --moe-backend flashinfer_trtllm",
)
