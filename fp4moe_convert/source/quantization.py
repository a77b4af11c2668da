"""How a checkpoint says that it is quantized, and whether that is ModelOpt's NVFP4."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import CheckpointError
from ..format.contract import GROUP_SIZE
from ..format.files import CONFIG_NAME, HF_QUANT_CONFIG_NAME
from .checkpoint import Checkpoint
from .converted import is_converted
from .names import is_mtp_by_name

WEIGHT_ONLY = (
    "weight-only (W4A16), which no engine serves with flashinfer_trtllm, the backend that this "
    "layout is for; serve the original with another MoE backend"
)
_EXPERTS = re.compile(r"(?:^|\.)experts(?:[.*]|$)")


def require_nvfp4(checkpoint: Checkpoint) -> None:
    """Refuse what is not a ModelOpt NVFP4 checkpoint with blocks of 16, and say what it is.

    Raises:
        CheckpointError: already converted, another quantization, or none.
    """
    if is_converted(checkpoint):
        raise CheckpointError(f"{checkpoint.location}: is already converted")
    section = checkpoint.quantization
    if section is None:
        dtype = checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype"))
        raise CheckpointError(
            f"{checkpoint.location}: not NVFP4: it is not quantized"
            + (f" ({CONFIG_NAME} says {dtype})" if dtype else "")
        )
    file = CONFIG_NAME if checkpoint.text.sections else HF_QUANT_CONFIG_NAME
    settings = _settings(section)
    producer = section.get("producer")
    maker = producer.get("name") if isinstance(producer, dict) else None
    method = section.get("quant_method", maker or "modelopt")
    algorithm = settings.get("quant_algo")
    # transformers' reader of ModelOpt's section also knows the method as "modelopt_fp4".
    if not str(method).startswith("modelopt") or algorithm != "NVFP4":
        kind = _words(method, algorithm, section.get("format"))
        why = _why_not(settings, checkpoint.hf_quant_config or {})
        raise CheckpointError(f"{file}: not ModelOpt NVFP4: the quantization is {kind}{why}")
    for group_size in _group_sizes(settings):
        if group_size != GROUP_SIZE:
            raise CheckpointError(f"{file}: group size is {group_size}, NVFP4 has {GROUP_SIZE}")


def _why_not(settings: Mapping[str, Any], hf_quant_config: Mapping[str, Any]) -> str:
    """What there is to say of experts that have four bits and yet are not converted."""
    algorithm = settings.get("quant_algo")
    experts = _algorithms_of_experts(settings) or _algorithms_of_experts(_settings(hf_quant_config))
    if not experts:
        experts = {"W4A16_NVFP4"} if _has_weights_alone(settings) else {str(algorithm)}
    if experts == {"W4A16_NVFP4"}:
        return f", whose experts are {WEIGHT_ONLY}"
    if experts == {"NVFP4_AWQ"}:
        return (
            ", whose experts multiply their input by a pre_quant_scale, which no engine does for "
            "experts; export the model as NVFP4"
        )
    if experts != {str(algorithm)}:
        return (
            f", whose experts are {' and '.join(sorted(experts))}; this release converts "
            "checkpoints that are NVFP4 as a whole"
        )
    if "nvfp4" in str(settings.get("format")):
        return "; this release converts the exports of ModelOpt"
    return ""


def _algorithms_of_experts(settings: Mapping[str, Any]) -> set[str]:
    """Those that a description of mixed precision gives the decoder's experts."""
    if algorithm := settings.get("moe_quant_algo"):  # DeepSeek-V4: the rest is FP8
        return {str(algorithm)}
    layers = settings.get("quantized_layers")
    return {
        str(layer.get("quant_algo"))
        for name, layer in (layers.items() if isinstance(layers, dict) else ())
        if _EXPERTS.search(name) and not is_mtp_by_name(name) and isinstance(layer, dict)
    }


def _has_weights_alone(settings: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors quantizes the activations of nothing that has FP4 weights."""
    groups = settings.get("config_groups")
    four_bits = [
        group.get("input_activations")
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict)
        and isinstance(weights := group.get("weights"), dict)
        and (weights.get("num_bits"), weights.get("type")) == (4, "float")
    ]
    return bool(four_bits) and not any(four_bits)


def describe(section: Mapping[str, Any]) -> str:
    """A few words on a section, a source's or a converted one: its method and algorithm."""
    source = section.get("source")
    own = source if isinstance(source, dict) else section
    algorithm = _settings(own).get("quant_algo") or own.get("format")
    return _words(section.get("quant_method"), algorithm) or "none"


def _settings(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """hf_quant_config.json nests what config.json has at the top."""
    nested = section.get("quantization")
    return nested if isinstance(nested, dict) else section


def _words(*values: object) -> str:
    return " ".join(str(value) for value in values if value)


def _group_sizes(settings: Mapping[str, Any]) -> Iterator[Any]:
    groups = settings.get("config_groups")
    described = [settings]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            described.append(weights)
    for each in described:
        if each.get("group_size") is not None:
            yield each["group_size"]
