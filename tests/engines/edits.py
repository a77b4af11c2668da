"""Changes to a checkpoint before it is converted or loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tensors = dict[str, Any]
"""By name; torch is imported where it is needed."""

SHARD_NBYTES = 400_000
"""Of a converted checkpoint: a layer's experts fill some shards, and engines may pass over some."""

Edit = Callable[[dict[str, Any]], Any]
"""Changes a JSON object in place."""


def edit_config(folder: Path, edit: Edit) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_section(folder: Path, edit: Edit) -> None:
    edit_config(folder, lambda config: edit(config["quantization_config"]))


def edit_tensors(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Put what ``edit`` makes of all tensors in their place, in a single shard."""
    from safetensors.torch import load_file, save_file

    shards = sorted(folder.glob("*.safetensors"))
    tensors: Tensors = {}
    for shard in shards:
        tensors |= load_file(shard)
        shard.unlink()
    tensors = edit(tensors)
    save_file(tensors, shards[0], metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shards[0].name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without(tensors: Tensors, name: str) -> Tensors:
    return {other: value for other, value in tensors.items() if other != name}
