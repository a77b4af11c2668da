"""What headers say of a decoder's linear layers, those of routed experts apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .checkpoint import Checkpoint
from .names import IN_LAYER, original_layer


class Linear(NamedTuple):
    """A linear layer, in each layer of the decoder that has just such a one."""

    name: str
    """Of the module in its layer: ``self_attn.o_proj``."""
    dtype: str
    """Of its weight. U8 holds two values of four bits."""
    features: tuple[int, int]
    """Rows and columns of its weight: outputs and inputs."""
    block: tuple[int, int]
    """How many of these share a scale of their own, as far as that keeps them together."""


def decoder_linears(checkpoint: Checkpoint, prefixes: Iterable[str]) -> frozenset[Linear]:
    """The linear layers of the decoder, those of routed experts apart.

    Args:
        checkpoint: an original, or a converted one.
        prefixes: of expert layers, which tell the decoder's layers from those of other models.
    """
    stacks = {match[1] for prefix in prefixes if (match := IN_LAYER.fullmatch(prefix))}
    count = checkpoint.text.layer_count or 0
    weights: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    scales: dict[tuple[str, str], tuple[int, ...]] = {}
    for shard in checkpoint.shards:
        for tensor in shard.header.tensors:
            if len(tensor.shape) != 2 or original_layer(tensor.name) is not None:
                continue
            match = IN_LAYER.fullmatch(tensor.name)
            if match is None or match[1] not in stacks or int(match[2]) >= count:
                continue
            module, _, leaf = match[3].rpartition(".")
            if leaf in ("weight", "weight_packed"):
                weights[f"{match[1]}.{match[2]}", module] = tensor.dtype, tensor.shape
            elif "scale" in leaf:
                scales[f"{match[1]}.{match[2]}", module] = tensor.shape
    found = set()
    for (layer, module), (dtype, (rows, cols)) in weights.items():
        features = rows, 2 * cols if dtype == "U8" else cols
        block = blocks_of(features, scales.get((layer, module)))
        found.add(Linear(module, dtype, features, block))
    return frozenset(found)


def blocks_of(features: tuple[int, int], scales: tuple[int, ...] | None) -> tuple[int, int]:
    """The extents of a block, from the number of scales in each direction. They are powers of two,
    and the last block may be cut short."""
    if scales is None or 0 in scales or scales == (features[0], 1):  # one for each row
        return 1, 1
    widths = [-(-size // count) for size, count in zip(features, scales, strict=True)]
    return 1 << (widths[0] - 1).bit_length(), 1 << (widths[1] - 1).bit_length()
