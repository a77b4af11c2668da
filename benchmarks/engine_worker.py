"""One process of an engine, for `engine_load`: it loads models as it is told, and measures.

    python -m benchmarks.engine_worker sglang|vllm [--stand-ins]

It reads one job a line from stdin (`Job` as JSON), gets ready, says so, and waits for another line.
Then it lets the engine's own model loader load, and writes what was measured (`Loaded` as JSON).
The time is that from a configuration to a model that could serve: the model is built, its weights
are loaded and processed, and the GPU has finished. What the engine prints goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

Load = Callable[[], torch.nn.Module]
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True)
class Job:
    """A model to load, as one rank."""

    folder: str
    loader: str
    """One of `LOADERS`."""
    tp_size: int
    tp_rank: int
    load_threads: str | None
    """FP4MOE_LOAD_THREADS."""
    counts_copies: bool = False
    """Count copies instead of measuring time."""
    sharing: int = 1
    """How many processes load onto this GPU at once."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load took."""

    seconds: float
    peak_allocated: int
    """By torch's allocator, above what was allocated before."""
    peak_reserved: int
    weights: int
    """Bytes that the model holds in the end."""
    copies: int | None
    """From the host to the GPU, where they were counted."""
    taken_over: int
    """MoE layers that the plugin has loaded."""
    checksums: dict[str, str]
    """Of everything that the model holds, by name."""


# --- the engines' loaders -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loader:
    """Options of an engine's command line that choose how files are read."""

    load_format: str = "auto"
    extra: dict[str, Any] = field(default_factory=dict)  # --model-loader-extra-config
    options: dict[str, Any] = field(default_factory=dict)  # others


OTHER_FORMATS = {name: Loader(name) for name in ("runai_streamer", "instanttensor")}
LOADERS: dict[str, dict[str, Loader]] = {
    "sglang": {
        "default": Loader(),  # a pool of 8 threads opens the files
        "one thread": Loader(extra={"enable_multithread_load": False}),
        "no mmap": Loader(options={"weight_loader_disable_mmap": True}),
        # Without GPUDirect storage, which SGLang does not go without by itself.
        "fastsafetensors": Loader("fastsafetensors", extra={"enable_gds": False}),
        **OTHER_FORMATS,
    },
    "vllm": {
        "default": Loader(),
        "threads": Loader(extra={"enable_multithread_load": True}),
        "eager": Loader(options={"safetensors_load_strategy": "eager"}),
        "fastsafetensors": Loader("fastsafetensors"),
        **OTHER_FORMATS,
    },
}


class SGLang:
    """SGLang, playing any rank. Loading sends nothing through a process group."""

    def __init__(self, stand_ins: bool) -> None:
        if stand_ins:
            from .engine_stand_ins import for_sglang

            for_sglang()
        from sglang.srt.plugins import load_plugins

        load_plugins()
        # Some of SGLang's modules keep the error of an import that failed, and with it the stack
        # that led there: it should not be one that a model is on.
        importlib.import_module("sglang.srt.model_loader")
        importlib.import_module("sglang.srt.models.registry")

    def ready(self, job: Job) -> Load:
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.eplb.expert_location import (
            ExpertLocationMetadata,
            set_global_expert_location_metadata,
        )
        from sglang.srt.layers.moe.utils import initialize_moe_config
        from sglang.srt.model_loader import get_model
        from sglang.srt.runtime_context import get_context

        from tests.support.cpu_engines import sglang_cpu

        loader = LOADERS["sglang"][job.loader]
        sglang_cpu.publish(tp_size=job.tp_size, tp_rank=job.tp_rank, ep_size=1, ep_rank=0)
        get_context().override_server_args(
            moe_runner_backend="flashinfer_trtllm",
            **{"weight_loader_disable_mmap": False, **loader.options},
        ).install()
        initialize_moe_config()
        sglang_cpu.publish_groups(tp_size=job.tp_size, ep_size=1)
        model_config = ModelConfig(job.folder)
        location = ExpertLocationMetadata.init_trivial(model_config, 0)
        set_global_expert_location_metadata(location, allow_overwrite=True)
        load_config = LoadConfig(
            load_format=loader.load_format, model_loader_extra_config=dict(loader.extra)
        )
        device_config = DeviceConfig("cuda", gpu_id=0)
        return lambda: get_model(
            model_config=model_config, load_config=load_config, device_config=device_config
        )

    @staticmethod
    def is_taken_over(module: torch.nn.Module) -> bool:
        return hasattr(module, "fp4moe_loader")


class VLLM:
    """vLLM, playing any rank, in a process group of one."""

    def __init__(self, stand_ins: bool) -> None:
        self.options: dict[str, Any] = {}
        os.environ["VLLM_PLUGINS"] = "fp4moe"
        if stand_ins:
            from .engine_stand_ins import for_vllm

            self.options = for_vllm()
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import parallel_state

        with set_current_vllm_config(VllmConfig()):
            parallel_state.init_distributed_environment(
                world_size=1,
                rank=0,
                distributed_init_method=f"file://{tempfile.mkdtemp()}/store",  # needs no port
                local_rank=0,
                backend="gloo",
            )
            parallel_state.initialize_model_parallel()

    def ready(self, job: Job) -> Load:
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model

        from tests.support.cpu_engines.vllm_golden import pretend_rank

        loader = LOADERS["vllm"][job.loader]
        config = EngineArgs(
            model=job.folder,
            tensor_parallel_size=job.tp_size,
            distributed_executor_backend="mp",
            moe_backend="flashinfer_trtllm",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=128,
            load_format=loader.load_format,
            model_loader_extra_config=dict(loader.extra),
            **loader.options,
            **self.options,
        ).create_engine_config()

        def load() -> torch.nn.Module:
            with set_current_vllm_config(config), pretend_rank(job.tp_size, job.tp_rank):
                return get_model(vllm_config=config)

        return load

    @staticmethod
    def is_taken_over(module: torch.nn.Module) -> bool:
        method = getattr(module, "quant_method", None)
        return type(method).__module__.startswith("fp4moe_convert.")


ENGINES: dict[str, type[SGLang] | type[VLLM]] = {"sglang": SGLang, "vllm": VLLM}

# --- one load -------------------------------------------------------------------------------------


def run(engine: SGLang | VLLM, job: Job, wait: Callable[[], None]) -> Loaded:
    """Load once.

    Args:
        wait: returns when the load may begin.
    """
    if job.load_threads is None:
        os.environ.pop("FP4MOE_LOAD_THREADS", None)
    else:
        os.environ["FP4MOE_LOAD_THREADS"] = job.load_threads
    load = engine.ready(job)
    gc.collect()
    fill_free_memory(job.sharing)
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    wait()
    copies = None
    started = time.perf_counter()
    if job.counts_copies:
        model, copies = load_counting(load)
    else:
        model = load()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    held = tensors_of(model)
    return Loaded(
        seconds=seconds,
        peak_allocated=torch.cuda.max_memory_allocated() - allocated,
        peak_reserved=torch.cuda.max_memory_reserved() - reserved,
        weights=sum({t.data_ptr(): t.nbytes for t in held.values()}.values()),
        copies=copies,
        taken_over=sum(map(engine.is_taken_over, model.modules())),
        checksums={name: checksum(tensor) for name, tensor in held.items()},
    )


def fill_free_memory(sharing: int) -> None:
    """Overwrite what earlier loads have left on the GPU, so that a part of a parameter that nothing
    loads does not look as if it were. Of several processes, each overwrites a part."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    most = max(0, free - 1024 * MEBIBYTE) // sharing
    torch.empty(most, dtype=torch.uint8, device="cuda").fill_(0xA5)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def load_counting(load: Load) -> tuple[torch.nn.Module, int]:
    """The model, and how many copies from the host to the GPU its load took, on all threads."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        model = load()
        torch.cuda.synchronize()
    counts = (e.count for e in profiler.key_averages() if e.key.startswith("Memcpy HtoD"))
    return model, sum(counts)


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All tensors that a model's modules hold, parameters or not."""
    return {
        f"{path}.{name}": value.detach()
        for path, module in model.named_modules()
        for name, value in (vars(module) | module._parameters | module._buffers).items()
        if isinstance(value, torch.Tensor)
    }


def checksum(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bytes; 64 bits of each byte's value and place."""
    octets = tensor.contiguous().flatten().view(torch.uint8)
    if odd := octets.numel() % 8:
        octets = torch.nn.functional.pad(octets, (0, 8 - odd))
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = 8 * MEBIBYTE
    for start, words in enumerate(octets.view(torch.int64).split(step)):
        place = torch.arange(start * step, start * step + len(words), device=tensor.device)
        # Multipliers of splitmix64, as signed numbers; products wrap.
        mixed = (words ^ (place * -7046029254386353131)) * -4658895280553007687
        mixed ^= mixed >> 29
        total += (mixed * -7723592293110705685).sum()
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)} {int(total) % 2**64:016x}"


# --- the process ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--stand-ins", action="store_true")
    arguments = parser.parse_args()
    # Engines print.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    def wait() -> None:
        answer("ready")
        sys.stdin.readline()

    engine = ENGINES[arguments.engine](arguments.stand_ins)
    answer("started")
    while line := sys.stdin.readline():
        try:
            answer(asdict(run(engine, Job(**json.loads(line)), wait)))
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
