"""What the two engine scripts share: jobs in, tensor files and a record of each run out.

Runs inside an engine's environment, with nothing but torch and safetensors. An engine takes 15 s to
import, so one process works through all jobs.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The laid-out tensors, as they are when the engine is ready to serve ...
LAID_OUT = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
# ... and the per-tensor scales, as they are when the loader has filled them, which is before the
# engine merges them. The input scales are those of all experts, whatever the rank.
RAW_SCALES = ("w13_weight_scale_2", "w2_weight_scale_2", "w13_input_scale", "w2_input_scale")

PATTERN = 0xA5
"""The byte that `poison` fills parameters with."""


@dataclass(frozen=True, slots=True)
class Job:
    """One MoE layer of one checkpoint, as one rank holds it."""

    case: str
    checkpoint: str  # folder
    layer: int
    tp_size: int
    tp_rank: int
    ep_size: int
    ep_rank: int

    @property
    def file_name(self) -> str:
        tp = f"tp{self.tp_rank}of{self.tp_size}"
        return f"{self.case}-{tp}-ep{self.ep_rank}of{self.ep_size}.safetensors"


@dataclass(frozen=True, slots=True)
class Golden:
    """What the engine's layer holds. ``hidden`` and ``intermediate`` are its padded sizes."""

    hidden: int
    intermediate: int
    tensors: dict[str, Any]  # name -> torch.Tensor


def main(description: str, engine: str, golden: Callable[[Job], Golden]) -> None:
    """Run every job of a JSON list; write the tensors and ``results.json`` into a folder."""
    parser = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    parser.add_argument("jobs", type=Path, help="JSON list of jobs, written by make_golden")
    parser.add_argument("out", type=Path, help="folder for the tensors and results.json")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    runs = [
        run(Job(**job), arguments.out, golden) for job in json.loads(arguments.jobs.read_text())
    ]
    versions = {name: version(name) for name in (engine, "flashinfer-python", "torch")}
    results = {"versions": versions, "runs": runs}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def run(job: Job, out: Path, golden: Callable[[Job], Golden]) -> dict[str, Any]:
    """The record of one job. An engine that refuses the sizes is a result like any other."""
    from safetensors.torch import save_file

    record = asdict(job)
    try:
        result = golden(job)
    except (AssertionError, ValueError, RuntimeError) as error:
        print(f"{job.file_name}: refused")
        return record | refusal(error)
    save_file(result.tensors, out / job.file_name)
    return record | {"hidden": result.hidden, "intermediate": result.intermediate}


def refusal(error: BaseException) -> dict[str, str]:
    """What an engine says to sizes that it does not take, and where below site-packages."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return {
        "refused": f"{type(error).__name__}: {error}" if str(error) else str(frame.line),
        "at": f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}",
    }


def read_config(checkpoint: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(checkpoint) / "config.json").read_text())
    return config


def tensors_below(checkpoint: str, prefix: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of everything below ``prefix``, in the order of the shards."""
    from safetensors import safe_open

    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - a handle, not a mapping
                if name.startswith(prefix):
                    yield name, shard.get_tensor(name)


def poison(module: Any) -> None:
    """Fill all parameters with a pattern, so that a part that nothing writes shows in the result.

    `PATTERN` is a finite number in every dtype involved.
    """
    import torch

    for parameter in module.parameters():
        parameter.data.view(torch.uint8).fill_(PATTERN)


def never_written(module: Any) -> list[str]:
    """Parameters with an expert of which nothing has overwritten what `poison` left."""
    import torch

    return [
        name
        for name, parameter in module.named_parameters()
        if (parameter.data.view(torch.uint8).view(len(parameter), -1) == PATTERN).all(1).any()
    ]


def interleave_block_scales(scales: Any) -> Any:
    """Stand in for FlashInfer's ``nvfp4_block_scale_interleave``, which is a CUDA kernel.

    Args:
        scales: [M, C], one byte each.

    Returns:
        uint8, flat: 128x4 tiles of the matrix padded with zeros, the rows of a tile as (4, 32)
        turned to (32, 4).
    """
    import torch

    rows, cols = scales.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-cols // 4) * 4, dtype=torch.uint8)
    padded[:rows, :cols] = scales.view(torch.uint8)
    tiles = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32))
    return tiles.permute(0, 3, 2, 1, 4).flatten()
