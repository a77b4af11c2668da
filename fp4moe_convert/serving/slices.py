"""A rank's share of a converted layer: slices and copies, no layout work (docs/format.md, 4).

The module knows tensors and no engine. The engine says which part of I a rank holds, and which
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..format.contract import GROUP_SIZE
from .fast_copy import COPIER, Copy, copy_plainly

TILE_NBYTES = 512
"""Of one tile of 128x4 block scales."""
LANE = GROUP_SIZE
"""Values of I that stay together wherever a file is cut: they share a block scale."""


class _Cut(NamedTuple):
    """How tensor parallelism cuts a tensor."""

    axis: int
    period: int
    """How many values of I take a range of the axis for themselves."""
    extent: int
    """The length of that range."""


def _cut_of(leaf: str, gated: bool) -> _Cut | None:
    """None: it is not cut. Scales are seen as tiles (`_tiles`)."""
    rows = 1 + gated  # of w13, for each value of I
    return {
        "w13_weight": _Cut(1, 32 // rows, 32),
        "w13_weight_scale": _Cut(1, 128 // rows, 1),
        "w2_weight": _Cut(2, LANE, LANE // 2),
        "w2_weight_scale": _Cut(2, 4 * LANE, 1),
    }.get(leaf)


def copy_share(
    leaf: str,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    experts: Sequence[int],
    part: range,
    gated: bool,
) -> int:
    """Fill a rank's parameter from the file's tensor.

    Args:
        leaf: ``w13_weight`` and so on, as in `layouts.trtllm_nvfp4.LayerTensors`.
        source: the file's tensor, [E, ...].
        target: the rank's parameter, [len(experts), ...] of the same dtype, overwritten whole:
            where the file has nothing for it (padding of I or H) it becomes zero.
        experts: for each slot of the target, the expert it holds.
        part: the values of I that the rank holds, in whole blocks of 16; those that the file does
            not have are zero.
        gated: whether the experts have a gate.

    Returns:
        The number of copies made: one for each run of experts that follow one another, or a few
        where ``part`` begins or ends within a tile.

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
    if part.start % LANE or part.stop % LANE:
        raise ValueError(f"{leaf} cannot be cut at {part} of I, only in whole blocks of {LANE}")
    if source.dim() != target.dim():
        raise ValueError(f"{leaf} is {list(source.shape)}, the engine wants {list(target.shape)}")
    cut = _cut_of(leaf, gated)
    if cut is None:
        if source.shape[1:] != target.shape[1:]:
            raise ValueError(f"{leaf} is {list(source.shape)}, expected {list(target.shape)}")
        return _copy(source, target, experts, COPIER.copy)
    file, own = source, target
    if leaf.endswith("_scale"):
        file, own = _tiles(leaf, source), _tiles(leaf, target)
    has, room = (t.shape[cut.axis] // cut.extent * cut.period for t in (file, own))
    start, stop = min(part.start, has), min(part.stop, has)
    if stop - start > room:
        raise ValueError(f"{leaf} has room for {room} values of I, its rank holds {part}")
    first, last = start // cut.period, -(-stop // cut.period)
    held = file.narrow(cut.axis, first * cut.extent, (last - first) * cut.extent)
    if start % cut.period == 0 and stop % cut.period == 0:
        return _copy(held, own, experts, COPIER.copy)
    here = torch.empty(held.shape, dtype=held.dtype, device=own.device)
    COPIER.copy([(here, held)])
    return _copy_lanes(
        _lanes(leaf, here, gated),
        _lanes(leaf, own.zero_(), gated),
        range((start - first * cut.period) // LANE, (stop - first * cut.period) // LANE),
        experts,
    )


def _copy(
    file: torch.Tensor,
    own: torch.Tensor,
    experts: Sequence[int],
    copy: Callable[[Sequence[Copy]], None],
) -> int:
    """Copy what both have, from the start of each axis after the first; the rest of ``own`` becomes
    zero."""
    for axis in range(1, own.dim()):
        extent = min(file.shape[axis], own.shape[axis])
        own.narrow(axis, extent, own.shape[axis] - extent).zero_()
        file, own = file.narrow(axis, 0, extent), own.narrow(axis, 0, extent)
    if not own.numel():
        return 0
    copies = [
        (own.narrow(0, slot, count), file.narrow(0, expert, count))
        for slot, expert, count in runs(experts)
    ]
    if copies:
        copy(copies)
    return len(copies)


def _copy_lanes(
    file: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    part: range,
    experts: Sequence[int],
) -> int:
    """Copy units ``part`` of the file to units 0, 1, ...; unit n is in lane n % len(lanes)."""
    copies = 0
    for lane, target in enumerate(own):
        units = len(part[lane :: len(own)])
        start, other = divmod(part.start + lane, len(own))
        source = file[other].narrow(1, start, units) if units else file[other][:, :0]
        copies += _copy(source, target.narrow(1, 0, units), experts, copy_plainly)
    return copies


def _lanes(leaf: str, tensor: torch.Tensor, gated: bool) -> Sequence[torch.Tensor]:
    """What is cut within a period, as views [E, periods, ...]: for each 16 values of a period one.

    16 rows of an expert without a gate are every other half of the columns of a shuffled block
    [4, 8]; with a gate they are a whole block. A tile holds 4 blocks, or 4 columns of w2.
    """
    if leaf == "w13_weight":
        return _split(tensor, 1, -1, 4, 2, 4).unbind(3)
    if leaf == "w2_weight_scale":
        return _split(tensor, 3, 128, 4).transpose(1, 2).unbind(4)
    blocks = _split(tensor, 3, 32, 4, 4).unbind(4)
    if gated:
        return blocks
    return [half for block in blocks for half in _split(block, 3, 4, 2, 4).unbind(4)]


def _split(tensor: torch.Tensor, axis: int, *sizes: int) -> torch.Tensor:
    return tensor.view(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])


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
