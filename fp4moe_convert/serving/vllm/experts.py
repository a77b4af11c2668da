"""The experts of vLLM's converted layers: stock's methods, but for the layout.

A config of ours gives a layer what stock's gives. Only the method that stock chooses for a
converted layer is replaced. The code follows vLLM 0.33.0 line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4 import (  # noqa: E501
    CompressedTensorsW4A4Nvfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE
from vllm.model_executor.layers.quantization.utils.flashinfer_utils import (
    trtllm_nvfp4_hidden_alignment,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import amax_for_moe_activation_quant
from vllm.model_executor.utils import is_weights_pre_processed, replace_parameter

from ...engines.vllm import VLLM
from ...format.contract import ConvertedSection, Geometry
from ...format.sizes import round_up
from ...layouts.trtllm_nvfp4 import intermediate_multiple
from ...source.description import is_mixed_precision
from ..checks import (
    CONVERTED_KEY,
    check_row_order,
    check_share,
    read_section,
    refusal,
    warn_if_untested,
)
from ..converted_layer import (
    COMPRESSED_TENSORS_NAMES,
    MODELOPT_NAMES,
    ConvertedLayer,
    converted_layer_of,
)

TESTED = ("0.33.*",)

DROP = "drop that from --quantization or --quantization-config"

logger = init_logger(__name__)


class ConvertedLayers(QuantizationConfig):
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
            self: ConvertedLayers = super().from_config({**added, **_as_read(converted)})
        except (KeyError, ValueError) as error:
            raise refusal(f"vLLM cannot read the source's quantization: {error}") from error
        self.converted = converted
        self.row_order_checked = False
        return self

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        converted_prefix = converted_layer_of(prefix, self.converted.layers)
        if converted_prefix is None or not isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        online = self.online_quantization_config
        if online and online.resolve_quant_method_cls(type(layer), prefix):
            raise refusal(
                f"{converted_prefix} is laid out already, it cannot be quantized anew",
                DROP,
            )
        stock = super().get_quant_method(layer, prefix)
        if type(stock) not in _TAKE_OVER:
            return stock
        if not self.row_order_checked:
            check_row_order(self.converted, VLLM)
            warn_if_untested(VLLM, vllm.__version__, TESTED)
            self.row_order_checked = True
        geometry = self.converted.layers[converted_prefix]
        return _TAKE_OVER[type(stock)](stock, layer, converted_prefix, geometry)


def _as_read(converted: ConvertedSection) -> Mapping[str, Any]:
    """The description of the original's quantization that vLLM makes a config from."""
    source, file = converted.source, converted.source_hf_quant_config
    # model_loader/weight_utils.py:273 in 0.33.0.
    is_in_file = is_mixed_precision(source) and "quantized_layers" not in source
    return file if file is not None and is_in_file else source


class ConvertedExperts(FusedMoEMethodBase):
    """Experts whose parameters are created as the kernel wants them and filled by slices. The other
    base is stock's method."""

    def adopt(self, converted_layer: ConvertedLayer) -> None:
        """Make sure that a layer of the file is what the model has.

        Raises:
            ServingError: it is not, or it cannot be served as the user wants it.
        """
        self.converted_layer = converted_layer
        moe_config = self.moe
        if moe_config.is_lora_enabled:
            raise refusal(
                "the weights are laid out for the MoE backend flashinfer_trtllm, which has no LoRA",
                "leave --enable-lora out",
            )
        if self.nvfp4_backend != NvFp4MoeBackend.FLASHINFER_TRTLLM:
            raise refusal(
                f"the weights are laid out for the MoE backend flashinfer_trtllm, vLLM chose "
                f"{self.nvfp4_backend.value.lower()}",
                "use --moe-backend flashinfer_trtllm",
            )
        if getattr(self, "per_token_activation", False):
            raise refusal(
                "activations quantized per token are not supported",
                DROP,
            )
        converted_layer.check_geometry(
            Geometry(
                experts=moe_config.num_logical_experts,
                hidden=moe_config.hidden_dim_unpadded,
                intermediate=moe_config.intermediate_size,
                gated=moe_config.is_act_and_mul,
            )
        )
        check_share(
            VLLM,
            converted_layer.prefix,
            converted_layer.geometry,
            moe_config.tp_size,
            options="--tensor-parallel-size or --enable-expert-parallel",
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
        multiple = intermediate_multiple(self.converted_layer.geometry)
        alignment = trtllm_nvfp4_hidden_alignment(
            per_token_activation=False, is_act_and_mul=self.moe.is_act_and_mul
        )
        loader = _weight_loader(self.converted_layer)
        super().create_weights(
            layer,
            num_experts,
            round_up(hidden_size, alignment),
            round_up(intermediate_size_per_partition, multiple),
            params_dtype,
            **{**extra_weight_attrs, "weight_loader": MethodType(loader, layer)},
        )
        self.from_file = get_current_vllm_config().load_config.load_format != "dummy"

    def check_loaded(self) -> None:
        """Loading has ended. Weights that are made up, or that another rank sends later, do not
        come from a file; but they may be loaded from one later.

        Raises:
            ServingError: a tensor was missing.
        """
        if self.from_file or self.converted_layer.has_begun:
            self.converted_layer.check_loaded()


class ConvertedModelOptMoE(ConvertedExperts, ModelOptNvFp4FusedMoE):
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
        self.check_loaded()

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


class ConvertedCompressedTensorsMoE(ConvertedExperts, CompressedTensorsW4A4Nvfp4MoEMethod):
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
        self.check_loaded()

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


_TAKE_OVER: dict[type, Callable[[Any, RoutedExperts, str, Geometry], ConvertedExperts]] = {
    ModelOptNvFp4FusedMoE: ConvertedModelOptMoE.take_over,
    CompressedTensorsW4A4Nvfp4MoEMethod: ConvertedCompressedTensorsMoE.take_over,
}
"""What serves a converted layer, by the method that stock chose for it."""


def _largest(layer: RoutedExperts, input_scales: torch.Tensor) -> torch.Tensor:
    """The input scale that stock serves all experts with, for each of ours."""
    eplb = layer.moe_config.moe_parallel_config.enable_eplb
    largest: torch.Tensor = amax_for_moe_activation_quant(input_scales, eplb)
    return largest.repeat(layer.w13_weight.shape[0])


def _weight_loader(converted_layer: ConvertedLayer) -> Callable[..., None]:
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
        width = converted_layer.geometry.intermediate // layer.moe_config.tp_size
        start = width * layer.moe_config.tp_rank
        if start + width == converted_layer.geometry.intermediate:
            # With the zeros that follow, in whole tiles.
            width = 2 * converted_layer.parameter_of(layer, "w2_weight").shape[2]
        converted_layer.load(
            converted_layer.leaf_of(layer, param),
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
