"""What the converter needs to know of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..format.contract import Geometry
from ..source.linears import Linear

MAX_TENSOR_PARALLEL = 64

NO_LIST = "{} wants a list in the ignore, or exclude_modules, of the quantization"
"""Of an engine, by its title."""

_CUT_BY = ("num_attention_heads", "num_key_value_heads", "vocab_size")


@dataclass(frozen=True, slots=True)
class Model:
    """What can be said of a model before an engine loads it."""

    architectures: tuple[str, ...]
    """As config.json names them."""
    text: Mapping[str, Any]
    """What config.json says of the text model."""
    section: Mapping[str, Any]
    """The original's own description of its quantization, which the plugins restore."""
    gated: bool = True
    """Whether all its experts have a gate."""
    downs: frozenset[str] = frozenset()
    """What the down projections of its experts are called."""
    linears: frozenset[Linear] = frozenset()
    """The decoder's, without its routed experts."""
    untied: str | None = None
    """A layer that clamps its SwiGLU and has experts whose gate and up differ in
    ``weight_scale_2``."""


@dataclass(frozen=True, slots=True)
class KnownModels:
    """The architectures that one release of an engine has models for."""

    release: str
    downs: Mapping[str, frozenset[str]] = field(hash=False)
    """By architecture, what its loader may call the down projections of experts; none where it is
    not known."""

    @classmethod
    def read(cls, path: Path) -> KnownModels:
        """From a file that tests/support/record_models.py has written."""
        release, *lines = path.read_text().splitlines()
        words = (line.split() for line in lines)
        return cls(release, {name: frozenset(downs) for name, *downs in words})

    def first_of(self, architectures: Iterable[str]) -> str | None:
        """The one that the engine takes: the first that it knows."""
        return next((name for name in architectures if name in self.downs), None)


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine that serves converted checkpoints."""

    name: str
    title: str
    """For messages."""
    models: KnownModels
    why_not: Callable[[Model], str | None]
    """Why the engine cannot serve a model that is converted; None where nothing is known that
    speaks against it."""
    can_cut: Callable[[Geometry, int], bool]
    """Whether ranks of T can be served from the file (docs/format.md, section 4), given that T
    divides I, as every engine requires."""
    least_share: Callable[[Model], int]
    """The smallest I / T that the engine takes as it is. With T > 1 it pads a smaller one by a rule
    of the model's own, which the file does not follow."""
    can_cut_vocabulary: Callable[[int, int], bool]
    """Whether T ranks can share an embedding of so many rows."""
    serve_command: Callable[[str], str]
    """The command line that serves a folder, given its name quoted for a shell."""

    def why_not_by_names(self, model: Model) -> str | None:
        """Why its loader would not find the experts, whatever `why_not` says."""
        name = self.models.first_of(model.architectures)
        downs = self.models.downs[name] if name is not None else frozenset()
        if not downs or model.downs <= downs:
            return None
        return (
            f"{self.title}'s {name} looks for the {' or '.join(sorted(downs))} of experts, "
            f"not for their {' or '.join(sorted(model.downs - downs))}"
        )

    def can_cut_rest(self, model: Model, size: int) -> bool:
        """Whether T ranks can share attention and embedding, as far as config.json tells."""
        heads, kv_heads, vocabulary = (
            value if type(value) is int and value > 0 else None
            for value in map(model.text.get, _CUT_BY)
        )
        # KV heads are cut, or each of them is repeated: `QKVParallelLinear`, layers/linear.py:1066
        # in vLLM 0.33.0 and :1140 in SGLang 0.5.23.
        return (
            (heads is None or heads % size == 0)
            and (kv_heads is None or kv_heads % size == 0 or size % kv_heads == 0)
            and (vocabulary is None or self.can_cut_vocabulary(vocabulary, size))
        )

    def tensor_parallel_sizes(self, geometry: Geometry, *, least_share: int = 1) -> list[int]:
        """The sizes T at which the engine can serve a layer, if it takes shares of I that are at
        least so large."""
        whole = geometry.intermediate
        divisors = (t for t in range(1, MAX_TENSOR_PARALLEL + 1) if whole % t == 0)
        shares = (t for t in divisors if t == 1 or whole // t >= least_share)
        return [size for size in shares if self.can_cut(geometry, size)]
