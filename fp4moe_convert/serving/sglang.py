"""SGLang serves converted checkpoints; what is hooked, in the order in which a start meets it.

1. config.json is read: its ``quantization_config`` becomes the source's own again, with the
   converted one below `MARK`. From here on SGLang sees the ModelOpt checkpoint that it knows, and
   chooses models, backends and options as it would for the original.
2. The quantization config is made, on each rank: the checkpoint is checked, and the config replaced
   by one that gives converted layers an MoE method of ours, and all else what stock gives. Once the
   model is made, no converted layer may have been passed by.
3. That method creates stock's parameters, which have their final shapes already. Their loader
   copies a rank's share out of the file's tensors, on whatever thread SGLang calls it.
4. After loading it does what stock does, except the layout: nothing is padded, interleaved or
   shuffled. A parameter that was not loaded stops the engine.

A shared expert that SGLang fuses with the routed ones (DeepSeek-V3's, where there is no expert
parallelism) stays fused. The file holds it as the source did, so this one slot is loaded and laid
out by SGLang's own functions.

SGLang's loader keeps one input scale for gate and up, and where they differ, which one is a matter
of chance; here both stay. It serves with the maximum over all experts, here then that of both.

Draft models keep their stock methods: an MTP layer is never converted. SGLang logs and swallows
what a plugin raises at its start, so that whatever must stop the engine is raised in a hook.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from ..contract import (
    FORMAT_VERSION,
    QUANT_METHOD,
    Conversion,
    Geometry,
    layer_tensors,
    tensor_parallel_sizes,
)
from .checks import WAY_OUT, ServingError, check_section, read_section, warn_if_untested

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.5.23",)
MARK = "fp4moe"
"""Key of the converted section in the one that SGLang gets to see."""


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
        raise ServingError(
            f"fp4moe: this SGLang has no {min(unhooked)} to hook into; install SGLang "
            f"{TESTED_VERSIONS[-1]}, or {WAY_OUT}"
        )
    # hf_quant_config.json nests what config.json has flat. SGLang reads both, but takes the first
    # for the second once it has written its own name for the method into it.
    flat = source.get("quantization", source)
    config.quantization_config = {"quant_method": "modelopt", **flat, MARK: section}


def _take_over(quant_config: Any, model_config: Any, *_args: Any, **_kwargs: Any) -> Any:
    """After ``get_quant_config``: check a converted checkpoint and return a config of ours.

    Returns:
        None, which lets the config stand, for any other checkpoint and for draft models.
    """
    section = getattr(model_config.hf_config, "quantization_config", None)
    if not isinstance(section, dict) or MARK not in section or model_config.is_draft_model:
        return None
    import sglang
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config
    from sglang.srt.runtime_context import get_parallel

    conversion = check_section(section[MARK], engine="SGLang")
    warn_if_untested("SGLang", sglang.__version__, TESTED_VERSIONS)
    if type(quant_config) is not ModelOptFp4Config or quant_config.is_w4a16:
        raise ServingError(
            f"fp4moe: {section.get('quant_algo')} experts served as {model_config.quantization} "
            f"are not supported, NVFP4 as modelopt_fp4 is; leave --quantization out, or {WAY_OUT}"
        )
    if quant_config.use_per_token_activation:
        raise ServingError(
            "fp4moe: per-token activation scales are not supported; unset "
            f"SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION, or {WAY_OUT}"
        )
    ranks = get_parallel().moe_tp_size
    for prefix, geometry in conversion.layers.items():
        sizes = tensor_parallel_sizes(geometry)["sglang"]
        if ranks not in sizes:
            raise ServingError(
                f"fp4moe: {prefix}: {ranks} ranks cannot share an intermediate size of "
                f"{geometry.intermediate}; choose --tp-size and --ep-size for one of "
                f"{', '.join(map(str, sizes))} ranks to an expert"
            )
    return _engine_classes()(quant_config, conversion)


def _check_model(model: Any, *args: Any, **kwargs: Any) -> None:
    """After ``_initialize_model``: check that no converted layer was passed by, and say so."""
    arguments = (*args, *kwargs.values())
    quant_config = next((each for each in arguments if hasattr(each, "conversion")), None)
    if quant_config is None:
        return
    from sglang.srt.runtime_context import get_parallel

    # With pipeline parallelism a rank has some of the layers, and rightly no place for the others.
    conversion: Conversion = quant_config.conversion
    passed_by = conversion.layers.keys() - quant_config.taken_over
    if not quant_config.taken_over or (passed_by and get_parallel().pp_size == 1):
        raise ServingError(
            f"fp4moe: SGLang's {type(model).__name__} has no fused MoE layer for "
            f"{min(passed_by)}; the plugin does not know this model, {WAY_OUT}"
        )
    logger.info(
        "fp4moe: format version %d, %d MoE layers taken over, row order %s checked against this "
        "FlashInfer",
        FORMAT_VERSION,
        len(quant_config.taken_over),
        conversion.row_order,
    )


HOOKS: dict[str, Callable[..., Any]] = {
    "sglang.srt.utils.hf_transformers.config.get_config": _restore_section,
    "sglang.srt.model_loader.weight_utils.get_quant_config": _take_over,
    "sglang.srt.model_loader.loader._initialize_model": _check_model,
}


@cache  # SGLang may call it more than once in a process
def register() -> None:
    """Hook into SGLang; its entry point ``sglang.srt.plugins``."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in HOOKS.items():
        HookRegistry.register(target, hook, HookType.AFTER)


class ExpertLoader:
    """Loads the parameters of one converted layer on one rank.

    SGLang's model loaders call it with a parameter and the tensor of the same name, on any
    thread; with the expert as well, where the tensor belongs to a single one.
    """

    def __init__(self, layer: Any, prefix: str, geometry: Geometry, stock: Callable[..., None]):
        self.layer = layer
        self.prefix = prefix
        self.geometry = geometry
        self.stock = stock
        self.tensors = layer_tensors(prefix, geometry)._asdict()
        self.loaded: set[tuple[str, str | None]] = set()
        """(leaf, None) for the routed experts; (leaf, "w1" to "w3") for a fused shared expert."""

    def __call__(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        weight_name: str = "",
        shard_id: str | None = None,
        expert_id: int | None = None,
    ) -> None:
        leaf = next(leaf for leaf in self.tensors if getattr(self.layer, leaf) is param)
        if expert_id is None:
            self._load_routed(leaf, param, tensor)
        elif expert_id < self.geometry.experts or not self.layer.num_fused_shared_experts:
            raise ServingError(
                f"fp4moe: {self.prefix} is converted, but the checkpoint has a tensor of its "
                f"expert {expert_id} alone ({leaf}); convert the checkpoint again"
            )
        else:
            self.stock(param, tensor, weight_name, shard_id=shard_id, expert_id=expert_id)
        self.loaded.add((leaf, shard_id))

    def _load_routed(self, leaf: str, param: torch.nn.Parameter, tensor: torch.Tensor) -> None:
        from .slices import copy_share

        spec = self.tensors[leaf]
        if tuple(tensor.shape) != spec.shape:
            raise ServingError(
                f"fp4moe: {spec.name} is {list(tensor.shape)}, config.json says "
                f"{list(spec.shape)}; convert the checkpoint again"
            )
        # Fused shared experts come after the routed ones, in slots of their own.
        experts = self._experts(every_rank=leaf.endswith("_input_scale"))
        slots = param.data[: len(experts)]
        try:
            copy_share(leaf, tensor, slots, experts=experts, tp_rank=self.layer.moe_tp_rank)
        except ValueError as error:
            raise ServingError(f"fp4moe: {self.prefix}.{error}; {WAY_OUT}") from error

    def _experts(self, *, every_rank: bool) -> list[int]:
        """For each slot of a parameter, the expert it holds, as stock's loader places them."""
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        layer = self.layer
        location = get_global_expert_location_metadata() if layer.uses_expert_location else None
        count = layer._num_global_routed if location is None else location.num_logical_experts
        if count != self.geometry.experts:
            raise ServingError(
                f"fp4moe: {self.prefix} has {self.geometry.experts} experts, SGLang "
                f"wants {count}; {WAY_OUT}"
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

    def finish(self) -> None:
        """Check that everything was loaded, and be ready for another load.

        Raises:
            ServingError: a tensor was missing.
        """
        loaded, self.loaded = self.loaded, set()
        expected: set[tuple[str, str | None]] = {(leaf, None) for leaf in self.tensors}
        if self.layer.num_fused_shared_experts:
            for leaf in self.tensors:
                shards = ("w1", "w3") if leaf.startswith("w13") else ("w2",)
                expected |= {(leaf, shard) for shard in shards}
        for leaf, shard in sorted(expected - loaded, key=str):
            what = "" if shard is None else f" of the shared expert ({shard})"
            raise ServingError(
                f"fp4moe: {self.prefix}.{leaf}{what} was not loaded: it is missing from the "
                "checkpoint, or the load format passes it by; verify the checkpoint with fp4moe "
                "verify"
            )


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

    # FusedMoE looks for "ModelOpt" in the name to tell per-tensor scales from block scales.
    class ConvertedModelOptNvFp4FusedMoEMethod(ModelOptNvFp4FusedMoEMethod):
        """The method of one converted layer."""

        def __init__(self, quant_config: Any, prefix: str, geometry: Geometry) -> None:
            super().__init__(quant_config)
            if not self.use_flashinfer_trtllm_weight_layout:
                raise ServingError(
                    "fp4moe: the checkpoint is laid out for the MoE runner backend "
                    f"flashinfer_trtllm, this is {get_moe_runner_backend().value}; pass "
                    f"--moe-runner-backend flashinfer_trtllm, or {WAY_OUT}"
                )
            self.prefix = prefix
            self.geometry = geometry

        def create_weights(
            self, layer: Any, num_experts: int, hidden_size: int, *args: Any, **extra: Any
        ) -> None:
            sizes = (hidden_size, extra["moe_intermediate_size"], layer.moe_runner_config.is_gated)
            own = self.geometry
            if sizes != (own.hidden, own.intermediate, own.gated):
                raise ServingError(
                    f"fp4moe: {self.prefix} has {own}, SGLang wants (hidden, intermediate, gated) "
                    f"= {sizes}; {WAY_OUT}"
                )
            self.loader = ExpertLoader(layer, self.prefix, own, extra["weight_loader"])
            extra["weight_loader"] = self.loader
            super().create_weights(layer, num_experts, hidden_size, *args, **extra)

        def process_weights_after_loading(self, layer: Any) -> None:
            self.loader.finish()
            runner = layer.moe_runner_config
            gate, up = layer.w13_weight_scale_2.unbind(dim=1)
            if (runner.gemm1_clamp_limit or runner.swiglu_limit) and not torch.equal(gate, up):
                # Stock would move both halves onto one scale, through linear block scales.
                raise ServingError(
                    f"fp4moe: {self.prefix}: a clamped SwiGLU whose gate and up differ in "
                    f"weight_scale_2 is not supported; {WAY_OUT}"
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

        def __init__(self, stock: Any, conversion: Conversion) -> None:
            self.__dict__.update(stock.__dict__)
            self.conversion = conversion
            self.taken_over: set[str] = set()

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            stock = super().get_quant_method(layer, prefix)
            if not isinstance(layer, FusedMoE):
                return stock
            # Models may leave out the first parts of a name, as Mixtral's does "model.".
            own = next((p for p in self.conversion.layers if f".{p}".endswith(f".{prefix}")), None)
            # A layer that only one side takes for NVFP4 would be left with unset weights.
            if (own is None) == (type(stock) is ModelOptNvFp4FusedMoEMethod):
                raise ServingError(
                    f"fp4moe: SGLang's {prefix} is "
                    + ("not among the converted layers" if own is None else "not NVFP4")
                    + f"; the plugin does not know this model, {WAY_OUT}"
                )
            if own is None:
                return stock
            self.taken_over.add(own)
            return ConvertedModelOptNvFp4FusedMoEMethod(self, own, self.conversion.layers[own])

    return ConvertedModelOptFp4Config
