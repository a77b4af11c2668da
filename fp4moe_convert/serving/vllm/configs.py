"""Quantization configs in the place of vLLM's own.

The rest of vLLM sees a converted checkpoint under the method of its source (``modelopt_fp4``,
``modelopt_mixed``, ``compressed-tensors``), because the dtype of the KV cache and some fusions
depend on that name. So the plugin replaces these methods' configs, passes ordinary checkpoints on
to them, and rewrites a converted checkpoint's section where vLLM looks for the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.modelopt import (
    ModelOptMixedPrecisionConfig,
    ModelOptNvFp4Config,
)

from ...format.contract import QUANT_METHOD
from ...source.description import is_fp8_hybrid, method_of
from ..checks import CONVERTED_KEY, read_section, refusal
from .experts import ConvertedLayers


class ConvertedNvFp4Config(ConvertedLayers, ModelOptNvFp4Config):
    stock = ModelOptNvFp4Config

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Asked for every model with a section, before anything else is read from it."""
        if hf_quant_cfg:  # a copy of what the model's configuration has
            configs = (hf_config, getattr(hf_config, "text_config", None))
            sections = (getattr(config, "quantization_config", None) for config in configs)
            for section in (hf_quant_cfg, *sections):
                if section and section.get("quant_method") == QUANT_METHOD:
                    _present_as_source(section, user_quant, hf_config)
            if CONVERTED_KEY in hf_quant_cfg:
                name: str = hf_quant_cfg["quant_method"]
                return name
        method: str | None = super().override_quantization_method(
            hf_quant_cfg, user_quant, hf_config
        )
        return method


class ConvertedMixedConfig(ConvertedLayers, ModelOptMixedPrecisionConfig):
    stock = ModelOptMixedPrecisionConfig


class ConvertedCompressedTensorsConfig(ConvertedLayers, CompressedTensorsConfig):
    stock = CompressedTensorsConfig


CONFIGS: dict[str, type[ConvertedLayers]] = {
    "modelopt_fp4": ConvertedNvFp4Config,
    "modelopt_mixed": ConvertedMixedConfig,
    "compressed-tensors": ConvertedCompressedTensorsConfig,
}
"""In the place of stock's, by the name that vLLM gives them. `deepseek_v4` has one more, which is
there when needed."""


def _present_as_source(section: dict[str, Any], user_quant: str | None, hf_config: Any) -> None:
    """Let config.json's section read as the source's, with itself below `CONVERTED_KEY`.

    What its reader needs is left out: ``quant_algo``, ``config_groups`` or ``activation_scheme``. A
    process without the plugin then refuses the section.
    """
    converted = dict(section)
    source = read_section(converted).source
    section.clear()
    section.update(source)
    if isinstance(inner := section.get("quantization"), dict):  # as hf_quant_config.json has it
        section["quantization"] = {k: v for k, v in inner.items() if k != "quant_algo"}
    section.pop("quant_algo", None)
    section.pop("activation_scheme", None)
    section.update(
        {"quant_method": _method(source, user_quant, hf_config), CONVERTED_KEY: converted}
    )
    if section["quant_method"] == "modelopt_mixed":
        section.setdefault("quantized_layers", None)  # or vLLM looks for hf_quant_config.json
    if section["quant_method"] == "compressed-tensors":
        section["config_groups"] = None


def _method(source: Mapping[str, Any], user_quant: str | None, hf_config: Any) -> str:
    """What vLLM calls the quantization of a source.

    Raises:
        ServingError: it is none that has experts to convert.
    """
    if is_fp8_hybrid(source):
        from .deepseek_v4 import DEEPSEEK_V4, Stock

        if Stock.override_quantization_method(source, user_quant, hf_config) is not None:
            return DEEPSEEK_V4
    described = {"quant_method": "modelopt", **source}  # hf_quant_config.json does not say that
    names = [
        config.stock.override_quantization_method(described, None) for config in CONFIGS.values()
    ]
    known = (name for name in names if name in CONFIGS)
    method: str = next(known, method_of(described))
    if method not in CONFIGS:
        raise refusal(f"vLLM has no NVFP4 experts in a source quantized with {method}")
    return method
