"""Checkpoint and options to a `Plan`: which source bytes go where, in which order.

A plan is a value. Nothing here touches a file or a tensor, so a dry run costs the headers and no
more. A gate row only ever interleaves with an up row of its own expert, so one expert's matrix
fills a contiguous range of its stacked tensor; a `Move` is that range, or a part of it small
enough for a worker's scratch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash

from . import defaults
from .checkpoint import Checkpoint, Located, bulk_allocation
from .contract import (
    FORMAT_VERSION,
    GROUP_SIZE,
    Geometry,
    TensorSpec,
    common_tensor_parallel_sizes,
    layer_tensors,
    shard_name,
)
from .errors import CheckpointError
from .experts import Leaf, MoeLayer, PassedLayer, Projection, find_layers
from .headers import DTYPE_BITS, encode_header, spec_nbytes
from .layouts import TILE_ROWS, Layout

MOVE_NBYTES = 8 * 2**20
"""Moves are cut to about this, so that scratch is the same for every model. Direct reads and
writes of 8 MiB ran at the speed of the disk; smaller ones did not gain, larger ones cost memory."""

DATA_ALIGNMENT = 4096
"""Data starts, and where sizes allow each expert starts, on a block that direct I/O can write."""


@dataclass(frozen=True, slots=True)
class Source:
    """Contiguous bytes of one source tensor."""

    path: Path
    tensor: str
    offset: int
    """From the start of the file, header included."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Move:
    """Read ``sources``, arrange them as ``layout`` says, fill one range of ``tensor``."""

    tensor: str
    offset: int
    """From the first byte of the tensor."""
    nbytes: int
    sources: tuple[Source, ...]
    layout: Layout | None
    """None: the sources' bytes, one after the other."""


@dataclass(frozen=True)
class PlannedShard:
    """One output file: its header, where its tensors lie, and the moves that fill it."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorSpec]
    """In order of their data."""
    offsets: Mapping[str, int]
    """Of each tensor, from the start of the file."""
    nbytes: int
    moves: tuple[Move, ...]
    """In an order that reads the source forwards and meets each tensor's bytes forwards."""

    @cached_property
    def fingerprint(self) -> str:
        """XXH3-128 over what the shard holds and where each byte of it is read."""
        digest = xxhash.xxh3_128(self.header)
        for move in self.moves:
            sources = [(source.path.name, source.offset, source.nbytes) for source in move.sources]
            digest.update(repr((move.tensor, move.offset, sources, move.layout)).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A layer that is converted."""

    prefix: str
    geometry: Geometry


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do, before it does any of it."""

    layers: tuple[PlannedLayer, ...]
    passed: tuple[PassedLayer, ...]
    shards: tuple[PlannedShard, ...]
    max_shard_nbytes: int
    tensors_in: int
    bytes_in: int
    """Size of the source's shards, headers included."""

    @property
    def tensors_out(self) -> int:
        return sum(len(shard.tensors) for shard in self.shards)

    @property
    def bytes_out(self) -> int:
        """Size of the output's shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def moved_nbytes(self) -> int:
        """Tensor data that will be written."""
        return self.bytes_out - sum(len(shard.header) for shard in self.shards)

    @property
    def tensor_parallel(self) -> dict[str, list[int]]:
        """Sizes at which each engine can serve the result."""
        return common_tensor_parallel_sizes(layer.geometry for layer in self.layers)

    @cached_property
    def fingerprint(self) -> str:
        """XXH3-128 over its shards' names and fingerprints."""
        shards = [(shard.name, shard.fingerprint) for shard in self.shards]
        return xxhash.xxh3_128_hexdigest(repr(shards).encode())

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values; moves are left out, they follow from tensors and layouts."""
        return {
            "layers": {layer.prefix: layer.geometry.as_json() for layer in self.layers},
            "passed_layers": {layer.prefix: layer.reason for layer in self.passed},
            "tensors_in": self.tensors_in,
            "tensors_out": self.tensors_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "max_shard_bytes": self.max_shard_nbytes,
            "fingerprint": self.fingerprint,
            "shards": {
                shard.name: {
                    "bytes": shard.nbytes,
                    "tensors": {
                        tensor.name: {
                            "dtype": tensor.dtype,
                            "shape": list(tensor.shape),
                            "offset": shard.offsets[tensor.name],
                        }
                        for tensor in shard.tensors.values()
                    },
                }
                for shard in self.shards
            },
        }


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors that stay together in one shard if it can hold them, and the moves that fill them."""

    tensors: tuple[TensorSpec, ...]
    moves: tuple[Move, ...]


@bulk_allocation()
def make_plan(checkpoint: Checkpoint, *, max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES) -> Plan:
    """Decide every byte of the output.

    Args:
        checkpoint: an NVFP4 checkpoint (`checkpoint.require_nvfp4`).
        max_shard_nbytes: no output file is larger, unless a single tensor is.

    Raises:
        CheckpointError: the experts are incomplete or of unsupported sizes.
    """
    layers, passed = find_layers(checkpoint)
    groups = list(_groups(checkpoint, layers))
    names: set[str] = set()
    for tensor in (tensor for group in groups for tensor in group.tensors):
        if tensor.name in names:
            raise CheckpointError(f"{tensor.name!r} is there already: the layer is half converted")
        names.add(tensor.name)
    return Plan(
        layers=tuple(PlannedLayer(layer.prefix, layer.geometry) for layer in layers),
        passed=tuple(passed),
        shards=_pack(groups, max_shard_nbytes),
        max_shard_nbytes=max_shard_nbytes,
        tensors_in=sum(len(shard.header.tensors) for shard in checkpoint.shards),
        bytes_in=sum(shard.header.file_nbytes for shard in checkpoint.shards),
    )


@bulk_allocation()
def source_moves(checkpoint: Checkpoint) -> tuple[Move, ...]:
    """All moves of a conversion, wherever the output's tensors lie.

    Raises:
        CheckpointError: as `make_plan`.
    """
    layers, _ = find_layers(checkpoint)
    return tuple(move for group in _groups(checkpoint, layers) for move in group.moves)


def _groups(checkpoint: Checkpoint, layers: Iterable[MoeLayer]) -> Iterator[_Group]:
    """The output's tensors in source order, each layer where its first expert tensor was."""
    layer_of = {tensor.info.name: layer for layer in layers for tensor in layer.tensors.values()}
    done: set[str] = set()
    for shard in checkpoint.shards:
        for info in shard.header.tensors:
            layer = layer_of.get(info.name)
            if layer is None:
                located = Located(shard, info)
                spec = TensorSpec(info.name, info.dtype, info.shape)
                yield _Group((spec,), tuple(_copy_moves(located)))
            elif layer.prefix not in done:
                done.add(layer.prefix)
                yield _layer_group(layer)


def _source(located: Located, start: int, stop: int) -> Source:
    return Source(located.shard.path, located.info.name, located.offset + start, stop - start)


def _copy_moves(located: Located) -> Iterator[Move]:
    for start in range(0, located.info.nbytes, MOVE_NBYTES):
        stop = min(start + MOVE_NBYTES, located.info.nbytes)
        yield Move(located.info.name, start, stop - start, (_source(located, start, stop),), None)


def _layer_group(layer: MoeLayer) -> _Group:
    out = layer_tensors(layer.prefix, layer.geometry)
    h, i = layer.geometry.hidden, layer.geometry.intermediate
    padded_i = layer.geometry.padded_intermediate
    matrices: tuple[tuple[Leaf, TensorSpec, TensorSpec, int], ...] = (
        ("weight", out.w13_weight, out.w2_weight, 2),
        ("weight_scale", out.w13_weight_scale, out.w2_weight_scale, GROUP_SIZE),
    )
    moves: list[Move] = []
    # Expert by expert rather than tensor by tensor: an expert's matrices lie together in the
    # source, and a disk likes to be read forwards.
    for expert in range(layer.geometry.experts):
        for leaf, w13, w2, values_per_byte in matrices:
            up = layer.tensors[expert, "up_proj", leaf]
            gate = layer.tensors[expert, "gate_proj", leaf]
            down = layer.tensors[expert, "down_proj", leaf]
            tiled = leaf == "weight_scale"
            h_nbytes, i_nbytes = h // values_per_byte, i // values_per_byte
            # up before gate: FlashInfer's interleave takes w3 as the first half.
            moves += _matrix_moves(
                w13, expert, (up, gate), Layout(padded_i, h_nbytes, i, h_nbytes, tiled)
            )
            moves += _matrix_moves(
                w2, expert, (down,), Layout(h, padded_i // values_per_byte, h, i_nbytes, tiled)
            )
    scalars: tuple[tuple[Leaf, TensorSpec, TensorSpec], ...] = (
        ("weight_scale_2", out.w13_weight_scale_2, out.w2_weight_scale_2),
        ("input_scale", out.w13_input_scale, out.w2_input_scale),
    )
    for leaf, w13, w2 in scalars:
        moves.append(_gather_move(w13, layer, ("gate_proj", "up_proj"), leaf))
        moves.append(_gather_move(w2, layer, ("down_proj",), leaf))
    return _Group(tuple(out), tuple(moves))


def _gather_move(
    spec: TensorSpec, layer: MoeLayer, projections: tuple[Projection, ...], leaf: Leaf
) -> Move:
    """One four-byte value of each expert and projection, as they are."""
    values = tuple(
        _source(layer.tensors[expert, projection, leaf], 0, 4)
        for expert in range(layer.geometry.experts)
        for projection in projections
    )
    return Move(spec.name, 0, 4 * len(values), values, None)


def _matrix_moves(
    spec: TensorSpec, expert: int, sources: tuple[Located, ...], whole: Layout
) -> Iterator[Move]:
    """One expert's slice of a stacked tensor, cut between tiles where it is too large."""
    unit = TILE_ROWS // len(sources)
    units = whole.rows // unit
    nbytes = len(sources) * whole.nbytes
    pieces = -(-nbytes // MOVE_NBYTES)
    cuts = [unit * (units * piece // pieces) for piece in range(pieces + 1)]
    offset = expert * nbytes
    for first, last in pairwise(cuts):
        layout = dataclasses.replace(
            whole,
            rows=last - first,
            source_rows=min(last, whole.source_rows) - min(first, whole.source_rows),
        )
        start = min(first, whole.source_rows) * whole.source_row_nbytes
        stop = start + layout.source_rows * whole.source_row_nbytes
        yield Move(
            tensor=spec.name,
            offset=offset,
            nbytes=len(sources) * layout.nbytes,
            sources=tuple(_source(source, start, stop) for source in sources),
            layout=layout,
        )
        offset += len(sources) * layout.nbytes


def _pack(groups: Sequence[_Group], max_nbytes: int) -> tuple[PlannedShard, ...]:
    """Fill shards in order. A group moves on to the next shard rather than be cut; only one that
    no shard could hold is cut, between its tensors, and begins a shard of its own."""
    empty = max_nbytes - 2 * DATA_ALIGNMENT  # metadata, and rounding up the header
    bins: list[list[TensorSpec]] = [[]]
    room = empty

    def place(tensors: Sequence[TensorSpec], nbytes: int) -> None:
        nonlocal room
        if nbytes > room and bins[-1]:
            bins.append([])
            room = empty
        bins[-1].extend(tensors)
        room -= nbytes

    for group in groups:
        sizes = [_nbytes_in_file(tensor) for tensor in group.tensors]
        if sum(sizes) <= empty:
            place(group.tensors, sum(sizes))
        else:
            room = 0
            for tensor, nbytes in zip(group.tensors, sizes, strict=True):
                place((tensor,), nbytes)

    bin_of = {tensor.name: number for number, bin_ in enumerate(bins) for tensor in bin_}
    moves: list[list[Move]] = [[] for _ in bins]
    for group in groups:
        for move in group.moves:
            moves[bin_of[move.tensor]].append(move)
    return tuple(
        _shard(shard_name(number, len(bins)), tensors, shard_moves)
        for number, (tensors, shard_moves) in enumerate(zip(bins, moves, strict=True), start=1)
    )


def _nbytes_in_file(tensor: TensorSpec) -> int:
    """Data and header entry, with offsets as long as they can get."""
    entry = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [10**14, 10**14],
        }
    }
    return spec_nbytes(tensor.dtype, tensor.shape) + len(
        json.dumps(entry, ensure_ascii=False).encode()
    )


def _shard(name: str, tensors: Sequence[TensorSpec], moves: Sequence[Move]) -> PlannedShard:
    # Whole blocks first, so that they all start on one; then wide elements before narrow ones, so
    # that each tensor is aligned to its dtype, which readers that map the file rely on.
    nbytes = {tensor.name: spec_nbytes(tensor.dtype, tensor.shape) for tensor in tensors}
    ordered = sorted(
        tensors,
        key=lambda tensor: (
            nbytes[tensor.name] % DATA_ALIGNMENT != 0,
            -DTYPE_BITS[tensor.dtype],
        ),
    )
    metadata = {"format": "pt", "fp4moe_format_version": str(FORMAT_VERSION)}
    header, offsets = encode_header(ordered, metadata, alignment=DATA_ALIGNMENT)
    return PlannedShard(
        name=name,
        header=header,
        tensors={tensor.name: tensor for tensor in ordered},
        offsets={tensor.name: offset for tensor, offset in zip(ordered, offsets, strict=True)},
        nbytes=len(header) + sum(nbytes.values()),
        moves=tuple(moves),
    )
