#!/usr/bin/env python3
"""Every way into SGLang: what happens to an original, a converted checkpoint, and one whose rows
are in another order, in a server of an original and in one of a converted checkpoint.

    PYTHONPATH=tests ~/.cache/fp4moe-engines/sglang/bin/python \\
        tests/engines/sglang_ways.py RESULTS.json

`test_drivers.py` runs it in SGLang's environment. What is offered holds other values than what the
server was started from: a load shows in every tensor, and so does one that stopped half way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from driver import Outcomes, main
from sglang_driver import SPECS, Setup, differences, held, load, make_pair, start_sglang
from ways import (
    OFFERS,
    SERVERS,
    Case,
    Folders,
    attempt,
    clone,
    leaves_unchanged,
    names_and_tensors,
)

SPECS["deepseek-b"] = replace(SPECS["deepseek"], seed=1)

Loader = Callable[[Any, Path], None]
"""Loads a folder into a model."""

DRAFT = Setup(draft=True)
WHOLE_DRAFT = "whole model as a draft"


def update_from_disk(model: Any, folder: Path) -> None:
    """By SGLang's own updater, whose answer tells of a refusal."""
    done, message = updater(model).update_weights_from_disk(str(folder), "auto")
    if not done:
        raise ValueError(message)


def update_from_tensors(model: Any, folder: Path) -> None:
    """In a session. One that is refused is left open: stock would process its layers once more."""
    session = updater(model)
    session.begin_weight_update()
    done, message = session.update_weights_from_tensor(names_and_tensors(folder))
    if not done:
        raise ValueError(message)
    session.end_weight_update(run_post_load=False)


def update_from_network(model: Any, folder: Path) -> None:
    """The same with what NCCL brings."""
    session = updater(model)
    session.begin_weight_update()
    done, message = session.load_weights_from_distributed(names_and_tensors(folder))
    if not done:
        raise ValueError(message.removeprefix("Failed to update parameter online: "))
    session.end_weight_update(run_post_load=False)


def load_from_iterator(model: Any, folder: Path) -> None:
    """In no order that files have: the marker comes last."""
    tensors = names_and_tensors(folder)
    model.load_weights(iter(tensors[1:] + tensors[:1]))
    finish(model)


def finish(model: Any) -> None:
    """What follows an update over the network."""
    import torch
    from sglang.srt.model_loader.loader import DefaultModelLoader

    DefaultModelLoader.postprocess_weights(model, torch.device("cpu"))


def updater(model: Any) -> Any:
    """SGLang's `WeightUpdater`, with what it asks of the runner that is not here."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner_components import weight_updater

    config = ModelConfig(model.config._name_or_path or model.folder)
    return weight_updater.WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=config,
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=lambda *_args, **_kw: None,
        recapture_cuda_graph=lambda: None,
        get_model_runner=lambda: SimpleNamespace(),
    )


LIVE: dict[str, Loader] = {
    "update_weights_from_disk": update_from_disk,
    "update_weights_from_tensor": update_from_tensors,
    "update_weights_from_distributed": update_from_network,
    "load_weights, iterator": load_from_iterator,
}


class Ways(Folders):
    """Folders, and what a fresh start makes of them."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def original(self, name: str) -> Path:
        return self.pair(name) / "original"

    def converted(self, name: str) -> Path:
        return self.pair(name) / "converted"

    def pair(self, name: str) -> Path:
        if not (self.work / name).exists():
            make_pair(self.work / name, name)
        return self.work / name

    def start(self, server: str, kind: str, name: str) -> str:
        load(self.mixed(server, kind, name), Setup())
        return "loaded"

    def draft(self, server: str, kind: str, name: str) -> str:
        model = load(self.mixed(server, kind, name), DRAFT)
        return same(held(load(self.mixed(kind, kind, name), Setup())), held(model))

    def live(self, way: str, server: str, kind: str, name: str) -> str:
        folder = self.mixed(server, server, name)
        model = load(folder, Setup())
        model.folder = str(folder)
        before = {key: clone(value) for key, value in held(model).items()}
        try:
            LIVE[way](model, self.mixed(kind, kind, f"{name}-b"))
        except Exception as error:
            unchanged = leaves_unchanged(error, way, server)
            if unchanged and (found := differences(before, held(model))):
                raise AssertionError(f"changed: {found}") from error
            raise
        return same(held(load(self.mixed(kind, kind, f"{name}-b"), Setup())), held(model))


def same(fresh: dict[str, Any], found: dict[str, Any]) -> str:
    if names := differences(fresh, found):
        raise AssertionError(f"{names} differ")
    return f"{len(found)} values equal to a fresh start's"


def cases() -> Iterator[tuple[Case, Callable[[Ways], str]]]:
    for name in ("qwen3", "deepseek"):
        for server in SERVERS:
            for kind in OFFERS:
                base = server.removesuffix(", no plugin")
                start = partial(Ways.start, server=base, kind=kind, name=name)
                yield Case(name, "start", server, kind), start
                for way in LIVE:
                    live = partial(Ways.live, way=way, server=base, kind=kind, name=name)
                    yield Case(name, way, server, kind), live

    # Of most models' drafts SGLang makes an MTP layer, but not of this one's.
    for server in SERVERS:
        for kind in OFFERS:
            base = server.removesuffix(", no plugin")
            draft = partial(Ways.draft, server=base, kind=kind, name="qwen2_moe")
            yield Case("qwen2_moe", WHOLE_DRAFT, server, kind), draft


STOCK_STOPS = (
    r"FusedMoE\.weight_loader\(\) missing 3 required positional arguments"
    r"|Expected 2D tensors, got expert_data shape .* and loaded_weight shape torch.Size\(\[0\]\)"
)
"""A converted layer's tensor or a stop tensor, whichever comes first."""


def case_names() -> list[str]:
    return [str(case) for case, _ in cases()]


def run(work: Path, _families: Sequence[str]) -> Outcomes:
    start_sglang()
    ways = Ways(work)
    outcomes = Outcomes()
    with_plugin = False
    for case, way in sorted(cases(), key=lambda each: each[0].has_plugin):
        if case.has_plugin and not with_plugin:
            from sglang.srt.plugins import load_plugins

            load_plugins()
            with_plugin = True
        attempt(outcomes, case, partial(way, ways), STOCK_STOPS)
    return outcomes


if __name__ == "__main__":
    main(run)
