"""vLLM's config of DeepSeek-V4: FP8, and experts in NVFP4.

A module of its own, because vLLM's class comes with its model and that model's kernels, which no
other model needs. `configs` imports it when it meets such a checkpoint; the configuration that vLLM
pickles brings it into the other processes.
"""

from __future__ import annotations

from vllm.model_executor.layers.quantization import (
    get_quantization_config,
    register_quantization_config,
)

from .experts import ConvertedLayers

DEEPSEEK_V4 = "deepseek_v4_fp8"
"""vLLM's name of it."""

Stock = get_quantization_config(DEEPSEEK_V4)  # differs by platform


@register_quantization_config(DEEPSEEK_V4)
class ConvertedDeepseekV4Config(ConvertedLayers, Stock):  # type: ignore[misc, valid-type]
    stock = Stock
