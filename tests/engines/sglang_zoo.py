#!/usr/bin/env python3
"""Load a tiny model of each family through SGLang: originals, converted ones, and by mistake.

    PYTHONPATH=tests ~/.cache/fp4moe-engines/sglang/bin/python \\
        tests/engines/sglang_zoo.py RESULTS.json [FAMILY ...]

`test_drivers.py` runs it in SGLang's environment, as `sglang_driver` is run. First without any
plugin, then with this project's:

- An original is loaded, and a loader sets all of it. What it does not set shows, because torch
  fills what it allocates with NaN and 255.
- The mistake is the original's config.json in a converted folder: SGLang then takes the tensors for
  the original's. It has to stop, because weights that no loader has set, or that are laid out for
  another kernel, do not crash, they answer nonsense.
- A converted checkpoint is served as its original is: every tensor of the model is the same.
- Scales of gate and up that differ in a layer whose SwiGLU is clamped are refused.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import originals
from driver import Outcome, Outcomes, main
from edits import SHARD_NBYTES, Tensors, edit_tensors
from sglang_driver import (
    FUSED,
    Setup,
    differences,
    held,
    load,
    load_again,
    start_sglang,
    update_nothing,
)
from support import model_zoo
from support.cpu_engines import sglang_cpu

# --- what SGLang's models do ----------------------------------------------------------------------

SHARED = r"^(model\.embed_tokens|lm_head)\."
"""A draft model gets these from its target."""

DRAFTS = (
    *("deepseek_v3", "glm4_moe", "glm4_moe-mtp-file", "qwen3_5_moe"),
    "qwen3_next-nvfp4-mtp",  # in bf16 stock SGLang does not load it
)
"""Families whose MTP layer stock SGLang can load."""

UNLOADABLE = {
    "modelopt-gpt_oss": "Expected 2D tensors",
    **dict.fromkeys(originals.BATCHED, "expand(CPUFloat8_e4m3fnType{[8, 8, 256]}, size=[256, 8])"),
    # It takes what text_config says of another quantization for the model's.
    "kimi_k25-leftover": "KeyError: 'model.layers.0.mlp.gate_up_proj.input_scale'",
    # It takes the experts' packed weights for plain ones, and does not know its own list of ignored
    # modules, whose names have another prefix there.
    "kimi_k3-ct": "KeyError: 'model.layers.0.mlp.gate_up_proj.weight'",
    "llmcompressor-gemma4": "not set: ['vision_tower.encoder.layers.0.self_attn.",
    "llmcompressor-minimax_m2": "not set: ['model.layers.0.block_sparse_moe.experts.",
    # It gives these layers other names than their list of ignored ones.
    "llmcompressor-glm4_moe": "'MergedColumnParallelLinear' object has no attribute 'weight'",
    "llmcompressor-mixtral": "model.layers.0.self_attn.qkv_proj.weight",
    "llmcompressor-qwen3_next": "'MergedColumnParallelLinear' object has no attribute 'weight'",
    # One scale for its four linear-attention projections.
    "modelopt-qwen3_next": "Shape mismatch: param torch.Size([4]) vs loaded torch.Size([])",
}
"""Originals that SGLang does not load here, and what it says."""

UNLOADABLE_EACH = {"modelopt-llama4": "shape '[2, 32, 2, 256]' is invalid for input of size 16384"}
"""The same of those with tensors of each expert. It permutes the rows of this attention's keys and
queries, which are NVFP4, as if they were not packed (`permute_qk_weight_for_rotary`,
models/mllama4.py:606 in 0.5.23)."""

LEFTOVER = "kimi_k25-leftover"
OTHERWISE = (*(name for name in originals.BATCHED if name not in UNLOADABLE_EACH), LEFTOVER)
"""Of `UNLOADABLE`, those that it loads in another form: a converted one is compared with that."""
SERVED = [name for name in originals.CONVERTED if name not in UNLOADABLE or name in OTHERWISE]
MISTAKEN = [name for name in SERVED if name in model_zoo.FAMILIES and name != LEFTOVER]

UNSET = {"hunyuan_v1_moe": r"^lm_head\."}
"""What SGLang leaves unset of an original: Hunyuan v1 hands no names to the quantization, so that
no ignore list applies, and its lm_head, which is the embedding, becomes NVFP4."""

NOT_SERVED = {
    "mixtral": "SGLang's QuantMixtralForCausalLM has no fused MoE layer",
    "modelopt-mixtral": "SGLang's QuantMixtralForCausalLM has no fused MoE layer",
    "llmcompressor-nemotron_h": "SGLang lays out experts of compressed-tensors as if",
    "hunyuan_v1_moe": "SGLang's HunYuanMoEV1ForCausalLM has no fused MoE layer",
    "laguna": "routed-expert tensors were not loaded",
}
"""What becomes of a converted one: what the plugin says, or, of Laguna, SGLang."""

STOPS = (
    r"TypeError: FusedMoE\.weight_loader\(\) missing 3 required positional arguments"
    r"|KeyError: .*fp4moe\.layout"
    r"|ValueError: No module or parameter named 'model\.fp4moe'"
    r"|(ValueError|AssertionError): .*loaded_weight.shape=?.*\[0\]"
    r"|IndexError: (Dimension out of range|index 0 is out of bounds for dimension 0 with size 0)"
)
"""Without the plugin, a converted layer's tensors reach a function that wants to know which expert,
or the marker is refused, or the empty tensor fits nowhere. Which comes first, nobody promises."""

LOGS = "a loader that logs what goes wrong with converted layers, and goes on"
PASSES_BY = {
    "mixtral": "a class without fused experts ignores names that it does not know",
    "minimax_m3_text": LOGS,
    "minimax_m3_text-mixed": LOGS,
}
"""Families of which only the empty tensor stops a rank, and so only a rank that has expert 0. A
server does not outlive a rank."""

DIFFERING = (
    "deepseek_v4",
    "kimi_k3-mixed",
    "minimax_m3_text",
    "minimax_m3_text-mixed",
    "step3p5",
)
"""Families with a limit for SwiGLU, which get other scales for gate than for up in every other
expert. SGLang moves both onto one scale, but in Kimi K3, whose limit is of SiTU."""

REFUSED = r"ServingError: fp4moe: these weights are converted, the model was built for a checkpoint"
"""The mistake, with the plugin."""

# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A folder, and how it is loaded."""

    family: str
    folder: Literal["original", "otherwise", "mistake", "converted"]
    setup: Setup = field(default_factory=Setup)
    plugin: bool = False
    model_impl: str = "auto"
    again: bool = False
    """Load the weights a second time, as an update from disk does."""


SETUPS = {"tp 1": Setup(), "tp 2": Setup(tp=2), "tp 4": Setup(tp=4), "ep 2": Setup(ep=2)}
OF_TWO = {label: setup for label, setup in SETUPS.items() if setup.tp * setup.ep == 2}
# `--model-impl transformers` replaces SGLang's own model class, whatever the family.
TRANSFORMERS = partial(Case, "qwen3_moe-nvfp4-head", model_impl="transformers")

CASES = {
    **{
        f"{name}: original, {label}": Case(name, "original", setup)
        for name in originals.NAMES
        if name not in UNLOADABLE
        for label, setup in SETUPS.items()
    },
    **{f"{name}: original": Case(name, "original") for name in UNLOADABLE},
    **{
        f"{name}: otherwise, {label}": Case(name, "otherwise", setup)
        for name in OTHERWISE
        for label, setup in SETUPS.items()
    },
    **{f"{name}: otherwise": Case(name, "otherwise") for name in UNLOADABLE_EACH},
    **{f"{name}: original's draft": Case(name, "original", Setup(draft=True)) for name in DRAFTS},
    "deepseek_v3-ct: original, fused shared expert": Case(
        "deepseek_v3-ct", "original", Setup(server=FUSED)
    ),
    "Transformers backend: original": TRANSFORMERS("original"),
    **{
        f"{name}: mistake, {label}": Case(name, "mistake", setup)
        for name in MISTAKEN
        for label, setup in OF_TWO.items()
    },
    "Transformers backend: mistake": TRANSFORMERS("mistake"),
    **{
        f"{name}: mistake, with the plugin": Case(name, "mistake", plugin=True) for name in MISTAKEN
    },
    "Transformers backend: mistake, with the plugin": TRANSFORMERS("mistake", plugin=True),
    **{
        f"{name}: converted, {label}": Case(name, "converted", setup, plugin=True)
        for name in SERVED
        for label, setup in SETUPS.items()
    },
    "deepseek_v3-ct: converted, fused shared expert": Case(
        "deepseek_v3-ct", "converted", Setup(server=FUSED), plugin=True
    ),
    # SGLang itself cannot load linear layers in FP8, or of compressed-tensors, again.
    **{
        f"{name}: converted, loaded again": Case(name, "converted", plugin=True, again=True)
        for name in ("minimax_m2-ct", "minimax_m3_text-mixed")
    },
    **{
        f"{name}: converted, draft": Case(name, "converted", Setup(draft=True), plugin=True)
        for name in DRAFTS
    },
    "Transformers backend: converted": TRANSFORMERS("converted", plugin=True),
}


def case_names() -> list[str]:
    return [*CASES]


# --- SGLang on a CPU ------------------------------------------------------------------------------


class Group(sglang_cpu.Group):
    """Nemotron-H asks a device group for its rank and size, Kimi K3 a group for a communicator."""

    def __init__(self, size: int, rank: int | None = None) -> None:
        super().__init__(size, rank)
        self.ca_comm = None
        self.device_group = SimpleNamespace(rank=lambda: rank or 0, size=lambda: size)


def load_rank(folder: Path, case: Case, tp_rank: int, ep_rank: int) -> Any:
    """The model of one rank; `model_impl` is what `--model-impl` says."""
    from sglang.srt.configs.model_config import ModelConfig

    init = ModelConfig.__init__

    def with_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs, model_impl=case.model_impl)

    with mock.patch.object(ModelConfig, "__init__", with_implementation):
        return load(folder, case.setup, tp_rank, ep_rank)


def unset(model: Any) -> list[str]:
    """The parameters that hold what nothing has written, in part or whole."""
    return [name for name, value in model.named_parameters() if holds_fill(value.detach())]


def holds_fill(value: Any) -> bool:
    """Whether a number is NaN; or, for integers, whether all of a row is 255."""
    import torch

    if value.is_floating_point():
        return bool(value.float().isnan().any())
    rows = value.view(torch.uint8) if value.dim() else value.view(1)
    return value.numel() > 0 and bool((rows == 255).all(-1).any())


# --- the run --------------------------------------------------------------------------------------


class Run:
    """All cases, each with a folder of its own: SGLang caches configs by path, and changes them."""

    def __init__(self, work: Path, families: Sequence[str]) -> None:
        self.work = work
        self.families = families
        self.cases = {name: case for name, case in CASES.items() if case.family in families}
        self.outcomes = Outcomes()
        self.stock: dict[str, list[dict[str, Any]]] = {}
        """What every rank holds of an original, by `key`."""

    def __call__(self) -> None:
        from sglang.srt.plugins import load_plugins
        from sglang.srt.plugins.hook_registry import HookRegistry

        for name in self.families:
            self.make(name)
        for name, case in self.cases.items():
            if not case.plugin:
                self.record(name, case)
        assert not HookRegistry._hooks, "there is a plugin"
        load_plugins()
        for name, case in self.cases.items():
            if case.plugin:
                self.record(name, case)

    def make(self, family: str) -> None:
        """Write the original, in both forms if there are two, the converted one, and that under the
        original's config.json."""
        from fp4moe_convert.conversion import convert

        original, converted, mistake = (
            self.work / family / folder for folder in ("original", "converted", "mistake")
        )
        originals.make(original, family)
        if family in DIFFERING:
            edit_tensors(original, untie)
        if family in originals.BATCHED:
            originals.make_each_by_itself(self.work / family / "otherwise", family)
        elif family == LEFTOVER:
            originals.make(self.work / family / "otherwise", "kimi_k25")
        elif family in UNLOADABLE or family in originals.REFUSED:
            return
        convert(original, converted, direct_io=False, max_shard_nbytes=SHARD_NBYTES)
        shutil.copytree(converted, mistake)
        for path in original.glob("*config.json"):
            shutil.copy(path, mistake)

    def record(self, name: str, case: Case) -> None:
        check = {
            "original": self.loads,
            "otherwise": self.loads,
            "mistake": self.stops,
            "converted": self.serves,
        }
        self.outcomes.record(name, *check[case.folder](name, case))

    def ranks(self, name: str, case: Case) -> list[Callable[[], Any]]:
        """For each rank, what loads its model."""
        own = self.folder(name)
        shutil.copytree(self.work / case.family / case.folder, own)
        return [partial(load_rank, own, case, *rank) for rank in case.setup.ranks()]

    def folder(self, name: str) -> Path:
        return self.work / re.sub(r"\W", "_", name)

    def loads(self, name: str, case: Case) -> Outcome:
        """Every rank loads, and all that it holds is set; or SGLang says what is known."""
        expected = SHARED if case.setup.draft else UNSET.get(case.family, r"$^")
        refusals = UNLOADABLE_EACH if case.folder == "otherwise" else UNLOADABLE
        refusal = refusals.get(case.family)
        stock = self.stock[key(case)] = []
        for load_model in self.ranks(name, case):
            try:
                model = load_model()
                left = [each for each in unset(model) if not re.search(expected, each)]
                wrong = f"not set: {left}" if left else None
            except Exception as error:
                wrong = one_line(error)
            if wrong is not None or refusal is not None:
                detail = wrong or f"was loaded, expected {refusal!r}"
                return Outcome(refusal is not None and refusal in detail, detail)
            stock.append(held(model))
        return Outcome(True, type(model).__name__)

    def stops(self, name: str, case: Case) -> Outcome:
        """Every rank stops; of a family that passes by, the first."""
        details = []
        for rank, load_model in enumerate(self.ranks(name, case)):
            try:
                model = load_model()
            except Exception as error:
                details.append(one_line(error))
                expected = re.match(REFUSED if case.plugin else STOPS, details[-1]) is not None
            else:
                details.append(f"was loaded, without {unset(model)}")
                expected = rank > 0 and case.family in PASSES_BY and not case.plugin
            if not expected:
                return Outcome(False, f"rank {rank}: {details[-1]}")
        return Outcome(True, details[0])

    def serves(self, name: str, case: Case) -> Outcome:
        """Every rank holds what it holds of the original; or says that the model is not known."""
        refusal = NOT_SERVED.get(case.family)
        ranks = self.ranks(name, case)
        values = 0
        for rank, load_model in enumerate(ranks):
            try:
                model = load_model()
                folder = self.work / case.family / case.folder
                moved = []
                if case.again:
                    moved = load_again(model, folder)
                    update_nothing(model, folder)
                own = held(model)
                found = moved + differences(self.stock[key(case)][rank], own)
            except Exception as error:
                detail = one_line(error)
                return Outcome(refusal is not None and refusal in detail, detail)
            if found:
                return Outcome(False, f"rank {rank} differs: {found}")
            values += len(own)
        return Outcome(refusal is None, f"{len(ranks)} ranks, {values} values equal")


def untie(tensors: Tensors) -> Tensors:
    """Give gate of experts 0, 2 and so on a larger scale, of one tensor or of all in one."""
    for name, tensor in tensors.items():
        if re.search(r"\.(experts\.\d*[02468]|moe)\.(gate_proj|w1)\.weight_scale_2$", name):
            tensor.view(-1)[::2] *= 1.7
    return tensors


def key(case: Case) -> str:
    """Of what is loaded, original or converted."""
    return f"{case.family} {case.setup} {case.model_impl}"


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def run(work: Path, families: Sequence[str]) -> Outcomes:
    start_sglang()
    sglang_cpu.more_models()
    import torch

    # Kimi K3 makes streams, on whatever device.
    torch.cuda.Stream = mock.MagicMock  # type: ignore[assignment, misc]
    with mock.patch.object(sglang_cpu, "Group", Group):
        cases = Run(work, families)
        cases()
    return cases.outcomes


if __name__ == "__main__":
    main(run, originals.NAMES)
