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

Part: TypeAlias = tuple[tuple[Projection, ...], Leaf]

SCALARS: tuple[Leaf, ...] = ("weight_scale_2", "input_scale")

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
    """Matches the whole name of an expert tensor, with the groups ``prefix`` (of the layer, up to
    and including ``.experts`` or ``.moe``: `names` knows no other end), ``part`` and, where each
    expert has tensors of its own, ``expert``. Without that group the tensor's first axis counts
    experts. Rows whose patterns could match the same name must share one pattern, because a tensor
    goes to the first that matches it."""
    parts: Mapping[str, Part]
    """What a ``part`` is: a leaf of one projection, or of several stacked along the rows."""
    batched: bool = False
    """Whether the experts are stored as one product of batches takes them: the matrix of each is
    transposed, and all of them, gate and up alike, share the scalars."""

    def roles(
        self, part: str, expert: int | None, matrix: Matrix, expert_count: int
    ) -> Iterator[tuple[Role, Matrix]]:
        """The roles that a tensor plays, each with the part that holds it.

        Args:
            part: by the tensor's name.
            expert: the same; None where the tensor is of all experts.
            matrix: the whole tensor.
            expert_count: how many experts there are, where a tensor does not say it.

        Raises:
            KeyError: no such ``part`` in this family.
            ValueError: the tensor does not divide among its roles.
        """
        projections, leaf = self.parts[part]
        count = len(projections)
        shared = self.batched and leaf in SCALARS
        if expert is not None:
            experts = [(expert, matrix)]
        elif shared:
            experts = [(number, matrix) for number in range(expert_count)]
        else:
            slices = matrix.split(matrix.shape[0] if matrix.shape else expert_count)
            experts = [(n, s._replace(shape=s.shape[1:])) for n, s in enumerate(slices)]
        for number, own in experts:
            if shared:
                parts = [own] * count
            elif self.batched:
                parts = own.transposed(count)
            else:
                parts = own.split(count) if count > 1 else [own]
            for projection, each in zip(projections, parts, strict=True):
                yield (number, projection, leaf), each

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Those of each expert, in the order of `PROJECTIONS`; without a gate there are two."""
        own = {each for projections, _ in self.parts.values() for each in projections}
        return tuple(each for each in PROJECTIONS if each in own)

    @property
    def part_names(self) -> list[str]:
        """The parts without their leaves, such as ``gate_proj``."""
        weights = (part for part, (_, leaf) in self.parts.items() if leaf == "weight")
        return [part.partition(".")[0] for part in weights]

    def spelled(self, leaves: Mapping[Leaf, str]) -> Family:
        """The same row in a checkpoint that has other names for the leaves."""
        parts = {
            re.sub(f"{leaf}$", leaves[leaf], part): (projections, leaf)
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


def per_expert(**projections: Projection) -> dict[str, Part]:
    """Parts like ``gate_proj.weight``, given the names of the projections."""
    return {
        f"{name}.{leaf}": ((projection,), leaf)
        for name, projection in projections.items()
        for leaf in LEAVES
    }


def batched(**projections: tuple[Projection, ...]) -> dict[str, Part]:
    """Parts like ``down_proj`` and ``down_proj_weight_scale``, given the names of parameters."""
    return {
        name if leaf == "weight" else f"{name}_{leaf}": (own, leaf)
        for name, own in projections.items()
        for leaf in LEAVES
    }


def leaf_name(part: str) -> str:
    """What a part calls its leaf: ``weight`` where it is ``gate_proj.weight``, or ``down_proj``."""
    module, _, leaf = part.rpartition(".")
    return leaf if module else part.partition("_proj")[2].lstrip("_") or "weight"


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
    # Llama 4 as ModelOpt exports it. gpt-oss has these names too, and biases.
    Family(
        name="experts.{gate_up,down}_proj",
        tensors=re.compile(
            r"(?P<prefix>.*\.experts)\.(?P<part>(?:gate_up|down)_proj(?:_(?!blocks|scales).+)?)",
            re.DOTALL,
        ),
        parts=batched(gate_up_proj=("gate", "up"), down_proj=("down",)),
        batched=True,
    ),
)
