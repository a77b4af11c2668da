"""Which layers of a checkpoint have experts, and which of these can be converted.

Works on names, dtypes and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from ..errors import CheckpointError
from ..format.contract import GROUP_SIZE, Geometry
from ..storage.header import TensorInfo
from .checkpoint import Checkpoint
from .families import (
    COMPRESSED_TENSORS_LEAVES,
    FAMILIES,
    LEAVES,
    MODELOPT_LEAVES,
    Family,
    Leaf,
    Projection,
    Role,
    leaf_name,
)
from .names import IN_LAYER, converted_layer, is_mtp_by_name, layer_number
from .quantization import WEIGHT_ONLY, Nvfp4Source, described_by
from .spans import Matrix, Shard
from .text_config import TextConfig

_SCALES = {leaves["weight_scale_2"] for leaves in (MODELOPT_LEAVES, COMPRESSED_TENSORS_LEAVES)}
_UNNUMBERED = re.compile(r"(.*\.experts)[._](?![0-9])", re.DOTALL)

MAX_SIZE = 2**20
"""Of H and I. A move has at least 128 rows, which a worker holds in memory: 64 MiB at this limit,
0.5 MiB for DeepSeek-V3."""

MAX_EXPERTS = 2**16
"""Of a tensor that holds all of a layer. The largest models have some hundred."""


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """A layer whose experts are all NVFP4, alike and complete."""

    prefix: str
    """Of its tensors' names, up to and including ``.experts``, or ``.moe`` in Step-3.5."""
    number: int
    family: Family
    geometry: Geometry
    matrices: Mapping[Role, Matrix]

    @property
    def tensors(self) -> set[str]:
        """Names of the source tensors that the layer is made of."""
        return {matrix.tensor.name for matrix in self.matrices.values()}


@dataclass(frozen=True, slots=True)
class PassedLayer:
    """A layer with experts that stays as it is."""

    prefix: str
    reason: str
    is_weight_only: bool = False
    """Whether it is one of the decoder's whose activations are not quantized (W4A16)."""


class _Named(NamedTuple):
    """A tensor that some family's pattern takes for an expert's."""

    pattern: re.Pattern[str]
    expert: int | None
    part: str
    matrix: Matrix


def find_layers(
    checkpoint: Checkpoint,
    families: Sequence[Family] = FAMILIES,
    *,
    converted: Collection[str] = (),
) -> tuple[list[MoeLayer], list[PassedLayer]]:
    """Sort the checkpoint's expert layers into those to convert and those to pass through.

    Args:
        checkpoint: an original, or a converted one.
        families: the table, in ModelOpt's spelling.
        converted: prefixes of layers that are converted already; they are neither.

    Raises:
        CheckpointError: a layer with NVFP4 experts is incomplete or not uniform.
    """
    text = checkpoint.text
    source = described_by(checkpoint)
    families = [family.spelled(source.leaves) for family in families]
    layers: list[MoeLayer] = []
    passed: list[PassedLayer] = []
    by_layer, unknown = _by_layer(checkpoint.shards, families)
    stays = {
        prefix: _passed(prefix, layer_number(prefix), text, tensors, source)
        for prefix, tensors in by_layer.items()
        if prefix not in converted
    }
    stays |= _of_other_stacks([*(p for p, why in stays.items() if why is None), *converted])
    for prefix, why in stays.items():
        if why is not None:
            passed.append(why)
            continue
        tensors, number = by_layer[prefix], layer_number(prefix)
        assert number is not None
        family = _family_of(tensors, families)
        expert_count = text.expert_count(number)
        layers.append(_check_layer(prefix, number, family, tensors, expert_count, source))
    passed += _stacked(unknown, text.layer_count, {*by_layer, *converted})
    _check_gates(layers)
    _check_counts([layer for layer in layers if text.expert_count(layer.number) is None], unknown)
    layers.sort(key=lambda layer: (layer.number, layer.prefix))
    passed.sort(key=lambda layer: (layer_number(layer.prefix) or 0, layer.prefix))
    return layers, passed


def require_layers(
    checkpoint: Checkpoint, layers: Sequence[object], passed: Sequence[PassedLayer]
) -> None:
    """Make sure that `find_layers` has found something to convert.

    Raises:
        CheckpointError: it has not; the reasons why layers pass are given.
    """
    if not layers:
        reasons = "; ".join(f"{layer.prefix}: {layer.reason}" for layer in passed[:3])
        raise CheckpointError(
            f"{checkpoint.location}: has no layer with NVFP4 experts to convert"
            + (f" ({reasons})" if reasons else "")
        )


def _by_layer(
    shards: Iterable[Shard], families: Iterable[Family]
) -> tuple[dict[str, list[_Named]], list[Matrix]]:
    """The tensors that some family takes for experts', by layer, and all others."""
    patterns = list(dict.fromkeys(family.tensors for family in families))
    found: dict[str, list[_Named]] = {}
    others: list[Matrix] = []
    for shard in shards:
        for info in shard.header.tensors:
            matrix = Matrix.whole(shard, info)
            for pattern in patterns:
                if match := pattern.fullmatch(info.name):
                    groups = match.groupdict()
                    number = groups.get("expert")
                    expert = None if number is None else int(number)
                    named = _Named(pattern, expert, groups["part"], matrix)
                    found.setdefault(groups["prefix"], []).append(named)
                    break
            else:
                others.append(matrix)
    return found, others


def _family_of(tensors: Sequence[_Named], families: Iterable[Family]) -> Family:
    """The row that knows most of a layer's tensors; of several, the one that wants no others, which
    tells experts without a gate from those with one."""

    def fit(family: Family) -> tuple[int, int]:
        known = {t.part for t in tensors if t.pattern is family.tensors} & family.parts.keys()
        return len(known), -len(family.parts)

    return max(families, key=fit)


def _passed(
    prefix: str,
    number: int | None,
    text: TextConfig,
    tensors: Iterable[_Named],
    source: Nvfp4Source,
) -> PassedLayer | None:
    """The layer, if it stays as it is. One that has no number does."""
    because = partial(PassedLayer, prefix)
    if is_mtp_by_name(prefix):
        return because("it is a layer of multi-token prediction (MTP), not of the decoder")
    if owner := text.owner_of(prefix):
        return because(f"it is a layer of the {owner}, not of the text model")
    if number is None:
        return because("its name has no layer number")
    if text.layer_count is None:
        raise CheckpointError("config.json: num_hidden_layers is missing")
    if number >= text.layer_count:
        return because(f"layer {number} is not among the {text.layer_count} hidden layers (MTP)")
    dtypes: dict[str, set[str]] = {}
    for tensor in tensors:
        dtypes.setdefault(leaf_name(tensor.part), set()).add(tensor.matrix.tensor.dtype)
    if source.leaves["weight_scale_2"] not in dtypes and _SCALES & dtypes.keys():
        return None  # named as the other exporter names them, which `_roles` refuses
    weights = dtypes.get("weight", set()) | dtypes.get(source.leaves["weight"], set())
    if "U8" not in weights:
        found = " and ".join(sorted(weights)) or "without weights"
        return because(f"its experts are {found}, not NVFP4")
    algorithms = source.algorithms_of(prefix, number)
    return _of_another_kind(prefix, algorithms, dtypes, source) if source.mixed else None


def _of_another_kind(
    prefix: str,
    algorithms: Collection[str],
    dtypes: Mapping[str, Collection[str]],
    source: Nvfp4Source,
) -> PassedLayer | None:
    """The layer, if its packed experts, of a source whose layers may differ, are not W4A4 in
    NVFP4."""
    because = partial(PassedLayer, prefix)
    has_input_scales = source.leaves["input_scale"] in dtypes
    if algorithms == {"W4A16_NVFP4"} or not (algorithms or has_input_scales):
        return because(f"its experts are {WEIGHT_ONLY}", is_weight_only=True)
    if algorithms and algorithms != {"NVFP4"}:
        return because(f"its experts are {' and '.join(sorted(algorithms))}, not NVFP4")
    scales = dtypes.get(source.leaves["weight_scale"], {"missing"})
    if "F8_E4M3" not in scales:
        found = " and ".join(sorted(scales))
        return because(f"its block scales are {found}, those of NVFP4 are F8_E4M3")
    return None


def _of_other_stacks(prefixes: Iterable[str]) -> dict[str, PassedLayer]:
    """Of stacks of layers that have the same numbers, all but the largest are of other models, such
    as a draft. A plugin knows experts by the number of their layer.

    Returns:
        Their layers, by prefix.

    Raises:
        CheckpointError: two have as many layers with experts.
    """
    stacks: dict[str, dict[int, str]] = {}
    for prefix in prefixes:
        if match := IN_LAYER.fullmatch(prefix):
            stacks.setdefault(match[1], {})[int(match[2])] = prefix
    found: dict[str, PassedLayer] = {}
    largest = max(stacks, key=lambda stack: len(stacks[stack]), default="")
    for stack, layers in stacks.items():
        shared = layers.keys() & stacks[largest].keys()
        if stack == largest or not shared:
            continue
        first = min(shared)
        if len(layers) == len(stacks[largest]):
            raise CheckpointError(
                f"{stacks[largest][first]} and {layers[first]} are of two models with NVFP4 "
                "experts, and nothing tells which of them is the text model; serve the original"
            )
        reason = f"{largest} has such a layer {first}, and more of them than this other model"
        found |= {prefix: PassedLayer(prefix, reason) for prefix in layers.values()}
    return found


def _check_layer(
    prefix: str,
    number: int,
    family: Family,
    tensors: Sequence[_Named],
    expert_count: int | None,
    source: Nvfp4Source,
) -> MoeLayer:
    if family.batched:
        _refuse_untransposed(tensors)
    matrices = _roles(family, tensors, source)
    _refuse_other_experts(family, matrices)
    experts = {expert for expert, _, _ in matrices}
    count = expert_count if expert_count is not None else max(experts, default=-1) + 1
    for expert in range(count):
        if expert not in experts:
            raise CheckpointError(
                f"config.json: layer {prefix!r} should have {count} experts, "
                f"but no shard has expert {expert}"
                if expert_count is not None
                else f"{prefix}.{expert}: no shard has this expert, but some have later ones"
            )
    for (expert, _, _), matrix in matrices.items():
        if expert >= count:
            raise CheckpointError(
                f"{matrix.shard.name}: {matrix.tensor.name!r} is of expert {expert}, "
                f"config.json allows {count}"
            )
    _check_complete(prefix, family, count, matrices)
    first = family.projections[0]
    geometry = _geometry(matrices[0, first, "weight"], count, gated=first == "gate")
    _check_alike(matrices, geometry)
    return MoeLayer(prefix, number, family, geometry, matrices)


def _refuse_other_experts(family: Family, matrices: Mapping[Role, Matrix]) -> None:
    """Refuse experts of which all lack the same thing: they are of another kind, not damaged."""
    projections = {projection for _, projection, _ in matrices}
    leaves = {leaf for _, _, leaf in matrices}
    first = matrices[min(matrices, key=lambda role: (role[2] != "weight", role))]
    name = f"{first.shard.name}: {first.tensor.name!r}"
    if "down" in projections and len(projections) == 2 < len(family.projections):
        raise CheckpointError(
            f"{name} is of experts without a gate: they have two projections, not three; this "
            "release knows such experts where these are up_proj and down_proj (as in Nemotron-H); "
            "serve the original"
        )
    if "weight" in leaves and "input_scale" not in leaves:
        raise CheckpointError(f"{name} is of experts without an input_scale: {WEIGHT_ONLY}")


def _refuse_untransposed(tensors: Iterable[_Named]) -> None:
    """Refuse experts that lie in one tensor, under the names of transposed ones, as they are."""
    shapes = {named.part: named.matrix.shape for named in tensors}
    gate_up, down = shapes.get("gate_up_proj", ()), shapes.get("down_proj", ())
    # [E, 2I, H/2] and [E, H, I/2]; transposed they are [E, H/2, 2I] and [E, I/2, H].
    both = len(gate_up) == len(down) == 3
    if both and gate_up[1] == 4 * down[2] and down[1] == 2 * gate_up[2]:
        matrix = next(named.matrix for named in tensors if named.part == "gate_up_proj")
        raise _unknown_stack(matrix.shard, matrix.tensor)


def _unknown_stack(shard: Shard, tensor: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{shard.name}: {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}: all experts of the "
        "layer stacked in one tensor; this release knows such tensors as moe.gate_proj, "
        "moe.up_proj and moe.down_proj (as in Step-3.5), or as experts.gate_up_proj and "
        "experts.down_proj, transposed (as in Llama 4); serve the original"
    )


def _stacked(
    others: Iterable[Matrix], layer_count: int | None, known: Collection[str]
) -> Iterator[PassedLayer]:
    """Layers of the decoder that have all experts in one tensor, where no family of the table says
    how.

    Args:
        known: prefixes of layers whose experts are found. A matrix beside them is of something
            else, such as a shared expert.

    Raises:
        CheckpointError: those are NVFP4.
    """
    prefixes: set[str] = set()
    for shard, tensor, *_ in others:
        number = layer_number(tensor.name)
        if number is None or number >= (layer_count or 0) or is_mtp_by_name(tensor.name):
            continue
        named = _UNNUMBERED.search(tensor.name)
        deep = len(tensor.shape) > 2
        of_experts = deep or (named is not None and named[1] not in known)
        if tensor.dtype == "U8" and of_experts and converted_layer(tensor.name) is None:
            raise _unknown_stack(shard, tensor)
        if named and deep and tensor.dtype in ("BF16", "F16", "F32") and named[1] not in prefixes:
            prefixes.add(named[1])
            yield PassedLayer(named[1], f"its experts are {tensor.dtype}, not NVFP4")


def _check_gates(layers: Iterable[MoeLayer]) -> None:
    """Where some layers have gates and others none, gates are missing."""
    by_kind = {layer.geometry.gated: layer.prefix for layer in layers}
    if len(by_kind) > 1:
        raise CheckpointError(
            f"{by_kind[False]}: no shard has a gate of any expert, but {by_kind[True]} has them; "
            "are all shards there?"
        )


def _check_counts(layers: Sequence[MoeLayer], others: Iterable[Matrix]) -> None:
    """Where config.json does not say how many experts a layer has, the other layers do, and its own
    router, which has a row for each."""
    shapes = {matrix.tensor.name: matrix.shape for matrix in others}
    most = max(layers, key=lambda layer: layer.geometry.experts, default=None)
    for layer in layers:
        found, expected = layer.geometry.experts, most.geometry.experts if most else 0
        where = most.prefix if most else ""
        for router in ("gate.weight", "router.weight"):
            name = f"{layer.prefix.removesuffix('.experts')}.{router}"
            shape = shapes.get(name, ())
            if shape[1:] == (layer.geometry.hidden,) and shape[0] > expected:
                expected, where = shape[0], name
        if found < expected:
            raise CheckpointError(
                f"{layer.prefix}: has {found} experts, {where} has {expected}, and config.json "
                "does not say how many there should be; are all shards there?"
            )


def _roles(family: Family, tensors: Sequence[_Named], source: Nvfp4Source) -> dict[Role, Matrix]:
    matrices: dict[Role, Matrix] = {}
    expert_count = 0
    for _, number, _, matrix in tensors:
        if number is not None or not matrix.shape:
            continue
        if matrix.shape[0] > MAX_EXPERTS:
            raise CheckpointError(
                f"{matrix.shard.name}: {matrix.tensor.name!r} is {_form(matrix)}, and more than "
                f"{MAX_EXPERTS} experts are not taken for true"
            )
        if len(matrix.shape) > 2:
            expert_count = max(expert_count, matrix.shape[0])
    for pattern, expert, part, whole in tensors:
        name, shard = whole.tensor.name, whole.shard.name
        if part.endswith(".pre_quant_scale"):
            raise CheckpointError(
                f"{shard}: {name!r} is of an NVFP4_AWQ expert, which multiplies its input by it; "
                "no engine does that for experts; export the model as NVFP4"
            )
        if pattern is not family.tensors or part not in family.parts:
            raise CheckpointError(
                f"{shard}: {name!r} is not a tensor of a {source.title} expert "
                f"({', '.join(family.part_names)} with {', '.join(source.leaves.values())})"
            )
        try:
            roles = list(family.roles(part, expert, whole, expert_count))
        except ValueError as error:
            raise CheckpointError(f"{shard}: {name!r}: {error}") from None
        for role, matrix in roles:
            if role in matrices:  # "experts.1" and "experts.01"
                raise CheckpointError(
                    f"{shard}: {name!r} names the same expert tensor as "
                    f"{matrices[role].tensor.name!r}"
                )
            matrices[role] = matrix
    return matrices


def _check_complete(
    prefix: str, family: Family, count: int, matrices: Mapping[Role, Matrix]
) -> None:
    projections = family.projections
    for expert in range(count):
        for projection in projections:
            for leaf in LEAVES:
                if (expert, projection, leaf) not in matrices:
                    home = next(m.shard.name for (e, _, _), m in matrices.items() if e == expert)
                    name = family.tensor_name(prefix, (expert, projection, leaf))
                    if any(matrix.tensor.name == name for matrix in matrices.values()):
                        raise CheckpointError(f"{home}: {name!r} has no expert {expert}")
                    raise CheckpointError(f"{home}: {name!r} is missing from every shard")


def _geometry(first: Matrix, experts: int, *, gated: bool) -> Geometry:
    """Sizes by the first expert's gate, or by its up projection where it has no gate."""
    name = f"{first.shard.name}: {first.tensor.name!r}"
    if first.tensor.dtype != "U8" or len(first.shape) != 2:
        raise CheckpointError(f"{name} is {_form(first)}, expected U8 [I, H/2]")
    intermediate, hidden = first.shape[0], 2 * first.shape[1]
    for letter, size in (("hidden size H", hidden), ("intermediate size I", intermediate)):
        if size == 0 or size % GROUP_SIZE:
            raise CheckpointError(
                f"{name} gives {letter} = {size}, which is not a multiple of {GROUP_SIZE}"
            )
        if size > MAX_SIZE:
            raise CheckpointError(f"{name} gives {letter} = {size}, the limit is {MAX_SIZE}")
    return Geometry(experts, hidden, intermediate, gated)


def _check_alike(matrices: Mapping[Role, Matrix], geometry: Geometry) -> None:
    """Each matrix has the dtype and the shape that the sizes give it."""
    h, i = geometry.hidden, geometry.intermediate
    sizes: dict[Projection, tuple[int, int]] = {"gate": (i, h), "up": (i, h), "down": (h, i)}
    expected: dict[tuple[Projection, Leaf], tuple[str, tuple[tuple[int, ...], ...]]] = {}
    for projection, (rows, cols) in sizes.items():
        expected[projection, "weight"] = "U8", ((rows, cols // 2),)
        expected[projection, "weight_scale"] = "F8_E4M3", ((rows, cols // GROUP_SIZE),)
        expected[projection, "weight_scale_2"] = "F32", ((), (1,))
        expected[projection, "input_scale"] = "F32", ((), (1,))
    for (_, projection, leaf), matrix in matrices.items():
        dtype, shapes = expected[projection, leaf]
        if matrix.tensor.dtype != dtype or matrix.shape not in shapes:
            raise CheckpointError(
                f"{matrix.shard.name}: {matrix.tensor.name!r} is {_form(matrix)}, "
                f"expected {dtype} {list(shapes[0])} (H = {h}, I = {i}, as in expert 0)"
            )


def _form(matrix: Matrix) -> str:
    transposed = "" if matrix.beside is None else ", transposed"
    return f"{matrix.tensor.dtype} {list(matrix.shape)}{transposed}"
