"""Experts as one product of batches takes them, as ModelOpt exports Llama 4, and each by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .tensors import StoredTensor, read_tensors, write_tensors

_BATCHED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj(?:_(.+))?", re.DOTALL)

HALVES = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def each_by_itself(tensors: Mapping[str, StoredTensor], experts: int) -> dict[str, StoredTensor]:
    """The same weights with tensors for each expert and projection.

    Args:
        tensors: of a checkpoint; those that are not of experts stay.
        experts: how many a layer has; the tensors of scalars do not say.
    """
    return dict(pair for name, tensor in tensors.items() for pair in _each(name, tensor, experts))


def _each(name: str, tensor: StoredTensor, experts: int) -> Iterator[tuple[str, StoredTensor]]:
    match = _BATCHED.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    prefix, kind, leaf = match[1], match[2], match[3] or "weight"
    for expert in range(experts):
        for number, projection in enumerate(HALVES[kind]):
            own = tensor
            if tensor.shape:
                of_expert = tensor.as_bytes()[expert]
                half = np.split(of_expert, len(HALVES[kind]), axis=1)[number]
                own = StoredTensor(tensor.dtype, half.shape[::-1], half.T.tobytes())
            yield f"{prefix}.{expert}.{projection}.{leaf}", own


def rewrite_each_by_itself(folder: Path, experts: int) -> None:
    """Rewrite the shards of a folder so, into one."""
    tensors = each_by_itself(read_tensors(folder), experts)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    write_tensors(folder / "model.safetensors", tensors)
