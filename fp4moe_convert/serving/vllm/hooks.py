"""vLLM's hooks: they load a converted checkpoint by slices and copies, with no layout work.

vLLM imports this module in every process, through the entry point group ``vllm.general_plugins``.
If the import fails, vLLM logs that and goes on without the plugin. It pickles its configuration,
`ConvertedConfig` included, for its workers. So the module imports vLLM at its top and defines its
classes there.

All that is loaded passes a `gate.Gate`, in models of other checkpoints, too.

The rest of vLLM sees a converted checkpoint as ``modelopt_fp4``, like its source, because the dtype
of the KV cache and some fusions depend on that name. So the plugin replaces that method's config,
passes ordinary checkpoints on to it, and rewrites a converted checkpoint's section where vLLM looks
for the method. The code follows vLLM 0.33.0 line by line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.modelopt import (
    ModelOptNvFp4Config,
    ModelOptNvFp4FusedMoE,
)
from vllm.model_executor.layers.quantization.utils.flashinfer_utils import (
    trtllm_nvfp4_hidden_alignment,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import amax_for_moe_activation_quant
from vllm.model_executor.model_loader import base_loader, tensorizer_loader
from vllm.model_executor.model_loader.reload import inplace
from vllm.model_executor.model_loader.weight_cache import ipc_loader
from vllm.model_executor.utils import is_weights_pre_processed, replace_parameter

from ...format.contract import (
    FORMAT_VERSION,
    QUANT_METHOD,
    ConvertedSection,
    Geometry,
    round_up,
)
from ...layouts.trtllm_nvfp4 import intermediate_multiple
from ..checks import CONVERTED_KEY, check_row_order, read_section, refusal, warn_if_untested
from ..converted_layer import ConvertedLayer, check_taken_over, converted_layer_of
from ..gate import Deliver, Gate, gate_of, guard
from . import VLLM

TESTED = ("0.33.*",)
METHOD = "modelopt_fp4"

logger = init_logger("vllm.fp4moe")  # vLLM prints what is logged below its own name


@cache  # a process may be told to load its plugins more than once
def register() -> None:
    """Put `ConvertedConfig` in the place of stock's, and a gate before every model."""
    register_quantization_config(METHOD)(ConvertedConfig)
    for loader in (base_loader, ipc_loader, tensorizer_loader):
        loader.initialize_model = _guarding(loader.initialize_model)
    stock, inplace.reload_weights = inplace.reload_weights, _judging(inplace.reload_weights)
    for name, module in list(sys.modules.items()):  # those that have imported it already
        if name.startswith("vllm.") and vars(module).get("reload_weights") is stock:
            module.reload_weights = inplace.reload_weights  # type: ignore[attr-defined]


def _guarding(initialize_model: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """vLLM's function that builds a model, with a gate before what it builds."""

    @wraps(initialize_model)
    def guarding(vllm_config: Any, **options: Any) -> torch.nn.Module:
        model = initialize_model(vllm_config, **options)
        model_config = options.get("model_config") or vllm_config.model_config
        converted = _converted(model_config)
        gate = Gate(None, {})
        if converted is not None:
            gate = _gate_for(model, vllm_config, model_config, converted)
        guard(model, gate)
        return model

    return guarding


def _converted(model_config: Any) -> ConvertedSection | None:
    """The section of a converted checkpoint, as `_present_as_source` leaves it."""
    for config in (model_config.hf_config, model_config.hf_text_config):
        section = getattr(config, "quantization_config", None)
        if isinstance(section, dict) and CONVERTED_KEY in section:
            return read_section(section[CONVERTED_KEY])
    return None


def _gate_for(
    model: torch.nn.Module, vllm_config: Any, model_config: Any, converted: ConvertedSection
) -> Gate:
    """A gate that knows the converted layers of a model.

    Raises:
        ServingError: a layer that is converted in the checkpoint is not so in the model.
    """
    layers = {
        module.quant_method.own.prefix: _delivery(name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), ConvertedModelOptMoE)
    }
    speculative = vllm_config.speculative_config
    is_draft = speculative is not None and model_config is speculative.draft_model_config
    # Other drafts than whole models have layers of their own, which are never converted.
    if not is_draft or speculative.method == "draft_model":
        check_taken_over(
            model,
            converted.layers,
            layers,
            layer_count=model_config.get_total_num_hidden_layers(),
            engine="vLLM",
        )
    if layers:
        logger.info(
            "fp4moe: format version %d, %d MoE layers taken over, "
            "row order checked against this vLLM's FlashInfer",
            FORMAT_VERSION,
            len(layers),
        )
    return Gate(converted, layers)


def _delivery(name: str, layer: RoutedExperts) -> Deliver:
    def deliver(leaf: str, tensor: torch.Tensor) -> str:
        parameter = getattr(layer, leaf)  # a reload creates them anew
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


class ConvertedConfig(ModelOptNvFp4Config):
    """The source's quantization, and the layers that are converted."""

    converted: ConvertedSection
    row_order_checked: bool

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
                    _present_as_source(section)
            if CONVERTED_KEY in hf_quant_cfg:
                return METHOD
        method: str | None = super().override_quantization_method(
            hf_quant_cfg, user_quant, hf_config
        )
        return method

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelOptNvFp4Config:
        if CONVERTED_KEY not in config:
            return ModelOptNvFp4Config.from_config(config)
        converted = read_section(config[CONVERTED_KEY])
        # vLLM adds what the user asks of activations, under a private key.
        private = {key: value for key, value in config.items() if key.startswith("_")}
        try:
            self: ConvertedConfig = super().from_config({**converted.source, **private})
        except ValueError as error:
            raise refusal(f"vLLM cannot read the source's quantization: {error}") from error
        self.converted = converted
        self.row_order_checked = False
        return self

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        own = converted_layer_of(prefix, self.converted.layers)
        if own is None or not isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        online = self.online_quantization_config
        if online and online.resolve_quant_method_cls(type(layer), prefix):
            raise refusal(
                f"{own} is laid out already, it cannot be quantized anew",
                "drop that from --quantization-config",
            )
        stock = super().get_quant_method(layer, prefix)
        if type(stock) is not ModelOptNvFp4FusedMoE:
            return stock
        if not self.row_order_checked:
            check_row_order(self.converted, engine="vLLM")
            warn_if_untested("vLLM", vllm.__version__, TESTED)
            self.row_order_checked = True
        return ConvertedModelOptMoE(self, layer.moe_config, own)


class ConvertedModelOptMoE(ModelOptNvFp4FusedMoE):
    """Experts whose parameters are created as the kernel wants them and filled by slices."""

    def __init__(self, quant_config: ConvertedConfig, moe_config: Any, prefix: str) -> None:
        super().__init__(quant_config, moe_config)
        self.own = ConvertedLayer(prefix, quant_config.converted.layers[prefix])

        if self.nvfp4_backend != NvFp4MoeBackend.FLASHINFER_TRTLLM:
            raise refusal(
                f"the weights are laid out for the MoE backend flashinfer_trtllm, vLLM chose "
                f"{self.nvfp4_backend.value.lower()}",
                "use --moe-backend flashinfer_trtllm",
            )
        if self.per_token_activation:
            raise refusal(
                "activations quantized per token are not supported",
                "drop that from --quantization-config",
            )
        model = Geometry(
            experts=moe_config.num_logical_experts,
            hidden=moe_config.hidden_dim_unpadded,
            intermediate=moe_config.intermediate_size,
            gated=moe_config.is_act_and_mul,
        )
        if self.own.geometry != model:
            raise refusal(f"{prefix} is {self.own.geometry} in config.json, {model} in the model")
        sizes = VLLM.tensor_parallel_sizes(model)
        if moe_config.tp_size not in sizes:
            raise refusal(
                f"{prefix}: an intermediate size of {model.intermediate} cannot be cut for a "
                f"tensor-parallel size of {moe_config.tp_size}",
                f"use one of {sizes} or --enable-expert-parallel",
            )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Stock's parameters, of the sizes to which stock pads them after loading."""
        alignment = trtllm_nvfp4_hidden_alignment(
            per_token_activation=self.per_token_activation, is_act_and_mul=self.moe.is_act_and_mul
        )
        loader = _weight_loader(self.own)
        super().create_weights(
            layer,
            num_experts,
            round_up(hidden_size, alignment),
            round_up(intermediate_size_per_partition, intermediate_multiple(self.own.geometry)),
            params_dtype,
            **{**extra_weight_attrs, "weight_loader": MethodType(loader, layer)},
        )
        # Weights that are made up, or that another rank sends later, do not come from the file.
        self.from_file = get_current_vllm_config().load_config.load_format != "dummy"

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """What stock does to the scales; the layout is there."""
        if is_weights_pre_processed():  # shared by a process that has been here
            super().process_weights_after_loading(layer)
            return
        if self.from_file:
            self.own.check_loaded()

        first, *others = layer.w13_weight_scale_2.unbind(1)  # gate and up, or up alone
        if not all(torch.allclose(first, other) for other in others):
            logger.warning_once(
                "w1_weight_scale_2 must match w3_weight_scale_2. Accuracy may be affected."
            )
        replace_parameter(layer, "w13_weight_scale_2", first.contiguous())
        eplb = layer.moe_config.moe_parallel_config.enable_eplb
        for leaf in ("w13_input_scale", "w2_input_scale"):
            largest = amax_for_moe_activation_quant(getattr(layer, leaf), eplb)
            replace_parameter(layer, leaf, largest.repeat(layer.w13_weight.shape[0]))
        self._restore_padded_moe_dims(layer)
        self._build_moe_kernel(layer)


def _present_as_source(section: dict[str, Any]) -> None:
    """Let config.json's section read as the source's, with itself below `CONVERTED_KEY`.

    ``quant_algo`` is left out: a process without the plugin then refuses the section.
    """
    converted = dict(section)
    source = read_section(converted).source
    section.clear()
    section.update(source)
    if isinstance(inner := section.get("quantization"), dict):  # as hf_quant_config.json has it
        section["quantization"] = {k: v for k, v in inner.items() if k != "quant_algo"}
    section.pop("quant_algo", None)
    section.update({"quant_method": METHOD, CONVERTED_KEY: converted})


def _weight_loader(own: ConvertedLayer) -> Callable[..., None]:
    """A loader for a layer's parameters, to be bound to the layer as stock's is.

    It must not know the layer's quantization method: vLLM keeps it in a table of layers, and from
    the method a path leads, by way of the kernel, back to the layer.
    """

    def weight_loader(
        layer: RoutedExperts,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
    ) -> None:
        leaf = own.leaf_of(layer, param)
        everywhere, here = _experts_held(layer)
        width = own.geometry.intermediate // layer.moe_config.tp_size
        start = width * layer.moe_config.tp_rank
        if start + width == own.geometry.intermediate:
            width = 2 * layer.w2_weight.shape[2]  # with the zeros that follow, in whole tiles
        own.load(
            leaf,
            param.data,
            loaded_weight,
            experts=everywhere if leaf.endswith("_input_scale") else here,
            part=range(start, start + width),
        )

    return weight_loader


def _experts_held(layer: RoutedExperts) -> tuple[list[int], list[int]]:
    """The expert in each slot of all ranks, those held twice included, and in each of ours."""
    moe = layer.moe_config
    everywhere = list(
        EplbState.build_initial_global_physical_to_logical_map(
            moe.num_logical_experts, moe.num_experts - moe.num_logical_experts
        )
    )
    slots = layer.expert_map_manager.expert_map  # our slot for each of all ranks' slots, or -1
    if slots is None:
        return everywhere, everywhere
    held = {slot: expert for expert, slot in zip(everywhere, slots.tolist(), strict=True)}
    return everywhere, [held[slot] for slot in sorted(held) if slot >= 0]
