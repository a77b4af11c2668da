"""The layout of FlashInfer's TRT-LLM NVFP4 MoE kernels; docs/format.md describes it in prose.

Every byte order of the kernels is a permutation of axes, so one description serves both directions:
a pair of views with equal shapes. `ShuffledRows.arrange` copies the source's view onto the
output's, `ShuffledRows.undo` the other way round. `TransposedRows` transposes before that.

Source: FlashInfer 0.7.2.post1, `reorder_rows_for_gated_act_gemm` (fused_moe/core.py),
`shuffle_matrix_a` with an epilogue tile of 128 (quantization/fp4_quantization.py), and the CUDA
kernel behind `block_scale_interleave`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..format.contract import GROUP_SIZE, Geometry, TensorSpec
from ..format.sizes import round_up
from ..source.experts import MoeLayer
from ..source.families import Leaf, Projection
from ..source.spans import Matrix
from ..storage.buffers import Bytes
from . import fingerprints
from .base import MOVE_NBYTES, BadSourceError, Move, RowOrder

HIDDEN_MULTIPLE = 128
"""The kernels' tiles leave no remainder in H; other sizes are refused."""
TILE_ROWS = 128
"""Rows of one tile of block scales. Moves are cut between tiles."""
STRIP_ROWS = 4 * TILE_ROWS
"""Rows that are transposed at a time, whole tiles."""
BLOCK = 512
"""Rows and columns of what is transposed in the cache of a core. Rows of it are long enough to be
fetched fast."""
MAX_TRANSPOSED_NBYTES = 128 * 2**20
"""Of one expert's matrices that lie side by side, which are read at once; Llama 4 has 40 MiB."""


class LayerTensors(NamedTuple):
    """The eight tensors that stand for one layer's experts."""

    w13_weight: TensorSpec
    w2_weight: TensorSpec
    w13_weight_scale: TensorSpec
    w2_weight_scale: TensorSpec
    w13_weight_scale_2: TensorSpec
    w2_weight_scale_2: TensorSpec
    w13_input_scale: TensorSpec
    w2_input_scale: TensorSpec


def w13_projections(geometry: Geometry) -> tuple[Projection, ...]:
    """What w13 is made of, in the order of its per-tensor scales."""
    return ("gate", "up") if geometry.gated else ("up",)


def intermediate_multiple(geometry: Geometry) -> int:
    """I is zero-padded to a multiple of this in the file, so that the rows of w13 fill whole tiles.
    Both engines pad to it, for the same reason."""
    return TILE_ROWS // len(w13_projections(geometry))


def padded_intermediate(geometry: Geometry) -> int:
    """I as the file holds it."""
    return round_up(geometry.intermediate, intermediate_multiple(geometry))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShuffledRows:
    """An `Arrangement`: how rows of one or two sources (down, or up and gate, or up alone) become
    output bytes.

    Two sources interleave: u0 g0 u1 g1 ... Rows are then shuffled within blocks of 32.
    """

    rows: int
    """Rows of each source, padding included."""
    row_nbytes: int
    """Bytes of a row, padding included."""
    source_rows: int
    """Rows that each source has; the others are zero."""
    source_row_nbytes: int
    """Bytes that a source's row has; the others are zero."""
    tiled: bool
    """Block scales: the shuffled rows are cut into 128x4 tiles."""

    @classmethod
    def unpadded(cls, rows: int, row_nbytes: int, *, tiled: bool) -> ShuffledRows:
        """Of sources that fill all rows."""
        return cls(
            rows=rows,
            row_nbytes=row_nbytes,
            source_rows=rows,
            source_row_nbytes=row_nbytes,
            tiled=tiled,
        )

    @property
    def nbytes(self) -> int:
        """Output bytes for each source."""
        return self.rows * self.row_nbytes

    @property
    def key(self) -> str:
        # The spelling is that of format version 1: manifests record the plan's fingerprint.
        return (
            f"Layout(rows={self.rows}, row_nbytes={self.row_nbytes}, "
            f"source_rows={self.source_rows}, source_row_nbytes={self.source_row_nbytes}, "
            f"tiled={self.tiled})"
        )

    def cut(self, first: int, last: int) -> ShuffledRows:
        """Of the same sources the rows [first, last), which are whole blocks or tiles."""
        source_rows = min(last, self.source_rows) - min(first, self.source_rows)
        return dataclasses.replace(self, rows=last - first, source_rows=source_rows)

    def arrange(self, sources: Sequence[Bytes], out: Bytes) -> None:
        if self.tiled:
            for n, source in enumerate(sources):
                if holds_nan(source, out):
                    raise BadSourceError(n, "has a NaN block scale (0x7F or 0xFF)")
        padded = [self._pad(source) for source in sources]
        for source_view, out_view in self._views(padded, out):
            out_view[...] = source_view

    def undo(self, data: Bytes, scratch: Bytes) -> list[Bytes]:
        matrices = list(scratch[: data.size].reshape(-1, self.rows, self.row_nbytes))
        for source_view, out_view in self._views(matrices, data):
            source_view[...] = out_view
        rows, row_nbytes = self.source_rows, self.source_row_nbytes
        for matrix in matrices:
            if matrix[rows:].any() or matrix[:, row_nbytes:].any():
                raise ValueError("is padded with something but zeros")
        return [matrix[:rows, :row_nbytes] for matrix in matrices]

    def _views(
        self, sources: Sequence[Bytes], out: Bytes
    ) -> Iterator[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
        """Pairs of views (source, output) with equal shapes that name the same bytes.

        Interleaving puts row j of source w (of n) at s = n*j + w. Shuffling then moves row s of
        each block of 32 to (s % 4) * 8 + s // 4. With j = (L * h + l) and L = 4 / n, the row lands
        at (l, w, h) of (L, n, 8): both steps are one transposition of h and l.

        Tiling takes [128, C] scales, C bytes to a row, as [4, 32, C/4, 4] to [C/4, 32, 4, 4]: the
        last four bytes stay together and are moved as one word.
        """
        n = len(sources)
        low = 4 // n
        for w, source in enumerate(sources):
            rows, row_nbytes = source.shape
            if self.tiled:
                words = source.view(np.uint32)
                tiles = n * rows // TILE_ROWS
                yield (
                    words.reshape(tiles, 4, 8, low, row_nbytes // 4).transpose(0, 4, 3, 2, 1),
                    out.view(np.uint32).reshape(tiles, row_nbytes // 4, low, n, 8, 4)[:, :, :, w],
                )
            else:
                blocks = rows // (8 * low)
                yield (
                    source.reshape(blocks, 8, low, row_nbytes).transpose(0, 2, 1, 3),
                    out.reshape(blocks, low, n, 8, row_nbytes)[:, :, w],
                )

    def _pad(self, source: Bytes) -> Bytes:
        """``source`` as [rows, row_nbytes], zeros where it falls short."""
        matrix = source.reshape(self.source_rows, self.source_row_nbytes)
        if matrix.shape == (self.rows, self.row_nbytes):
            return matrix
        padded = np.zeros((self.rows, self.row_nbytes), np.uint8)
        padded[: self.source_rows, : self.source_row_nbytes] = matrix
        return padded


@dataclass(frozen=True, slots=True)
class TransposedRows:
    """An `Arrangement`: as `ShuffledRows`, of matrices that are stored transposed, side by side in
    one source [cols, count * rows]."""

    rows: ShuffledRows
    """What becomes of the rows."""
    order: tuple[int, ...]
    """Where the sources of ``rows`` stand in that source: (1, 0) where gate stands before up."""

    @property
    def key(self) -> str:
        return f"Transposed({self.order}, {self.rows.key})"

    def arrange(self, sources: Sequence[Bytes], out: Bytes) -> None:
        (source,) = sources
        matrices = self._side_by_side(source)
        room_of_rows = (len(self.order), STRIP_ROWS, self.rows.source_row_nbytes)
        rows = np.empty(room_of_rows, np.uint8)
        for strip, start, place in self._strips(out):
            parts = []
            for n, room in zip(self.order, rows, strict=True):
                part = room[: strip.source_rows]
                _transpose(matrices[:, n, start : start + strip.source_rows], part)
                parts.append(part)
            try:
                strip.arrange(parts, place)
            except BadSourceError as error:
                raise BadSourceError(0, str(error)) from None

    def undo(self, data: Bytes, scratch: Bytes) -> list[Bytes]:
        nbytes = len(self.order) * self.rows.source_rows * self.rows.source_row_nbytes
        matrices = self._side_by_side(scratch[:nbytes])
        rows = np.empty(len(self.order) * self.rows.cut(0, STRIP_ROWS).nbytes, np.uint8)
        for strip, start, place in self._strips(data):
            for n, part in zip(self.order, strip.undo(place, rows), strict=True):
                _transpose(part, matrices[:, n, start : start + strip.source_rows])
        return [matrices]

    def _side_by_side(self, source: Bytes) -> Bytes:
        return source.reshape(self.rows.source_row_nbytes, len(self.order), self.rows.source_rows)

    def _strips(self, out: Bytes) -> Iterator[tuple[ShuffledRows, int, Bytes]]:
        """A few rows at a time: how they lie, the first of them, and where they go in ``out``."""
        position = 0
        for start in range(0, self.rows.rows, STRIP_ROWS):
            strip = self.rows.cut(start, min(start + STRIP_ROWS, self.rows.rows))
            nbytes = len(self.order) * strip.nbytes
            yield strip, start, out[position : position + nbytes]
            position += nbytes


def _transpose(matrix: Bytes, out: Bytes) -> None:
    """[rows, cols] to [cols, rows], uint8; either may be part of a larger one.

    A byte at a time, torn from rows that are whole pages apart, this ran at 0.09 GB/s. So a block
    is brought into the cache, words of four bytes are transposed there, and split by shifts and
    casts, which work on many at once: 1.7 GB/s.
    """
    memory = np.empty((2, BLOCK * BLOCK), np.uint8)
    rows, cols = matrix.shape
    for top in range(0, rows, BLOCK):
        for left in range(0, cols, BLOCK):
            down, across = slice(top, top + BLOCK), slice(left, left + BLOCK)
            _transpose_block(matrix[down, across], out[across, down], memory)


def _transpose_block(matrix: Bytes, out: Bytes, memory: Bytes) -> None:
    """``memory``: [2, ...], each with room for the block; overwritten."""
    rows, cols = matrix.shape
    in_words = -(-cols // 4)
    first, second = memory[:, : 4 * in_words * rows]
    block = first.reshape(rows, 4 * in_words)
    block[:, :cols] = matrix
    words = second.view("<u4").reshape(in_words, rows)
    words[...] = block.view("<u4").T
    for byte in range(4):
        lines = out[byte::4]
        np.copyto(lines, words[: len(lines)], casting="unsafe")  # takes the lowest byte
        words >>= 8


@dataclass(frozen=True, slots=True)
class SharedValues:
    """An `Arrangement` of values of four bytes, some of which stand in several places."""

    order: tuple[int, ...]
    """The source of each value."""

    @property
    def key(self) -> str:
        return f"SharedValues({self.order})"

    def arrange(self, sources: Sequence[Bytes], out: Bytes) -> None:
        out.reshape(-1, 4)[...] = np.stack(sources)[list(self.order)]

    def undo(self, data: Bytes, scratch: Bytes) -> list[Bytes]:  # noqa: ARG002
        values = data.reshape(-1, 4)
        sources = [values[self.order.index(n)] for n in range(max(self.order) + 1)]
        if (np.stack(sources)[list(self.order)] != values).any():
            raise ValueError("holds different values where its source has one")
        return sources


def holds_nan(scales: Bytes, scratch: Bytes) -> bool:
    """Whether any E4M3 value is NaN (0x7F or 0xFF).

    Args:
        scales: uint8, any shape.
        scratch: uint8, at least as many bytes as ``scales``; overwritten.
    """
    flat = scales.reshape(-1)
    magnitudes = np.bitwise_and(flat, 0x7F, out=scratch[: flat.size])
    return flat.size > 0 and bool(magnitudes.max() == 0x7F)


class TrtllmNvfp4:
    """The `Layout`."""

    name = "trtllm_nvfp4"
    parameters: Mapping[str, int] = {"epilogue_tile_m": fingerprints.EPILOGUE_TILE_M}

    def check(self, layer: MoeLayer) -> None:
        hidden = layer.geometry.hidden
        if hidden % HIDDEN_MULTIPLE:
            first = layer.matrices[0, w13_projections(layer.geometry)[0], "weight"]
            raise CheckpointError(
                f"{first.shard.name}: {first.tensor.name!r} gives hidden size H = {hidden}, "
                f"which is not a multiple of {HIDDEN_MULTIPLE}"
            )
        for projection in layer.family.projections:
            matrix = layer.matrices[0, projection, "weight"]
            nbytes = matrix.span_of_all().nbytes
            if matrix.beside is not None and nbytes > MAX_TRANSPOSED_NBYTES:
                raise CheckpointError(
                    f"{matrix.shard.name}: {matrix.tensor.name!r} has {nbytes} bytes for each "
                    f"expert, transposed, the limit is {MAX_TRANSPOSED_NBYTES}"
                )

    def tensors(self, prefix: str, geometry: Geometry) -> LayerTensors:
        e, h, i = geometry.experts, geometry.hidden, padded_intermediate(geometry)
        n = len(w13_projections(geometry))

        def spec(leaf: str, dtype: str, *shape: int) -> TensorSpec:
            return TensorSpec(f"{prefix}.{leaf}", dtype, shape)

        return LayerTensors(
            w13_weight=spec("w13_weight", "U8", e, n * i, h // 2),
            w2_weight=spec("w2_weight", "U8", e, h, i // 2),
            w13_weight_scale=spec("w13_weight_scale", "F8_E4M3", e, n * i, h // GROUP_SIZE),
            w2_weight_scale=spec("w2_weight_scale", "F8_E4M3", e, h, i // GROUP_SIZE),
            w13_weight_scale_2=spec("w13_weight_scale_2", "F32", e, n),
            w2_weight_scale_2=spec("w2_weight_scale_2", "F32", e),
            w13_input_scale=spec("w13_input_scale", "F32", e, n),
            w2_input_scale=spec("w2_input_scale", "F32", e),
        )

    def moves(self, layer: MoeLayer) -> Iterator[Move]:
        out = self.tensors(layer.prefix, layer.geometry)
        h, i = layer.geometry.hidden, layer.geometry.intermediate
        padded_i = padded_intermediate(layer.geometry)
        projections = w13_projections(layer.geometry)
        of_matrices: tuple[tuple[Leaf, TensorSpec, TensorSpec, int], ...] = (
            ("weight", out.w13_weight, out.w2_weight, 2),
            ("weight_scale", out.w13_weight_scale, out.w2_weight_scale, GROUP_SIZE),
        )
        # Expert by expert rather than tensor by tensor: an expert's matrices lie together in the
        # source, and a disk reads fastest forwards.
        for expert in range(layer.geometry.experts):
            for leaf, w13, w2, values_per_byte in of_matrices:
                # up before gate: FlashInfer's interleave takes w3 as the first half.
                rows = tuple(layer.matrices[expert, each, leaf] for each in reversed(projections))
                down = layer.matrices[expert, "down", leaf]
                tiled = leaf == "weight_scale"
                h_nbytes = h // values_per_byte
                w13_rows = ShuffledRows(
                    rows=padded_i,
                    row_nbytes=h_nbytes,
                    source_rows=i,
                    source_row_nbytes=h_nbytes,
                    tiled=tiled,
                )
                w2_rows = ShuffledRows(
                    rows=h,
                    row_nbytes=padded_i // values_per_byte,
                    source_rows=h,
                    source_row_nbytes=i // values_per_byte,
                    tiled=tiled,
                )
                yield from _matrix_moves(w13, expert, rows, w13_rows)
                yield from _matrix_moves(w2, expert, (down,), w2_rows)
        for leaf, w13, w2 in self._gathered(out):
            yield _gather_move(w13, layer, projections, leaf)
            yield _gather_move(w2, layer, ("down",), leaf)

    def value_warnings(
        self, prefix: str, geometry: Geometry, read: Callable[[TensorSpec], Bytes]
    ) -> Iterator[str]:
        for leaf, w13, w2 in self._gathered(self.tensors(prefix, geometry)):
            columns = read(w13).view("<f4").reshape(geometry.experts, -1).T
            # By bits, so that a NaN equals itself.
            if differing := int((columns[0].view("<u4") != columns[-1].view("<u4")).sum()):
                yield (
                    f"{prefix}: gate and up {leaf} differ for {differing} of "
                    f"{geometry.experts} experts; both are kept"
                )
            down = read(w2).view("<f4")
            names = (*w13_projections(geometry), "down")
            for projection, scales in zip(names, (*columns, down), strict=True):
                unusable = np.flatnonzero(~(np.isfinite(scales) & (scales > 0)))
                if unusable.size:
                    yield (
                        f"{prefix}: {projection} {leaf} is not a positive number for "
                        f"{unusable.size} of {geometry.experts} experts (expert {unusable[0]}: "
                        f"{scales[unusable[0]]}); engines divide by it"
                    )

    @staticmethod
    def _gathered(tensors: LayerTensors) -> tuple[tuple[Leaf, TensorSpec, TensorSpec], ...]:
        """The scalars of a layer, with the tensors of gate and up and of down."""
        return (
            ("weight_scale_2", tensors.w13_weight_scale_2, tensors.w2_weight_scale_2),
            ("input_scale", tensors.w13_input_scale, tensors.w2_input_scale),
        )

    @cached_property
    def fingerprint(self) -> str:
        return fingerprints.fingerprint(written_rows)

    def authority(self, geometries: Iterable[Geometry]) -> RowOrder:
        geometries = list(geometries)
        counts = {(len(w13_projections(g)) * padded_intermediate(g), g.gated) for g in geometries}
        counts |= {(g.hidden, False) for g in geometries}
        return fingerprints.row_order(written_rows, counts)


TRTLLM_NVFP4 = TrtllmNvfp4()


def written_rows(count: int, gated: bool) -> fingerprints.Rows:
    """[count] numbers of the source rows that `ShuffledRows` puts at rows 0, 1, ...

    Gated: rows count from the first of up, and on from the first of gate.
    """
    numbers = np.arange(count, dtype="<i4").view(np.uint8)
    out = np.empty_like(numbers)
    sources = np.split(numbers, 2) if gated else [numbers]
    rows = count // len(sources)
    ShuffledRows.unpadded(rows, 4, tiled=False).arrange(sources, out)
    return out.view("<i4")


def _gather_move(
    spec: TensorSpec, layer: MoeLayer, projections: tuple[Projection, ...], leaf: Leaf
) -> Move:
    """One four-byte value of each expert and projection, as they are."""
    values = tuple(
        layer.matrices[expert, projection, leaf].span(0, 4)
        for expert in range(layer.geometry.experts)
        for projection in projections
    )
    sources = tuple(dict.fromkeys(values))
    arrangement = None
    if len(sources) < len(values):
        place = {source: n for n, source in enumerate(sources)}
        arrangement = SharedValues(tuple(place[value] for value in values))
    return Move(spec.name, 0, 4 * len(values), sources, arrangement)


def _matrix_moves(
    spec: TensorSpec, expert: int, sources: tuple[Matrix, ...], whole: ShuffledRows
) -> Iterator[Move]:
    """One expert's slice of a tensor, cut between tiles where it is too large. What is
    transposed is not cut: a row of the output has a byte of each row of the source."""
    places = tuple(source.beside[0] for source in sources if source.beside is not None)
    if places:
        nbytes = len(sources) * whole.nbytes
        arrangement = TransposedRows(whole, places)
        yield Move(spec.name, expert * nbytes, nbytes, (sources[0].span_of_all(),), arrangement)
        return
    unit = TILE_ROWS // len(sources)
    units = whole.rows // unit
    nbytes = len(sources) * whole.nbytes
    pieces = -(-nbytes // MOVE_NBYTES)
    cuts = [unit * (units * piece // pieces) for piece in range(pieces + 1)]
    offset = expert * nbytes
    for first, last in pairwise(cuts):
        part = whole.cut(first, last)
        start = min(first, whole.source_rows) * whole.source_row_nbytes
        stop = start + part.source_rows * whole.source_row_nbytes
        yield Move(
            tensor=spec.name,
            offset=offset,
            nbytes=len(sources) * part.nbytes,
            sources=tuple(source.span(start, stop) for source in sources),
            arrangement=part,
        )
        offset += len(sources) * part.nbytes
