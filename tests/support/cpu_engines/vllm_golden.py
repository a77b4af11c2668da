"""Golden MoE tensors made by vLLM's own loader and weight processing, on CPU.

Builds vLLM's routed experts for one layer with the FLASHINFER_TRTLLM backend, feeds them its
ModelOpt tensors, runs ``process_weights_after_loading`` and records what the layer holds.
`make_golden` runs this in vLLM's environment. All is vLLM's and FlashInfer's own code but for

- the platform, which is vLLM's CpuPlatform, and the backend's word that it supports the device;
- FlashInfer's one CUDA kernel of the weight path, replaced by `interleave_block_scales`;
- torch's word that the CPU has AMX or AVX-512 BF16, which calls for kernels that are compiled;
- the platform's word, where a MoE layer without a gate asks, that it is not like CUDA;
- rank and size of vLLM's process group, which has one member (no collective is involved).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

from . import jobs
from .jobs import LAID_OUT, RAW_SCALES, Golden, Job

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def golden(job: Job) -> Golden:
    if job.tp_size > 1 and job.ep_size > 1:
        raise ValueError("vLLM does not divide the experts of an expert-parallel layer further")
    bootstrap()
    use_ep = job.ep_size > 1
    size, rank = (job.ep_size, job.ep_rank) if use_ep else (job.tp_size, job.tp_rank)
    prefix = f"model.layers.{job.layer}.mlp.experts"
    with pretend_rank(size, rank):
        runner = build(job, prefix, use_ep)
        experts = runner.routed_experts
        jobs.poison(experts)
        loaded = set(
            runner.load_weights(
                (name.removeprefix(f"{prefix}."), tensor)
                for name, tensor in jobs.tensors_below(job.checkpoint, f"{prefix}.")
            )
        )
        # vLLM passes over names that it does not know.
        missing = {f"routed_experts.{name}" for name, _ in experts.named_parameters()} - loaded
        if missing:
            raise KeyError(f"never loaded: {sorted(missing)}")
        tensors = {name: getattr(experts, name).data.clone() for name in RAW_SCALES}
        experts.quant_method.process_weights_after_loading(experts)
    tensors |= {name: getattr(experts, name).data.contiguous() for name in LAID_OUT}
    return Golden(
        hidden=experts.moe_config.hidden_dim,
        intermediate=experts.moe_config.intermediate_size_per_partition,
        tensors=tensors,
    )


@cache
def bootstrap() -> None:
    """Put the replacements in place and start vLLM's process group of one."""
    import torch
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()

    import flashinfer

    flashinfer.nvfp4_block_scale_interleave = jobs.interleave_block_scales
    torch.accelerator.current_device_index = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cpu._is_amx_tile_supported = lambda: False
    torch.cpu._is_avx512_bf16_supported = lambda: False

    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.fused_moe import config as moe_config
    from vllm.model_executor.layers.fused_moe.experts import trtllm_nvfp4_moe

    experts_base = trtllm_nvfp4_moe.TrtLlmNvFp4ExpertsBase
    experts_base._supports_current_device = staticmethod(lambda: True)
    moe_config.current_platform = LikeCuda(moe_config.current_platform)

    rendezvous = tempfile.mkdtemp()  # a file needs no free port
    with set_current_vllm_config(vllm_config()):
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            distributed_init_method=f"file://{rendezvous}/store",
            local_rank=0,
            backend="gloo",
        )
        parallel_state.initialize_model_parallel()


class LikeCuda:
    """A platform, but for its answer to one question."""

    def __init__(self, platform: Any) -> None:
        self.platform = platform

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.platform, name)


@contextlib.contextmanager
def pretend_rank(size: int, rank: int) -> Iterator[None]:
    """Let vLLM's tensor-parallel group report ``rank`` of ``size``."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    saved = group.world_size, group.rank_in_group
    group.world_size, group.rank_in_group = size, rank
    try:
        yield
    finally:
        group.world_size, group.rank_in_group = saved


def vllm_config(use_ep: bool = False) -> Any:
    from vllm.config import DeviceConfig, KernelConfig, ParallelConfig, VllmConfig

    return VllmConfig(
        device_config=DeviceConfig(device="cpu"),
        kernel_config=KernelConfig(moe_backend="flashinfer_trtllm"),
        parallel_config=ParallelConfig(enable_expert_parallel=use_ep),
    )


def build(job: Job, prefix: str, use_ep: bool) -> Any:
    """The runner that vLLM's DeepSeek model builds for this layer."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import activation_without_mul
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = jobs.read_config(job.checkpoint)
    quant_config = get_quantization_config("modelopt_fp4").from_config(
        config["quantization_config"]
    )
    without_gate = {}
    if "mlp_hidden_act" in config:
        without_gate = {
            "activation": activation_without_mul(config["mlp_hidden_act"]),
            "ckpt_names": ("up_proj", "down_proj", None),
        }
    with set_current_vllm_config(vllm_config(use_ep)), set_default_torch_dtype(torch.bfloat16):
        return FusedMoEFactory(
            num_experts=config["n_routed_experts"],
            top_k=config["num_experts_per_tok"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["moe_intermediate_size"],
            renormalize=config["norm_topk_prob"],
            use_grouped_topk=True,
            num_expert_group=config["n_group"],
            topk_group=config["topk_group"],
            quant_config=quant_config,
            prefix=prefix,
            scoring_func=config["scoring_func"],
            routed_scaling_factor=config["routed_scaling_factor"],
            e_score_correction_bias=torch.zeros(config["n_routed_experts"]),
            **without_gate,
        )


if __name__ == "__main__":
    jobs.main(__doc__ or "", "vllm", golden)
