#!/usr/bin/env python3
"""Load a tiny model of each family through vLLM: originals, converted ones, and by mistake.

    PYTHONPATH=tests ~/.cache/fp4moe-engines/vllm/bin/python \\
        tests/engines/vllm_zoo.py RESULTS.json [FAMILY ...]

`test_drivers.py` runs it in vLLM's environment. `vllm_driver` and `support.cpu_engines` say what
is replaced on a CPU. First without any plugin, then with this project's:

- An original is loaded, and the loader fills all of its experts.
- The mistake is the original's config.json in a converted folder, or that folder offered to an
  engine that serves the original. vLLM has to stop: weights that no loader has filled, or that are
  laid out for another kernel, do not crash, they answer nonsense.
- A converted checkpoint is served as its original is: every tensor of the model is the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import originals
import vllm_driver
from driver import Outcomes, main
from edits import edit_tensors, without
from support import exporters, model_zoo
from vllm_driver import (
    EP,
    MTP,
    Bench,
    Setup,
    as_rank,
    difference,
    engine_config,
    experts_of,
    forget_models,
    is_ours,
    load,
    load_plugins,
    state_of,
)

from fp4moe_convert.format.contract import MARKER_NAME

# --- what vLLM's models do ------------------------------------------------------------------------

STOPS = "There is no module or parameter named 'fp4moe'"
"""No model has a part of that name. The marker is a converted checkpoint's first tensor."""

STOPS_LLAMA4 = "'Llama4ForConditionalGeneration' object has no attribute 'fp4moe'"
"""Its loader looks for the part itself."""

STOPS_UNMARKED = "tuple index out of range"
"""Some loaders (Bailing V3's, Nemotron Nano VL's) pass over the marker. What stops them is shown by
others from which the marker is taken away: the empty tensor of an expert has no axis to cut."""

STOPS_UNMARKED_STEP = "AssertionError()"
"""Of Step-3.5: an empty tensor is not that of all experts (step3p5.py:795 in 0.33.0)."""

DRAFTS = ("deepseek_v3", "glm4_moe", "qwen3_5_moe", "qwen3_next", "qwen3_next-nvfp4-mtp")
"""Families whose MTP layer vLLM makes a draft of."""

WHOLE_DRAFTS = (
    "gemma4",
    "hunyuan_v1_moe",
    "minimax_m2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_vl_moe",
)
"""Families of which vLLM makes a draft as they are, not of their MTP layer."""

FILE_BESIDE = "glm4_moe-mtp-file"
"""vLLM reads no file that the index does not name, and starts a draft that nothing has filled.
The converted checkpoint's index names all."""

NO_RELOAD = dict.fromkeys(
    ("minimax_m2", "minimax_m2-ct"), "'functools.partial' object has no attribute '__name__'"
)
"""Families that vLLM cannot load again into a running engine, and what it says."""

UNLOADABLE = {
    "step3p5": "kernel does not support MoEActivation.SWIGLUSTEP activation",
    # transformers' configuration of its vision tower says it otherwise.
    "step3p7": "'Step3p7VisionConfig' object has no attribute 'width'",
    "modelopt-gpt_oss": "kernel does not support MoEActivation.SWIGLUOAI activation",
    "llmcompressor-minimax_m2": "never written: w13_weight_packed",
}
"""Originals that vLLM does not load with the backend, and what it says."""
FAMILIES = [name for name in model_zoo.FAMILIES if name not in UNLOADABLE]

DROPPED = "e_score_correction_bias"
"""A parameter of the router's that vLLM does not load for Laguna, which has it among the experts'
tensors (`RoutedExperts.load_weights`, fused_moe/routed_experts.py:1004 in 0.33.0)."""

UNREADABLE = {
    "mixed": "Missing 'quant_algo'",
    "compressed-tensors": "no attribute 'items'",
    "amid": "Cannot find any of ['activation_scheme']",
}
"""What vLLM says without the plugin of a section that one with it hands on, by its kind."""

EACH = " each by itself"
"""Of `originals.BATCHED`: the same weights with tensors of each expert."""

LOADED_WRONGLY = {
    "tp 2": "w13_weight_scale: values differ from stock's",
    "tp 4": "w13_weight_scale: values differ from stock's",
    "ep 2": "must match the size of tensor b (8)",
}
"""What becomes of `originals.BATCHED` with several ranks. vLLM cuts the block scales of gate and up
as if they were one projection, so that the first of two ranks has those of gate alone, and the
second those of up: `_load_combined_w13_weight_scale`, fused_moe/routed_experts.py:355 in 0.33.0."""

REFUSED = "fp4moe: these weights are converted, the model was built for a checkpoint that is not"
"""The mistake, with the plugin."""

# --- the run --------------------------------------------------------------------------------------

OPTIONS = {
    "trust_remote_code": True,  # some configurations are code beside the checkpoint
    "enable_prefix_caching": False,  # on a CPU, MLA has none, which Kimi K3's other layers miss
}
ALONE = Setup("", 1, OPTIONS)
SERVED = {
    "tp 1": ALONE,
    "tp 2": Setup("", 2, OPTIONS),
    "tp 4": Setup("", 4, OPTIONS),
    "ep 2": Setup("", 2, OPTIONS | EP),
}
DRAFT = Setup("", 1, OPTIONS | MTP, draft=True)


@dataclass(frozen=True)
class Case:
    name: str
    plugin: bool
    run: Callable[[Zoo], str]
    refusal: str | None = None
    """Part of the message that it must fail with."""


class Zoo(Bench):
    """The zoo's checkpoints instead of the driver's own."""

    def original(self, name: str) -> Path:
        folder = self.work / name
        if not folder.exists():
            if name.endswith(EACH):
                originals.make_each_by_itself(folder, name.removesuffix(EACH))
            else:
                originals.make(folder, name)
        return folder

    def disguised(self, family: str) -> Path:
        """A converted checkpoint with its original's config.json, or hf_quant_config.json."""
        paths = list(self.original(family).glob("*config.json"))
        return self.edited(family, lambda folder: [shutil.copy(path, folder) for path in paths])

    def unmarked(self, family: str) -> Path:
        """The same without the marker."""
        folder = self.disguised(family)
        edit_tensors(folder, lambda tensors: without(tensors, MARKER_NAME))
        return folder


def cases() -> Iterator[Case]:
    """All of them, in the order of the run: first those without the plugin."""
    for family in originals.NAMES:
        if refusal := UNLOADABLE.get(family):
            yield Case(f"{family}: original", False, partial(stock, family, ALONE), refusal)
            continue
        for served, setup in SERVED.items():
            label = f"{family}: original, {served}"
            if family not in originals.BATCHED:
                yield Case(label, False, partial(stock, family, setup))
                continue
            each = partial(stock, family, setup, form=EACH)
            yield Case(f"{family}: each expert by itself, {served}", False, each)
            same = partial(original_equal, family, setup)
            yield Case(label, False, same, LOADED_WRONGLY.get(served))
        if family in DRAFTS:
            yield Case(f"{family}: original, draft", False, partial(stock, family, DRAFT))
        if family in WHOLE_DRAFTS:
            yield Case(f"{family}: original, whole draft", False, partial(stock_draft, family))
    for family in FAMILIES:
        unmarked = partial(start, family, "unmarked")
        stops = STOPS_UNMARKED_STEP if family.startswith("step") else STOPS_UNMARKED
        yield Case(f"{family}: mistake, without the marker", False, unmarked, stops)
    loads_draft = partial(stock, FILE_BESIDE, DRAFT)
    yield Case(f"{FILE_BESIDE}: original, draft", False, loads_draft, "never written")
    for plugin in (False, True):
        for family in FAMILIES:
            stops = STOPS_LLAMA4 if family in model_zoo.BATCHED else STOPS
            stops = REFUSED if plugin else stops
            label = f"{family}: mistake{', with the plugin' if plugin else ''}"
            yield Case(label, plugin, partial(start, family, "disguised"), stops)
            wrong = stops if plugin else NO_RELOAD.get(family, stops)
            yield Case(f"{label}, reload", plugin, partial(reload, family), wrong)
    for family in (*FAMILIES, *exporters.CONVERTED):
        for served, setup in SERVED.items():
            yield Case(f"{family}: converted, {served}", True, partial(equal, family, setup))
        if family in DRAFTS:
            yield Case(f"{family}: converted, draft", True, partial(equal, family, DRAFT))
        if family in WHOLE_DRAFTS:
            yield Case(f"{family}: converted, whole draft", True, partial(equal_draft, family))
        if family in model_zoo.OTHER_SECTIONS and family not in NO_RELOAD:
            read = partial(read_without_plugin, family)
            refuses = UNREADABLE[model_zoo.FAMILIES[family].section.split()[0]]
            yield Case(f"{family}: converted, read without the plugin", True, read, refuses)
            yield Case(f"{family}: converted, reload", True, partial(reload_converted, family))
    yield Case(f"{FILE_BESIDE}: converted, draft", True, draft_of_all)


def key(family: str, setup: Setup) -> str:
    return f"{family} {setup}"


def start(family: str, kind: str, zoo: Zoo) -> str:
    model, _ = load(getattr(zoo, kind)(family), ALONE)
    return f"{type(model).__name__}, {len(experts_of(model))} layers with experts"


def stock(family: str, setup: Setup, zoo: Zoo, form: str = "") -> str:
    """Every rank; `equal` compares with it."""
    zoo.load_stock(key(family, setup), replace(setup, checkpoint=family + form))
    return f"loaded on {setup.ranks} rank{'s' * (setup.ranks > 1)}"


def equal(family: str, setup: Setup, zoo: Zoo) -> str:
    return zoo.equal(key(family, setup), setup, zoo.converted(family))


def original_equal(family: str, setup: Setup, zoo: Zoo) -> str:
    return zoo.equal(key(family, setup), setup, zoo.original(family))


def load_draft(family: str, folder: Path, zoo: Zoo) -> tuple[Any, Any]:
    """The folder's whole model as vLLM builds it beside another one, here its original."""
    from vllm.config.utils import replace as with_other
    from vllm.model_executor.model_loader import get_model

    forget_models()
    speculative = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 1}
    setup = replace(ALONE, options=OPTIONS | {"speculative_config": speculative})
    target = engine_config(zoo.original(family), setup)
    config = with_other(
        target, model_config=target.speculative_config.draft_model_config, quant_config=None
    )
    with as_rank(config, 1, 0):
        return get_model(vllm_config=config, prefix="draft_model"), config


def stock_draft(family: str, zoo: Zoo) -> str:
    """`equal_draft` compares with it."""
    model, config = load_draft(family, zoo.original(family), zoo)
    zoo.stock[f"{family} draft"] = [state_of(model, config)]
    return next(experts.layer_name for experts in experts_of(model).values())


def equal_draft(family: str, zoo: Zoo) -> str:
    model, config = load_draft(family, zoo.converted(family), zoo)
    if found := difference(zoo.stock[f"{family} draft"][0], state_of(model, config)):
        raise AssertionError(found)
    taken = [is_ours(experts) for experts in experts_of(model).values()]
    if not all(taken):
        raise AssertionError(f"{sum(taken)} of {len(taken)} layers taken over")
    return f"equal, {len(taken)} layers taken over"


def draft_of_all(zoo: Zoo) -> str:
    model, _ = load(zoo.converted(FILE_BESIDE), DRAFT)
    return type(model).__name__


def reload(family: str, zoo: Zoo) -> str:
    """The converted folder into an engine that serves the original, as a worker would load it."""
    from vllm.model_executor.model_loader.reload import inplace

    model, config = load(zoo.original(family), ALONE)
    with as_rank(config, 1, 0):
        inplace.reload_weights(config, model, None, str(zoo.disguised(family)), True)
    return "loaded again"


def reload_converted(family: str, zoo: Zoo) -> str:
    """A converted folder into an engine that serves it."""
    from vllm.model_executor.model_loader.reload import inplace

    folder = zoo.converted(family)
    model, config = load(folder, ALONE)
    with as_rank(config, 1, 0):
        inplace.reload_weights(config, model, None, str(folder), True)
    if found := difference(zoo.stock[key(family, ALONE)][0], state_of(model, config)):
        raise AssertionError(found)
    return "equal"


def read_without_plugin(family: str, zoo: Zoo) -> str:
    """What another process would make of the section that one with the plugin hands on."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    model_config = engine_config(zoo.converted(family), ALONE).model_config
    stock = get_quantization_config(model_config.quantization).stock
    return repr(stock.from_config(model_config.hf_config.quantization_config))


def start_vllm() -> None:
    """The driver's start, what more families need, and a look at the experts after each loading."""
    vllm_driver.start_vllm()
    from support.cpu_engines import jobs, vllm_cpu

    vllm_cpu.bootstrap()
    os.environ["VLLM_KIMI_K3_GEMM_AR"] = "0"  # a kernel that is compiled for a GPU

    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_weights = DefaultModelLoader.load_weights

    def load_all_weights(self: Any, model: Any, model_config: Any) -> None:
        load_weights(self, model, model_config)
        for name, experts in experts_of(model).items():
            if leaves := [leaf for leaf in jobs.never_written(experts) if leaf != DROPPED]:
                raise AssertionError(f"{name}: never written: {', '.join(leaves)}")

    DefaultModelLoader.load_weights = load_all_weights


def case_names() -> list[str]:
    """What `run` reports, in its order."""
    return [case.name for case in cases()]


def run(work: Path, families: Sequence[str]) -> Outcomes:
    start_vllm()
    load_plugins("")
    zoo = Zoo(work)
    with_plugin = False
    for case in cases():
        if case.name.partition(":")[0] not in families:
            continue
        if case.plugin and not with_plugin:
            load_plugins("fp4moe")
            with_plugin = True
        zoo.case(case.name, partial(case.run, zoo), case.refusal)
    return zoo.outcomes


if __name__ == "__main__":
    main(run, originals.NAMES)
