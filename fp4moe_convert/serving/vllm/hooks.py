"""vLLM's hooks: they load a converted checkpoint by slices and copies, with no layout work.

vLLM imports this module in every process, through the entry point group ``vllm.general_plugins``.
If the import fails, vLLM logs that and goes on without the plugin. It pickles its configuration,
those of `CONFIGS` included, for its workers. So the module imports vLLM at its top and defines its
classes there.

All that is loaded passes a `gate.Gate`, in models of other checkpoints, too.

The rest of vLLM sees a converted checkpoint under the method of its source (``modelopt_fp4``,
``modelopt_mixed``, ``compressed-tensors``), because the dtype of the KV cache and some fusions
depend on that name. So the plugin replaces these methods' configs, passes ordinary checkpoints on
to them, and rewrites a converted checkpoint's section where vLLM looks for the method. A config of
ours gives what stock's gives; only the method that stock chooses for a converted layer is replaced.
The code follows vLLM 0.33.0 line by line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import cache, wraps
from types import MethodType
from typing import Any, ClassVar

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import (
    NvFp4MoeBackend,
    make_nvfp4_moe_kernel,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4 import (  # noqa: E501
    CompressedTensorsW4A4Nvfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.modelopt import (
    ModelOptMixedPrecisionConfig,
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

from ...engines.vllm import VLLM
from ...format.contract import QUANT_METHOD, ConvertedSection, Geometry
from ...format.sizes import round_up
from ...layouts.trtllm_nvfp4 import intermediate_multiple
from ...source.description import is_fp8_hybrid, is_mixed_precision
from ..checks import (
    CONVERTED_KEY,
    check_row_order,
    log_good_start,
    read_section,
    refusal,
    warn_if_untested,
)
from ..converted_layer import (
    COMPRESSED_TENSORS_NAMES,
    MODELOPT_NAMES,
    ConvertedLayer,
    check_taken_over,
    converted_layer_of,
)
from ..gate import OUT_OF_ORDER, Deliver, Gate, gate_of, guard

TESTED = ("0.33.*",)

logger = init_logger("vllm.fp4moe")  # vLLM prints what is logged below its own name


@cache  # a process may be told to load its plugins more than once
def register() -> None:
    """Put `CONFIGS` in the place of stock's, and a gate before every model."""
    logging.getLogger("fp4moe_convert").parent = logger  # for what all engines share
    for name, config in CONFIGS.items():
        register_quantization_config(name)(config)
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
        if isinstance(getattr(module, "quant_method", None), _ConvertedExperts)
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
        log_good_start(logger, converted, len(layers), engine="vLLM")
    in_order = vllm_config.load_config.load_format not in OUT_OF_ORDER
    return Gate(converted, layers, in_order=in_order)


def _delivery(name: str, layer: RoutedExperts) -> Deliver:
    def deliver(leaf: str, tensor: torch.Tensor) -> str:
        # A reload creates them anew.
        parameter: Any = layer.quant_method.own.parameter_of(layer, leaf)
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


class _ConvertedLayers(QuantizationConfig):
    """A source's quantization, and the layers that are converted. The other base is stock's."""

    stock: ClassVar[type[QuantizationConfig]]
    converted: ConvertedSection
    row_order_checked: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        if CONVERTED_KEY not in config:
            return cls.stock.from_config(config)
        converted = read_section(config[CONVERTED_KEY])
        try:
            # vLLM adds what the user asks of activations, and numbers of heads.
            added = {k: v for k, v in config.items() if k not in (CONVERTED_KEY, "quant_method")}
            self: _ConvertedLayers = super().from_config({**added, **_as_read(converted)})
        except (KeyError, ValueError) as error:
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
        if type(stock) not in _TAKE_OVER:
            return stock
        if not self.row_order_checked:
            check_row_order(self.converted, engine="vLLM")
            warn_if_untested("vLLM", vllm.__version__, TESTED)
            self.row_order_checked = True
        return _TAKE_OVER[type(stock)](stock, layer, own, self.converted.layers[own])


class ConvertedNvFp4Config(_ConvertedLayers, ModelOptNvFp4Config):
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


class ConvertedMixedConfig(_ConvertedLayers, ModelOptMixedPrecisionConfig):
    stock = ModelOptMixedPrecisionConfig


class ConvertedCompressedTensorsConfig(_ConvertedLayers, CompressedTensorsConfig):
    stock = CompressedTensorsConfig


CONFIGS: dict[str, type[_ConvertedLayers]] = {
    "modelopt_fp4": ConvertedNvFp4Config,
    "modelopt_mixed": ConvertedMixedConfig,
    "compressed-tensors": ConvertedCompressedTensorsConfig,
}
"""In the place of stock's, by the name that vLLM gives them."""
DEEPSEEK_V4 = "deepseek_v4_fp8"
"""The name of one more, `deepseek_v4.ConvertedDeepseekV4Config`, which is there when needed."""


class _ConvertedExperts(FusedMoEMethodBase):
    """Experts whose parameters are created as the kernel wants them and filled by slices. The other
    base is stock's method."""

    def adopt(self, own: ConvertedLayer) -> None:
        """Make sure that a layer of the file is what the model has.

        Raises:
            ServingError: it is not, or it cannot be served as the user wants it.
        """
        self.own = own
        moe_config = self.moe
        if self.nvfp4_backend != NvFp4MoeBackend.FLASHINFER_TRTLLM:
            raise refusal(
                f"the weights are laid out for the MoE backend flashinfer_trtllm, vLLM chose "
                f"{self.nvfp4_backend.value.lower()}",
                "use --moe-backend flashinfer_trtllm",
            )
        if getattr(self, "per_token_activation", False):
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
        prefix = own.prefix
        if own.geometry != model:
            raise refusal(f"{prefix} is {own.geometry} in config.json, {model} in the model")
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
            per_token_activation=False, is_act_and_mul=self.moe.is_act_and_mul
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


class ConvertedModelOptMoE(_ConvertedExperts, ModelOptNvFp4FusedMoE):
    """Of ModelOpt's experts, wherever their config comes from."""

    @classmethod
    def take_over(
        cls, stock: ModelOptNvFp4FusedMoE, layer: RoutedExperts, prefix: str, geometry: Geometry
    ) -> ConvertedModelOptMoE:
        self = cls(stock.quant_config, layer.moe_config)
        self.adopt(ConvertedLayer(prefix, geometry, MODELOPT_NAMES))
        return self

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
        for leaf in ("w13_input_scale", "w2_input_scale"):
            replace_parameter(layer, leaf, _largest(layer, getattr(layer, leaf)))
        self._restore_padded_moe_dims(layer)
        self._build_moe_kernel(layer)


class ConvertedCompressedTensorsMoE(_ConvertedExperts, CompressedTensorsW4A4Nvfp4MoEMethod):
    """Of llm-compressor's experts."""

    @classmethod
    def take_over(
        cls,
        stock: CompressedTensorsW4A4Nvfp4MoEMethod,
        layer: RoutedExperts,
        prefix: str,
        geometry: Geometry,
    ) -> ConvertedCompressedTensorsMoE:
        self = cls(layer.moe_config, use_a16=stock.use_a16)
        self.adopt(ConvertedLayer(prefix, geometry, COMPRESSED_TENSORS_NAMES))
        return self

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """What stock does to the scales; the layout is there."""
        if self.from_file:
            self.own.check_loaded()

        for name in ("w13_weight", "w2_weight"):
            packed = getattr(layer, f"{name}_packed")
            delattr(layer, f"{name}_packed")
            setattr(layer, name, torch.nn.Parameter(packed.data, requires_grad=False))
        first, *others = layer.w13_weight_global_scale.unbind(1)  # gate and up, or up alone
        if not all(torch.allclose(first, other) for other in others):
            logger.warning_once(
                "w1_weight_global_scale must match w3_weight_global_scale. "
                "Accuracy may be affected."
            )
        replace_parameter(layer, "w13_weight_scale_2", 1.0 / first.contiguous())
        replace_parameter(layer, "w2_weight_scale_2", 1.0 / layer.w2_weight_global_scale)
        for matrix in ("w13", "w2"):
            scales = 1.0 / getattr(layer, f"{matrix}_input_global_scale")
            setattr(layer, f"{matrix}_input_scale", _largest(layer, scales))
        ModelOptNvFp4FusedMoE._restore_padded_moe_dims(self, layer)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = make_nvfp4_moe_kernel(
            moe_quant_config=self.moe_quant_config,
            moe_config=self.moe,
            experts_cls=self.experts_cls,
            backend=self.nvfp4_backend,
            routing_tables=layer._expert_routing_tables(),
        )
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)


_TAKE_OVER: dict[type, Callable[[Any, RoutedExperts, str, Geometry], _ConvertedExperts]] = {
    ModelOptNvFp4FusedMoE: ConvertedModelOptMoE.take_over,
    CompressedTensorsW4A4Nvfp4MoEMethod: ConvertedCompressedTensorsMoE.take_over,
}
"""What serves a converted layer, by the method that stock chose for it."""


def _largest(layer: RoutedExperts, input_scales: torch.Tensor) -> torch.Tensor:
    """The input scale that stock serves all experts with, for each of ours."""
    eplb = layer.moe_config.moe_parallel_config.enable_eplb
    largest: torch.Tensor = amax_for_moe_activation_quant(input_scales, eplb)
    return largest.repeat(layer.w13_weight.shape[0])


def _as_read(converted: ConvertedSection) -> Mapping[str, Any]:
    """The description of the original's quantization that vLLM makes a config from."""
    source, file = converted.source, converted.source_hf_quant_config
    # model_loader/weight_utils.py:273 in 0.33.0.
    is_in_file = is_mixed_precision(source) and "quantized_layers" not in source
    return file if file is not None and is_in_file else source


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
    section.update(
        {"quant_method": _method(source, user_quant, hf_config), CONVERTED_KEY: converted}
    )
    if section["quant_method"] == "modelopt_mixed":
        section.setdefault("quantized_layers", None)  # or vLLM looks for hf_quant_config.json
    if section["quant_method"] == "compressed-tensors":
        section["config_groups"] = None
    if section["quant_method"] == DEEPSEEK_V4:
        section.pop("activation_scheme", None)


def _method(source: Mapping[str, Any], user_quant: str | None, hf_config: Any) -> str:
    """What vLLM calls the quantization of a source.

    Raises:
        ServingError: it is none that has experts to convert.
    """
    if is_fp8_hybrid(source):
        from .deepseek_v4 import Stock

        if Stock.override_quantization_method(source, user_quant, hf_config) is not None:
            return DEEPSEEK_V4
    described = {"quant_method": "modelopt", **source}  # hf_quant_config.json does not say that
    names = [
        config.stock.override_quantization_method(described, None) for config in CONFIGS.values()
    ]
    known = (name for name in names if name in CONFIGS)
    method: str = next(known, str(described["quant_method"]).replace("_", "-"))
    if method not in CONFIGS:
        raise refusal(f"vLLM has no NVFP4 experts in a source quantized with {method}")
    return method


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
        everywhere, here = _experts_held(layer)
        width = own.geometry.intermediate // layer.moe_config.tp_size
        start = width * layer.moe_config.tp_rank
        if start + width == own.geometry.intermediate:
            # With the zeros that follow, in whole tiles.
            width = 2 * own.parameter_of(layer, "w2_weight").shape[2]
        own.load(
            own.leaf_of(layer, param),
            param.data,
            loaded_weight,
            # Of ModelOpt's input scales vLLM keeps those of all ranks.
            experts=everywhere if param.shape[0] == len(everywhere) else here,
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
