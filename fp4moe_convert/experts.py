"""Which tensors are experts, which layers they make up, and whether a layer can be converted.

Works on names, dtypes and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from .checkpoint import Checkpoint, Located
from .contract import GROUP_SIZE, HIDDEN_MULTIPLE, Geometry
from .errors import CheckpointError

Projection = Literal["gate_proj", "up_proj", "down_proj"]
Leaf = Literal["weight", "weight_scale", "weight_scale_2", "input_scale"]

ExpertKey: TypeAlias = tuple[int, Projection, Leaf]

PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
LEAVES: tuple[Leaf, ...] = get_args(Leaf)

EXPERT_COUNT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts")
"""How config.json spells E: DeepSeek and GLM, Qwen, Mixtral and MiniMax."""

MAX_SIZE = 2**20
"""Of H and I. No move is smaller than 128 rows, which a worker holds in memory: 64 MiB at this
limit, 0.5 MiB for DeepSeek-V3."""

_EXPERT_NAME = re.compile(
    r"(?P<prefix>.*\.experts)\.(?P<expert>[0-9]{1,18})\.(?P<rest>.+)", re.DOTALL
)
_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.([0-9]{1,18})\.")
_TENSOR_OF = {f"{p}.{leaf}": (p, leaf) for p in PROJECTIONS for leaf in LEAVES}


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """A layer whose experts are all NVFP4, alike and complete."""

    prefix: str
    """Up to and including ``.experts``."""
    number: int
    geometry: Geometry
    tensors: Mapping[ExpertKey, Located]


@dataclass(frozen=True, slots=True)
class PassedLayer:
    """A layer with experts that stays as it is."""

    prefix: str
    reason: str


def find_layers(checkpoint: Checkpoint) -> tuple[list[MoeLayer], list[PassedLayer]]:
    """Sort the checkpoint's expert layers into those to convert and those to pass through.

    Raises:
        CheckpointError: a layer with NVFP4 experts is incomplete or not uniform, or its sizes are
            not supported.
    """
    by_prefix: dict[str, dict[tuple[int, str], Located]] = {}
    for shard in checkpoint.shards:
        for info in shard.header.tensors:
            if match := _EXPERT_NAME.fullmatch(info.name):
                layer = by_prefix.setdefault(match["prefix"], {})
                key = (int(match["expert"]), match["rest"])
                if key in layer:  # "experts.1" and "experts.01"
                    raise CheckpointError(
                        f"{shard.name}: {info.name!r} names the same expert tensor as "
                        f"{layer[key].info.name!r}"
                    )
                layer[key] = Located(shard, info)

    layer_count = checkpoint.text_config_value("num_hidden_layers")
    expert_count = checkpoint.text_config_value(*EXPERT_COUNT_KEYS)
    layers: list[MoeLayer] = []
    passed: list[PassedLayer] = []
    for prefix, tensors in by_prefix.items():
        number = _layer_number(prefix)
        reason = _reason_to_pass(number, layer_count, tensors)
        if reason is None and number is not None:
            layers.append(_check_layer(prefix, number, tensors, expert_count))
        elif reason is not None:
            passed.append(PassedLayer(prefix, reason))
    layers.sort(key=lambda layer: (layer.number, layer.prefix))
    passed.sort(key=lambda layer: (_layer_number(layer.prefix) or 0, layer.prefix))
    return layers, passed


def _layer_number(prefix: str) -> int | None:
    match = _LAYER_NUMBER.search(prefix)
    return int(match[1]) if match else None


def _reason_to_pass(
    number: int | None, layer_count: int | None, tensors: Mapping[tuple[int, str], Located]
) -> str | None:
    if number is None:
        return "its name has no layer number"
    if layer_count is None:
        raise CheckpointError("config.json: num_hidden_layers is missing")
    if number >= layer_count:
        return f"layer {number} is not among the {layer_count} hidden layers (MTP)"
    dtypes = {t.info.dtype for (_, rest), t in tensors.items() if rest.endswith("weight")}
    if "U8" not in dtypes:
        return f"its experts are {' and '.join(sorted(dtypes)) or 'without weights'}, not NVFP4"
    return None


def _check_layer(
    prefix: str,
    number: int,
    tensors: Mapping[tuple[int, str], Located],
    expert_count: int | None,
) -> MoeLayer:
    found = {expert for expert, _ in tensors}
    count = expert_count if expert_count is not None else max(found) + 1
    for expert in range(count):
        if expert not in found:
            raise CheckpointError(
                f"config.json: layer {prefix!r} should have {count} experts, "
                f"but no shard has expert {expert}"
                if expert_count is not None
                else f"{prefix}.{expert}: no shard has this expert, but some have later ones"
            )
    complete: dict[ExpertKey, Located] = {}
    for (expert, rest), tensor in tensors.items():
        if expert >= count:
            raise CheckpointError(
                f"{tensor.shard.name}: {tensor.info.name!r} is of expert {expert}, "
                f"config.json allows {count}"
            )
        if rest not in _TENSOR_OF:
            raise CheckpointError(
                f"{tensor.shard.name}: {tensor.info.name!r} is not a tensor of a ModelOpt NVFP4 "
                f"expert ({', '.join(PROJECTIONS)} with {', '.join(LEAVES)})"
            )
        projection, leaf = _TENSOR_OF[rest]
        complete[expert, projection, leaf] = tensor
    shard_of_layer = next(iter(tensors.values())).shard.name
    for expert in range(count):
        for projection in PROJECTIONS:
            for leaf in LEAVES:
                if (expert, projection, leaf) not in complete:
                    raise CheckpointError(
                        f"{_home_of(expert, tensors) or shard_of_layer}: "
                        f"'{prefix}.{expert}.{projection}.{leaf}' is missing from every shard"
                    )
    geometry = _geometry(complete, count)
    for tensor, dtype, shapes in _expectations(complete, geometry):
        if tensor.info.dtype != dtype or tensor.info.shape not in shapes:
            raise CheckpointError(
                f"{tensor.shard.name}: {tensor.info.name!r} is {tensor.info.dtype} "
                f"{list(tensor.info.shape)}, expected {dtype} {list(shapes[0])} "
                f"(H = {geometry.hidden}, I = {geometry.intermediate}, as in expert 0)"
            )
    return MoeLayer(prefix, number, geometry, complete)


def _home_of(expert: int, tensors: Mapping[tuple[int, str], Located]) -> str | None:
    return next((t.shard.name for (e, _), t in tensors.items() if e == expert), None)


def _geometry(tensors: Mapping[ExpertKey, Located], experts: int) -> Geometry:
    gate = tensors[0, "gate_proj", "weight"]
    if gate.info.dtype != "U8" or len(gate.info.shape) != 2:
        raise CheckpointError(
            f"{gate.shard.name}: {gate.info.name!r} is {gate.info.dtype} "
            f"{list(gate.info.shape)}, expected U8 [I, H/2]"
        )
    intermediate, hidden = gate.info.shape[0], 2 * gate.info.shape[1]
    for letter, size, multiple in (
        ("hidden size H", hidden, HIDDEN_MULTIPLE),
        ("intermediate size I", intermediate, GROUP_SIZE),
    ):
        if size == 0 or size % multiple:
            raise CheckpointError(
                f"{gate.shard.name}: {gate.info.name!r} gives {letter} = {size}, "
                f"which is not a multiple of {multiple}"
            )
        if size > MAX_SIZE:
            raise CheckpointError(
                f"{gate.shard.name}: {gate.info.name!r} gives {letter} = {size}, "
                f"the limit is {MAX_SIZE}"
            )
    return Geometry(experts, hidden, intermediate)


def _expectations(
    tensors: Mapping[ExpertKey, Located], geometry: Geometry
) -> Iterator[tuple[Located, str, tuple[tuple[int, ...], ...]]]:
    """Each tensor with the dtype and the shapes it may have, the usual one first."""
    h, i = geometry.hidden, geometry.intermediate
    rows_cols = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    for (_, projection, leaf), tensor in tensors.items():
        rows, cols = rows_cols[projection]
        if leaf == "weight":
            yield tensor, "U8", ((rows, cols // 2),)
        elif leaf == "weight_scale":
            yield tensor, "F8_E4M3", ((rows, cols // GROUP_SIZE),)
        else:
            yield tensor, "F32", ((), (1,))
