"""Golden MoE tensors made by SGLang's own loader and weight processing, on CPU.

Builds SGLang's FusedMoE for one layer, feeds it the layer's ModelOpt tensors through the loader of
its DeepSeek models, or of Nemotron-H where the experts have no gate, runs
``process_weights_after_loading`` and records what the layer holds.
`make_golden` runs this in SGLang's environment; `sglang_cpu` says what is replaced there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from . import jobs, sglang_cpu
from .jobs import LAID_OUT, RAW_SCALES, Golden, Job


def golden(job: Job) -> Golden:
    sglang_cpu.bootstrap()
    sglang_cpu.publish(
        tp_size=job.tp_size, tp_rank=job.tp_rank, ep_size=job.ep_size, ep_rank=job.ep_rank
    )
    import torch

    prefix = f"model.layers.{job.layer}.mlp.experts"
    model, experts = build(job, prefix)
    jobs.poison(experts)
    model.load_weights(jobs.tensors_below(job.checkpoint, f"{prefix}."))
    tensors = {name: getattr(experts, name).data.clone() for name in RAW_SCALES}
    with torch.no_grad():
        experts.quant_method.process_weights_after_loading(experts)
    tensors |= {name: getattr(experts, name).data.contiguous() for name in LAID_OUT}
    return Golden(
        hidden=experts.w2_weight.shape[1],
        intermediate=experts.intermediate_size_per_partition,
        tensors=tensors,
    )


def build(job: Job, prefix: str) -> tuple[Any, Any]:
    """(a model with nothing but the layer's experts, those experts)."""
    import torch
    from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
    from sglang.srt.layers.moe.utils import RoutingMethodType
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config
    from sglang.srt.models.deepseek_common.deepseek_weight_loader import (
        DeepseekV2WeightLoaderMixin,
    )
    from sglang.srt.models.nemotron_h import NemotronHForCausalLM

    config = SimpleNamespace(**jobs.read_config(job.checkpoint))
    ungated = hasattr(config, "mlp_hidden_act")
    quant_config = ModelOptFp4Config.from_config(config.quantization_config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        experts = get_moe_impl_class(quant_config)(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            layer_id=job.layer,
            quant_config=quant_config,
            routed_scaling_factor=config.routed_scaling_factor,
            routing_method_type=RoutingMethodType.DeepSeekV3,
            prefix=prefix,
            **({"is_gated": False, "activation": config.mlp_hidden_act} if ungated else {}),
        )
    finally:
        torch.set_default_dtype(torch.float32)

    class OneLayer(torch.nn.Module, DeepseekV2WeightLoaderMixin):
        load_weights = DeepseekV2WeightLoaderMixin.do_load_weights

    class OneLayerOfNemotronH(torch.nn.Module):
        load_weights = NemotronHForCausalLM.load_weights
        remap_prefix = NemotronHForCausalLM.remap_prefix
        remap_substr = NemotronHForCausalLM.remap_substr
        stacked_params_mapping = NemotronHForCausalLM.stacked_params_mapping

    model: Any = OneLayerOfNemotronH() if ungated else OneLayer()
    node = model
    *parents, leaf = prefix.split(".")
    for name in parents:
        node.add_module(name, torch.nn.Module())
        node = getattr(node, name)
    node.add_module(leaf, experts)
    # What the loader looks up on a whole model.
    model.model.start_layer, model.model.end_layer = 0, config.num_hidden_layers
    config.max_n_routed_experts = config.n_routed_experts
    model.config, model.quant_config = config, quant_config
    model.pp_group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    model.num_fused_shared_experts = 0
    return model, experts


if __name__ == "__main__":
    jobs.main(__doc__ or "", "sglang", golden)
