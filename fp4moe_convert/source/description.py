"""What a source's own description of its quantization says, whatever else is in it.

The serving plugins ask it, too, so it does no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def settings_of(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A source's description of its quantization, flat: hf_quant_config.json nests what
    config.json has at the top."""
    nested = section.get("quantization")
    return nested if isinstance(nested, dict) else section


def method_of(section: Mapping[str, Any]) -> str:
    """The name of a method, however it is spelled: vLLM takes each of these for the same."""
    return str(section.get("quant_method")).lower().replace("_", "-")


def algorithm_of(settings: Mapping[str, Any], key: str = "quant_algo") -> str:
    """The name of an algorithm, in capitals: engines take others for the same, SGLang not always
    (`engines.sglang`)."""
    return str(settings.get(key)).upper()


def ignored_modules(section: Mapping[str, Any]) -> object:
    """What a source leaves as it is. Engines want a list; one of none need not be there."""
    settings = settings_of(section)
    return settings.get("ignore", settings.get("exclude_modules", []))


def is_fp8_hybrid(section: Mapping[str, Any]) -> bool:
    """Whether a source's description is one of FP8 that gives the experts NVFP4, as DeepSeek-V4's
    is."""
    is_fp8 = section.get("quant_method") == "fp8"
    return is_fp8 and algorithm_of(section, "moe_quant_algo") == "NVFP4"


def is_mixed_precision(section: Mapping[str, Any]) -> bool:
    """Whether a source's description, one of ModelOpt's, gives each layer its own algorithm."""
    mixed = algorithm_of(settings_of(section)) == "MIXED_PRECISION"
    return mixed and not is_fp8_hybrid(section)


def is_compressed_tensors(section: Mapping[str, Any]) -> bool:
    """Whether a source's description is one of compressed-tensors, as llm-compressor writes it."""
    return method_of(section) == "compressed-tensors"
