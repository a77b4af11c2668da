#!/usr/bin/env python3
"""Load whole tiny models through vLLM's own loaders: originals without the plugin, then converted
checkpoints with it, and compare all that the engine ends up with. `test_drivers.py` runs this in
vLLM's environment; by hand:

    PYTHONPATH=tests ~/.cache/fp4moe-engines/vllm/bin/python \\
        tests/engines/vllm_driver.py RESULTS.json

All is vLLM's and FlashInfer's own code, from the command line's options to the kernel's operands,
but for what `support.cpu_engines.vllm_golden` replaces on a CPU and, for the rest of the models,

- NVFP4 linear layers get vLLM's emulation kernel and bf16 experts its CPU kernel, less the last
  step of its loading, which is compiled;
- the choice of an attention backend does not see the dtype of the KV cache, as MLA with an FP8
  cache needs a GPU (the layer itself gets that dtype, and its scales);
- experts are filled with a pattern before loading, so that what nothing writes shows.

A rank is one process that says it is rank r of T; no collective depends on others here.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import pickle
import shutil
import tempfile
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from driver import Outcomes, main
from edits import SHARD_NBYTES, Tensors, edit_section, edit_tensors, without
from support.make_checkpoint import Spec, make_checkpoint

State = dict[str, Any]  # name -> tensor or plain value
Json = dict[str, Any]


def spec(**changes: Any) -> Spec:
    """Small, with everything that a checkpoint may have."""
    small = {
        "layers": 2,
        "dense_layers": 1,
        "experts": 8,
        "hidden": 256,
        "intermediate": 256,
        "shards": 2,
        "vocab_size": 64,
        "kv_scales": True,
        "differing_scales": True,
    }
    if changes.get("style") != "qwen3_moe":
        small["mtp"] = True
    return Spec(**small | changes)


CHECKPOINTS = {
    "deepseek": spec(),
    "deepseek-H384": spec(hidden=384, intermediate=128),
    "deepseek-I96": spec(intermediate=96),
    "deepseek-I192": spec(intermediate=192),
    "deepseek-hf": spec(quantization="hf"),
    "deepseek-mixed": spec(),  # see `make_mixed`
    "qwen": spec(style="qwen3_moe"),
    "qwen-I96": spec(style="qwen3_moe", intermediate=96),
    "qwen-H384": spec(style="qwen3_moe", hidden=384, intermediate=128),
}


@dataclass(frozen=True)
class Setup:
    """A checkpoint and how it is served."""

    checkpoint: str
    ranks: int = 1  # of tensor parallelism; with expert parallelism these are its ranks
    options: Mapping[str, Any] = field(default_factory=dict)  # of vLLM's command line
    redundant: int = 0  # experts held twice, for load balancing
    draft: bool = False  # load the MTP model instead
    stage: int = 0  # of a pipeline
    stages: int = 1
    layers: int | None = None  # taken over, where it is not all


EP = {"enable_expert_parallel": True}
EP_FILTER = EP | {"enable_ep_weight_filter": True}
ROUND_ROBIN = EP | {"expert_placement_strategy": "round_robin"}
THREADS = {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 4}}
MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}

EQUAL = {
    "deepseek: tp 1": Setup("deepseek"),
    "deepseek: tp 2": Setup("deepseek", 2),
    "deepseek: tp 4": Setup("deepseek", 4),
    "deepseek: ep 2": Setup("deepseek", 2, EP),
    "deepseek: ep 2, round robin": Setup("deepseek", 2, ROUND_ROBIN),
    "deepseek: ep 2, redundant experts": Setup("deepseek", 2, EP, redundant=2),
    "deepseek: ep 4, weight filter": Setup("deepseek", 4, EP_FILTER),
    "deepseek: ep 4, redundant experts": Setup("deepseek", 4, EP_FILTER, redundant=4),
    "deepseek: loader threads, tp 2": Setup("deepseek", 2, THREADS),
    "deepseek: MTP model, bf16": Setup("deepseek", 1, MTP, draft=True),
    "deepseek: a layer with bf16 experts": Setup("deepseek-mixed"),
    "deepseek: hf_quant_config.json": Setup("deepseek-hf"),
    "deepseek: H = 384, tp 1": Setup("deepseek-H384"),
    "deepseek: H = 384, tp 2": Setup("deepseek-H384", 2),
    "deepseek: I = 96, tp 1": Setup("deepseek-I96"),
    "deepseek: I = 96, tp 2": Setup("deepseek-I96", 2),
    "deepseek: I = 192, tp 2": Setup("deepseek-I192", 2),
    "deepseek: I = 192, tp 4": Setup("deepseek-I192", 4),
    "deepseek: I = 192, ep 2": Setup("deepseek-I192", 2, EP),
    # Pipeline stages: the first has the dense layer alone.
    **{
        f"deepseek: stage {n} of 3": Setup("deepseek", stage=n, stages=3, layers=min(1, n))
        for n in range(3)
    },
    "qwen: tp 1": Setup("qwen"),
    "qwen: tp 2": Setup("qwen", 2),
    "qwen: tp 4": Setup("qwen", 4),
    "qwen: ep 2, redundant experts": Setup("qwen", 2, EP, redundant=2),
    "qwen: ep 4, weight filter": Setup("qwen", 4, EP_FILTER),
    "qwen: loader threads, tp 2": Setup("qwen", 2, THREADS),
    "qwen: I = 96, tp 2": Setup("qwen-I96", 2),
    "qwen: H = 384, tp 2": Setup("qwen-H384", 2),
}

UNKNOWN_METHOD = "Unknown quantization method: fp4moe"

# --- what is done to a converted checkpoint before it is loaded -----------------------------------


def make_mixed(folder: Path) -> None:
    """Give layer 2 of an original bf16 experts, as a quantizer told to leave them out does."""
    import torch

    experts = "model.layers.2.mlp.experts"

    def leave_out(tensors: Tensors) -> Tensors:
        left = {}
        for name, tensor in tensors.items():
            if not name.startswith(f"{experts}."):
                left[name] = tensor
            elif name.endswith(".weight"):
                rows, cols = tensor.shape
                values = torch.arange(rows * cols * 2).reshape(rows, cols * 2) % 251
                left[name] = values.to(torch.bfloat16)
        return left

    edit_tensors(folder, leave_out)
    edit_section(folder, lambda section: section["ignore"].append(f"{experts}*"))


EXPERTS = "model.layers.1.mlp.experts"


def drop(leaf: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda all_: without(all_, f"{EXPERTS}.{leaf}"))


def shorten(leaf: str) -> Callable[[Path], None]:
    name = f"{EXPERTS}.{leaf}"
    return lambda folder: edit_tensors(
        folder, lambda all_: all_ | {name: all_[name][:, :-128].contiguous()}
    )


def add_expert_tensor(folder: Path) -> None:
    import torch

    name = f"{EXPERTS}.0.gate_proj.weight_scale_2"
    edit_tensors(folder, lambda all_: all_ | {name: torch.ones(())})


def set_section(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_section(folder, lambda section: section.update(changes))


def set_row_order(folder: Path) -> None:
    edit_section(folder, lambda s: s["layout"].update(row_order="xxh3_128:00", flashinfer="9.9"))


def set_intermediate(folder: Path) -> None:
    edit_section(folder, lambda section: section["layers"][EXPERTS].update(intermediate=512))


def forget_layer(folder: Path) -> None:
    edit_section(folder, lambda section: section["layers"].pop(EXPERTS))


def leave(folder: Path) -> None:
    """As it was converted."""


PER_TOKEN = {"quantization_config": {"moe": {"activation": "nvfp4_per_token"}}}
ANEW = {"quantization_config": {"moe": {"weight": "mxfp8"}}}

# name -> setup, what is done to the converted checkpoint, part of the message
REFUSED: dict[str, tuple[Setup, Callable[[Path], None], str]] = {
    "unknown format version": (
        Setup("deepseek"),
        set_section(format_version=1),
        "format version is 1, this release of fp4moe-convert knows 2; convert again, or",
    ),
    "another row order": (Setup("deepseek"), set_row_order, "row order xxh3_128:00"),
    "another MoE backend": (
        Setup("deepseek", options={"moe_backend": "flashinfer_cutlass"}),
        leave,
        "vLLM chose flashinfer_cutlass; use --moe-backend flashinfer_trtllm",
    ),
    "I/T not a multiple of 16": (Setup("qwen-I96", 4), leave, "for one of 1, 2, 3, 6 ranks"),
    "LoRA": (
        Setup("qwen", options={"enable_lora": True, "moe_backend": "auto"}),
        leave,
        "flashinfer_trtllm, which has no LoRA; leave --enable-lora out",
    ),
    "quantized by --quantization": (
        Setup("qwen", options={"quantization": "nvfp4_per_token"}),
        leave,
        "drop that from --quantization or --quantization-config",
    ),
    "activations per token": (Setup("deepseek", options=PER_TOKEN), leave, "per token"),
    "experts quantized anew": (
        Setup("deepseek", options=ANEW),
        leave,
        "it cannot be quantized anew",
    ),
    "another geometry in config.json": (Setup("qwen"), set_intermediate, "intermediate=512"),
    "mixed-precision source": (
        Setup("qwen"),
        set_section(source={"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}),
        "cannot read the source's quantization",
    ),
    "deepseek: a tensor missing": (Setup("deepseek"), drop("w2_weight_scale"), "w2_weight_scale"),
    "qwen: a tensor missing": (Setup("qwen"), drop("w13_input_scale"), "w13_input_scale"),
    "deepseek: a tensor too small": (Setup("deepseek"), shorten("w13_weight"), "it should have"),
    "qwen: a tensor too small": (Setup("qwen"), shorten("w2_weight_scale"), "it should have"),
    "deepseek: tensor of one expert": (Setup("deepseek"), add_expert_tensor, "also has 'model."),
    "qwen: tensor of one expert": (Setup("qwen"), add_expert_tensor, "also has 'model."),
    "qwen: layer not in config.json": (Setup("qwen"), forget_layer, "not among config.json's"),
    "deepseek: layer not in config.json": (
        Setup("deepseek"),
        forget_layer,
        "not among config.json's",
    ),
}

# --- vLLM on a CPU --------------------------------------------------------------------------------

LAYOUT_FUNCTIONS = {
    "vllm.model_executor.layers.quantization.modelopt": ["convert_to_nvfp4_moe_kernel_format"],
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    ".compressed_tensors_moe_w4a4_nvfp4": ["convert_to_nvfp4_moe_kernel_format"],
    "vllm.model_executor.layers.quantization.utils.flashinfer_fp4_moe": [
        "align_fp4_moe_hidden_dim_for_fi",
        "align_fp4_moe_weights_for_fi",
        "prepare_static_weights_for_trtllm_fp4_moe",
        "reorder_w1w3_to_w3w1",
    ],
    "flashinfer": ["nvfp4_block_scale_interleave"],
}
layout_calls: Counter[str] = Counter()


def start_vllm() -> None:
    """Everything that this file's first lines say is replaced, and counters around layout work."""
    os.environ["VLLM_PLUGINS"] = ""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import importlib

    import torch
    from support.cpu_engines import jobs, vllm_golden

    vllm_golden.bootstrap()
    torch.accelerator.empty_cache = lambda: None

    from vllm.model_executor.kernels.linear import (
        EmulationNvFp4LinearKernel,
        register_linear_kernel,
    )
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutlass_moe import (
        FlashInferExperts,
    )
    from vllm.model_executor.layers.fused_moe.oracle import unquantized
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.platforms import PlatformEnum
    from vllm.platforms.cpu import CpuPlatform

    FlashInferExperts.is_supported_config = staticmethod(lambda *_: (True, None))  # to be chosen
    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    unquantized.map_unquantized_backend = lambda _: unquantized.UnquantizedMoeBackend.CPU
    cpu_moe.cpu_prepack_moe_weight = lambda weight, _isa: weight

    choose = CpuPlatform.get_attn_backend_cls

    def choose_for_any_cache(
        selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> Any:
        config = attn_selector_config._replace(kv_cache_dtype=None)
        return choose(selected_backend, config, num_heads)

    CpuPlatform.get_attn_backend_cls = staticmethod(choose_for_any_cache)

    load_weights = DefaultModelLoader.load_weights

    def load_weights_over_pattern(self: Any, model: Any, model_config: Any) -> None:
        for module in model.modules():
            if isinstance(module, RoutedExperts):
                jobs.poison(module)
                module.as_created = {
                    name: (parameter.shape, parameter.data_ptr())
                    for name, parameter in module.named_parameters()
                }
        load_weights(self, model, model_config)

    DefaultModelLoader.load_weights = load_weights_over_pattern

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            layout_calls[function.__name__] += 1
            return function(*arguments, **options)

        return call

    for module_name, names in LAYOUT_FUNCTIONS.items():
        module = importlib.import_module(module_name)
        for name in names:
            setattr(module, name, counted(getattr(module, name)))


def load_plugins(names: str) -> None:
    """Run vLLM's own plugin loading, as if the process began with VLLM_PLUGINS set."""
    import vllm.plugins

    os.environ["VLLM_PLUGINS"] = names
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()


def engine_config(folder: Path, setup: Setup, **options: Any) -> Any:
    """What the command line would give, sent to another process and back, as workers get it."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {
        "model": str(folder),
        "tensor_parallel_size": setup.ranks,
        "distributed_executor_backend": "mp",
        "moe_backend": "flashinfer_trtllm",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
    }
    config = EngineArgs(**arguments | dict(setup.options) | options).create_engine_config()
    if setup.redundant:  # not by an option: on a CPU these refuse it
        config.parallel_config.enable_eplb = True
        config.parallel_config.eplb_config.num_redundant_experts = setup.redundant
    return pickle.loads(pickle.dumps(config))


@contextlib.contextmanager
def as_rank(config: Any, size: int, rank: int) -> Iterator[None]:
    from support.cpu_engines import vllm_golden
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config), vllm_golden.pretend_rank(size, rank):
        yield


@contextlib.contextmanager
def as_stage(stage: int, stages: int) -> Iterator[None]:
    """Let vLLM's pipeline group report a stage."""
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    seen = {"world_size": stages, "rank_in_group": stage, "rank": stage, "ranks": [*range(stages)]}
    with mock.patch.multiple(group, **seen):
        yield


def forget_models() -> None:
    """Let the next model be as the first of a process. What vLLM keeps beside models is not: of
    rotary embeddings, which models share, some may be empty after a reload that failed, and some
    are another family's; what a pipeline stage lacks is kept by the model's address, which a later
    model may get."""
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.models import utils

    rotary_embedding._ROPE_DICT.clear()
    utils._model_to_pp_missing_layer_names.clear()


def load(folder: Path, setup: Setup, rank: int = 0, **options: Any) -> tuple[Any, Any]:
    """A model as an engine process would hold it, and the configuration."""
    from vllm.model_executor.model_loader import get_model

    forget_models()
    config = engine_config(folder, setup, **options)
    model_config = config.model_config
    if setup.draft:
        model_config = config.speculative_config.draft_model_config
    with as_rank(config, setup.ranks, rank), as_stage(setup.stage, setup.stages):
        return get_model(vllm_config=config, model_config=model_config), config


def experts_of(model: Any) -> dict[str, Any]:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return {n: module for n, module in model.named_modules() if isinstance(module, RoutedExperts)}


def state_of(model: Any, config: Any) -> State:
    """All that could differ: parameters, buffers, the kernels' operands, what was configured."""
    state: State = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, experts in experts_of(model).items():
        moe = experts.moe_config
        for key in ("hidden_dim", "hidden_dim_unpadded", "intermediate_size_per_partition"):
            state[f"{name}: {key}"] = getattr(moe, key)
        if (kernel := getattr(experts.quant_method, "moe_kernel", None)) is None:
            continue
        operands = vars(kernel.fused_experts) | {
            key: getattr(kernel.fused_experts.quant_config, key)
            for key in ("a1_gscale", "a2_gscale", "g1_alphas", "g2_alphas", "w1_scale", "w2_scale")
        }
        for key, value in operands.items():
            if hasattr(value, "data_ptr") or isinstance(value, (int, float, str)):
                state[f"{name}: {key}"] = value
        state[f"{name}: kernel"] = type(kernel.fused_experts).__name__
    state["quantization"] = config.model_config.quantization
    state["KV cache dtype"] = config.cache_config.cache_dtype
    state["fusions"] = str(config.compilation_config.pass_config)
    return state


def difference(expected: State, found: State) -> str | None:
    """The first entry that is not the same: type, dtype, shape, strides and bytes of tensors."""
    import torch

    def facts(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return type(value), value.dtype, value.shape, value.stride()
        return value

    if expected.keys() != found.keys():
        return f"only one has {sorted(expected.keys() ^ found.keys())}"
    for name, value in expected.items():
        other = found[name]
        if facts(value) != facts(other):
            return f"{name}: {facts(other)}, stock has {facts(value)}"
        if isinstance(value, torch.Tensor) and not torch.equal(raw(value), raw(other)):
            return f"{name}: values differ from stock's"
    return None


def raw(tensor: Any) -> Any:
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8)


# --- the cases ------------------------------------------------------------------------------------


class Bench:
    """Checkpoints, what stock vLLM makes of the originals, and the results."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.outcomes = Outcomes()
        self.stock: dict[str, list[State]] = {}

    def original(self, name: str) -> Path:
        folder = self.work / name
        if not folder.exists():
            make_checkpoint(folder, CHECKPOINTS[name])
            if name == "deepseek-mixed":
                make_mixed(folder)
        return folder

    def converted(self, name: str) -> Path:
        from fp4moe_convert import convert

        folder = self.work / f"{name}-converted"
        if not folder.exists():
            convert(self.original(name), folder, max_shard_nbytes=SHARD_NBYTES)
        return folder

    def edited(self, name: str, change: Callable[[Path], None]) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.work)) / name
        shutil.copytree(self.converted(name), folder)
        change(folder)
        return folder

    def case(self, name: str, run: Callable[[], str], refusal: str | None = None) -> None:
        """Record what ``run`` returns or how it fails; given ``refusal``, it must, saying that."""
        import pydantic

        from fp4moe_convert.serving.checks import WAY_OUT

        try:
            detail, ok = run(), refusal is None
        except Exception as error:
            message = str(error) or repr(error)
            if isinstance(error, pydantic.ValidationError):  # of vLLM's options
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
            detail = f"refused: {message}"
            ok = refusal is not None and refusal in detail
            if ok and "fp4moe: " in detail:  # one of ours: it names the way out
                ok = WAY_OUT in detail
            if not ok:
                traceback.print_exc()
        self.outcomes.record(name, ok, detail)

    # Without the plugin.

    def load_stock(self, name: str, setup: Setup) -> None:
        """Every rank of the original, with no plugin loaded."""
        folder = self.original(setup.checkpoint)
        self.stock[name] = [state_of(*load(folder, setup, rank)) for rank in range(setup.ranks)]

    def load_without_plugin(self, checkpoint: str) -> str:
        load(self.converted(checkpoint), Setup(checkpoint))
        return "loaded"

    # With it.

    def equal(self, name: str, setup: Setup, folder: Path) -> str:
        config = json.loads((folder / "config.json").read_text())
        section = config["quantization_config"]
        layers = 0 if setup.draft else len(section.get("layers", ()))
        if setup.layers is not None and layers:
            layers = setup.layers
        for rank in range(setup.ranks):
            layout_calls.clear()
            model, engine = load(folder, setup, rank)
            if found := difference(self.stock[name][rank], state_of(model, engine)):
                raise AssertionError(f"rank {rank}: {found}")
            taken = [module for module in experts_of(model).values() if is_ours(module)]
            if len(taken) != layers:
                raise AssertionError(f"rank {rank}: {len(taken)} of {layers} layers taken over")
            if layers and layout_calls:
                raise AssertionError(f"rank {rank}: layout work: {dict(layout_calls)}")
            for module in taken:
                for leaf in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
                    parameter = getattr(module, leaf)
                    created = module.as_created.get(leaf) or module.as_created[f"{leaf}_packed"]
                    if created != (parameter.shape, parameter.data_ptr()):
                        raise AssertionError(f"rank {rank}: {leaf} was created anew")
        work = f"{layers} layers taken over, no layout work" if layers else "no layer taken over"
        return f"equal on {setup.ranks} rank{'s' * (setup.ranks > 1)}, {work}"


def is_ours(experts: Any) -> bool:
    return type(experts.quant_method).__module__ == "fp4moe_convert.serving.vllm.experts"


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """The messages of a logger while the block runs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def one_log_line(bench: Bench) -> str:
    with logged("vllm.fp4moe") as messages:
        load(bench.converted("qwen"), Setup("qwen"))
    ours = [message for message in messages if message.startswith("fp4moe: ")]
    expected = "fp4moe: format version 2, 2 MoE layers taken over, row order xxh3_128:"
    if len(ours) != 1 or not ours[0].startswith(expected):
        raise AssertionError(f"logged {ours}")
    return ours[0]


def untested_version(bench: Bench) -> str:
    import vllm

    stock, vllm.__version__ = vllm.__version__, "0.34.1"
    try:
        with logged("fp4moe_convert.serving.checks") as messages:
            load(bench.converted("qwen"), Setup("qwen"))
    finally:
        vllm.__version__ = stock
    if len(messages) != 1 or "0.33.*" not in messages[0]:
        raise AssertionError(f"logged {messages}")
    return messages[0]


def rewritten_section(bench: Bench) -> str:
    """What a process without the plugin would do with the section of one that has it."""
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    config = engine_config(bench.converted("qwen"), Setup("qwen"))
    ModelOptNvFp4Config.from_config(config.model_config.hf_config.quantization_config)
    return "read"


def shared_weights(bench: Bench) -> str:
    """Tensors of a process that has loaded them, as vLLM's weight cache hands them on."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.utils import replace_parameter, weights_already_processed
    from vllm.utils.torch_utils import set_default_torch_dtype

    folder, setup = bench.converted("qwen-H384"), Setup("qwen-H384", 2)
    source, config = load(folder, setup, rank=1)
    config = engine_config(folder, setup)
    dtype = config.model_config.dtype
    with as_rank(config, setup.ranks, 1), set_default_torch_dtype(dtype):
        model = initialize_model(config)
        for name, module in experts_of(model).items():
            for leaf, parameter in source.get_submodule(name).named_parameters():
                replace_parameter(module, leaf, parameter.data)
            with weights_already_processed():
                module.quant_method.process_weights_after_loading(module)
    theirs, ours = (experts_state(state_of(m, config)) for m in (source, model))
    if found := difference(theirs, ours):
        raise AssertionError(found)
    return "equal"


def experts_state(state: State) -> State:
    return {name: value for name, value in state.items() if ".routed_experts" in name}


def loaded_twice(bench: Bench) -> str:
    """New weights into a running engine, which puts every parameter back as it was created. What
    is padded is filled last, and the pinned memory is given back all the same."""
    from support.slow_bus import SlowBus
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    from fp4moe_convert.serving import fast_copy

    bus = SlowBus()
    name = "qwen: H = 384, tp 2"
    setup = EQUAL[name]
    model, config = load(bench.converted(setup.checkpoint), setup, rank=1)
    loader = get_model_loader(config.load_config)
    with (
        as_rank(config, setup.ranks, 1),
        mock.patch.object(fast_copy.COPIER, "_bus_to", return_value=bus),
        mock.patch.object(fast_copy, "MIN_NBYTES", 1),
    ):
        initialize_layerwise_reload(model)
        model.load_weights(loader.get_all_weights(config.model_config, model))
        finalize_layerwise_reload(model, config.model_config)
    if bus.pinned or not bus.sent:
        raise AssertionError(f"{bus.sent} chunks sent, {len(bus.pinned)} pieces of memory pinned")
    stock, ours = experts_state(bench.stock[name][1]), experts_state(state_of(model, config))
    if found := difference(stock, ours):
        raise AssertionError(found)
    return "equal"


def made_up_weights(bench: Bench) -> str:
    load(bench.converted("qwen"), Setup("qwen"), load_format="dummy")
    return "loaded"


def made_up_and_loaded(bench: Bench) -> str:
    """Real weights into an engine that has started without; a tensor of them is missing."""
    from vllm.model_executor.model_loader.reload import inplace

    model, config = load(bench.converted("qwen"), Setup("qwen"), load_format="dummy")
    config.load_config.load_format = "auto"
    folder = bench.edited("qwen", drop("w2_weight_scale"))
    with as_rank(config, 1, 0):
        inplace.reload_weights(config, model, None, str(folder), True)
    return "loaded"


def dropped(bench: Bench) -> str:
    """Nobody keeps a model that its owner has let go."""
    model = weakref.ref(load(bench.converted("qwen"), Setup("qwen"))[0])
    gc.collect()
    if model() is not None:
        raise AssertionError("it stays")
    return "freed"


def while_building_elsewhere(bench: Bench) -> str:
    """vLLM builds a model with its GPU as the default device; here any other than the CPU does."""
    import torch

    from fp4moe_convert.engines.vllm import VLLM
    from fp4moe_convert.serving.checks import check_row_order, read_section

    config = json.loads((bench.converted("qwen") / "config.json").read_text())
    with torch.device("meta"):
        check_row_order(read_section(config["quantization_config"]), VLLM)
    return "checked"


OTHERS: dict[str, tuple[Callable[[Bench], str], str | None]] = {
    "one line in the log": (one_log_line, None),
    "untested vLLM": (untested_version, None),
    "row order checked on any device": (while_building_elsewhere, None),
    "rewritten section without plugin": (rewritten_section, "Missing 'quant_algo'"),
    "weights shared by another process": (shared_weights, None),
    "weights loaded twice": (loaded_twice, None),
    "made-up weights": (made_up_weights, None),
    "made-up weights, then from a folder that lacks a tensor": (
        made_up_and_loaded,
        "experts.w2_weight_scale was not loaded: missing from the checkpoint",
    ),
    "a model that is dropped": (dropped, None),
}
UNCHANGED = ("deepseek: tp 2", "qwen: ep 2, redundant experts")


def without_plugin(name: str) -> str:
    return f"{name}: converted, no plugin"


def with_plugin(name: str) -> str:
    return f"{name}: original, with plugin"


def case_names() -> list[str]:
    """What `run` reports, in its order."""
    return [
        *map(without_plugin, ("deepseek", "qwen")),
        *EQUAL,
        *map(with_plugin, UNCHANGED),
        *REFUSED,
        *OTHERS,
    ]


def run(work: Path, _families: Sequence[str]) -> Outcomes:
    start_vllm()
    bench = Bench(work)

    load_plugins("")
    for checkpoint in ("deepseek", "qwen"):
        name = without_plugin(checkpoint)
        bench.case(name, lambda c=checkpoint: bench.load_without_plugin(c), UNKNOWN_METHOD)
    for name, setup in EQUAL.items():
        layout_calls.clear()
        bench.load_stock(name, setup)
        if not layout_calls and not setup.draft and setup.layers != 0:
            raise AssertionError(f"{name}: stock's layout work was not counted")

    load_plugins("fp4moe")
    load_plugins("fp4moe")  # engine processes may
    for name, setup in EQUAL.items():
        folder = bench.converted(setup.checkpoint)
        bench.case(name, lambda n=name, s=setup, f=folder: bench.equal(n, s, f))
    for name in UNCHANGED:
        setup = EQUAL[name]
        folder = bench.original(setup.checkpoint)
        bench.case(with_plugin(name), lambda n=name, s=setup, f=folder: bench.equal(n, s, f))
    for name, (setup, change, refusal) in REFUSED.items():
        bench.case(
            name,
            lambda s=setup, c=change: load_edited(bench, s, c),
            refusal,
        )
    for name, (function, expected) in OTHERS.items():
        bench.case(name, lambda f=function: f(bench), expected)
    return bench.outcomes


def load_edited(bench: Bench, setup: Setup, change: Callable[[Path], None]) -> str:
    load(bench.edited(setup.checkpoint, change), setup)
    return "loaded"


if __name__ == "__main__":
    main(run)
