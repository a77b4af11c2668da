"""The experts of SGLang's converted layers: stock's methods, but for the layout.

SGLang's own classes are their bases, so `hooks` imports this module where SGLang serves a converted
checkpoint.

SGLang fuses DeepSeek-V3's shared expert with the routed ones where there is no expert parallelism.
It stays fused here: the file holds it as the source did, so SGLang's own functions load this one
slot and lay it out.

SGLang's loader keeps one input scale for gate and up. Where they differ, chance decides which one.
Here both stay. SGLang serves with the maximum over all experts, which is then that of both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.moe_runner.flashinfer_trtllm import _compute_g1_scale_c
from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.quantization import utils
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A4Nvfp4MoE,
)
from sglang.srt.layers.quantization.modelopt_quant import (
    HybridFp8NvFp4Config,
    ModelOptFp4Config,
    ModelOptMixedPrecisionConfig,
    ModelOptNvFp4FusedMoEMethod,
    _compute_gemm1_alphas,
)
from sglang.srt.layers.utils import copy_or_rebind_param

from ...engines.sglang import NO_UNGATED
from ...format.contract import ConvertedSection, Geometry
from ..checks import refusal
from ..converted_layer import (
    COMPRESSED_TENSORS_NAMES,
    MODELOPT_NAMES,
    ConvertedLayer,
    converted_layer_of,
)

logger = logging.getLogger(__name__)

CONFIGS = (
    ModelOptFp4Config,
    ModelOptMixedPrecisionConfig,
    HybridFp8NvFp4Config,
    CompressedTensorsConfig,
)
"""The quantizations that may have NVFP4 experts."""

LOADER = "fp4moe_loader"
"""Where a FusedMoE that is taken over keeps its `ExpertLoader`."""


def take_over(quant_config: Any, converted: ConvertedSection, model_config: Any) -> None:
    """Let a quantization config give converted layers methods of ours.

    Raises:
        ServingError: it is none that has NVFP4 experts, or they are not served as such.
    """
    is_draft: bool = model_config.is_draft_model
    # Of a mixed one, that of NVFP4.
    nvfp4_config = getattr(quant_config, "nvfp4_config", quant_config)
    if type(quant_config) not in CONFIGS or getattr(nvfp4_config, "is_w4a16", False):
        section = model_config.hf_config.quantization_config
        draft = "speculative-draft-model-" if is_draft else ""
        raise refusal(
            f"{section.get('quant_algo') or section.get('format')} experts served as "
            f"{model_config.quantization} are not supported, NVFP4 as modelopt_fp4, modelopt_mixed "
            "or compressed-tensors is, and amid fp8",
            f"leave --{draft}quantization out",
        )
    if getattr(nvfp4_config, "use_per_token_activation", False):
        raise refusal(
            "per-token activation scales are not supported",
            "unset SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION",
        )
    stock = type(quant_config)

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        method = stock.get_quant_method(self, layer, prefix)
        if not isinstance(layer, FusedMoE):
            return method
        converted_prefix = converted_layer_of(prefix, converted.layers)
        if converted_prefix is None:
            return method
        geometry = converted.layers[converted_prefix]
        return _method(layer, method, converted_prefix, geometry, is_draft=is_draft)

    # A class of its own, so that SGLang finds the config to be of the class that it knows.
    quant_config.__class__ = type(
        f"Converted{stock.__name__}", (stock,), {"get_quant_method": get_quant_method}
    )


def _method(layer: Any, stock: Any, prefix: str, geometry: Geometry, *, is_draft: bool) -> Any:
    """The method of a converted layer, given what stock chose for it. Of compressed-tensors the
    method stays, and the layer gets a scheme of ours."""
    if type(stock) is ModelOptNvFp4FusedMoEMethod:
        _check_backend(stock.enable_flashinfer_trtllm_moe, is_draft=is_draft)
        return ConvertedModelOptNvFp4FusedMoEMethod(
            stock.quant_config, ConvertedLayer(prefix, geometry, MODELOPT_NAMES)
        )
    scheme = layer.scheme  # None for ModelOpt's
    if type(scheme) is CompressedTensorsW4A4Nvfp4MoE:
        _check_backend(scheme.use_flashinfer_trtllm, is_draft=is_draft)
        if not geometry.gated:
            raise refusal(f"{NO_UNGATED}, as {prefix} is")
        layer.scheme = ConvertedCompressedTensorsW4A4Nvfp4MoE(
            ConvertedLayer(prefix, geometry, COMPRESSED_TENSORS_NAMES)
        )
    return stock


def _check_backend(is_flashinfer_trtllm: bool, *, is_draft: bool) -> None:
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


class ExpertLoader:
    """The weight loader of one converted layer's parameters on one rank.

    The gate calls it with a parameter and the tensor of the same name. SGLang's model loaders call
    it, on any thread, with the tensor of a single expert: a shared one that is fused.
    """

    def __init__(
        self, layer: Any, converted_layer: ConvertedLayer, stock: Callable[..., None]
    ) -> None:
        self.layer = layer
        self.converted_layer = converted_layer
        self.stock = stock

    def deliver(self, name: str, leaf: str, tensor: torch.Tensor) -> str:
        """A `gate.Deliver`, given the layer's name in the model."""
        self(self.converted_layer.parameter_of(self.layer, leaf), tensor)
        return f"{name}.{leaf}"

    def __call__(
        self,
        param: torch.nn.Parameter,
        tensor: torch.Tensor,
        weight_name: str = "",
        shard_id: str | None = None,
        expert_id: int | None = None,
    ) -> None:
        leaf = self.converted_layer.leaf_of(self.layer, param)
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
            self.converted_layer.load(leaf, slots, tensor, experts=experts, part=part)
        else:  # a fused shared expert
            self.stock(param, tensor, weight_name, shard_id=shard_id, expert_id=expert_id)
            self.converted_layer.note(_of_shared_expert(leaf, shard_id))

    def _experts(self, *, every_rank: bool) -> list[int]:
        """For each slot of a parameter, the expert it holds, as stock's loader places them."""
        layer = self.layer
        location = _location(layer)
        count = self.converted_layer.geometry.experts
        if every_rank:
            # SGLang only takes their maximum: wherever a redundant expert is, it repeats the first.
            return [slot % count for slot in range(layer._num_global_routed)]
        start = layer._expert_storage_rank * layer._num_local_routed
        slots = slice(start, start + layer._num_local_routed)
        if location is None:
            return list(range(count))[slots]
        experts: list[int] = location.physical_to_logical_map_cpu[layer.layer_id, slots].tolist()
        return experts

    def check_loaded(self) -> bool:
        """Loading has ended.

        Returns:
            Whether something was loaded into this layer. Nothing was by an update of other tensors
            alone, by one that was refused, or by one that wrote into the parameters from outside;
            SGLang then ends it as any other.

        Raises:
            ServingError: a tensor was missing.
        """
        if self.converted_layer.is_complete and not self.converted_layer.has_begun:
            return False
        w13_shards = ("w1", "w3") if self.converted_layer.geometry.gated else ("w1",)
        shared = (
            _of_shared_expert(leaf, shard)
            for leaf in self.converted_layer.specs
            for shard in (w13_shards if leaf.startswith("w13") else ("w2",))
        )
        self.converted_layer.check_loaded(shared if self.layer.num_fused_shared_experts else ())
        return True


def loaders_of(model: torch.nn.Module) -> dict[str, ExpertLoader]:
    """The loaders of a model's converted layers, by the layers' names in the model."""
    return {
        name: loader
        for name, module in model.named_modules()
        if (loader := getattr(module, LOADER, None)) is not None
    }


def _of_shared_expert(leaf: str, shard_id: str | None) -> str:
    return f"{leaf} of the shared expert ({shard_id})"


def _location(layer: Any) -> Any:
    """SGLang's map of experts that are spread over the ranks; None if this layer's are not."""
    return get_global_expert_location_metadata() if layer.uses_expert_location else None


class ConvertedExperts:
    """Of a method or a scheme: its parameters are filled by slices."""

    converted_layer: ConvertedLayer

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, *args: Any, **extra: Any
    ) -> None:
        location = _location(layer)
        self.converted_layer.check_geometry(
            Geometry(
                layer._num_global_routed if location is None else location.num_logical_experts,
                hidden_size,
                extra["moe_intermediate_size"],
                layer.moe_runner_config.is_gated,
            )
        )
        loader = ExpertLoader(layer, self.converted_layer, extra["weight_loader"])
        setattr(layer, LOADER, loader)
        extra["weight_loader"] = loader
        super().create_weights(layer, num_experts, hidden_size, *args, **extra)  # type: ignore[misc]


# FusedMoE looks for "ModelOpt" in the name to tell per-tensor scales from block scales.
class ConvertedModelOptNvFp4FusedMoEMethod(ConvertedExperts, ModelOptNvFp4FusedMoEMethod):
    """Of ModelOpt's experts, wherever their config comes from."""

    def __init__(self, quant_config: Any, converted_layer: ConvertedLayer) -> None:
        super().__init__(quant_config)
        self.converted_layer = converted_layer

    def process_weights_after_loading(self, layer: Any) -> None:
        loaded = getattr(layer, LOADER).check_loaded()
        if loaded:
            _lay_out_shared_experts(layer)
        with _tied_halves(layer, loaded=loaded):
            super().process_weights_after_loading(layer)

    def _align_fp4_moe_weights_for_flashinfer_trtllm(self, layer: Any) -> None:
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

    def __init__(self, converted_layer: ConvertedLayer) -> None:
        super().__init__()
        self.converted_layer = converted_layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """What stock does to the scales; the layout is there. An update writes into the same
        memory, which captured CUDA graphs read."""
        loaded = getattr(layer, LOADER).check_loaded()
        for name in ("w13_weight", "w2_weight"):
            if (packed := getattr(layer, f"{name}_packed", None)) is not None:
                delattr(layer, f"{name}_packed")
                copy_or_rebind_param(layer, name, packed.data)
        gate, up = layer.w13_weight_global_scale.unbind(dim=1)
        if not torch.allclose(gate, up):
            logger.warning(
                "fp4moe: %s: gate and up weight_global_scale differ", self.converted_layer.prefix
            )
        if loaded:
            _lay_out_shared_experts(layer, gate_first=True)
        copy_or_rebind_param(layer, "w13_weight_scale_2", 1 / gate)
        copy_or_rebind_param(layer, "w2_weight_scale_2", 1 / layer.w2_weight_global_scale.data)
        for matrix, alphas in (("w13", "g1_alphas"), ("w2", "g2_alphas")):
            divisors = getattr(layer, f"{matrix}_input_global_scale")
            smallest = divisors.min().to(torch.float32).repeat(layer.num_local_experts)
            scale = getattr(layer, f"{matrix}_weight_scale_2")
            copy_or_rebind_param(layer, alphas, ((1 / smallest) * scale).to(torch.float32))
            copy_or_rebind_param(layer, f"{matrix}_input_scale_quant", smallest)
        g1_scale_c = layer.w2_input_scale_quant * layer.g1_alphas
        copy_or_rebind_param(layer, "g1_scale_c", g1_scale_c.to(torch.float32))


@contextmanager
def _tied_halves(layer: Any, *, loaded: bool) -> Iterator[None]:
    """Give gate and up of an expert one scale where a layer clamps its SwiGLU.

    SGLang does so, because the kernel clamps both with one limit, and takes the block scales for
    linear ones. Here that has been done when SGLang looks.

    Args:
        layer: a FusedMoE.
        loaded: whether its block scales have just been loaded. Others have been moved before.
    """
    runner = layer.moe_runner_config
    scales = layer.w13_weight_scale_2.data
    # SiTU, which is Kimi K3's, has its own use for these limits.
    clamps = (runner.gemm1_clamp_limit or runner.swiglu_limit) and runner.activation != "situ"
    if not (runner.is_gated and clamps) or torch.equal(scales[:, 0], scales[:, 1]):
        yield
        return
    if loaded:
        _rescale_blocks(layer)
    own = scales.clone()
    scales.copy_(own.amax(dim=1, keepdim=True).expand_as(own))
    try:
        yield
    finally:
        scales.copy_(own)


def _rescale_blocks(layer: Any) -> None:
    """Multiply the block scales of the half with the smaller scale, as SGLang does, wherever they
    lie.

    Source: SGLang 0.5.23, quantization/modelopt_quant.py:2858.
    """
    blocks = layer.w13_weight_scale.data
    marks = torch.zeros_like(blocks[:1], dtype=torch.uint8)
    marks[:, marks.shape[1] // 2 :] = 1  # linear rows are [up, gate]
    laid_out = _lay_out(
        layer,
        layer.w13_weight.data[:1],
        marks,
        layer.w2_weight.data[:1],
        layer.w2_weight_scale.data[:1],
    )
    is_gate = laid_out[1].view(torch.uint8).flatten() == 1
    gate, up = _compute_gemm1_alphas(
        layer.w13_weight_scale_2, layer.w13_input_scale.max().to(torch.float32), True
    )
    largest = torch.maximum(gate, up)
    for expert in (gate != up).nonzero().flatten().tolist():
        ratios = torch.stack([up, gate])[:, expert] / largest[expert]
        own = blocks[expert].view(-1)
        own.copy_(own.float().mul_(torch.where(is_gate, ratios[1], ratios[0])))


def _lay_out(
    layer: Any, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Lay experts out by SGLang's own function; new tensors, in the order of the arguments."""
    return utils.prepare_static_weights_for_trtllm_fp4_moe(  # type: ignore[no-any-return]
        w13,
        w2,
        w13_scale,
        w2_scale,
        hidden_size=w2.shape[1],
        intermediate_size=w2.shape[2] * 2,
        num_experts=w2.shape[0],
        is_gated=layer.moe_runner_config.is_gated,
    )


def _lay_out_shared_experts(layer: Any, *, gate_first: bool = False) -> None:
    if not layer.num_fused_shared_experts:
        return
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
        w13, w13_scale = utils.reorder_w1w3_to_w3w1(w13, w13_scale, dim=-2)
    for slots, result in zip(shared, _lay_out(layer, w13, w13_scale, w2, w2_scale), strict=True):
        slots.copy_(result)
