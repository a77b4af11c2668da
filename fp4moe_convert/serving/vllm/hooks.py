"""vLLM's hooks: they load a converted checkpoint by slices and copies, with no layout work.

vLLM imports this module in every process, through the entry point group ``vllm.general_plugins``.
If the import fails, vLLM logs that and goes on without the plugin. It pickles its configuration,
those of `configs` included, for its workers. So all modules but `deepseek_v4` import vLLM at their
top and are imported with this one.

All that is loaded passes a `gate.Gate`, in models of other checkpoints, too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader import base_loader, tensorizer_loader
from vllm.model_executor.model_loader.reload import inplace
from vllm.model_executor.model_loader.weight_cache import ipc_loader

from ...engines.vllm import VLLM
from ...format.contract import ConvertedSection
from ..checks import CONVERTED_KEY, read_section
from ..fast_copy import COPIER
from ..gate import Deliver, Gate, gate_for, gate_of, guard
from .configs import CONFIGS
from .experts import ConvertedExperts


@cache  # a process may be told to load its plugins more than once
def register() -> None:
    """Put `CONFIGS` in the place of stock's, and a gate before every model."""
    # vLLM prints what is logged below its own name.
    logging.getLogger("fp4moe_convert").parent = logging.getLogger("vllm.fp4moe")
    for name, config in CONFIGS.items():
        register_quantization_config(name)(config)
    for loader in (base_loader, ipc_loader, tensorizer_loader):
        loader.initialize_model = _guarding(loader.initialize_model)
    _wrap("reload_weights", inplace.reload_weights, _judging)
    _wrap("finalize_layerwise_reload", inplace.finalize_layerwise_reload, _giving_back)


def _wrap(function: str, stock: Callable[..., None], wrapper: Callable[..., Any]) -> None:
    """Put a wrapper around a function of vLLM's, in all modules that have imported it already."""
    wrapped = wrapper(stock)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(module).get(function) is stock:
            setattr(module, function, wrapped)


def _guarding(initialize_model: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """vLLM's function that builds a model, with a gate before what it builds."""

    @wraps(initialize_model)
    def guarding(vllm_config: Any, **options: Any) -> torch.nn.Module:
        model = initialize_model(vllm_config, **options)
        model_config = options.get("model_config") or vllm_config.model_config
        converted = _converted(model_config)
        gate = Gate(None, {})
        if converted is not None:
            gate = _gate_of_model(model, vllm_config, model_config, converted)
        guard(model, gate)
        return model

    return guarding


def _converted(model_config: Any) -> ConvertedSection | None:
    """The section of a converted checkpoint, as `configs` leaves it."""
    for config in (model_config.hf_config, model_config.hf_text_config):
        section = getattr(config, "quantization_config", None)
        if isinstance(section, dict) and CONVERTED_KEY in section:
            return read_section(section[CONVERTED_KEY])
    return None


def _gate_of_model(
    model: torch.nn.Module, vllm_config: Any, model_config: Any, converted: ConvertedSection
) -> Gate:
    speculative = vllm_config.speculative_config
    is_draft = speculative is not None and model_config is speculative.draft_model_config
    # Other drafts than whole models have layers of their own.
    is_whole = not is_draft or speculative.method == "draft_model"
    return gate_for(
        model,
        converted,
        {
            module.quant_method.converted_layer.prefix: _delivery(name, module)
            for name, module in model.named_modules()
            if isinstance(getattr(module, "quant_method", None), ConvertedExperts)
        },
        layer_count=model_config.get_total_num_hidden_layers() if is_whole else None,
        engine=VLLM,
    )


def _delivery(name: str, layer: RoutedExperts) -> Deliver:
    def deliver(leaf: str, tensor: torch.Tensor) -> str:
        # A reload creates them anew.
        parameter: Any = layer.quant_method.converted_layer.parameter_of(layer, leaf)
        parameter.weight_loader(parameter, tensor)
        return f"{name}.{leaf}"

    return deliver


def _judging(reload_weights: Callable[..., None]) -> Callable[..., None]:
    """vLLM's function that reloads a running model. It empties the model before it looks at the
    first tensor, so here they are judged before."""

    @wraps(reload_weights)
    def judging(
        vllm_config: Any,
        model: torch.nn.Module,
        weights_iterator: Any,
        weights_path: str | None,
        is_checkpoint_format: bool,
    ) -> None:
        if is_checkpoint_format:
            gate = gate_of(model)
            if weights_iterator is not None:
                weights_iterator = gate.judge(weights_iterator)
            elif weights_path is not None:
                gate.check_folder(weights_path)
        reload_weights(vllm_config, model, weights_iterator, weights_path, is_checkpoint_format)

    return judging


def _giving_back(finalize_layerwise_reload: Callable[..., None]) -> Callable[..., None]:
    """vLLM's function that ends a reload. Only here it fills layers whose parameters are padded,
    after the model's ``load_weights`` has ended."""

    @wraps(finalize_layerwise_reload)
    def giving_back(*args: Any, **kw: Any) -> None:
        try:
            finalize_layerwise_reload(*args, **kw)
        finally:
            COPIER.give_back()

    return giving_back
