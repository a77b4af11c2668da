"""Which engines can serve a checkpoint once it is converted, as far as config.json and headers
tell."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from .engines import ENGINES, tensor_parallel_sizes
from .engines.engine import Engine, Model
from .errors import CheckpointError
from .format.contract import Geometry
from .source.checkpoint import Checkpoint
from .source.experts import PassedLayer
from .source.families import FAMILIES
from .source.linears import decoder_linears
from .source.names import original_layer

_DOWNS = {
    part.partition(".")[0]
    for family in FAMILIES
    for part, (projections, leaf) in family.parts.items()
    if "down" in projections and leaf == "weight"
}


@dataclass(frozen=True, slots=True)
class CanServe:
    """An engine can serve the model."""

    sizes: list[int]
    """Of tensor parallelism."""


@dataclass(frozen=True, slots=True)
class CannotServe:
    """It is known that an engine cannot serve the model."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotTried:
    """Nothing can be said of an engine."""

    reason: str


Verdict: TypeAlias = CanServe | CannotServe | NotTried


@dataclass(frozen=True, slots=True)
class Prospects:
    """What can be said of each engine without starting it."""

    verdicts: Mapping[str, Verdict]
    """By engine; empty where the model is not converted, and will not be."""

    @property
    def tensor_parallel(self) -> dict[str, list[int]]:
        """The sizes at which the engines that can serve the model do so."""
        return {name: v.sizes for name, v in self.verdicts.items() if isinstance(v, CanServe)}

    @property
    def cannot_serve(self) -> dict[str, str]:
        """Why other engines cannot."""
        return {name: v.reason for name, v in self.verdicts.items() if isinstance(v, CannotServe)}

    @property
    def not_tried(self) -> dict[str, str]:
        """Why nothing can be said of the rest."""
        return {name: v.reason for name, v in self.verdicts.items() if isinstance(v, NotTried)}

    def commands(self, folder: str) -> dict[str, str]:
        """The commands that serve a converted folder, of the engines that can."""
        return {
            engine.name: engine.serve_command(shlex.quote(folder))
            for engine in ENGINES
            if engine.name in self.tensor_parallel
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "tensor_parallel": self.tensor_parallel,
            "cannot_serve": self.cannot_serve,
            "not_tried": self.not_tried,
        }

    def require_one(self, location: str) -> None:
        """Refuse what no engine can serve.

        Args:
            location: of the model, for the message.

        Raises:
            CheckpointError: it is known of every engine that it cannot.
        """
        if len(self.cannot_serve) == len(ENGINES):
            raise CheckpointError(
                f"{location}: no engine could serve it once it is converted: "
                + "; ".join(self.cannot_serve.values())
                + "; serve the original with another MoE backend"
            )


def prospects(
    checkpoint: Checkpoint,
    section: Mapping[str, Any],
    geometries: Mapping[str, Geometry],
    passed: Iterable[PassedLayer],
) -> Prospects:
    """Say which engines can serve a checkpoint.

    Args:
        checkpoint: an original, or a converted one.
        section: the original's description of its quantization.
        geometries: of the layers that are converted, or would be, by prefix.
        passed: the other layers with experts.
    """
    text = checkpoint.text.own
    names = checkpoint.config.get("architectures")
    # There is one, rarely two.
    first = [str(name) for name in names[:3]] if isinstance(names, list) else []
    model = Model(
        tuple(first),
        text,
        section,
        gated=all(each.gated for each in geometries.values()),
        downs=frozenset(_down_projections(checkpoint, geometries)),
        linears=decoder_linears(checkpoint, geometries),
    )
    sizes = tensor_parallel_sizes(model, geometries.values())
    weight_only = next((layer.prefix for layer in passed if layer.is_weight_only), None)
    return Prospects(
        {
            engine.name: _verdict(engine, model, sizes.get(engine.name, []), weight_only)
            for engine in ENGINES
        }
    )


def _verdict(engine: Engine, model: Model, sizes: list[int], weight_only: str | None) -> Verdict:
    """What can be said of an engine that can cut the model at ``sizes``.

    Args:
        weight_only: a layer whose experts are so; the serve command names the backend of all.
    """
    if reason := engine.why_not(model) or engine.why_not_by_names(model):
        return CannotServe(reason)
    if not sizes:
        return CannotServe(f"{engine.title} can cut its layers at no tensor-parallel size")
    if engine.models.first_of(model.architectures) is None:
        names = " or ".join(model.architectures) or "for it: config.json names no architecture"
        return NotTried(f"{engine.title} {engine.models.release} has no model {names}")
    if weight_only is not None:
        # arg_groups/model_overrides/qwen3_moe.py:56 of SGLang 0.5.23: "trtllm-gen only has the W4A4
        # NVFP4 MoE path"; fused_moe/experts/trtllm_nvfp4_moe.py:219 of vLLM 0.33.0.
        return NotTried(
            f"{engine.title} {engine.models.release} has no flashinfer_trtllm for weight-only "
            f"(W4A16) experts, and takes one MoE backend for all layers: {weight_only}"
        )
    return CanServe(sizes)


def _down_projections(checkpoint: Checkpoint, prefixes: Collection[str]) -> Iterator[str]:
    """What those of the layers' experts are called; of a converted layer its stop tensor says."""
    for shard in checkpoint.shards:
        for tensor in shard.header.tensors:
            if original_layer(tensor.name) in prefixes:
                # The last of the name where all experts are in one tensor of a batch.
                yield from _DOWNS.intersection(tensor.name.split(".")[-2:])
