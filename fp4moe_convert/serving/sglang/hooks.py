"""SGLang's hooks, in the order in which a start meets them.

1. SGLang reads config.json. The hook puts the source's own ``quantization_config`` back, with the
   converted section below `CONVERTED_KEY`. From here on SGLang sees the checkpoint that it knows,
   and chooses models, backends and options as it would for the original.
2. SGLang makes the quantization config, on each rank. The hook checks the checkpoint and returns
   the same config, but for what it gives to converted layers: an MoE method of ours in the place
   of the method, or of the scheme, that stock chose.
3. That method creates stock's parameters, which already have their final shapes.
4. SGLang has built a model, of any checkpoint. The hook puts a `gate.Gate` before it: all that is
   loaded now or later is judged there. The gate hands the tensors of converted layers to their
   loaders, which copy a rank's share out of them, on any thread.
5. After loading, the method does what stock does, except for the layout: it pads, interleaves and
   shuffles nothing. A parameter that was not loaded stops the engine.
6. An update from a folder is judged before SGLang touches the model.

SGLang fuses DeepSeek-V3's shared expert with the routed ones where there is no expert parallelism.
It stays fused here: the file holds it as the source did, so SGLang's own functions load this one
slot and lay it out.

SGLang's loader keeps one input scale for gate and up. Where they differ, chance decides which one.
Here both stay. SGLang serves with the maximum over all experts, which is then that of both.

A draft that SGLang builds from another class than the checkpoint's, as for multi-token prediction,
has layers of its own, which are never converted; a whole model as a draft is a model like others.
SGLang logs and swallows what a plugin raises at its start, so the hooks raise what must stop the
engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ...engines.sglang import NO_UNGATED, SGLANG
from ...errors import ServingError
from ...format.contract import QUANT_METHOD, ConvertedSection
from ...source.description import is_mixed_precision, settings_of
from ..checks import (
    CONVERTED_KEY,
    check_row_order,
    log_good_start,
    read_section,
    refusal,
    warn_if_untested,
)
from ..gate import OUT_OF_ORDER, Gate, gate_of, guard

if TYPE_CHECKING:
    import torch

    from ...format.contract import Geometry
    from ..converted_layer import ConvertedLayer

logger = logging.getLogger(__name__)

TESTED = ("0.5.23",)

LOADER = "fp4moe_loader"
"""Where a FusedMoE that is taken over keeps its `ExpertLoader`."""

CLASSES_KEY = "fp4moe_architectures"
"""Where config.json's ``architectures`` are kept: SGLang writes a draft's own over them."""


def _restore_section(config: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``get_config``: let a converted checkpoint's config say what the source's said.

    This is the one place that all readers of the section come after; there are a dozen.
    """
    section = getattr(config, "quantization_config", None)
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry

    converted = read_section(section)
    # SGLang goes on without the hooks whose targets it does not have.
    if unhooked := HOOKS.keys() - HookRegistry._patched:
        raise refusal(
            f"this SGLang has no {min(unhooked)} to hook into", f"install SGLang {TESTED[-1]}"
        )
    # hf_quant_config.json nests what config.json has flat. SGLang reads both, but takes the first
    # for the second once it has written its own name for the method into it.
    source = settings_of(converted.source)
    if is_mixed_precision(source):
        # SGLang reads that file, too, for what the section lacks (model_loader/weight_utils.py:283
        # in 0.5.23): the layers' algorithms, or that of the KV cache.
        source = {**settings_of(converted.source_hf_quant_config or {}), **source}
    config.quantization_config = {
        "quant_method": "modelopt",
        **source,
        CONVERTED_KEY: section,
        CLASSES_KEY: list(config.architectures or ()),
    }


def _converted(model_config: Any) -> ConvertedSection | None:
    """The section of a converted checkpoint, as `_restore_section` leaves it."""
    section = getattr(model_config.hf_config, "quantization_config", None)
    if not isinstance(section, dict) or CONVERTED_KEY not in section:
        return None
    return read_section(section[CONVERTED_KEY])


def _is_whole(model_config: Any) -> bool:
    """Whether SGLang builds the model that config.json names, not a draft out of other layers."""
    named: object = model_config.hf_config.quantization_config[CLASSES_KEY]
    return named == list(model_config.hf_config.architectures or ())


def _take_over(quant_config: Any, model_config: Any, *_args: Any, **_kwargs: Any) -> Any:
    """After ``_get_quantization_config``: check a converted checkpoint and return a config of ours.

    Returns:
        None, which lets the config stand, for any other checkpoint and for other layers of one.
    """
    converted = _converted(model_config)
    if converted is None or not _is_whole(model_config):
        return None
    section = model_config.hf_config.quantization_config
    import sglang
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from sglang.srt.layers.quantization.modelopt_quant import (
        HybridFp8NvFp4Config,
        ModelOptFp4Config,
        ModelOptMixedPrecisionConfig,
    )
    from sglang.srt.runtime_context import get_exec, get_parallel

    for option, reason in OPTIONS.items():
        if getattr(get_exec().moe, option):
            raise refusal(reason, f"leave --{option.replace('_', '-')} out")
    check_row_order(converted, engine="SGLang")
    warn_if_untested("SGLang", sglang.__version__, TESTED)
    known = (
        ModelOptFp4Config,
        ModelOptMixedPrecisionConfig,
        HybridFp8NvFp4Config,
        CompressedTensorsConfig,
    )
    own = getattr(quant_config, "nvfp4_config", quant_config)  # of a mixed one, that of NVFP4
    if type(quant_config) not in known or getattr(own, "is_w4a16", False):
        raise refusal(
            f"{section.get('quant_algo') or section.get('format')} experts served as "
            f"{model_config.quantization} are not supported, NVFP4 as modelopt_fp4, modelopt_mixed "
            "or compressed-tensors is, and amid fp8",
            "leave --quantization out",
        )
    if getattr(own, "use_per_token_activation", False):
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
    take_over = partial(_engine_classes(), is_draft=model_config.is_draft_model)
    # A class of its own, so that SGLang finds the config to be of the class that it knows.
    quant_config.__class__ = _with_converted_layers(type(quant_config), converted, take_over)
    return quant_config


def _with_converted_layers(
    stock: type[Any], converted: ConvertedSection, take_over: Callable[..., Any]
) -> type[Any]:
    """A subclass of a quantization config that lets ``take_over`` replace what ``stock`` gives to
    the converted layers."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    from ..converted_layer import converted_layer_of

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        method = stock.get_quant_method(self, layer, prefix)
        if not isinstance(layer, FusedMoE):
            return method
        own = converted_layer_of(prefix, converted.layers)
        return method if own is None else take_over(layer, method, own, converted.layers[own])

    return type(f"Converted{stock.__name__}", (stock,), {"get_quant_method": get_quant_method})


def _put_gate(model: Any, model_config: Any, load_config: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``_initialize_model``, of any model."""
    converted = _converted(model_config)
    if converted is None:
        guard(model, Gate(None, {}))
        return
    from ..converted_layer import check_taken_over

    loaders = {
        name: loader
        for name, module in model.named_modules()
        if (loader := getattr(module, LOADER, None)) is not None
    }
    layers = {each.own.prefix: partial(_deliver, name, each) for name, each in loaders.items()}
    if _is_whole(model_config):
        check_taken_over(
            model,
            converted.layers,
            layers,
            layer_count=model_config.num_hidden_layers,
            engine="SGLang",
        )
    if layers:
        log_good_start(logger, converted, len(layers), engine="SGLang")
    modules = [each.layer for each in loaders.values() if not each.layer.num_fused_shared_experts]
    in_order = load_config.load_format not in OUT_OF_ORDER
    guard(model, Gate(converted, layers, in_order=in_order), filled=modules)


def _deliver(name: str, loader: ExpertLoader, leaf: str, tensor: torch.Tensor) -> str:
    loader(loader.own.parameter_of(loader.layer, leaf), tensor)
    return f"{name}.{leaf}"


def _judge_update(
    update: Callable[..., tuple[bool, str]],
    updater: Any,
    model_path: str,
    load_format: str,
    weight_name_filter: Any = None,
    **options: Any,
) -> tuple[bool, str]:
    """Around ``update_weights_from_disk``, which cannot go back once it has begun: it would load
    the same folder once more."""
    gate = gate_of(updater.get_model())
    if weight_name_filter is not None and gate.converted is not None:
        # Elastic expert parallelism looks for the tensors of an expert, and goes on without.
        raise refusal("single experts cannot be loaded again from a converted checkpoint")
    try:
        gate.check_folder(model_path)
    except ServingError as error:
        return False, str(error)
    return update(updater, model_path, load_format, weight_name_filter, **options)


OPTIONS = {
    "kt_weight_path": "KTransformers keeps experts in a form of its own",
    "enable_paged_experts": "paged experts are loaded one by one",
    "enable_elastic_expert_backup": "a backup of experts is loaded one by one",
}
"""Options of SGLang's with which another kernel or loader takes the experts, and why the plugin
cannot serve them."""

UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"

HOOKS: dict[str, tuple[Callable[..., Any], str]] = {
    "sglang.srt.utils.hf_transformers.config.get_config": (_restore_section, "after"),
    "sglang.srt.model_loader.loader._get_quantization_config": (_take_over, "after"),
    "sglang.srt.model_loader.loader._initialize_model": (_put_gate, "after"),
    f"{UPDATER}.update_weights_from_disk": (_judge_update, "around"),
}


@cache  # SGLang may call it more than once in a process
def register() -> None:
    """Hook into SGLang."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, (hook, when) in HOOKS.items():
        HookRegistry.register(target, hook, HookType(when))


class ExpertLoader:
    """The weight loader of one converted layer's parameters on one rank.

    The gate calls it with a parameter and the tensor of the same name. SGLang's model loaders call
    it, on any thread, with the tensor of a single expert: a shared one that is fused.
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
        leaf = self.own.leaf_of(self.layer, param)
        if expert_id is None:
            # Stock's own mark: of ModelOpt's input scales it keeps those of all ranks.
            every_rank = getattr(param, "_sglang_require_global_experts", False)
            experts = self._experts(every_rank=every_rank)
            # Fused shared experts come after the routed ones, in slots of their own.
            slots = param.data[: len(experts)]
            if tensor.dim() == slots.dim() + 1:  # [E, 1]: the one scale of w13 without a gate
                slots = slots.unsqueeze(1)
            width = self.layer.intermediate_size_per_partition  # padded
            start = width * self.layer.moe_tp_rank
            part = range(start, start + width)
            self.own.load(leaf, slots, tensor, experts=experts, part=part)
        else:  # a fused shared expert
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
        w13_shards = ("w1", "w3") if self.own.geometry.gated else ("w1",)
        shared = (
            _of_shared_expert(leaf, shard)
            for leaf in self.own.specs
            for shard in (w13_shards if leaf.startswith("w13") else ("w2",))
        )
        self.own.check_loaded(shared if self.layer.num_fused_shared_experts else ())


def _of_shared_expert(leaf: str, shard_id: str | None) -> str:
    return f"{leaf} of the shared expert ({shard_id})"


@cache
def _engine_classes() -> Callable[..., Any]:
    """What takes over a converted layer; a function, as its classes have SGLang's as bases.

    Returns:
        A function of a FusedMoE, the method that stock chose for it, its prefix in the file and its
        geometry; and of ``is_draft``. It returns the method to use.
    """
    import torch
    from sglang.srt.layers.moe.moe_runner.flashinfer_trtllm import _compute_g1_scale_c
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW4A4Nvfp4MoE,
    )
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod
    from sglang.srt.layers.utils import copy_or_rebind_param

    from ..converted_layer import COMPRESSED_TENSORS_NAMES, MODELOPT_NAMES, ConvertedLayer

    def take_over(
        layer: Any, method: Any, prefix: str, geometry: Geometry, *, is_draft: bool
    ) -> Any:
        if type(method) is ModelOptNvFp4FusedMoEMethod:
            check_backend(method.enable_flashinfer_trtllm_moe, is_draft)
            own = ConvertedLayer(prefix, geometry, MODELOPT_NAMES)
            return ConvertedModelOptNvFp4FusedMoEMethod(method.quant_config, own)
        scheme = layer.scheme  # None for ModelOpt's
        if type(scheme) is CompressedTensorsW4A4Nvfp4MoE:
            check_backend(scheme.use_flashinfer_trtllm, is_draft)
            if not geometry.gated:
                raise refusal(f"{NO_UNGATED}, as {prefix} is")
            own = ConvertedLayer(prefix, geometry, COMPRESSED_TENSORS_NAMES)
            layer.scheme = ConvertedCompressedTensorsW4A4Nvfp4MoE(own)
        return method

    def check_backend(is_flashinfer_trtllm: bool, is_draft: bool) -> None:
        draft = "speculative-" if is_draft else ""
        if get_moe_a2a_backend().is_megamoe():
            raise refusal(
                "the checkpoint is laid out for the MoE runner backend flashinfer_trtllm, "
                "MegaMoE has a byte order of its own",
                f"leave --{draft}moe-a2a-backend megamoe out, or what stands for it, "
                "--moe-runner-backend megamoe",
            )
        if not is_flashinfer_trtllm:
            raise refusal(
                "the checkpoint is laid out for the MoE runner backend flashinfer_trtllm, "
                f"this is {get_moe_runner_backend().value}",
                f"pass --{draft}moe-runner-backend flashinfer_trtllm",
            )

    class ConvertedExperts:
        """Of a method or a scheme: its parameters are filled by slices."""

        own: ConvertedLayer

        def create_weights(
            self, layer: Any, num_experts: int, hidden_size: int, *args: Any, **extra: Any
        ) -> None:
            sizes = (hidden_size, extra["moe_intermediate_size"], layer.moe_runner_config.is_gated)
            own = self.own.geometry
            if sizes != (own.hidden, own.intermediate, own.gated):
                raise refusal(
                    f"{self.own.prefix} has {own}, "
                    f"SGLang wants (hidden, intermediate, gated) = {sizes}"
                )
            loader = ExpertLoader(layer, self.own, extra["weight_loader"])
            setattr(layer, LOADER, loader)
            extra["weight_loader"] = loader
            super().create_weights(layer, num_experts, hidden_size, *args, **extra)  # type: ignore[misc]

    # FusedMoE looks for "ModelOpt" in the name to tell per-tensor scales from block scales.
    class ConvertedModelOptNvFp4FusedMoEMethod(ConvertedExperts, ModelOptNvFp4FusedMoEMethod):
        """Of ModelOpt's experts, wherever their config comes from."""

        def __init__(self, quant_config: Any, own: ConvertedLayer) -> None:
            super().__init__(quant_config)
            self.own = own

        def process_weights_after_loading(self, layer: Any) -> None:
            getattr(layer, LOADER).check_loaded()
            runner = layer.moe_runner_config
            if runner.is_gated and (runner.gemm1_clamp_limit or runner.swiglu_limit):
                gate, up = layer.w13_weight_scale_2.unbind(dim=1)
                if not torch.equal(gate, up):
                    # Stock would move both halves onto one scale, through linear block scales.
                    raise refusal(
                        f"{self.own.prefix}: a clamped SwiGLU whose gate and up differ in "
                        "weight_scale_2 is not supported"
                    )
            super().process_weights_after_loading(layer)

        def _align_fp4_moe_weights_for_flashinfer_trtllm(self, layer: Any) -> None:
            lay_out_shared_experts(layer)
            layer.trtllm_padded_hidden_size = None
            g1_scale_c = _compute_g1_scale_c(
                layer.w2_input_scale_quant,
                layer.g1_alphas,
                layer.g1_alphas_up,
                is_gated=layer.moe_runner_config.is_gated,
                activation=layer.moe_runner_config.activation,
            )
            copy_or_rebind_param(layer, "g1_scale_c", g1_scale_c)

    class ConvertedCompressedTensorsW4A4Nvfp4MoE(ConvertedExperts, CompressedTensorsW4A4Nvfp4MoE):
        """Of llm-compressor's experts."""

        def __init__(self, own: ConvertedLayer) -> None:
            super().__init__()
            self.own = own

        def process_weights_after_loading(self, layer: Any) -> None:
            """What stock does to the scales; the layout is there."""
            getattr(layer, LOADER).check_loaded()
            for name in ("w13_weight", "w2_weight"):
                if (packed := getattr(layer, f"{name}_packed", None)) is not None:
                    delattr(layer, f"{name}_packed")
                    bind(layer, name, packed.data)
            gate, up = layer.w13_weight_global_scale.unbind(dim=1)
            if not torch.allclose(gate, up):
                logger.warning(
                    "fp4moe: %s: gate and up weight_global_scale differ", self.own.prefix
                )
            lay_out_shared_experts(layer, gate_first=True)
            bind(layer, "w13_weight_scale_2", 1 / gate)
            bind(layer, "w2_weight_scale_2", 1 / layer.w2_weight_global_scale.data)
            for matrix, alphas in (("w13", "g1_alphas"), ("w2", "g2_alphas")):
                divisors = getattr(layer, f"{matrix}_input_global_scale")
                smallest = divisors.min().to(torch.float32).expand(layer.num_local_experts)
                scale = getattr(layer, f"{matrix}_weight_scale_2")
                bind(layer, alphas, ((1 / smallest) * scale).to(torch.float32))
                bind(layer, f"{matrix}_input_scale_quant", smallest)
            g1_scale_c = layer.w2_input_scale_quant * layer.g1_alphas
            bind(layer, "g1_scale_c", g1_scale_c.to(torch.float32))

    def bind(layer: Any, name: str, value: Any) -> None:
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))

    def lay_out_shared_experts(layer: Any, *, gate_first: bool = False) -> None:
        if not layer.num_fused_shared_experts:
            return
        from sglang.srt.layers.quantization.utils import (
            prepare_static_weights_for_trtllm_fp4_moe,
            reorder_w1w3_to_w3w1,
        )

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
        if gate_first:
            w13, w13_scale = reorder_w1w3_to_w3w1(w13, w13_scale, dim=-2)
        laid_out = prepare_static_weights_for_trtllm_fp4_moe(
            w13,
            w2,
            w13_scale,
            w2_scale,
            hidden_size=w2.shape[1],
            intermediate_size=w2.shape[2] * 2,
            num_experts=w2.shape[0],
            is_gated=layer.moe_runner_config.is_gated,
        )
        for slots, result in zip(shared, laid_out, strict=True):
            slots.copy_(result)

    return take_over
