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

_HEADS = (
    "num_attention_heads",
    "swa_num_attention_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "mamba_num_heads",
    "num_heads",
    "o_groups",
)
"""What T has to divide. The last are Kimi K3's linear attention's and DeepSeek-V4's."""
_KV_HEADS = (
    "num_key_value_heads",
    "swa_num_key_value_heads",
    "num_global_key_value_heads",
    "num_attention_groups",
)
"""They are cut, or each of them is repeated: `QKVParallelLinear`, layers/linear.py:1066 in vLLM
0.33.0 and :1140 in SGLang 0.5.23."""
_MAMBA_GROUPS = ("n_groups", "mamba_n_groups")
"""They are cut, or a single one is repeated: layers/mamba/mamba_mixer2.py:320 in vLLM 0.33.0,
layers/attention/mamba/mamba.py:249 in SGLang 0.5.23."""
_NESTED = ("linear_attn_config", "attention_other_setting")
"""Kimi K3's and Step-3.5's, for some of their layers."""

_BY_ROWS = {"q_proj", "q_b_proj", "kv_b_proj", "wq_b", "gate_proj", "up_proj", "w1", "w3"}
_BY_COLUMNS = {"o_proj", "out_proj", "wo_b", "down_proj", "w2"}
"""Linear layers of which each rank has a part of the outputs or of the inputs, by the last of their
names. Blocks that share a scale must stay whole (quantization/modelopt.py:2026 and
utils/fp8_utils.py:1318 in vLLM 0.33.0, quantization/modelopt_quant.py:1822 and fp8.py:591 in SGLang
0.5.23)."""


@dataclass(frozen=True, slots=True)
class Model:
    """What an engine learns of a model from its config.json, before it has seen a tensor."""

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
        """Whether T ranks can share what surrounds the experts, as far as config.json and headers
        tell."""

        def counts(keys: Iterable[str]) -> list[int]:
            values = [each.get(key) for each in described for key in keys]
            return [value for value in values if type(value) is int and value > 0]

        nested = [model.text.get(key) for key in _NESTED]
        described = [model.text, *(each for each in nested if isinstance(each, dict))]
        return (
            all(count % size == 0 for count in counts(_HEADS))
            and all(count % size == 0 or size % count == 0 for count in counts(_KV_HEADS))
            and all(count % size == 0 or count == 1 for count in counts(_MAMBA_GROUPS))
            and all(self.can_cut_vocabulary(rows, size) for rows in counts(["vocab_size"]))
            and all(_can_cut_linear(each, size) for each in model.linears)
        )

    def tensor_parallel_sizes(self, geometry: Geometry, *, least_share: int = 1) -> list[int]:
        """The sizes T at which the engine can serve a layer, if it takes shares of I that are at
        least so large."""
        whole = geometry.intermediate
        divisors = (t for t in range(1, MAX_TENSOR_PARALLEL + 1) if whole % t == 0)
        shares = (t for t in divisors if t == 1 or whole // t >= least_share)
        return [size for size in shares if self.can_cut(geometry, size)]


def _can_cut_linear(linear: Linear, size: int) -> bool:
    """Whether each rank gets whole blocks. The weights of an indexer are on every rank."""
    *parents, name = linear.name.split(".")
    if size == 1 or "indexer" in parents or name not in _BY_ROWS | _BY_COLUMNS:
        return True
    axis = 1 if name in _BY_COLUMNS else 0
    return linear.features[axis] % (size * linear.block[axis]) == 0
