#!/usr/bin/env python3
"""Load a tiny model of each family through stock SGLang: originals, and converted ones by mistake.

    PYTHONPATH=tests ~/.cache/fp4moe-engines/sglang/bin/python \\
        tests/engines/sglang_zoo.py [RESULTS_JSON]

`test_sglang_zoo.py` runs it in SGLang's environment, as `sglang_driver` is run. No plugin is
loaded. The mistake is the original's config.json in a converted folder: SGLang then takes the
tensors for the original's. It has to stop, because weights that no loader has set, or that are
laid out for another kernel, do not crash, they answer nonsense.

Parameters that a loader has not set show, because torch fills what it allocates with NaN and 255.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import sglang_driver
from sglang_driver import Setup, load, start_sglang
from support import model_zoo
from support.cpu_engines import sglang_cpu

SHARED = r"^(model\.embed_tokens|lm_head)\."
"""A draft model gets these from its target."""

DRAFTS = ("deepseek_v3", "glm4_moe", "glm4_moe-mtp-file", "qwen3_5_moe")
"""Families whose MTP layer stock SGLang can load. It cannot load that of Qwen3-Next in bf16 where
the rest is NVFP4."""

UNSET = {"hunyuan_v1_moe": r"^lm_head\."}
"""What SGLang leaves unset of an original: Hunyuan v1 hands no names to the quantization, so that
no ignore list applies, and its lm_head, which is the embedding, becomes NVFP4."""

NOT_CONVERTED = ("nemotron_h",)
"""Its experts have no gate."""

BACKEND = "qwen3_moe-nvfp4-head, Transformers backend"
"""`--model-impl transformers` replaces SGLang's own model class, whatever the family."""

STOPS = (
    r"TypeError: FusedMoE\.weight_loader\(\) missing 3 required positional arguments"
    r"|KeyError: .*fp4moe\.layout"
    r"|ValueError: No module or parameter named 'model\.fp4moe'"
)
"""Stacked experts reach a function that wants to know which expert; or the marker is refused.
Which comes first is nobody's promise."""

PASSES_BY = {
    "mixtral": "a class without fused experts ignores names that it does not know",
    "minimax_m3_text": "a loader that logs what goes wrong, and goes on",
}
"""Families whose loader does not stop."""


@dataclass(frozen=True)
class Case:
    """One folder, loaded with one setup."""

    family: str
    setup: Setup = field(default_factory=Setup)
    converted: bool = False
    model_impl: str = "auto"


CASES = {
    **{f"{name}: original": Case(name) for name in model_zoo.FAMILIES},
    **{f"{name}: original's draft": Case(name, Setup(draft=True)) for name in DRAFTS},
    f"{BACKEND}: original": Case("qwen3_moe-nvfp4-head", model_impl="transformers"),
    **{
        f"{name}: converted, {label}": Case(name, setup, converted=True)
        for name in model_zoo.FAMILIES
        if name not in NOT_CONVERTED
        for label, setup in (("tp 2", Setup(tp=2)), ("ep 2", Setup(ep=2)))
    },
    f"{BACKEND}: converted": Case(
        "qwen3_moe-nvfp4-head", converted=True, model_impl="transformers"
    ),
}


# --- SGLang on a CPU ------------------------------------------------------------------------------


class Group(sglang_driver.Group):
    """Nemotron-H asks a device group for its rank and size."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.device_group = SimpleNamespace(rank=lambda: 0, size=lambda: size)


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

    def __init__(self, work: Path) -> None:
        self.work = work
        self.results: dict[str, dict[str, Any]] = {}

    def __call__(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry

        for name in model_zoo.FAMILIES:
            self.make(name)
        for name, case in CASES.items():
            passed, detail = (self.stops if case.converted else self.loads)(name, case)
            self.results[name] = {"passed": passed, "detail": detail}
            print(f"{name:52} {'ok  ' if passed else 'FAIL'} {detail}", flush=True)
        assert not HookRegistry._hooks, "there is a plugin"

    def make(self, family: str) -> None:
        """Write the original, and the converted one under the original's config.json."""
        from fp4moe_convert.conversion import convert

        original, converted = self.work / family / "original", self.work / family / "converted"
        model_zoo.make(original, family)
        if family not in NOT_CONVERTED:
            convert(original, converted, direct_io=False)
            shutil.copy(original / "config.json", converted)

    def ranks(self, name: str, case: Case) -> Iterator[Callable[[], Any]]:
        """For each rank, what loads its model."""
        folder = self.work / re.sub(r"\W", "_", name)
        kind = "converted" if case.converted else "original"
        shutil.copytree(self.work / case.family / kind, folder)
        for tp_rank, ep_rank in case.setup.ranks():
            with implementation(case.model_impl):
                yield partial(load, folder, case.setup, tp_rank, ep_rank)

    def loads(self, name: str, case: Case) -> tuple[bool, str]:
        """An original is loaded, and all of it is set."""
        expected = SHARED if case.setup.draft else UNSET.get(case.family, r"$^")
        for load_model in self.ranks(name, case):
            try:
                model = load_model()
            except Exception as error:
                return False, one_line(error)
            left = [parameter for parameter in unset(model) if not re.search(expected, parameter)]
            if left:
                return False, f"not set: {left}"
        return True, type(model).__name__

    def stops(self, name: str, case: Case) -> tuple[bool, str]:
        """Every rank stops; or, of a family that passes by, every one is left without experts."""
        for load_model in self.ranks(name, case):
            try:
                model = load_model()
            except Exception as error:
                outcome, expected = one_line(error), case.family not in PASSES_BY
                expected = expected and re.match(STOPS, outcome) is not None
            else:
                experts = [parameter for parameter in unset(model) if ".experts." in parameter]
                outcome = f"was loaded, {len(experts)} parameters of experts are not set"
                expected = case.family in PASSES_BY and len(experts) > 0
            if not expected:
                return False, outcome
        return True, outcome


@contextmanager
def implementation(model_impl: str) -> Iterator[None]:
    """What `--model-impl` does."""
    from sglang.srt.configs.model_config import ModelConfig

    init = ModelConfig.__init__

    def with_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs, model_impl=model_impl)

    with mock.patch.object(ModelConfig, "__init__", with_implementation):
        yield


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def main() -> None:
    start = time.monotonic()
    start_sglang()
    sglang_cpu.more_models()
    with (
        mock.patch.object(sglang_driver, "Group", Group),
        tempfile.TemporaryDirectory() as folder,
    ):
        run = Run(Path(folder))
        run()
    failed = [case for case in CASES if not run.results[case]["passed"]]
    print(f"{len(CASES)} cases, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(run.results, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
