"""What the values of a few scalars tell of experts, where names and shapes do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from ..format.contract import Geometry
from ..storage.reader import in_parallel, read_bytes
from .checkpoint import Checkpoint
from .names import DOWNS, original_layer
from .recorded import DroppedSource
from .spans import Matrix, Span

_GAP = 256
"""Bytes between two scalars that are read along with them. Those of an expert lie side by side."""


def untied_layer(checkpoint: Checkpoint, layers: Mapping[str, Geometry]) -> str | None:
    """Find experts whose gate and up differ in ``weight_scale_2``.

    Args:
        checkpoint: an export of ModelOpt, or a converted one. Shards of an export that have been
            deleted are passed over.
        layers: those to look at, all gated, by prefix.

    Returns:
        The first such layer.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    found: dict[tuple[str, str], list[Span]] = {}
    """By layer and expert: gate and up, or both in one, of all experts."""
    gone = checkpoint.store.gone if isinstance(checkpoint.store, DroppedSource) else ()
    for shard in checkpoint.shards:
        for tensor in shard.header.tensors if shard.name not in gone else ():
            module, _, leaf = tensor.name.rpartition(".")
            layer, expert = module, ""
            if leaf == "weight_scale_2":
                expert, _, projection = module.rpartition(".")
                layer = "" if projection in DOWNS else original_layer(tensor.name) or ""
            elif leaf != "w13_weight_scale_2":
                continue
            if layer in layers and tensor.nbytes <= 8 * layers[layer].experts:
                span = Matrix.whole(shard, tensor).span(0, tensor.nbytes)
                found.setdefault((layer, expert), []).append(span)
    values = _read(checkpoint, [span for spans in found.values() for span in spans])
    for (layer, _), spans in found.items():
        scales = [values[span] for span in spans]
        if scales[0].size == 2 * layers[layer].experts:
            scales = [scales[0][::2], scales[0][1::2]]
        if len(scales) == 2 and not np.array_equal(scales[0], scales[1]):
            return layer
    return None


def _read(checkpoint: Checkpoint, spans: Iterable[Span]) -> dict[Span, npt.NDArray[np.float32]]:
    """The values of small tensors, read a few at a time."""
    runs: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.file, span.offset)):
        last = runs[-1][-1] if runs else None
        if last and last.file == span.file and span.offset <= last.offset + last.nbytes + _GAP:
            runs[-1].append(span)
        else:
            runs.append([span])

    def read(run: list[Span]) -> dict[Span, npt.NDArray[np.float32]]:
        start = run[0].offset
        nbytes = run[-1].offset + run[-1].nbytes - start
        data = read_bytes(checkpoint.store.open(run[0].file), start, nbytes)
        return {s: np.frombuffer(data[s.offset - start :][: s.nbytes], "<f4") for s in run}

    values: dict[Span, npt.NDArray[np.float32]] = {}
    for each in in_parallel(read, runs, width=checkpoint.store.connections):
        values |= each
    return values
