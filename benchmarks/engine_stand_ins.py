"""Let SGLang's and vLLM's loaders run on a GPU that is no Blackwell, without compiled packages.

Loading a model needs no kernel of the engines' own, but importing them needs the packages that have
these kernels, and their choice of a MoE backend asks for the GPU. Replaced here:

- the question whether this is a Blackwell GPU is answered with yes;
- packages and operators that are compiled for the engines are importable, and inert;
- of vLLM, the attention backend is the one written in Triton, which is not compiled before it runs,
  and model classes are inspected in this process, as another one would lack these stand-ins;
- of SGLang, the second copy of a shared expert's weights that CUTLASS makes for a fused kernel.

All else is the engines' and FlashInfer's own, FlashInfer's CUDA kernel that lays out block scales
included. Call the engine's function before anything is imported from it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def for_sglang() -> None:
    from tests.support.cpu_engines import sglang_cpu

    sglang_cpu.make_importable()
    from sglang.srt.layers.quantization.fp4_utils import Fp4GemmRunnerBackend

    Fp4GemmRunnerBackend.supports_swiglu_fusion = lambda _self: False


VLLM_MODULES = ("_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C", "vllm_flash_attn")


def for_vllm() -> dict[str, Any]:
    """Returns options of the command line that the stand-ins need."""
    import torch

    from tests.support.cpu_engines.sglang_cpu import InertModule

    for name in VLLM_MODULES:
        sys.modules[f"vllm.{name}"] = InertModule(f"vllm.{name}")
    # vLLM asks these while it is imported. Other operators are looked up later, or found missing.
    for name in ("fp8", "block_fp8", "fp4"):
        operator = f"_C::cutlass_scaled_mm_supports_{name}"
        torch.library.define(operator, "(int capability) -> bool")
        torch.library.impl(operator, "CompositeExplicitAutograd")(lambda _capability: True)

    importlib.import_module("vllm._custom_ops")
    for name in ("_C", "_moe_C"):
        setattr(torch.ops, name, InertModule(f"torch.ops.{name}"))

    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    platform = type(current_platform)
    platform.get_device_capability = staticmethod(lambda *_, **__: DeviceCapability(10, 0))
    registry._run_in_subprocess = lambda inspect: inspect()
    return {"attention_backend": "TRITON_MLA"}
