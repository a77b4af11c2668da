"""Which engines can serve a checkpoint once it is converted, as far as config.json tells."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError
from .format.contract import Geometry
from .serving.engine import Model
from .serving.engines import ENGINES, tensor_parallel_sizes
from .source.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Prospects:
    """What can be said of each engine without starting it. Each is in one of three places."""

    tensor_parallel: dict[str, list[int]]
    """The sizes at which an engine can serve the model."""
    cannot_serve: dict[str, str]
    """Why an engine cannot."""
    not_tried: dict[str, str]
    """Why nothing can be said of an engine."""

    def commands(self, folder: str) -> dict[str, str]:
        """The commands that serve a converted folder, of the engines that can."""
        return {
            engine.name: engine.serve_command(shlex.quote(folder))
            for engine in ENGINES
            if engine.name in self.tensor_parallel
        }

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

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
    checkpoint: Checkpoint, section: Mapping[str, Any], geometries: Iterable[Geometry]
) -> Prospects:
    """Say which engines can serve a checkpoint.

    Args:
        checkpoint: an original, or a converted one.
        section: the original's description of its quantization.
        geometries: of the layers that are converted, or would be.
    """
    text: Mapping[str, Any] = checkpoint.config
    for key in checkpoint.text.path:
        text = text[key]
    names = checkpoint.config.get("architectures")
    # Engines take the first that they know. There is one, rarely two.
    first = [str(name) for name in names[:3]] if isinstance(names, list) else []
    geometries = list(geometries)
    model = Model(tuple(first), text, section, gated=all(each.gated for each in geometries))
    sizes = tensor_parallel_sizes(geometries)
    heads = text.get("num_attention_heads")
    can: dict[str, list[int]] = {}
    cannot: dict[str, str] = {}
    not_tried: dict[str, str] = {}
    for engine in ENGINES:
        own = sizes.get(engine.name, [])
        if type(heads) is int:  # attention is cut by heads
            own = [size for size in own if heads % size == 0]
        if reason := engine.why_not(model):
            cannot[engine.name] = reason
        elif not own:
            cannot[engine.name] = f"{engine.title} can cut its layers at no tensor-parallel size"
        elif not engine.models.names.intersection(model.architectures):
            not_tried[engine.name] = (
                f"{engine.title} {engine.models.release} has no model "
                f"{' or '.join(model.architectures) or 'for it: config.json names no architecture'}"
            )
        else:
            can[engine.name] = own
    return Prospects(can, cannot, not_tried)
