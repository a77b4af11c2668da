"""What a model folder holds, from its headers: source or converted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from . import layouts
from .errors import CheckpointError
from .format.contract import ConvertedSection, Geometry, LayoutRecord
from .format.files import CONFIG_NAME, INDEX_NAME
from .preparation import plan_of
from .prospects import Prospects, prospects
from .source.checkpoint import open_checkpoint
from .source.completeness import warnings_on
from .source.converted import is_converted
from .source.experts import PassedLayer, find_layers, require_layers
from .source.quantization import describe
from .storage.opening import open_store
from .storage.reader import Store

State: TypeAlias = Literal["source", "converted", "unsupported"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found."""

    folder: str
    state: State
    """A source can be converted."""
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
    families: dict[str, str]
    """How their experts are stored (a row of `source.families`), where they are not converted."""
    passed_layers: dict[str, str]
    """The others with experts, and why."""
    warnings: list[str]
    """What a conversion would say besides."""
    prospects: Prospects
    """Which engines can serve it, once converted."""
    row_order: str | None
    """Fingerprint of the row order, where converted."""
    flashinfer: str | None
    """The release that gave it."""

    def as_json(self) -> dict[str, Any]:
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["layers"] = {prefix: sizes.as_json() for prefix, sizes in self.layers.items()}
        content["bytes"] = content.pop("nbytes")
        content |= {**content.pop("prospects").as_json(), "serve": self.serve}
        return content

    @property
    def serve(self) -> dict[str, str]:
        """The command that serves it, by engine, where it is converted."""
        return self.prospects.commands(self.folder) if self.state == "converted" else {}


def inspect(folder: str | Path | Store) -> Inspection:
    """Describe a model folder without reading its weights, but for scalars of experts that clamp
    their SwiGLU.

    Raises:
        CheckpointError: not a model folder, or one that contradicts itself.
        FormatError: converted, but to a format that this release does not know.
    """
    checkpoint = open_checkpoint(open_store(folder))
    dtypes: Counter[str] = Counter()
    for shard in checkpoint.shards:
        for tensor in shard.header.tensors:
            dtypes[tensor.dtype] += tensor.nbytes
    section = checkpoint.quantization or {}
    layout: LayoutRecord | None = None
    state: State = "source"
    reason = None
    layers: dict[str, Geometry] = {}
    families: dict[str, str] = {}
    others: list[PassedLayer] = []
    warnings: list[str] = []
    outlook = Prospects({})
    try:
        if is_converted(checkpoint):
            state = "converted"
            converted = ConvertedSection.from_json(section)
            layers = dict(converted.layers)
            found, others = find_layers(checkpoint, converted=layers)
            if found:
                raise CheckpointError(
                    f"{checkpoint.location}: {found[0].prefix!r} is as in an original, and "
                    f"{CONFIG_NAME} says that it has passed through; convert the original again"
                )
            outlook = prospects(checkpoint, converted.source, layers, others)
        else:
            plan = plan_of(checkpoint)
            layers, families, others = plan.geometries, plan.families, list(plan.passed)
            require_layers(checkpoint, plan.layers, others)
            warnings = warnings_on(checkpoint, layers)
            outlook = prospects(checkpoint, section, layers, others)
            outlook.require_one(checkpoint.location)
    except CheckpointError as error:
        state, reason = "unsupported", str(error)
    if state == "converted":
        if not checkpoint.has_index:
            raise CheckpointError(f"{checkpoint.location}: is unfinished: it has no {INDEX_NAME}")
        layout = converted.layout
        layouts.layout_of(layout)
    return Inspection(
        folder=checkpoint.location,
        state=state,
        reason=reason,
        quantization=describe(section),
        shards=len(checkpoint.shards),
        tensors=sum(len(shard.header.tensors) for shard in checkpoint.shards),
        nbytes=sum(shard.header.file_nbytes for shard in checkpoint.shards),
        dtypes=dict(dtypes.most_common()),
        layers=layers,
        families=families,
        passed_layers={layer.prefix: layer.reason for layer in others},
        warnings=warnings,
        prospects=outlook,
        row_order=layout.row_order if layout else None,
        flashinfer=layout.flashinfer if layout else None,
    )
