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


def is_fp8_hybrid(section: Mapping[str, Any]) -> bool:
    """Whether a source's description is one of FP8 that gives the experts NVFP4, as DeepSeek-V4's
    is."""
    return section.get("quant_method") == "fp8" and section.get("moe_quant_algo") == "NVFP4"


def is_mixed_precision(section: Mapping[str, Any]) -> bool:
    """Whether a source's description, one of ModelOpt's, gives each layer its own algorithm."""
    mixed = settings_of(section).get("quant_algo") == "MIXED_PRECISION"
    return mixed and not is_fp8_hybrid(section)


def is_compressed_tensors(section: Mapping[str, Any]) -> bool:
    """Whether a source's description is one of compressed-tensors, as llm-compressor writes it."""
    return str(section.get("quant_method")).replace("_", "-") == "compressed-tensors"
