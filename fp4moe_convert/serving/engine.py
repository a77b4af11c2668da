"""What the converter needs to know of an engine. Imports no engine and no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..format.contract import Geometry

MAX_TENSOR_PARALLEL = 64


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine that serves converted checkpoints."""

    name: str
    can_cut: Callable[[Geometry, int], bool]
    """Whether a rank of T holds a slice of the file (docs/format.md, section 4), given that T
    divides I, as every engine requires."""
    serve_command: Callable[[str], str]
    """The command line that serves a folder, given its name quoted for a shell."""

    def tensor_parallel_sizes(self, geometry: Geometry) -> list[int]:
        """The sizes T at which the engine can serve a layer."""
        divisors = (t for t in range(1, MAX_TENSOR_PARALLEL + 1) if geometry.intermediate % t == 0)
        return [size for size in divisors if self.can_cut(geometry, size)]
