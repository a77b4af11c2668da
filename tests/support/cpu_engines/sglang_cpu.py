"""Let SGLang's NVFP4 MoE code, flashinfer_trtllm runner included, run on a machine without a GPU.

All that is not SGLang's or FlashInfer's own code is in this module:

- packages that are compiled for CUDA only are importable but inert;
- FlashInfer's one CUDA kernel of the weight path is replaced by `interleave_block_scales`;
- the question "is this a Blackwell GPU" is answered with yes;
- server arguments and ranks are published by SGLang's own means instead of a running server.

Call `bootstrap` before anything is imported from sglang, then `publish` for each rank.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from functools import cache
from typing import Any

from ..environments import environments
from .jobs import interleave_block_scales

CUDA_ONLY = ("torchvision", "sgl_kernel", "deep_gemm")


def _inert_attribute(name: str) -> Any:
    # Dunder look-ups must fail as usual, or copy, pickle and inspect believe in them.
    if name.startswith("__"):
        raise AttributeError(name)
    return _Inert()


class _InertType(type):
    def __getattr__(cls, name: str) -> Any:
        return _inert_attribute(name)


class _Inert(metaclass=_InertType):
    """Any attribute of an inert package: callable, subclassable, and without effect."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return _inert_attribute(name)


class InertModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _InertType(name, (_Inert,), {})
        setattr(self, name, value)
        return value


class _InertFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: list[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(
        self, fullname: str, _path: Any = None, _target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@cache
def bootstrap() -> None:
    """Make sglang importable, and FlashInfer's weight path free of CUDA."""
    make_importable()

    import flashinfer

    flashinfer.nvfp4_block_scale_interleave = interleave_block_scales


@cache
def make_importable() -> None:
    """Put inert packages in the place of those of `CUDA_ONLY` that are not installed."""
    engines = environments("engines")
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(engines / "flashinfer"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(engines / "triton"))
    warnings.filterwarnings("ignore", category=UserWarning)

    # transformers caches the answer: ask before an inert torchvision looks installed.
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()
    sys.meta_path.append(
        _InertFinder([name for name in CUDA_ONLY if importlib.util.find_spec(name) is None])
    )


def publish(*, tp_size: int, tp_rank: int, ep_size: int, ep_rank: int) -> None:
    """Make this process the given rank.

    ``tp`` divides the intermediate size of the experts and ``ep`` the experts, SGLang's moe_tp and
    moe_ep; its --tp-size is their product.
    """
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import get_context, get_parallel, override_platform

    override_platform(is_blackwell=True, is_sm100=True).install()
    get_context().override_server_args(moe_runner_backend="flashinfer_trtllm").install()
    initialize_moe_config()
    world, rank = tp_size * ep_size, ep_rank * tp_size + tp_rank
    parallel = get_parallel()
    parallel.clear_stamp()
    parallel.override_permanently(
        tp_size=world,
        tp_rank=rank,
        attn_tp_size=world,
        attn_tp_rank=rank,
        attn_dp_size=1,
        attn_dp_rank=0,
        attn_cp_size=1,
        attn_cp_rank=0,
        moe_ep_size=ep_size,
        moe_ep_rank=ep_rank,
        moe_tp_size=tp_size,
        moe_tp_rank=tp_rank,
        moe_dp_size=1,
        moe_dp_rank=0,
        pp_size=1,
        pp_rank=0,
    )


class Group(types.SimpleNamespace):
    """A process group that nothing is sent through."""

    def __init__(self, size: int, rank: int | None = None) -> None:
        super().__init__(
            world_size=size,
            rank_in_group=rank or 0,
            is_first_rank=not rank,
            is_last_rank=rank in (None, size - 1),
            cpu_group=None,
            device_group=None,
        )


def publish_groups(*, tp_size: int, ep_size: int, stage: int = 0, stages: int = 1) -> None:
    """What a whole model asks of its process groups, after `publish`: that they exist.

    Args:
        stage: of a pipeline of ``stages``.
    """
    from sglang.srt.runtime_context import get_parallel

    world = Group(tp_size * ep_size)
    get_parallel().override_permanently(
        tp_group=world,
        attn_tp_group=world,
        moe_tp_group=Group(tp_size),
        moe_ep_group=Group(ep_size),
        pp_group=Group(stages, stage),
        pp_size=stages,
        pp_rank=stage,
        **{f"{name}_group": Group(1) for name in ("attn_cp", "moe_dp", "dcp")},
    )


def more_models() -> None:
    """What further models want: the Transformers backend and compressed-tensors ask which
    accelerator there is, FP8 linear layers are quantized anew by a compiled function, and
    DeepSeek-V4 compiles kernels in advance unless told otherwise."""
    import torch
    from sglang.kernels.ops.quantization import fp8_kernel
    from sglang.srt.models import transformers

    # compressed-tensors asks torch, not the platform.
    torch.cuda.get_device_capability = lambda *_args: (10, 0)
    fp8_kernel.sgl_per_tensor_quant_fp8 = _quantize_fp8

    transformers.get_device = lambda: "cpu"
    os.environ["SGLANG_OPT_USE_TILELANG_MHC_PRE"] = "0"


def _quantize_fp8(values: Any, out: Any, scale: Any, is_static: bool) -> None:
    import torch

    assert is_static
    out.copy_((values / scale).clamp(-448, 448).to(torch.float8_e4m3fn))
