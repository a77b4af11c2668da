"""A rank's share of a converted layer: slices and copies, no layout work (docs/format.md, 4).

The module knows tensors and no engine. The shape of a parameter and the tensor-parallel rank say
which part of an expert a rank holds. The engine says which experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

TILE_NBYTES = 512
"""Of one tile of 128x4 block scales."""


def copy_share(
    leaf: str,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    experts: Sequence[int],
    tp_rank: int,
) -> int:
    """Fill a rank's parameter from the file's tensor.

    Args:
        leaf: ``w13_weight`` and so on, as in `layouts.trtllm_nvfp4.LayerTensors`.
        source: the file's tensor, [E, ...].
        target: the rank's parameter, [len(experts), ...] of the same dtype, overwritten whole:
            where the file has nothing for it (padding of I or H) it becomes zero.
        experts: for each slot of the target, the expert it holds.
        tp_rank: which of the shares of the target's size; 0 without tensor parallelism.

    Returns:
        The number of copies made: one for each run of experts that follow one another.

    Raises:
        ValueError: dtypes or shapes do not fit.
    """
    if source.dtype != target.dtype:
        raise ValueError(f"{leaf} is {source.dtype} in the file, the engine wants {target.dtype}")
    if target.shape[0] != len(experts):
        raise ValueError(f"{leaf} has {target.shape[0]} slots for {len(experts)} experts")
    if experts and max(experts) >= source.shape[0]:
        raise ValueError(f"{leaf} has no expert {max(experts)}, it has {source.shape[0]} experts")
    if experts and min(experts) < 0:
        raise ValueError(f"{leaf}: {min(experts)} is not an expert")
    if source.dim() != target.dim():
        raise ValueError(f"{leaf} is {list(source.shape)}, the engine wants {list(target.shape)}")
    file, own, starts = _aligned_views(leaf, source, target, tp_rank)
    extents = [
        max(0, min(have - start, want))
        for have, want, start in zip(file.shape[1:], own.shape[1:], starts, strict=True)
    ]
    for dim, (extent, want) in enumerate(zip(extents, own.shape[1:], strict=True), start=1):
        own.narrow(dim, extent, want - extent).zero_()
        if extent:
            file = file.narrow(dim, starts[dim - 1], extent)
            own = own.narrow(dim, 0, extent)
        else:
            return 0
    copies = 0
    for slot, expert, count in runs(experts):
        own.narrow(0, slot, count).copy_(file.narrow(0, expert, count))
        copies += 1
    return copies


def _aligned_views(
    leaf: str, source: torch.Tensor, target: torch.Tensor, tp_rank: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """File and parameter as tensors of one rank whose axes after the first can be cut, and where
    on the file's axes the parameter begins."""
    if leaf in ("w13_weight", "w2_weight"):
        file, own = source, target
    elif leaf in ("w13_weight_scale", "w2_weight_scale"):
        file, own = _tiles(leaf, source), _tiles(leaf, target)
    else:
        if source.shape[1:] != target.shape[1:]:
            raise ValueError(f"{leaf} is {list(source.shape)}, expected {list(target.shape)}")
        return source, target, [0] * (source.dim() - 1)
    # Tensor parallelism cuts rows of w13 and columns of w2; the third axis of scales is a tile.
    starts = [0] * (file.dim() - 1)
    cut = 1 if leaf.startswith("w13") else 2
    starts[cut - 1] = tp_rank * own.shape[cut]
    return file, own, starts


def _tiles(leaf: str, scales: torch.Tensor) -> torch.Tensor:
    """[E, M, C] E4M3 in 128x4 tiles as bytes [E, M/128, C/4, 512]."""
    experts, rows, cols = scales.shape
    if rows % 128 or cols % 4:
        raise ValueError(f"{leaf}: {rows} x {cols} scales are not whole tiles of 128 x 4")
    return scales.view(torch.uint8).view(experts, rows // 128, cols // 4, TILE_NBYTES)


def runs(experts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first slot, first expert, count) of each stretch of experts that follow one another."""
    start = 0
    for slot in range(1, len(experts) + 1):
        if slot == len(experts) or experts[slot] != experts[slot - 1] + 1:
            yield start, experts[start], slot - start
            start = slot
