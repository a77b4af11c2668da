"""What a model folder holds, from its headers: source or converted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import open_checkpoint, require_nvfp4
from .contract import (
    INDEX_NAME,
    Conversion,
    Geometry,
    common_tensor_parallel_sizes,
    read_quantization_section,
)
from .errors import CheckpointError
from .experts import PassedLayer, find_layers


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found."""

    folder: str
    state: str
    """"source" (can be converted), "converted", or "unsupported"."""
    reason: str | None
    """Why it is unsupported."""
    quantization: str
    shards: int
    tensors: int
    nbytes: int
    """Of all shards, headers included."""
    dtypes: dict[str, int]
    """Bytes by dtype."""
    layers: dict[str, Geometry]
    """Layers that would be, or were, converted; by prefix."""
    passed_layers: dict[str, str]
    """The others with experts, and why."""
    tensor_parallel: dict[str, list[int]]
    """Sizes that each engine can serve all layers at; docs/format.md, section 4."""
    row_order: str | None
    """Fingerprint of the row order, where converted."""
    flashinfer: str | None
    """The release that gave it."""

    def as_json(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["bytes"] = content.pop("nbytes")
        return content


def inspect(folder: str | Path) -> Inspection:
    """Describe a model folder without reading its weights.

    Raises:
        CheckpointError: not a model folder, or one that contradicts itself.
        FormatError: converted, but to a format that this release does not know.
    """
    checkpoint = open_checkpoint(Path(folder))
    dtypes: Counter[str] = Counter()
    for shard in checkpoint.shards:
        for tensor in shard.header.tensors:
            dtypes[tensor.dtype] += tensor.nbytes
    section = checkpoint.quantization or {}
    conversion: Conversion | None = None
    state, reason = "source", None
    layers: dict[str, Geometry] = {}
    others: list[PassedLayer] = []
    if checkpoint.is_converted:
        state = "converted"
        if not (checkpoint.root / INDEX_NAME).exists():
            raise CheckpointError(f"{checkpoint.root}: is unfinished: it has no {INDEX_NAME}")
        conversion = read_quantization_section(section)
        layers = dict(conversion.layers)
        _, others = find_layers(checkpoint)
    else:
        try:
            require_nvfp4(checkpoint)
            found, others = find_layers(checkpoint)
            layers = {layer.prefix: layer.geometry for layer in found}
            if not layers:
                state, reason = "unsupported", "no layer has NVFP4 experts"
        except CheckpointError as error:
            state, reason = "unsupported", str(error)
    return Inspection(
        folder=str(folder),
        state=state,
        reason=reason,
        quantization=_quantization(section),
        shards=len(checkpoint.shards),
        tensors=sum(len(shard.header.tensors) for shard in checkpoint.shards),
        nbytes=sum(shard.header.file_nbytes for shard in checkpoint.shards),
        dtypes=dict(dtypes.most_common()),
        layers=layers,
        passed_layers={layer.prefix: layer.reason for layer in others},
        tensor_parallel=common_tensor_parallel_sizes(layers.values()),
        row_order=conversion.row_order if conversion else None,
        flashinfer=conversion.flashinfer if conversion else None,
    )


def _quantization(section: Any) -> str:
    """A few words: method, algorithm, group size."""
    source = section.get("source") if isinstance(section.get("source"), dict) else section
    nested = source.get("quantization")
    settings = nested if isinstance(nested, dict) else source
    algorithm = settings.get("quant_algo") or source.get("format")
    method = section.get("quant_method")
    return " ".join(str(word) for word in (method, algorithm) if word) or "none"
