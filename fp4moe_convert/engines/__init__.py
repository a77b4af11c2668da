"""The engines that have a plugin here, with what can be said of one where it is not installed.

Imports no engine and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..format.contract import Geometry
from .engine import Engine, Model
from .sglang import SGLANG
from .vllm import VLLM

ENGINES: tuple[Engine, ...] = (SGLANG, VLLM)


def tensor_parallel_sizes(model: Model, geometries: Iterable[Geometry]) -> dict[str, list[int]]:
    """The sizes at which each engine can cut a model with these layers, as far as config.json and
    headers tell; none without layers."""
    geometries = set(geometries)
    if not geometries:
        return {}
    sizes = {}
    for engine in ENGINES:
        least = engine.least_share(model)
        of_layers = [engine.tensor_parallel_sizes(each, least_share=least) for each in geometries]
        of_all = sorted(set.intersection(*map(set, of_layers)))
        # Most models refuse more ranks than experts.
        experts = min(each.experts for each in geometries)
        of_all = [size for size in of_all if size <= experts]
        sizes[engine.name] = [size for size in of_all if engine.can_cut_rest(model, size)]
    return sizes
