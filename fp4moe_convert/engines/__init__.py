"""The engines that have a plugin here, with what can be said of one where it is not installed.

Imports no engine and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..format.contract import Geometry
from .engine import Engine
from .sglang import SGLANG
from .vllm import VLLM

ENGINES: tuple[Engine, ...] = (SGLANG, VLLM)


def tensor_parallel_sizes(geometries: Iterable[Geometry]) -> dict[str, list[int]]:
    """The sizes at which each engine can cut all of these layers; none without layers."""
    geometries = set(geometries)
    if not geometries:
        return {}
    sizes = {
        engine.name: [set(engine.tensor_parallel_sizes(geometry)) for geometry in geometries]
        for engine in ENGINES
    }
    return {name: sorted(set.intersection(*of_layers)) for name, of_layers in sizes.items()}
