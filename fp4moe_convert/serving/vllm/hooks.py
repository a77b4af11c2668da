"""vLLM's hooks: they load a converted checkpoint by slices and copies, with no layout work.

vLLM imports this module in every process, through the entry point group ``vllm.general_plugins``.
If the import fails, vLLM logs that and goes on without the plugin. It pickles its configuration,
`ConvertedConfig` included, for its workers. So the module imports vLLM at its top and defines its
classes there.

The rest of vLLM sees a converted checkpoint as ``modelopt_fp4``, like its source, because the dtype
of the KV cache and some fusions depend on that name. So the plugin replaces that method's config,
passes ordinary checkpoints on to it, and rewrites a converted checkpoint's section where vLLM looks
for the method. The code follows vLLM 0.33.0 line by line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
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
from vllm.model_executor.utils import is_weights_pre_processed, replace_parameter

from ...format.contract import (
    FORMAT_VERSION,
    QUANT_METHOD,
    ConvertedSection,
    Geometry,
    round_up,
)
from ...layouts.trtllm_nvfp4 import INTERMEDIATE_MULTIPLE
from ..checks import CONVERTED_KEY, check_row_order, read_section, refusal, warn_if_untested
from ..converted_layer import LEAVES, ConvertedLayer, single_expert_refusal
from . import VLLM

TESTED = ("0.33.*",)
METHOD = "modelopt_fp4"

logger = init_logger("vllm.fp4moe")  # vLLM prints what is logged below its own name


def register() -> None:
    """Put `ConvertedConfig` in the place of stock's."""
    register_quantization_config(METHOD)(ConvertedConfig)


class ConvertedConfig(ModelOptNvFp4Config):
    """The source's quantization, and the layers that are converted."""

    converted: ConvertedSection
    layers: dict[str, Geometry]
    """The converted ones, by their names in vLLM."""
    taken_over: set[str]
    """Those among them that this process has built."""
    announced: bool

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
        self.layers = dict(converted.layers)
        self.taken_over = set()
        self.announced = False
        return self

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_checkpoint_weight_mapper(self) -> Any:
        """vLLM keeps a layer's expert parameters in a module of its own."""
        from vllm.model_executor.models.utils import WeightsMapper  # as vLLM does: it is circular

        name = re.compile(rf"\.experts\.({'|'.join(LEAVES)})$")
        return super().get_checkpoint_weight_mapper() | WeightsMapper(
            orig_to_new_regex={name: r".experts.routed_experts.\1"}
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            if prefix in self.layers:
                if not self.taken_over:
                    check_row_order(self.converted, engine="vLLM")
                    warn_if_untested("vLLM", vllm.__version__, TESTED)
                online = self.online_quantization_config
                if online and online.resolve_quant_method_cls(type(layer), prefix):
                    raise refusal(
                        f"{prefix} is laid out already, it cannot be quantized anew",
                        "drop that from --quantization-config",
                    )
                self.taken_over.add(prefix)
                return ConvertedModelOptMoE(self, layer.moe_config, prefix)
            layer.load_weights = MethodType(_load_unconverted, layer)
        return super().get_quant_method(layer, prefix)

    def announce(self) -> None:
        """Log, once the model is built, that the plugin takes part."""
        if not self.announced:
            self.announced = True
            logger.info(
                "fp4moe: format version %d, %d MoE layers taken over, "
                "row order checked against this vLLM's FlashInfer",
                FORMAT_VERSION,
                len(self.taken_over),
            )


class ConvertedModelOptMoE(ModelOptNvFp4FusedMoE):
    """Experts whose parameters are created as the kernel wants them and filled by slices."""

    def __init__(self, quant_config: ConvertedConfig, moe_config: Any, prefix: str) -> None:
        super().__init__(quant_config, moe_config)
        self.own = ConvertedLayer(prefix, quant_config.layers[prefix])

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
        if not model.gated:
            raise refusal(f"{prefix} has experts without a gate, which are not supported")
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
            round_up(intermediate_size_per_partition, INTERMEDIATE_MULTIPLE),
            params_dtype,
            **{**extra_weight_attrs, "weight_loader": MethodType(loader, layer)},
        )
        # Stock's passes over names that it does not know, which ours are.
        layer.load_weights = MethodType(_load_converted, layer)
        # Weights that are made up, or that another rank sends later, do not come from the file.
        self.from_file = get_current_vllm_config().load_config.load_format != "dummy"

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """What stock does to the scales; the layout is there."""
        self.quant_config.announce()
        if is_weights_pre_processed():  # shared by a process that has been here
            super().process_weights_after_loading(layer)
            return
        if self.from_file:
            self.own.check_loaded()

        gate, up = layer.w13_weight_scale_2.unbind(1)
        if not torch.allclose(gate, up):
            logger.warning_once(
                "w1_weight_scale_2 must match w3_weight_scale_2. Accuracy may be affected."
            )
        replace_parameter(layer, "w13_weight_scale_2", gate.contiguous())
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
        *per_expert: Any,
        **details: Any,
    ) -> None:
        leaf = own.leaf_of(layer, param)
        if per_expert or details:
            raise single_expert_refusal(own.prefix, f"tensors of single experts ({leaf})")
        everywhere, here = _experts_held(layer)
        own.load(
            leaf,
            param.data,
            loaded_weight,
            experts=everywhere if leaf.endswith("_input_scale") else here,
            tp_rank=layer.moe_config.tp_rank,
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


def _load_converted(
    layer: RoutedExperts, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[str]:
    """Stands in for `RoutedExperts.load_weights` in a converted layer."""
    for name, tensor in weights:
        leaf = name.removeprefix("routed_experts.")
        if leaf not in LEAVES:
            raise single_expert_refusal(layer.layer_name, f"its {name!r}")
        param = getattr(layer, leaf)
        param.weight_loader(param, tensor)
        yield leaf


def _load_unconverted(
    layer: RoutedExperts, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterable[str]:
    """`RoutedExperts.load_weights`, which would pass over a converted tensor."""

    def checked() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name.removeprefix("routed_experts.") in LEAVES:
                raise refusal(f"{layer.layer_name} is not among config.json's converted layers")
            yield name, tensor

    names: Iterable[str] = type(layer).load_weights(layer, checked())
    return names
