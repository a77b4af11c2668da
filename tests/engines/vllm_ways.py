#!/usr/bin/env python3
"""Every way into vLLM: what happens to an original, a converted checkpoint, and one whose rows are
in another order, in a server of an original and in one of a converted checkpoint.

    PYTHONPATH=tests ~/.cache/fp4moe-engines/vllm/bin/python \\
        tests/engines/vllm_ways.py RESULTS.json

`test_drivers.py` runs it in vLLM's environment. What is offered holds other values than what the
server was started from: a load shows in every tensor, and so does one that stopped half way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import vllm_driver
from driver import Outcomes, main
from vllm_driver import CHECKPOINTS, Bench, Setup, as_rank, difference, load, raw, state_of
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

CHECKPOINTS |= {f"{name}-b": replace(CHECKPOINTS[name], seed=1) for name in ("qwen", "deepseek")}

Loader = Callable[[Any, Any, Path], None]
"""Loads a folder into a model with this configuration."""


def from_a_path(model: Any, config: Any, folder: Path) -> None:
    from vllm.model_executor.model_loader.reload import inplace

    inplace.reload_weights(config, model, None, str(folder), True)


def from_a_list(model: Any, config: Any, folder: Path) -> None:
    from vllm.model_executor.model_loader.reload import inplace

    inplace.reload_weights(config, model, names_and_tensors(folder), None, True)


def from_an_iterator(model: Any, config: Any, folder: Path) -> None:
    """In the order of a loader with threads: the marker's file need not come first."""
    from vllm.model_executor.model_loader.reload import inplace

    tensors = names_and_tensors(folder)
    inplace.reload_weights(config, model, iter(tensors[1:] + tensors[:1]), None, True)


def transfer(model: Any, config: Any, folder: Path) -> None:
    """As weights come from a trainer: by the model's own method, in a session."""
    from vllm.model_executor.model_loader import reload

    reload.initialize_layerwise_reload(model)
    try:
        model.load_weights(names_and_tensors(folder))
    finally:
        reload.finalize_layerwise_reload(model, config.model_config)


LIVE: dict[str, Loader] = {
    "reload_weights, path": from_a_path,
    "reload_weights, list": from_a_list,
    "reload_weights, iterator": from_an_iterator,
    "weight transfer": transfer,
}
NOT_AGAIN = re.compile(r"\.attn\._[kvq]_scale")
"""What vLLM does not load again, of an original neither."""
GPU_0 = mock.patch("torch.accelerator.current_device_index", return_value=0)
ALONE = Setup("")
CACHE = "ipc_cache"
DRAFT = "whole model as a draft"


class Ways(Folders, Bench):
    """Folders, and what a fresh start makes of them."""

    def start(self, server: str, kind: str, name: str) -> str:
        folder = self.folder(kind, name) if server == kind else self.mixed(server, kind, name)
        load(folder, ALONE)
        return "loaded"

    def draft(self, server: str, kind: str, name: str) -> str:
        """``server``: what the draft's configuration is of. The target is an original."""
        from vllm.v1.spec_decode.draft_model import DraftModelProposer

        speculative = {"method": "draft_model", "num_speculative_tokens": 1}
        speculative["model"] = str(self.mixed(server, kind, name))
        target = vllm_driver.engine_config(
            self.original(name), ALONE, speculative_config=speculative
        )
        proposer = DraftModelProposer.__new__(DraftModelProposer)  # less what runs the model
        proposer.vllm_config, proposer.speculative_config = target, target.speculative_config
        config = proposer._create_draft_vllm_config()
        with as_rank(config, 1, 0):
            model = proposer._get_model()
        fresh, fresh_config = load(self.folder(kind, name), ALONE)
        return self.same(state_of(fresh, fresh_config), state_of(model, config))

    def cache(self, server: str, kind: str, name: str) -> str:
        """vLLM's weight cache: a process that has loaded ``kind`` hands its tensors to an engine
        started from ``server``. The two compare keys, then tensors go from one to the other."""
        import torch
        from vllm.config import LoadConfig
        from vllm.model_executor.model_loader.weight_cache import daemon, ipc_loader, protocol

        source, source_config = load(self.folder(kind, name), ALONE)
        config = vllm_driver.engine_config(self.folder(server, name), ALONE)

        def key(own: Any) -> Any:
            return protocol.WeightCacheKey.from_model_config(
                own.model_config, 1, 0, cache_config=own.cache_config,
                kernel_config=own.kernel_config,
            )  # fmt: skip

        fresh = vllm_driver.engine_config(self.folder(kind, name), ALONE)
        if key(config) != key(fresh):
            raise ValueError("the keys of the weight cache differ")
        state = protocol.WeightCacheState(*daemon.export_entries(source), {})
        loader = ipc_loader.IpcModelLoader(LoadConfig(load_format="ipc_cache"))
        loader._fetch_entries = lambda *_args, **_kw: state  # type: ignore[method-assign]
        loader._watch_daemon = lambda: None  # type: ignore[method-assign]
        loader.fallback = False
        ipc_loader.check_ipc_platform_support = lambda: None
        with as_rank(config, 1, 0), GPU_0:
            model = loader.load_model(config, config.model_config)
        theirs, ours = state_of(source, source_config), state_of(model, config)
        for name, value in vllm_driver.experts_state(theirs).items():
            if hasattr(value, "data_ptr") and not torch.equal(raw(value), raw(ours[name])):
                raise AssertionError(f"{name} differs")
        return "equal to the process that has loaded it"

    def live(self, way: str, server: str, kind: str, name: str) -> str:
        model, config = load(self.folder(server, name), ALONE)
        before = {key: clone(value) for key, value in state_of(model, config).items()}
        try:
            with as_rank(config, 1, 0):
                LIVE[way](model, config, self.folder(kind, f"{name}-b"))
        except Exception as error:
            if leaves_unchanged(error, way, server):
                after = {key: clone(value) for key, value in state_of(model, config).items()}
                if found := difference(before, after):
                    raise AssertionError(f"changed: {found}") from error
            raise
        fresh, fresh_config = load(self.folder(kind, f"{name}-b"), ALONE)
        return self.same(state_of(fresh, fresh_config), state_of(model, config))

    @staticmethod
    def same(fresh: dict[str, Any], found: dict[str, Any]) -> str:
        if what := difference(
            *({k: v for k, v in s.items() if not NOT_AGAIN.search(k)} for s in (fresh, found))
        ):
            raise AssertionError(what)
        return "equal to a fresh start"


def cases() -> Iterator[tuple[Case, Callable[[Ways], str]]]:
    for name in ("qwen", "deepseek"):
        for server in SERVERS:
            for kind in OFFERS:
                base = server.removesuffix(", no plugin")
                start = partial(Ways.start, server=base, kind=kind, name=name)
                yield Case(name, "start", server, kind), start
                for way in LIVE:
                    live = partial(Ways.live, way=way, server=base, kind=kind, name=name)
                    yield Case(name, way, server, kind), live
                cache = partial(Ways.cache, server=base, kind=kind, name=name)
                if kind != "another order":  # the cache's process does not start
                    yield Case(name, CACHE, server, kind), cache
                draft = partial(Ways.draft, server=base, kind=kind, name=name)
                if name == "qwen":  # vLLM makes DeepSeek's MTP layer of any DeepSeek draft
                    yield Case(name, DRAFT, server, kind), draft


STOCK_STOPS = (
    r"no module or parameter named 'fp4moe'"
    r"|^tuple index out of range"
    r"|^'layers\.\d+\.mlp\.experts\.w(13|2)_"
    r"|Unknown quantization method: fp4moe"
)
"""The marker, a stop tensor or a converted layer's, whichever comes first; or no such method."""


def case_names() -> list[str]:
    return [str(case) for case, _ in cases()]


def run(work: Path, _families: Sequence[str]) -> Outcomes:
    vllm_driver.start_vllm()
    from support.cpu_engines import vllm_cpu

    vllm_cpu.bootstrap()
    ways = Ways(work)
    vllm_driver.load_plugins("")
    with_plugin = False
    for case, way in sorted(cases(), key=lambda each: each[0].has_plugin):
        if case.has_plugin and not with_plugin:
            vllm_driver.load_plugins("fp4moe")
            with_plugin = True
        attempt(ways.outcomes, case, partial(way, ways), STOCK_STOPS)
    return ways.outcomes


if __name__ == "__main__":
    main(run)
