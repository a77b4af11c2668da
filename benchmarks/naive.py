"""The converter one would write in an afternoon: stack the experts, index the rows, save the file.

    python -m benchmarks.naive MODEL_DIR OUT_DIR

benchmarks/convert.py measures it, and checks that its tensors equal those of fp4moe-convert. It
takes a few times the size of a layer in memory, keeps the source's config.json and knows none of
the ways in which a checkpoint can be wrong. Prints, as JSON, the seconds of imports and of work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

started = time.perf_counter()

import torch  # noqa: E402
from flashinfer import reorder_rows_for_gated_act_gemm, shuffle_matrix_a  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

imported = time.perf_counter()

EPILOGUE_TILE_M = 128
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)_proj\.(\w+)")
INDEX_NAME = "model.safetensors.index.json"

Tensors = dict[str, torch.Tensor]


def stack_layer(tensors: Tensors, prefix: str) -> Tensors:
    """The eight tensors that stand for a layer's experts."""
    count = sum(name.endswith(".down_proj.weight") for name in tensors)

    def stack(projection: str, leaf: str) -> torch.Tensor:
        return torch.stack(
            [tensors[f"{prefix}.{expert}.{projection}_proj.{leaf}"] for expert in range(count)]
        )

    out: Tensors = {}
    for leaf in ("weight", "weight_scale"):
        w13 = torch.cat([stack("up", leaf), stack("gate", leaf)], dim=1).view(torch.uint8)
        w2 = stack("down", leaf).view(torch.uint8)
        for name, stacked in (("w13", w13), ("w2", w2)):
            rows = torch.arange(stacked.shape[1])[:, None]
            if name == "w13":
                rows = reorder_rows_for_gated_act_gemm(rows)
            shuffled = stacked[:, shuffle_matrix_a(rows, EPILOGUE_TILE_M)[:, 0]]
            if leaf == "weight_scale":
                shuffled = tile(shuffled).view(torch.float8_e4m3fn)
            out[f"{prefix}.{name}_{leaf}"] = shuffled
    for leaf in ("weight_scale_2", "input_scale"):
        out[f"{prefix}.w13_{leaf}"] = torch.stack([stack("gate", leaf), stack("up", leaf)], dim=1)
        out[f"{prefix}.w2_{leaf}"] = stack("down", leaf)
    return out


def tile(scales: torch.Tensor) -> torch.Tensor:
    """128x4 tiles: the rows of a tile, (4, 32), are turned to (32, 4)."""
    experts, rows, cols = scales.shape
    tiles = scales.view(experts, rows // 128, 4, 32, cols // 4, 4)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(scales.shape)


def convert(model: Path, out: Path) -> None:
    """One shard for each layer with NVFP4 experts, and one for the rest."""
    files = {
        name: file
        for path in sorted(model.glob("*.safetensors"))
        for file in [safe_open(path, framework="pt")]
        for name in file.keys()  # noqa: SIM118 (not a dict)
    }
    groups: dict[str, list[str]] = defaultdict(list)
    for name in files:
        match = EXPERT.fullmatch(name)
        quantized = match and f"{name.rpartition('.')[0]}.weight_scale" in files
        groups[match[1] if match and quantized else ""].append(name)
    weight_map: dict[str, str] = {}
    out.mkdir()
    for number, (prefix, names) in enumerate(groups.items(), start=1):
        tensors = {name: files[name].get_tensor(name) for name in names}
        if prefix:
            tensors = stack_layer(tensors, prefix)
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, out / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    for path in model.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX_NAME:
            shutil.copy(path, out / path.name)
    (out / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    for path in (*out.iterdir(), out):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    work = time.perf_counter() - imported
    print(json.dumps({"imports": imported - started, "work": work}))
