"""The table of model families: which expert tensor is which.

A family's row says how its tensors are named. From a tensor's name and shape follow its *roles*:
(expert, projection, leaf), each with the matrix that holds it. Everything after this module knows
roles only, so a family whose tensors are stored in a known way is one more row of `FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from .spans import Matrix

Projection = Literal["gate", "up", "down"]
Leaf = Literal["weight", "weight_scale", "weight_scale_2", "input_scale"]
"""ModelOpt's names: E2M1 values, block scales, the weights' and the activations' tensor scale."""

Role: TypeAlias = tuple[int, Projection, Leaf]

PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
LEAVES: tuple[Leaf, ...] = get_args(Leaf)

MODELOPT_LEAVES: Mapping[Leaf, str] = {leaf: leaf for leaf in LEAVES}
COMPRESSED_TENSORS_LEAVES: Mapping[Leaf, str] = {
    "weight": "weight_packed",
    "weight_scale": "weight_scale",
    # The two tensor scales are divisors here, ModelOpt's are factors.
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table."""

    name: str
    """Names the row to users."""
    tensors: re.Pattern[str]
    """Matches the whole name of an expert tensor, with the groups ``prefix`` (of the layer: what
    `names.stacked_layer` tells by its end), ``part`` and, where each expert has tensors of its own,
    ``expert``. Without that group the tensor's first axis counts experts. `names.original_layer`
    has to know such a name too. Rows whose patterns could match the same name must share one
    pattern, because a tensor goes to the first that matches it."""
    parts: Mapping[str, tuple[tuple[Projection, ...], Leaf]]
    """What a ``part`` is: a leaf of one projection, or of several stacked along the rows."""

    def roles(self, part: str, expert: int | None, matrix: Matrix) -> Iterator[tuple[Role, Matrix]]:
        """The roles that a tensor plays, each with the rows that hold it.

        Raises:
            KeyError: no such ``part`` in this family.
            ValueError: the tensor's rows do not divide among its roles.
        """
        projections, leaf = self.parts[part]
        if expert is not None:
            experts = [(expert, matrix)]
        else:
            slices = matrix.split(matrix.shape[0] if matrix.shape else 0)
            experts = [(n, s._replace(shape=s.shape[1:])) for n, s in enumerate(slices)]
        for number, own in experts:
            halves = own.split(len(projections)) if len(projections) > 1 else [own]
            for projection, half in zip(projections, halves, strict=True):
                yield (number, projection, leaf), half

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Those of each expert, in the order of `PROJECTIONS`; without a gate there are two."""
        own = {each for projections, _ in self.parts.values() for each in projections}
        return tuple(each for each in PROJECTIONS if each in own)

    @property
    def part_names(self) -> list[str]:
        """The parts without their leaves, such as ``gate_proj``."""
        return list(dict.fromkeys(part.rpartition(".")[0] for part in self.parts))

    def spelled(self, leaves: Mapping[Leaf, str]) -> Family:
        """The same row in a checkpoint that has other names for the leaves."""
        parts = {
            part.removesuffix(leaf) + leaves[leaf]: (projections, leaf)
            for part, (projections, leaf) in self.parts.items()
        }
        return replace(self, parts=parts)

    def tensor_name(self, prefix: str, role: Role) -> str:
        """The name of the tensor that should play a role."""
        expert, projection, leaf = role
        part = next(
            part
            for part, (projections, kind) in self.parts.items()
            if projection in projections and kind == leaf
        )
        numbered = "expert" in self.tensors.groupindex
        return f"{prefix}.{expert}.{part}" if numbered else f"{prefix}.{part}"


def per_expert(**projections: Projection) -> dict[str, tuple[tuple[Projection, ...], Leaf]]:
    """Parts like ``gate_proj.weight``, given the names of the projections."""
    return {
        f"{name}.{leaf}": ((projection,), leaf)
        for name, projection in projections.items()
        for leaf in LEAVES
    }


NUMBERED_EXPERTS = re.compile(
    r"(?P<prefix>.*\.experts)\.(?P<expert>[0-9]{1,18})\.(?P<part>.+)", re.DOTALL
)

FAMILIES: tuple[Family, ...] = (
    # DeepSeek-V3, Kimi-K2, GLM-4.5, Qwen3-MoE and most others that ModelOpt exports.
    Family(
        name="experts.N.{gate,up,down}_proj",
        tensors=NUMBERED_EXPERTS,
        parts=per_expert(gate_proj="gate", up_proj="up", down_proj="down"),
    ),
    # MiniMax-M2, Mixtral, DeepSeek-V4.
    Family(
        name="experts.N.{w1,w3,w2}",
        tensors=NUMBERED_EXPERTS,
        parts=per_expert(w1="gate", w3="up", w2="down"),
    ),
    # Nemotron-H (Nemotron-3): down(relu(up(x))^2), with no gate.
    Family(
        name="experts.N.{up,down}_proj",
        tensors=NUMBERED_EXPERTS,
        parts=per_expert(up_proj="up", down_proj="down"),
    ),
    # Step-3.5, Step-3.7.
    Family(
        name="moe.{gate,up,down}_proj",
        tensors=re.compile(r"(?P<prefix>.*\.moe)\.(?P<part>(?:gate|up|down)_proj\..+)", re.DOTALL),
        parts=per_expert(gate_proj="gate", up_proj="up", down_proj="down"),
    ),
)
