"""SGLang's hooks, in the order in which a start meets them.

1. SGLang reads config.json. The hook puts the source's own ``quantization_config`` back, with the
   converted section below `CONVERTED_KEY`. From here on SGLang sees the ModelOpt checkpoint that it
   knows, and chooses models, backends and options as it would for the original.
2. SGLang makes the quantization config, on each rank. The hook checks the checkpoint and returns a
   config that gives converted layers an MoE method of ours, and other layers what stock gives. A
   further hook makes sure that the model has taken every converted layer.
3. That method creates stock's parameters, which already have their final shapes. Their loader
   copies a rank's share out of the file's tensors, on any thread.
4. After loading, the method does what stock does, except for the layout: it pads, interleaves and
   shuffles nothing. A parameter that was not loaded stops the engine.

SGLang fuses DeepSeek-V3's shared expert with the routed ones where there is no expert parallelism.
It stays fused here: the file holds it as the source did, so SGLang's own functions load this one
slot and lay it out.

SGLang's loader keeps one input scale for gate and up. Where they differ, chance decides which one.
Here both stay. SGLang serves with the maximum over all experts, which is then that of both.

Draft models keep their stock methods, because an MTP layer is never converted. SGLang logs and
swallows what a plugin raises at its start, so the hooks raise what must stop the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from ...format.contract import FORMAT_VERSION, QUANT_METHOD, ConvertedSection, Geometry
from ..checks import CONVERTED_KEY, check_section, read_section, refusal, warn_if_untested
from . import SGLANG

if TYPE_CHECKING:
    import torch

    from ..converted_layer import ConvertedLayer

logger = logging.getLogger(__name__)

TESTED = ("0.5.23",)


def _restore_section(config: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``get_config``: let a converted checkpoint's config say what the source's said.

    This is the one place that all readers of the section come after; there are a dozen.
    """
    section = getattr(config, "quantization_config", None)
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry

    source = read_section(section).source
    # SGLang goes on without the hooks whose targets it does not have.
    if unhooked := HOOKS.keys() - HookRegistry._patched:
        raise refusal(
            f"this SGLang has no {min(unhooked)} to hook into", f"install SGLang {TESTED[-1]}"
        )
    # hf_quant_config.json nests what config.json has flat. SGLang reads both, but takes the first
    # for the second once it has written its own name for the method into it.
    flat = source.get("quantization", source)
    config.quantization_config = {"quant_method": "modelopt", **flat, CONVERTED_KEY: section}


def _take_over(quant_config: Any, model_config: Any, *_args: Any, **_kwargs: Any) -> Any:
    """After ``get_quant_config``: check a converted checkpoint and return a config of ours.

    Returns:
        None, which lets the config stand, for any other checkpoint and for draft models.
    """
    section = getattr(model_config.hf_config, "quantization_config", None)
    if not isinstance(section, dict) or CONVERTED_KEY not in section or model_config.is_draft_model:
        return None
    import sglang
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config
    from sglang.srt.runtime_context import get_parallel

    converted = check_section(section[CONVERTED_KEY], engine="SGLang")
    warn_if_untested("SGLang", sglang.__version__, TESTED)
    if type(quant_config) is not ModelOptFp4Config or quant_config.is_w4a16:
        raise refusal(
            f"{section.get('quant_algo')} experts served as {model_config.quantization} are not "
            "supported, NVFP4 as modelopt_fp4 is",
            "leave --quantization out",
        )
    if quant_config.use_per_token_activation:
        raise refusal(
            "per-token activation scales are not supported",
            "unset SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION",
        )
    ranks = get_parallel().moe_tp_size
    for prefix, geometry in converted.layers.items():
        sizes = SGLANG.tensor_parallel_sizes(geometry)
        if ranks not in sizes:
            raise refusal(
                f"{prefix}: {ranks} ranks cannot share an intermediate size of "
                f"{geometry.intermediate}",
                "choose --tp-size and --ep-size for one of "
                f"{', '.join(map(str, sizes))} ranks to an expert",
            )
    return _engine_classes()(quant_config, converted)


def _check_model(model: Any, *args: Any, **kwargs: Any) -> None:
    """After ``_initialize_model``: check that no converted layer was passed by, and say so."""
    arguments = (*args, *kwargs.values())
    quant_config = next((each for each in arguments if hasattr(each, "converted")), None)
    if quant_config is None:
        return
    from sglang.srt.runtime_context import get_parallel

    # With pipeline parallelism a rank has some of the layers, and rightly no place for the others.
    converted: ConvertedSection = quant_config.converted
    passed_by = converted.layers.keys() - quant_config.taken_over
    if not quant_config.taken_over or (passed_by and get_parallel().pp_size == 1):
        raise refusal(
            f"SGLang's {type(model).__name__} has no fused MoE layer for {min(passed_by)}; "
            "the plugin does not know this model"
        )
    logger.info(
        "fp4moe: format version %d, %d MoE layers taken over, row order %s checked against this "
        "FlashInfer",
        FORMAT_VERSION,
        len(quant_config.taken_over),
        converted.layout.row_order,
    )


HOOKS: dict[str, Callable[..., Any]] = {
    "sglang.srt.utils.hf_transformers.config.get_config": _restore_section,
    "sglang.srt.model_loader.weight_utils.get_quant_config": _take_over,
    "sglang.srt.model_loader.loader._initialize_model": _check_model,
}


@cache  # SGLang may call it more than once in a process
def register() -> None:
    """Hook into SGLang."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in HOOKS.items():
        HookRegistry.register(target, hook, HookType.AFTER)


class ExpertLoader:
    """The weight loader of one converted layer's parameters on one rank.

    SGLang's model loaders call it with a parameter and the tensor of the same name, on any
    thread; with the expert as well, where the tensor belongs to a single one.
    """

    def __init__(self, layer: Any, own: ConvertedLayer, stock: Callable[..., None]) -> None:
        self.layer = layer
        self.own = own
        self.stock = stock

    def __call__(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        weight_name: str = "",
        shard_id: str | None = None,
        expert_id: int | None = None,
    ) -> None:
        from ..converted_layer import single_expert_refusal  # imports torch

        leaf = self.own.leaf_of(self.layer, param)
        if expert_id is None:
            experts = self._experts(every_rank=leaf.endswith("_input_scale"))
            # Fused shared experts come after the routed ones, in slots of their own.
            slots = param.data[: len(experts)]
            self.own.load(leaf, slots, tensor, experts=experts, tp_rank=self.layer.moe_tp_rank)
        elif expert_id < self.own.geometry.experts or not self.layer.num_fused_shared_experts:
            raise single_expert_refusal(
                self.own.prefix, f"a tensor of its expert {expert_id} alone ({leaf})"
            )
        else:
            self.stock(param, tensor, weight_name, shard_id=shard_id, expert_id=expert_id)
            self.own.note(_of_shared_expert(leaf, shard_id))

    def _experts(self, *, every_rank: bool) -> list[int]:
        """For each slot of a parameter, the expert it holds, as stock's loader places them."""
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        layer = self.layer
        location = get_global_expert_location_metadata() if layer.uses_expert_location else None
        count = layer._num_global_routed if location is None else location.num_logical_experts
        if count != self.own.geometry.experts:
            raise refusal(
                f"{self.own.prefix} has {self.own.geometry.experts} experts, SGLang wants {count}"
            )
        if every_rank:
            # SGLang only takes their maximum: wherever a redundant expert is, it repeats the first.
            return [slot % count for slot in range(layer._num_global_routed)]
        start = layer._expert_storage_rank * layer._num_local_routed
        slots = slice(start, start + layer._num_local_routed)
        if location is None:
            return list(range(count))[slots]
        experts: list[int] = location.physical_to_logical_map_cpu[layer.layer_id, slots].tolist()
        return experts

    def check_loaded(self) -> None:
        """Loading has ended.

        Raises:
            ServingError: a tensor was missing.
        """
        shared = (
            _of_shared_expert(leaf, shard)
            for leaf in self.own.specs
            for shard in (("w1", "w3") if leaf.startswith("w13") else ("w2",))
        )
        self.own.check_loaded(shared if self.layer.num_fused_shared_experts else ())


def _of_shared_expert(leaf: str, shard_id: str | None) -> str:
    return f"{leaf} of the shared expert ({shard_id})"


@cache
def _engine_classes() -> Callable[..., Any]:
    """The quantization config of a converted checkpoint; a function, as SGLang is the base."""
    import torch
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.moe.moe_runner.flashinfer_trtllm import _compute_g1_scale_c
    from sglang.srt.layers.moe.utils import get_moe_runner_backend
    from sglang.srt.layers.quantization.modelopt_quant import (
        ModelOptFp4Config,
        ModelOptNvFp4FusedMoEMethod,
    )
    from sglang.srt.layers.utils import copy_or_rebind_param

    from ..converted_layer import ConvertedLayer

    # FusedMoE looks for "ModelOpt" in the name to tell per-tensor scales from block scales.
    class ConvertedModelOptNvFp4FusedMoEMethod(ModelOptNvFp4FusedMoEMethod):
        """The method of one converted layer."""

        def __init__(self, quant_config: Any, prefix: str, geometry: Geometry) -> None:
            super().__init__(quant_config)
            if not self.use_flashinfer_trtllm_weight_layout:
                raise refusal(
                    "the checkpoint is laid out for the MoE runner backend flashinfer_trtllm, "
                    f"this is {get_moe_runner_backend().value}",
                    "pass --moe-runner-backend flashinfer_trtllm",
                )
            self.prefix = prefix
            self.geometry = geometry

        def create_weights(
            self, layer: Any, num_experts: int, hidden_size: int, *args: Any, **extra: Any
        ) -> None:
            sizes = (hidden_size, extra["moe_intermediate_size"], layer.moe_runner_config.is_gated)
            own = self.geometry
            if sizes != (own.hidden, own.intermediate, own.gated):
                raise refusal(
                    f"{self.prefix} has {own}, SGLang wants (hidden, intermediate, gated) = {sizes}"
                )
            converted = ConvertedLayer(self.prefix, own)
            self.loader = ExpertLoader(layer, converted, extra["weight_loader"])
            extra["weight_loader"] = self.loader
            super().create_weights(layer, num_experts, hidden_size, *args, **extra)

        def process_weights_after_loading(self, layer: Any) -> None:
            self.loader.check_loaded()
            runner = layer.moe_runner_config
            gate, up = layer.w13_weight_scale_2.unbind(dim=1)
            if (runner.gemm1_clamp_limit or runner.swiglu_limit) and not torch.equal(gate, up):
                # Stock would move both halves onto one scale, through linear block scales.
                raise refusal(
                    f"{self.prefix}: a clamped SwiGLU whose gate and up differ in "
                    "weight_scale_2 is not supported"
                )
            super().process_weights_after_loading(layer)

        def _align_fp4_moe_weights_for_flashinfer_trtllm(self, layer: Any) -> None:
            if layer.num_fused_shared_experts:
                lay_out_shared_experts(layer)
            layer.trtllm_padded_hidden_size = None
            g1_scale_c = _compute_g1_scale_c(
                layer.w2_input_scale_quant,
                layer.g1_alphas,
                layer.g1_alphas_up,
                is_gated=True,
                activation=layer.moe_runner_config.activation,
            )
            copy_or_rebind_param(layer, "g1_scale_c", g1_scale_c)

    def lay_out_shared_experts(layer: Any) -> None:
        from sglang.srt.layers.quantization.utils import prepare_static_weights_for_trtllm_fp4_moe

        shared = [
            parameter.data[layer._num_local_routed :]
            for parameter in (
                layer.w13_weight,
                layer.w13_weight_scale,
                layer.w2_weight,
                layer.w2_weight_scale,
            )
        ]
        w13, w13_scale, w2, w2_scale = shared
        laid_out = prepare_static_weights_for_trtllm_fp4_moe(
            w13,
            w2,
            w13_scale,
            w2_scale,
            hidden_size=w2.shape[1],
            intermediate_size=w2.shape[2] * 2,
            num_experts=w2.shape[0],
        )
        for slots, result in zip(shared, laid_out, strict=True):
            slots.copy_(result)

    class ConvertedModelOptFp4Config(ModelOptFp4Config):
        """Stock's config with `ConvertedModelOptNvFp4FusedMoEMethod` for converted layers."""

        def __init__(self, stock: Any, converted: ConvertedSection) -> None:
            self.__dict__.update(stock.__dict__)
            self.converted = converted
            self.taken_over: set[str] = set()

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            stock = super().get_quant_method(layer, prefix)
            if not isinstance(layer, FusedMoE):
                return stock
            # Models may leave out the first parts of a name, as Mixtral's does "model.".
            own = next((p for p in self.converted.layers if f".{p}".endswith(f".{prefix}")), None)
            # A layer that only one side takes for NVFP4 would be left with unset weights.
            if (own is None) == (type(stock) is ModelOptNvFp4FusedMoEMethod):
                raise refusal(
                    f"SGLang's {prefix} is "
                    + ("not among the converted layers" if own is None else "not NVFP4")
                    + "; the plugin does not know this model"
                )
            if own is None:
                return stock
            self.taken_over.add(own)
            return ConvertedModelOptNvFp4FusedMoEMethod(self, own, self.converted.layers[own])

    return ConvertedModelOptFp4Config
