"""What a CPU needs besides `vllm_golden` so that vLLM loads whole models of many families.

Everything else is vLLM's own code. Replaced here:

- model classes are inspected in this process: another one would import vLLM anew for each of them;
- torchvision is importable but inert: image processors import it, and no image is processed;
- linear layers get vLLM's emulating kernel for MXFP8, and for FP8 a plain version of the compiled
  function that quantizes them anew, or, in blocks, the CPU's kernel without its packing;
- DeepSeek-V3.2, GLM-5 and DeepSeek-V4 are the classes that vLLM has for CUDA, whose streams and
  events are inert here. The sparse attention of the first two is FlashMLA's, which is not called.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any
from unittest.mock import MagicMock


@cache
def bootstrap() -> None:
    """To be called after `vllm_golden.bootstrap`, before a model is configured."""
    import torch
    import vllm.models.deepseek_v4
    import vllm.models.deepseek_v32
    from transformers.utils import import_utils
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear import (
        EmulationMxfp8LinearKernel,
        register_linear_kernel,
    )
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.models import registry
    from vllm.models.deepseek_v4.nvidia import flashmla, model
    from vllm.models.deepseek_v32.nvidia import model as sparse
    from vllm.models.deepseek_v41.quant_config import DeepseekV4FP8Config
    from vllm.platforms import PlatformEnum
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.workspace import init_workspace_manager

    class UnpackedFp8Blocks(CPUFp8BlockScaledMMKernel):  # type: ignore[misc]
        @classmethod
        def is_supported(cls, _compute_capability: int | None = None) -> tuple[bool, None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            pass

    register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    register_linear_kernel(UnpackedFp8Blocks, PlatformEnum.CPU, "fp8_block")
    _custom_ops.scaled_fp8_quant = _quantize_fp8

    choose = CpuPlatform.get_attn_backend_cls

    def choose_sparse_too(
        selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> Any:
        if attn_selector_config.use_sparse:
            return "vllm.v1.attention.backends.mla.flashmla_sparse.FlashMLASparseBackend"
        return choose(selected_backend, attn_selector_config, num_heads)

    CpuPlatform.get_attn_backend_cls = staticmethod(choose_sparse_too)
    init_workspace_manager(torch.device("cpu"))
    vllm.models.deepseek_v32.DeepseekV32ForCausalLM = sparse.DeepseekV32ForCausalLM
    vllm.models.deepseek_v32.GlmMoeDsaForCausalLM = sparse.DeepseekV32ForCausalLM
    vllm.models.deepseek_v4.DeepseekV4ForCausalLM = model.DeepseekV4ForCausalLM
    vllm.models.deepseek_v4.DeepseekV4FP8Config = DeepseekV4FP8Config
    torch.cuda.Stream = torch.cuda.Event = MagicMock  # type: ignore[assignment, misc]
    flashmla.compute_fp8_einsum_recipe = lambda: ((1, 128, 128), False)

    registry._run_in_subprocess = lambda inspect: inspect()
    # transformers caches the answer: ask before an inert torchvision looks installed.
    if not import_utils.is_torchvision_available():
        for name in ("", ".transforms", ".transforms.functional", ".transforms.v2"):
            sys.modules[f"torchvision{name}"] = MagicMock()


def _quantize_fp8(values: Any, scale: Any) -> tuple[Any, Any]:
    import torch

    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale
