#!/usr/bin/env python3
"""Load tiny models through SGLang's own model loader: the original against the converted one.

    PYTHONPATH=tests ~/.cache/fp4moe-engines/sglang/bin/python \\
        tests/engines/sglang_driver.py RESULTS_JSON

`test_drivers.py` runs it in SGLang's environment (scripts/setup_engines.sh). SGLang takes
15 s to import, so that one process works through all cases, prints a table of them, and plays one
rank after the other. First all originals are loaded, without the plugin; then SGLang loads its
plugins, this project's among them, by their entry points.

Models, loaders and weight processing are SGLang's. Not SGLang's, for want of a GPU: what
`sglang_cpu` replaces, what `start_sglang` does, and the process groups (loading does not
communicate).
"""

from __future__ import annotations

import gc
import logging
import pkgutil
import re
import shutil
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from driver import Outcomes, main
from edits import SHARD_NBYTES, Edit, Tensors, edit_config, edit_tensors, without
from support.make_checkpoint import Spec, make_checkpoint

# --- checkpoints ----------------------------------------------------------------------------------

DEEPSEEK = Spec(
    experts=8, hidden=256, intermediate=128, shards=3, vocab_size=64, mtp=True, kv_scales=True
)
QWEN3 = replace(DEEPSEEK, style="qwen3_moe", mtp=False, dense_layers=0)
# Of T = 1, 2 and 4, I = 128 is divisible by 64 * T for two, I = 192 for one, and I = 80 for none.
SPECS = {
    "deepseek": DEEPSEEK,
    "deepseek-I192": replace(DEEPSEEK, intermediate=192, differing_scales=True),
    "deepseek-hf": replace(DEEPSEEK, quantization="hf", scale_shape="vector"),
    "qwen3": QWEN3,
    "qwen3-b": replace(QWEN3, seed=1),
    "qwen3-I80": replace(QWEN3, intermediate=80),
    "qwen3-I192": replace(QWEN3, intermediate=192, differing_scales=True, quantization="both"),
    "input-scales": replace(DEEPSEEK, differing_scales=True, mtp=False),
    # Other models, from the tensors of one of these two.
    "glm4_moe": replace(QWEN3, dense_layers=1, differing_scales=True),
    "qwen2_moe": QWEN3,
    "minimax_m2": QWEN3,
    "mixtral": replace(QWEN3, kv_scales=False),
}
MOE_SIZES = {"num_local_experts": 8, "intermediate_size": 128, "head_dim": 128}
CONFIGS = {
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "first_k_dense_replace": 1,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_key_value_heads": 4,
        "qkv_bias": False,
        "shared_expert_intermediate_size": 128,
    },
    "minimax_m2": {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "qk_norm_type": "per_layer",
        "rotary_dim": 64,
        "scoring_func": "sigmoid",
        "use_qk_norm": False,
        "use_routing_bias": False,
        **MOE_SIZES,
    },
    "mixtral": {"architectures": ["MixtralForCausalLM"], **MOE_SIZES},
}
BLOCK_SPARSE = ("minimax_m2", "mixtral")
"""Their experts lie below block_sparse_moe and are called w1, w3 and w2."""


def make_pair(folder: Path, name: str) -> None:
    """Write ``folder/original`` and ``folder/converted``."""
    from fp4moe_convert.conversion import convert

    original = folder / "original"
    make_checkpoint(original, SPECS[name])
    edit_config(original, lambda config: config.update(pad_token_id=0))
    if name in CONFIGS:
        edit_config(original, lambda config: config.update(CONFIGS[name], model_type=name))
    if name == "glm4_moe":
        edit_tensors(original, lambda all_: all_ | copies_of_expert(all_, "shared_experts"))
    if name == "qwen2_moe":
        edit_tensors(original, lambda all_: all_ | copies_of_expert(all_, "shared_expert"))
        edit_tensors(original, add_shared_gates)
    if name == "mixtral":  # its attention has other sizes
        edit_tensors(original, lambda all_: {n: t for n, t in all_.items() if "self_attn" not in n})
    if name in BLOCK_SPARSE:
        edit_tensors(original, lambda all_: rename(all_, r"\.mlp\.", ".block_sparse_moe."))
        edit_tensors(original, lambda all_: rename(all_, r"(\.experts\.\d+)\.gate_proj", r"\1.w1"))
        edit_tensors(original, lambda all_: rename(all_, r"(\.experts\.\d+)\.up_proj", r"\1.w3"))
        edit_tensors(original, lambda all_: rename(all_, r"(\.experts\.\d+)\.down_proj", r"\1.w2"))
    elif SPECS[name].differing_scales:
        tie = tie_the_largest if name == "input-scales" else tie_input_scales
        edit_tensors(original, tie)
    convert(original, folder / "converted", direct_io=False, max_shard_nbytes=SHARD_NBYTES)


def rename(tensors: Tensors, pattern: str, replacement: str) -> Tensors:
    return {re.sub(pattern, replacement, name): value for name, value in tensors.items()}


def copies_of_expert(tensors: Tensors, name: str) -> Tensors:
    """Expert 0 of each layer again, as a shared expert."""
    return {
        old.replace(".experts.0.", f".{name}."): tensor.clone()
        for old, tensor in tensors.items()
        if ".experts.0." in old
    }


def add_shared_gates(tensors: Tensors) -> Tensors:
    gates = {
        name.replace(".mlp.gate.", ".mlp.shared_expert_gate."): tensor[:1].clone()
        for name, tensor in tensors.items()
        if name.endswith(".mlp.gate.weight")
    }
    return tensors | gates


def tie_input_scales(tensors: Tensors) -> Tensors:
    """Give up the input scale of gate, as ModelOpt does. SGLang's loader, which fills both columns
    for gate and again for up, from several threads, then has only one result."""
    for name in tensors:
        if name.endswith(".up_proj.input_scale"):
            tensors[name] = tensors[name.replace(".up_proj.", ".gate_proj.")].clone()
    return tensors


def tie_the_largest(tensors: Tensors) -> Tensors:
    """Tie the input scales of one expert, and make them the largest: the maximum, which is all that
    SGLang serves with, then is the same whichever column the loader leaves."""
    for name in tensors:
        if re.search(r"\.experts\.0\.(gate|up)_proj\.input_scale", name):
            tensors[name].fill_(1.0)
    return tensors


# --- one rank of SGLang on a CPU ------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """How a model is served."""

    tp: int = 1
    ep: int = 1
    redundant: int = 0  # experts, spread by EPLB
    draft: bool = False
    stage: int = 0  # of a pipeline
    stages: int = 1
    model: str | None = None
    """The class, where SGLang would choose another."""
    server: dict[str, Any] = field(default_factory=dict)  # further arguments
    quantization: str | None = None  # as the user says
    load_format: str = "auto"

    def ranks(self) -> Iterator[tuple[int, int]]:
        """(tp_rank, ep_rank) of each."""
        return ((tp, ep) for ep in range(self.ep) for tp in range(self.tp))


def start_sglang() -> None:
    """Import SGLang and replace what needs a GPU."""
    from support.cpu_engines import sglang_cpu

    sglang_cpu.bootstrap()
    import torch
    from sglang.srt.layers.quantization.fp4_utils import Fp4GemmRunnerBackend
    from sglang.srt.layers.rotary_embedding import rope_variant

    # Off CUDA SGLang takes its rotary embedding, which has no weights, from vLLM.
    sys.modules["vllm"] = types.ModuleType("vllm")
    sys.modules["vllm._custom_ops"] = types.ModuleType("vllm._custom_ops")
    sys.modules["vllm._custom_ops"].rotary_embedding = None  # type: ignore[attr-defined]
    rope_variant.get_device = lambda *_args: "cpu"
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    # The second copy of a shared expert's weights that this keeps is made by CUTLASS.
    Fp4GemmRunnerBackend.supports_swiglu_fusion = lambda _self: False  # type: ignore[method-assign]
    # Fills torch.empty with NaN and 255: what a loader leaves unset shows, and compares equal.
    torch.use_deterministic_algorithms(True)


def become(setup: Setup, tp_rank: int, ep_rank: int) -> None:
    """Make this process one rank of a server."""
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import get_context
    from support.cpu_engines import sglang_cpu

    sglang_cpu.publish(tp_size=setup.tp, tp_rank=tp_rank, ep_size=setup.ep, ep_rank=ep_rank)
    arguments = {"moe_runner_backend": "flashinfer_trtllm", "ep_size": setup.ep}
    arguments |= {"ep_num_redundant_experts": setup.redundant, **setup.server}
    get_context().override_server_args(**arguments).install()
    initialize_moe_config()
    sglang_cpu.publish_groups(
        tp_size=setup.tp, ep_size=setup.ep, stage=setup.stage, stages=setup.stages
    )


def load(folder: Path, setup: Setup, tp_rank: int = 0, ep_rank: int = 0) -> Any:
    """One rank's model, as SGLang's own loader leaves it."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.eplb import expert_location
    from sglang.srt.layers.moe.utils import draft_model_build_scope
    from sglang.srt.model_loader import loader

    become(setup, tp_rank, ep_rank)
    config = ModelConfig(str(folder), is_draft_model=setup.draft, quantization=setup.quantization)
    load_config = LoadConfig(load_format=setup.load_format)
    location = None if setup.draft else expert_map(config, setup, ep_rank)
    expert_location.set_global_expert_location_metadata(location, allow_overwrite=True)
    with ExitStack() as stack:
        if setup.draft:
            stack.enter_context(draft_model_build_scope())
        if setup.model:
            model = pkgutil.resolve_name(setup.model), setup.model.rpartition(".")[2]
            stack.enter_context(
                mock.patch.object(loader, "get_model_architecture", return_value=model)
            )
        chosen = loader.DefaultModelLoader(load_config)
        if setup.load_format != "auto":
            chosen = loader.get_model_loader(load_config, config)
        return chosen.load_model(model_config=config, device_config=DeviceConfig("cpu"))


def expert_map(config: Any, setup: Setup, ep_rank: int) -> Any:
    """SGLang's expert map; with redundant experts, a scattered one."""
    import torch
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata

    if not setup.redundant:
        return ExpertLocationMetadata.init_trivial(config, ep_rank)
    random = torch.Generator().manual_seed(0)
    experts = SPECS["deepseek"].experts
    rows = [
        torch.cat(
            [torch.arange(experts), torch.randint(experts, (setup.redundant,), generator=random)]
        )[torch.randperm(experts + setup.redundant, generator=random)]
        for _ in range(config.hf_config.num_hidden_layers)
    ]
    return ExpertLocationMetadata.init_by_mapping(config, torch.stack(rows), ep_rank)


def load_weights(model: Any, folder: Path) -> None:
    """Load once more, as SGLang does to update weights from disk."""
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig())
    weights = loader._get_all_weights(ModelConfig(str(folder)), model)
    loader.load_weights_and_postprocess(model, weights, torch.device("cpu"))


def load_again(model: Any, folder: Path) -> list[str]:
    """`load_weights`, and which of its experts' tensors have another address afterwards: a captured
    CUDA graph would go on to read the old ones."""
    before = experts_addresses(model)
    load_weights(model, folder)
    after = experts_addresses(model)
    return [f"{name} moved" for name in before if before[name] != after.get(name)]


def update_without_experts(model: Any, stock: dict[str, Any], folder: Path) -> tuple[bool, str]:
    """In a session, as over NCCL: of weights that are refused, then of one that is not of experts.
    SGLang ends a session as if all had come."""
    from sglang_ways import updater

    model.folder = str(folder)
    session = updater(model)
    norm = "model.norm.weight"
    expert = "model.layers.1.mlp.experts.0.up_proj.weight"
    for name, expected in ((expert, []), (norm, [norm])):
        session.begin_weight_update()
        done, message = session.load_weights_from_distributed([(name, stock[norm] * 2)])
        session.end_weight_update(run_post_load=True)
        found = differences(stock, held(model))
        if done != (name == norm) or found != expected:
            return False, f"{name}: {message}; {found} differ"
    return True, "the experts stay"


def update_nothing(model: Any, folder: Path) -> None:
    """A session that ends as it began."""
    from sglang_ways import updater

    model.folder = str(folder)
    session = updater(model)
    session.begin_weight_update()
    session.end_weight_update(run_post_load=True)


def update_from_outside(model: Any, other: Any, folder: Path) -> list[str]:
    """In a session in which another process writes into the parameters, as over RDMA. What SGLang
    computes from them is not written; which of it is then not as in ``other``."""
    from sglang_ways import updater

    model.folder = str(folder)
    session = updater(model)
    session.begin_weight_update()
    parameters = dict(model.named_parameters())
    for name, value in other.named_parameters():
        if not re.search(r"\.(g[12]_\w+|\w+_quant)$", name):
            parameters[name].data.copy_(value.data)
    session.end_weight_update(run_post_load=True)
    return differences(held(other), held(model))


def update_after_a_rank_failed(model: Any, folder: Path) -> list[str]:
    """As elastic expert parallelism asks for single experts again, and gets all."""
    from sglang_ways import updater

    stock = {name: value.clone() for name, value in held(model).items() if hasattr(value, "clone")}
    lost = {f"{LAYER}.w13_weight", f"{LAYER}.w2_weight_scale"}
    for name, parameter in model.named_parameters():
        if name in lost:
            parameter.data.zero_()
    model.folder = str(folder)
    only_these = model.generate_weight_name_filter({1: [3]})
    done, message = updater(model).update_weights_from_disk(
        str(folder), "auto", weight_name_filter=only_these
    )
    found = {name: value for name, value in held(model).items() if hasattr(value, "clone")}
    return differences(stock, found) if done else [message]


def experts_addresses(model: Any) -> dict[str, int]:
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    return {
        f"{path}{name}": value.data_ptr()
        for path, module in model.named_modules()
        if isinstance(module, FusedMoE)
        for name, value in held(module).items()
        if hasattr(value, "data_ptr")
    }


SIZES = ("intermediate_size_per_partition", "num_local_experts", "trtllm_padded_hidden_size")


def held(model: Any) -> dict[str, Any]:
    """All tensors that a model holds, parameters or not, and what its MoE layers know of sizes."""
    import torch

    result = {}
    for path, module in model.named_modules():
        attributes = vars(module) | module._parameters | module._buffers
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor) or name in SIZES:
                result[f"{path}.{name}"] = value
    return result


def differences(stock: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Names whose values are not the same, bit for bit."""
    import torch

    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return type(a) is type(b) and bool(a == b)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))

    absent = object()
    names = sorted(stock.keys() | own.keys())
    return [name for name in names if not same(stock.get(name, absent), own.get(name, absent))]


LAYOUT_FUNCTIONS = (
    "sglang.srt.layers.moe.moe_runner.flashinfer_trtllm.align_fp4_moe_weights_for_flashinfer_trtllm",
    "sglang.srt.layers.quantization.utils.prepare_static_weights_for_trtllm_fp4_moe",
    "flashinfer.fused_moe.core._maybe_get_cached_w3_w1_permute_indices",
    "flashinfer.fused_moe.core.get_w2_permute_indices_with_cache",
    "flashinfer.nvfp4_block_scale_interleave",
)


@contextmanager
def counting_layout_work() -> Iterator[Counter[str]]:
    """Count the calls of all functions of SGLang's MoE weight layout."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in LAYOUT_FUNCTIONS:
            function = pkgutil.resolve_name(name)
            stack.enter_context(mock.patch(name, counted(name.rpartition(".")[2], function)))
        yield calls


# --- cases: the same as stock ---------------------------------------------------------------------


@dataclass(frozen=True)
class Equal:
    """Every rank's model from the converted checkpoint is that from the original."""

    checkpoint: str
    setup: Setup = Setup()
    undetermined: str = r"$^"
    """What stock itself does not load the same each time: a pattern of names."""
    layout_calls: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """Changes to config.json."""
    layers: int | None = None
    """How many are taken over, where it is not all."""


# SGLang takes a class without fused experts for quantizations that it has not listed for Mixtral.
MODELS = {"mixtral": "sglang.srt.models.mixtral.MixtralForCausalLM"}
FUSED = {"enforce_shared_experts_fusion": True}
# Once for each of the two MoE layers, on a single slot, through functions of FlashInfer.
FUSED_CALLS = {
    "prepare_static_weights_for_trtllm_fp4_moe": 2,
    "_maybe_get_cached_w3_w1_permute_indices": 4,
    "get_w2_permute_indices_with_cache": 4,
    "nvfp4_block_scale_interleave": 4,
}

EQUAL = {
    **{
        f"{name} tp{tp}": Equal(name, Setup(tp=tp))
        for name in ("deepseek", "deepseek-I192", "qwen3", "qwen3-I192", "qwen3-I80")
        for tp in (1, 2, 4)
    },
    **{
        f"{name} ep{ep}": Equal(name, Setup(ep=ep))
        for name in ("deepseek", "qwen3")
        for ep in (2, 4)
    },
    "deepseek-hf tp2": Equal("deepseek-hf", Setup(tp=2)),
    "deepseek-I192 tp2 ep2": Equal("deepseek-I192", Setup(tp=2, ep=2)),
    "deepseek ep2 2 redundant": Equal("deepseek", Setup(ep=2, redundant=2)),
    "deepseek-I192 tp2 ep2 4 redundant": Equal("deepseek-I192", Setup(tp=2, ep=2, redundant=4)),
    "qwen3 ep4 4 redundant": Equal("qwen3", Setup(ep=4, redundant=4)),
    **{
        f"deepseek-I192 fused shared expert tp{tp} ep{ep}": Equal(
            "deepseek-I192", Setup(tp=tp, ep=ep, server=FUSED), layout_calls=FUSED_CALLS
        )
        for tp, ep in ((1, 1), (2, 1), (1, 2))
    },
    "deepseek routed runner": Equal(
        "deepseek", Setup(server={"moe_runner_backend": "flashinfer_trtllm_routed"})
    ),
    "deepseek clamped SwiGLU": Equal("deepseek", config={"swiglu_limit": 7.0}),
    "deepseek MTP draft": Equal("deepseek", Setup(draft=True)),
    # Fewer layers than the checkpoint has: a dense one alone, and one of two with experts.
    **{
        f"deepseek {layers} layers": Equal(
            "deepseek", config={"num_hidden_layers": layers}, layers=layers - 1
        )
        for layers in (1, 2)
    },
    # Pipeline stages: the first has the dense layer alone.
    **{
        f"deepseek stage {stage} of 3": Equal(
            "deepseek", Setup(stage=stage, stages=3), layers=min(stage, 1)
        )
        for stage in range(3)
    },
    # Both columns of w13_input_scale are gate's or up's, by chance; the maximum is the same here.
    "input-scales tp2": Equal("input-scales", Setup(tp=2), undetermined=r"\.w13_input_scale$"),
    **{
        f"{name} {label}": Equal(name, replace(setup, model=MODELS.get(name)))
        for name in CONFIGS
        for label, setup in (("tp2", Setup(tp=2)), ("ep2", Setup(ep=2)))
    },
}


@dataclass(frozen=True)
class Refused:
    """SGLang stops with a message of ours."""

    message: str
    """Pattern."""
    checkpoint: str = "qwen3"
    setup: Setup = Setup()
    config: Edit = dict
    """Change of config.json, and below of its quantization_config."""
    section: Edit = dict
    tensors: Callable[[Tensors], Tensors] = dict
    environment: dict[str, str] = field(default_factory=dict)

    def edit(self, config: dict[str, Any]) -> None:
        self.config(config)
        self.section(config["quantization_config"])


LAYER = "model.layers.1.mlp.experts"
REFUSED = {
    **{
        f"runner {backend}": Refused(
            rf"flashinfer_trtllm, this is {backend}; pass --moe-runner-backend flashinfer_trtllm",
            setup=Setup(server={"moe_runner_backend": backend}),
        )
        for backend in ("triton", "flashinfer_cutlass", "flashinfer_cutedsl")
    },
    "MegaMoE": Refused(
        "MegaMoE has a byte order of its own; leave --moe-a2a-backend megamoe out, or what stands",
        setup=Setup(server={"moe_a2a_backend": "megamoe"}),
    ),
    **{
        f"runner {backend} of a draft": Refused(
            rf"this is {backend}; pass --speculative-moe-runner-backend flashinfer_trtllm",
            checkpoint="qwen2_moe",
            setup=Setup(draft=True, server={"moe_runner_backend": backend}),
        )
        for backend in ("triton",)
    },
    **{
        f"--{option}": Refused(
            f"{reason}; leave --{option} out",
            setup=Setup(server={option.replace("-", "_"): value}),
        )
        for option, value, reason in (
            ("kt-weight-path", "experts", "KTransformers keeps experts in a form of its own"),
            ("enable-paged-experts", True, "paged experts are loaded one by one"),
            ("enable-elastic-expert-backup", True, "a backup of experts is loaded one by one"),
        )
    },
    "another format version": Refused(
        "format version is 1, this release of fp4moe-convert knows 2; convert again, or serve the",
        section=lambda section: section.update(format_version=1),
    ),
    "another row order": Refused(
        r"row order xxh3_128:0 of .*flashinfer 0\.7\.2.* with xxh3_128:[0-9a-f]{32}; convert again",
        section=lambda section: section["layout"].update(row_order="xxh3_128:0"),
    ),
    "tp3 of I128": Refused(
        "3 ranks cannot share an intermediate size of 128; use --tp.* one of 1, 2, 4, 8, 16",
        setup=Setup(tp=3),
    ),
    "per-token activation": Refused(
        "per-token .* unset SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION",
        environment={"SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION": "1"},
    ),
    "weight-only quantization": Refused(
        "W4A16_NVFP4 experts served as modelopt_fp4 are not supported",
        section=lambda section: section["source"].update(quant_algo="W4A16_NVFP4"),
    ),
    "quantization of a draft": Refused(
        "experts served as nvfp4_online are not .*; leave --speculative-draft-model-quantization o",
        checkpoint="qwen2_moe",
        setup=Setup(draft=True, quantization="nvfp4_online"),
    ),
    **{
        f"load format {each}": Refused(
            f"the load format {each} does not load a checkpoint's tensors; leave --load-format out",
            setup=Setup(load_format=each),
        )
        for each in ("dummy", "sharded_state", "presharded")
    },
    "mixed quantization": Refused(
        "MIXED_PRECISION experts served as w4afp8 are not supported",
        section=lambda section: section["source"].update(quant_algo="MIXED_PRECISION"),
    ),
    "a per-expert tensor": Refused(
        rf"{LAYER} is converted, but .* also has '{LAYER}\.3\.up_proj\.weight'; convert .* again",
        tensors=lambda all_: (
            all_ | {f"{LAYER}.3.up_proj.weight": all_[f"{LAYER}.w2_weight"][3].clone()}
        ),
    ),
    **{
        f"{leaf} missing": Refused(
            rf"{LAYER}\.{leaf} was not loaded: .* fp4moe verify",
            tensors=lambda all_, leaf=leaf: without(all_, f"{LAYER}.{leaf}"),
        )
        for leaf in ("w13_weight", "w2_weight_scale", "w13_weight_scale_2", "w2_input_scale")
    },
    "shared expert's tensor missing": Refused(
        rf"{LAYER}\.w13_weight of the shared expert \(w3\) was not loaded",
        checkpoint="deepseek",
        setup=Setup(server=FUSED),
        tensors=lambda all_: without(all_, "model.layers.1.mlp.shared_experts.up_proj.weight"),
    ),
    "tensor of another dtype": Refused(
        rf"{LAYER}\.w2_weight_scale_2 is torch\.float64 in the file, the engine wants",
        tensors=lambda all_: (
            all_ | {f"{LAYER}.w2_weight_scale_2": all_[f"{LAYER}.w2_weight_scale_2"].double()}
        ),
    ),
    "tensor of another shape": Refused(
        rf"{LAYER}\.w2_weight is \[7, 256, 64\], config.json says \[8, 256, 64\]",
        tensors=lambda all_: all_ | {f"{LAYER}.w2_weight": all_[f"{LAYER}.w2_weight"][:7].clone()},
    ),
    "model without fused experts": Refused(
        "SGLang's QuantMixtralForCausalLM has no fused MoE layer with NVFP4 experts for model.lay",
        checkpoint="mixtral",
    ),
    "layer not among the converted": Refused(
        rf"{LAYER} is not among config\.json's converted layers, but '{LAYER}\.",
        section=lambda section: section["layers"].pop(LAYER),
    ),
    "layer excluded from NVFP4": Refused(
        f"SGLang's Qwen3MoeForCausalLM has no fused MoE layer with NVFP4 experts for {LAYER}",
        section=lambda section: section["source"]["ignore"].append(LAYER),
    ),
    "another number of experts": Refused(
        r"layers\.0\.mlp\.experts is Geometry\(experts=8,.* in config\.json, Geometry\(experts=4,",
        config=lambda config: config.update(num_experts=4),
    ),
    "another intermediate size": Refused(
        r"is Geometry.*intermediate=128.* in config\.json, Geometry.*intermediate=64.* in the mo",
        config=lambda config: config.update(moe_intermediate_size=64),
    ),
}


# --- the run --------------------------------------------------------------------------------------

WITHOUT_PLUGIN = {f"{name} without the plugin": name for name in ("deepseek", "qwen3")}
ORDINARY = {f"{name} original beside the plugin": name for name in ("deepseek", "qwen3")}
OTHERS = (
    "loading again into the same model",
    "an update without experts",
    "an update from outside",
    "an update after a rank has failed",
    "an untested SGLang warns",
    "a hook without its target",
    "a model that is dropped is freed",
    "registering again",
)


def case_names() -> list[str]:
    return [*WITHOUT_PLUGIN, *EQUAL, *ORDINARY, *REFUSED, *OTHERS]


class Run:
    """All cases, in an order in which one process can go through them."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.outcomes = Outcomes()
        self.log: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("fp4moe_convert").addHandler(handler)
        logging.getLogger("fp4moe_convert").setLevel(logging.INFO)

    def __call__(self) -> None:
        for name in SPECS:
            make_pair(self.work / name, name)
        for case, name in WITHOUT_PLUGIN.items():
            folder = self.folder(name, "converted", case)
            self.refused(case, folder, Setup(), "ValueError: Unknown quantization method: fp4moe")
        stock = {name: list(self.models(name, "original")) for name in EQUAL}

        from sglang.srt.plugins import load_plugins

        load_plugins()
        for name in EQUAL:
            self.equal(name, stock[name])
        for case, name in ORDINARY.items():
            own = held(load(self.folder(name, "original", case), Setup()))
            found = differences(stock[f"{name} tp1"][0][0], own)
            self.record(case, not found and not self.log, found or f"{len(own)} values equal")
        for case, refused in REFUSED.items():
            folder = self.folder(refused.checkpoint, "converted", case, refused.edit)
            edit_tensors(folder, refused.tensors)
            with mock.patch.dict("os.environ", refused.environment):
                self.refused(
                    case, folder, refused.setup, f"ServingError: fp4moe: .*{refused.message}"
                )
        self.others(stock["qwen3 tp1"][0][0])

    def record(self, case: str, passed: bool, detail: object) -> None:
        self.outcomes.record(case, passed, detail)
        self.log.clear()

    def folder(self, checkpoint: str, which: str, case: str, edit: Edit = dict) -> Path:
        """A checkpoint at a path of its own: SGLang caches configs by path, and changes them."""
        folder = self.work / re.sub(r"\W", "_", f"{case} {which}")
        shutil.copytree(self.work / checkpoint / which, folder)
        edit_config(folder, edit)
        return folder

    def models(self, name: str, which: str) -> Iterator[tuple[dict[str, Any], Counter[str]]]:
        """What every rank of a case holds, and the layout work it took."""
        case = EQUAL[name]
        edit = lambda config: config.update(case.config)  # noqa: E731
        folder = self.folder(case.checkpoint, which, name, edit)
        for tp_rank, ep_rank in case.setup.ranks():
            with counting_layout_work() as calls:
                yield held(load(folder, case.setup, tp_rank, ep_rank)), calls

    def equal(self, name: str, stock: list[tuple[dict[str, Any], Counter[str]]]) -> None:
        case = EQUAL[name]
        problems = []
        tensors = 0
        stock_calls: Counter[str] = Counter()
        own_calls: Counter[str] = Counter()
        for rank, ((theirs, their_calls), (own, calls)) in enumerate(
            zip(stock, self.models(name, "converted"), strict=True)
        ):
            found = differences(theirs, own)
            problems += [
                f"rank {rank}: {tensor} differs"
                for tensor in found
                if not re.search(case.undetermined, tensor)
            ]
            if calls != (their_calls if case.setup.draft else case.layout_calls):
                problems.append(f"rank {rank}: layout work {dict(calls)}")
            tensors += len(own) - len(found)
            stock_calls, own_calls = stock_calls + their_calls, own_calls + calls
        lines = [line for line in self.log if "layers taken over" in line]
        expected = 0 if case.setup.draft or case.layers == 0 else len(stock)
        if len(lines) != expected or len(self.log) != len(lines):
            problems.append(f"logged {self.log}")
        if case.layers and f" {case.layers} MoE layers taken over" not in lines[0]:
            problems.append(f"took over: {lines[0]}")
        detail = f"{len(stock)} ranks, {tensors} values equal; layout calls "
        detail += f"{sum(own_calls.values())}, stock {sum(stock_calls.values())}"
        if case.undetermined != r"$^":
            detail += f"; but {case.undetermined}"
        self.record(name, not problems, "; ".join(problems) or detail)

    def refused(self, case: str, folder: Path, setup: Setup, pattern: str) -> None:
        try:
            load(folder, setup)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            self.record(case, bool(re.match(pattern, message)) and "\n" not in message, message)
        else:
            self.record(case, False, "was loaded")

    def others(self, stock: dict[str, Any]) -> None:
        import sglang
        from sglang.srt.plugins.hook_registry import HookRegistry

        from fp4moe_convert.serving.sglang.hooks import HOOKS, register

        case = "loading again into the same model"
        folder = self.folder("qwen3", "converted", case)
        model = load(folder, Setup())
        found = load_again(model, folder) + differences(stock, held(model))
        self.record(case, not found, found or f"{len(stock)} values equal")

        case = "an update without experts"
        self.record(case, *update_without_experts(model, stock, folder))

        case = "an update from outside"
        folder = self.folder("qwen3", "converted", case)
        other = load(self.folder("qwen3-b", "converted", f"{case}, the other"), Setup())
        found = update_from_outside(load(folder, Setup()), other, folder)
        self.record(case, not found, found or "all is computed anew")

        case = "an update after a rank has failed"
        folder = self.folder("deepseek", "converted", case)
        found = update_after_a_rank_failed(load(folder, Setup(ep=2)), folder)
        self.record(case, not found, found or "all experts are loaded again")

        case = "an untested SGLang warns"
        with mock.patch.object(sglang, "__version__", "0.5.24"):
            found = differences(stock, held(load(self.folder("qwen3", "converted", case), Setup())))
        warning = next((line for line in self.log if "tested with" in line), "")
        expected = re.search(r"tested with SGLang 0\.5\.23, this is 0\.5\.24", warning)
        self.record(case, not found and expected is not None, found or warning)

        case = "a hook without its target"
        with mock.patch.object(
            HookRegistry, "_patched", HookRegistry._patched - {next(iter(HOOKS))}
        ):
            folder = self.folder("qwen3", "converted", case)
            self.refused(
                case, folder, Setup(), "ServingError: fp4moe: this SGLang has no .*get_config"
            )

        case = "a model that is dropped is freed"
        dropped = weakref.ref(load(self.folder("qwen3", "converted", case), Setup()))
        gc.collect()
        self.record(case, dropped() is None, "it stays" if dropped() else "it is gone")

        register()
        hooks = [
            hook.__module__
            for hooks in HookRegistry._hooks.values()
            for _, hook, _ in hooks
            if hook.__module__.startswith("fp4moe_convert")
        ]
        self.record("registering again", len(hooks) == len(HOOKS), f"{len(hooks)} hooks")


def run(work: Path, _families: Sequence[str]) -> Outcomes:
    start_sglang()
    cases = Run(work)
    cases()
    return cases.outcomes


if __name__ == "__main__":
    main(run)
