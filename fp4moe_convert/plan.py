"""Checkpoint and layout to a `Plan`: which source bytes go where, in which order.

A plan is a value. Making one reads no file and no tensor, so a dry run costs the headers and no
more. Layouts give the moves of expert layers; all other tensors are copied as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from . import defaults
from .errors import CheckpointError, VerifyError
from .format.contract import FORMAT_VERSION, MARKER_NAME, Geometry, Marker, TensorSpec
from .format.files import shard_name
from .layouts.base import MOVE_NBYTES, Layout, Move
from .source.checkpoint import Checkpoint
from .source.experts import MoeLayer, PassedLayer, find_layers
from .source.spans import Matrix
from .storage.buffers import Bytes
from .storage.header import DTYPE_BITS, encode_header, spec_nbytes

DATA_ALIGNMENT = 4096
"""Data starts, and where sizes allow each expert starts, on a block that direct I/O can write."""


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
            sources = [(source.file, source.offset, source.nbytes) for source in move.sources]
            arrangement = move.arrangement and move.arrangement.key
            digest.update(f"({move.tensor!r}, {move.offset}, {sources}, {arrangement})".encode())
        return digest.hexdigest()

    @property
    def source_files(self) -> list[str]:
        """Names of the source files that the shard is read from."""
        return sorted({source.file for move in self.moves for source in move.sources})


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """An expert layer, and the output tensors that it becomes."""

    prefix: str
    geometry: Geometry
    family: str
    """The row of the table of families that it matched."""
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The share of one machine, where several carry out a plan."""

    number: int
    """From 1."""
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"there is no part {self.number} of {self.count}")

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do, before it does any of it."""

    layout: Layout
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
    def geometries(self) -> dict[str, Geometry]:
        """Of the layers that are converted, by prefix."""
        return {layer.prefix: layer.geometry for layer in self.layers}

    @property
    def families(self) -> dict[str, str]:
        """How the source stores their experts (a row of `source.families`), by prefix."""
        return {layer.prefix: layer.family for layer in self.layers}

    @property
    def passed_reasons(self) -> dict[str, str]:
        """Why the other expert layers stay as they are, by prefix."""
        return {layer.prefix: layer.reason for layer in self.passed}

    @cached_property
    def layer_of(self) -> dict[str, str]:
        """The prefix of the layer that an output tensor belongs to; other tensors are absent."""
        return {tensor.name: layer.prefix for layer in self.layers for tensor in layer.tensors}

    @cached_property
    def fingerprint(self) -> str:
        """XXH3-128 over its shards' names and fingerprints."""
        shards = [(shard.name, shard.fingerprint) for shard in self.shards]
        return xxhash.xxh3_128_hexdigest(repr(shards).encode())

    def only(self, part: Part) -> Plan:
        """The plan with the shards of one part.

        A part is a run of shards, so that it reads a run of the source. A shard belongs to the part
        that its middle falls into, so parts differ by less than two shards.
        """
        shards, start = [], 0
        for shard in self.shards:
            middle = start + shard.nbytes // 2
            if middle * part.count // self.bytes_out == part.number - 1:
                shards.append(shard)
            start += shard.nbytes
        return replace(self, shards=tuple(shards))

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values; moves are left out, they follow from tensors and layouts."""
        return {
            "layers": {prefix: sizes.as_json() for prefix, sizes in self.geometries.items()},
            "families": self.families,
            "passed_layers": self.passed_reasons,
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


def make_plan(
    checkpoint: Checkpoint, layout: Layout, *, max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES
) -> Plan:
    """Decide every byte of the output.

    Args:
        checkpoint: an NVFP4 checkpoint (`source.quantization.require_nvfp4`).
        layout: what its expert layers get.
        max_shard_nbytes: no output file is larger, unless a single tensor is.

    Raises:
        CheckpointError: the experts are incomplete or of unsupported sizes.
    """
    layers, passed = layers_to_convert(checkpoint, layout)
    groups = list(_groups(checkpoint, layers, layout))
    names: set[str] = set()
    for tensor in (tensor for group in groups for tensor in group.tensors):
        if tensor.name in names:
            raise CheckpointError(f"{tensor.name!r} is there already: the layer is half converted")
        names.add(tensor.name)
    return Plan(
        layout=layout,
        layers=tuple(
            PlannedLayer(
                layer.prefix,
                layer.geometry,
                layer.family.name,
                layout.tensors(layer.prefix, layer.geometry),
            )
            for layer in layers
        ),
        passed=tuple(passed),
        shards=_pack(groups, max_shard_nbytes),
        max_shard_nbytes=max_shard_nbytes,
        tensors_in=sum(len(shard.header.tensors) for shard in checkpoint.shards),
        bytes_in=sum(shard.header.file_nbytes for shard in checkpoint.shards),
    )


def layers_to_convert(
    checkpoint: Checkpoint, layout: Layout
) -> tuple[list[MoeLayer], list[PassedLayer]]:
    """The expert layers that ``layout`` can take, and those that pass through.

    Raises:
        CheckpointError: as `make_plan`.
    """
    layers, passed = find_layers(checkpoint)
    for layer in layers:
        layout.check(layer)
    return layers, passed


def source_moves(checkpoint: Checkpoint, layout: Layout) -> tuple[Move, ...]:
    """All moves of a conversion, wherever the output's tensors lie.

    Raises:
        CheckpointError: as `make_plan`.
    """
    layers, _ = layers_to_convert(checkpoint, layout)
    return tuple(move for group in _groups(checkpoint, layers, layout) for move in group.moves)


def check_moves_cover(checkpoint: Checkpoint, moves: Sequence[Move]) -> None:
    """Make sure that the moves of a conversion take each byte of a checkpoint once.

    Raises:
        VerifyError: one is missing, or comes twice.
    """
    spans: dict[str, list[tuple[int, int, str]]] = {shard.name: [] for shard in checkpoint.shards}
    for move in moves:
        for source in move.sources:
            spans[source.file].append((source.offset, source.nbytes, source.tensor))
    for shard in checkpoint.shards:
        position = shard.header.nbytes
        end = (shard.header.file_nbytes, 0, "its end")
        for offset, nbytes, tensor in (*sorted(spans[shard.name]), end):
            if offset != position:
                raise VerifyError(
                    f"{shard.name}: the converted tensors hold its data up to byte {position}, but "
                    f"{tensor!r} is at {offset}"
                )
            position += nbytes


def _groups(checkpoint: Checkpoint, layers: Sequence[MoeLayer], layout: Layout) -> Iterator[_Group]:
    """The output's tensors: the marker, then the others in source order, each layer where its first
    expert tensor was."""
    yield _marker(layout)
    layer_of = {name: layer for layer in layers for name in layer.tensors}
    done: set[str] = set()
    for shard in checkpoint.shards:
        for info in shard.header.tensors:
            layer = layer_of.get(info.name)
            if layer is None:
                spec = TensorSpec(info.name, info.dtype, info.shape)
                yield _Group((spec,), tuple(_copy_moves(Matrix.whole(shard, info))))
            elif layer.prefix not in done:
                done.add(layer.prefix)
                tensors = layout.tensors(layer.prefix, layer.geometry)
                yield _Group((*tensors, _stop(layer)), tuple(layout.moves(layer)))


def _marker(layout: Layout) -> _Group:
    data = Marker(layout.name, layout.parameters, layout.fingerprint).encode()
    spec = TensorSpec(MARKER_NAME, "U8", (len(data),))
    return _Group((spec,), (Move(spec.name, 0, len(data), (), _Constant(data)),))


def _stop(layer: MoeLayer) -> TensorSpec:
    """An empty tensor under a name of the source. An engine that can load the source has a
    parameter of that name, and nothing of this size fits it. Some engines skip names that they do
    not know; they do not skip this one. Gate would not do: a tensor that is cut along its rows may
    broadcast."""
    return TensorSpec(layer.family.tensor_name(layer.prefix, (0, "down", "weight")), "U8", (0,))


@dataclass(frozen=True, slots=True)
class _Constant:
    """An `Arrangement` of no sources."""

    data: bytes

    @property
    def key(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.data)

    def arrange(self, sources: Sequence[Bytes], out: Bytes) -> None:  # noqa: ARG002
        out[:] = np.frombuffer(self.data, np.uint8)

    def undo(self, data: Bytes, scratch: Bytes) -> list[Bytes]:  # noqa: ARG002
        if data.tobytes() != self.data:
            raise ValueError("is not what this release writes there")
        return []


def _copy_moves(tensor: Matrix) -> Iterator[Move]:
    for start in range(0, tensor.nbytes, MOVE_NBYTES):
        stop = min(start + MOVE_NBYTES, tensor.nbytes)
        span = tensor.span(start, stop)
        yield Move(span.tensor, start, span.nbytes, (span,), None)


def _pack(groups: Sequence[_Group], max_nbytes: int) -> tuple[PlannedShard, ...]:
    """Fill shards in order. A group moves on to the next shard rather than be cut; only one that
    no shard could hold is cut, between its tensors, and begins a shard of its own."""
    empty = max_nbytes - 2 * DATA_ALIGNMENT  # less metadata and the header's padding
    bins: list[list[TensorSpec]] = [[]]
    left = empty

    def place(tensors: Sequence[TensorSpec], nbytes: int) -> None:
        nonlocal left
        if nbytes > left and bins[-1]:
            bins.append([])
            left = empty
        bins[-1].extend(tensors)
        left -= nbytes

    for group in groups:
        sizes = [_nbytes_in_file(tensor) for tensor in group.tensors]
        if sum(sizes) <= empty:
            place(group.tensors, sum(sizes))
        else:
            left = 0
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
    # The marker first, so that readers meet it before what it is about. Whole blocks next, so that
    # they all start on one; then wide elements before narrow ones, so that each tensor is aligned
    # to its dtype, which readers that map the file rely on.
    nbytes = {tensor.name: spec_nbytes(tensor.dtype, tensor.shape) for tensor in tensors}
    ordered = sorted(
        tensors,
        key=lambda tensor: (
            tensor.name != MARKER_NAME,
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
