"""What a model folder holds, from its headers: source or converted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from . import layouts
from .errors import CheckpointError
from .format.contract import ConvertedSection, Geometry, LayoutRecord
from .format.files import CONFIG_NAME, INDEX_NAME
from .preparation import plan_of
from .prospects import Prospects, prospects
from .source.checkpoint import Checkpoint, open_checkpoint
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
    layout: LayoutRecord | None
    """Where converted."""

    @property
    def row_order(self) -> str | None:
        """Fingerprint of the row order, where converted."""
        return self.layout.row_order if self.layout else None

    @property
    def flashinfer(self) -> str | None:
        """The release that gave it."""
        return self.layout.flashinfer if self.layout else None

    def as_json(self) -> dict[str, Any]:
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del content["layout"]
        content |= {"row_order": self.row_order, "flashinfer": self.flashinfer}
        content["layers"] = {prefix: sizes.as_json() for prefix, sizes in self.layers.items()}
        content["bytes"] = content.pop("nbytes")
        content |= {**content.pop("prospects").as_json(), "serve": self.serve}
        return content

    @property
    def serve(self) -> dict[str, str]:
        """The command that serves it, by engine, where it is converted."""
        return self.prospects.commands(self.folder) if self.state == "converted" else {}


@dataclass
class _Experts:
    """What `Inspection` says of a model's expert layers, as far as it was found out."""

    layers: Mapping[str, Geometry] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    passed: Sequence[PassedLayer] = ()
    warnings: list[str] = field(default_factory=list)
    prospects: Prospects = field(default_factory=lambda: Prospects({}))

    def look_at_source(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError: it cannot be converted."""
        plan = plan_of(checkpoint)
        self.layers, self.families, self.passed = plan.geometries, plan.families, plan.passed
        require_layers(checkpoint, plan.layers, plan.passed)
        self.warnings = warnings_on(checkpoint, self.layers)
        section = checkpoint.quantization or {}
        self.prospects = prospects(checkpoint, section, self.layers, self.passed)
        self.prospects.require_one(checkpoint.location)

    def look_at_converted(self, checkpoint: Checkpoint, section: ConvertedSection) -> None:
        """Raises CheckpointError: it has layers as in an original."""
        self.layers = section.layers
        found, self.passed = find_layers(checkpoint, converted=self.layers)
        if found:
            raise CheckpointError(
                f"{checkpoint.location}: {found[0].prefix!r} is as in an original, and "
                f"{CONFIG_NAME} says that it has passed through; convert the original again"
            )
        self.prospects = prospects(checkpoint, section.source, self.layers, self.passed)


def inspect(folder: str | Path | Store) -> Inspection:
    """Describe a model folder without reading its weights.

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
    experts = _Experts()
    layout = reason = None
    try:
        if is_converted(checkpoint):
            converted = ConvertedSection.from_json(section)
            experts.look_at_converted(checkpoint, converted)
            layout = converted.layout
        else:
            experts.look_at_source(checkpoint)
    except CheckpointError as error:
        reason = str(error)
    if layout:
        if not checkpoint.has_index:
            raise CheckpointError(f"{checkpoint.location}: is unfinished: it has no {INDEX_NAME}")
        layouts.layout_of(layout)
    return Inspection(
        folder=checkpoint.location,
        state="unsupported" if reason else "converted" if layout else "source",
        reason=reason,
        quantization=describe(section),
        shards=len(checkpoint.shards),
        tensors=sum(len(shard.header.tensors) for shard in checkpoint.shards),
        nbytes=sum(shard.header.file_nbytes for shard in checkpoint.shards),
        dtypes=dict(dtypes.most_common()),
        layers=dict(experts.layers),
        families=experts.families,
        passed_layers={layer.prefix: layer.reason for layer in experts.passed},
        warnings=experts.warnings,
        prospects=experts.prospects,
        layout=layout,
    )
