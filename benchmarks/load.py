"""Load one MoE layer onto a GPU: expert by expert and shuffled there, or in slices as converted.

    python -m benchmarks.load                            # a DeepSeek-V3 layer; needs sglang
    python -m benchmarks.load --shuffle-from utils.py    # the engine's function from its source

What is compared, for tensor-parallel size 1 and for one rank of 8:

- **per expert**: what SGLang's loader does. Parameters in linear layout; for each of the 3,072
  expert tensors, the rank's part is copied into its place; then the engine's own
  `prepare_static_weights_for_trtllm_fp4_moe` (sglang/srt/layers/quantization/utils.py) shuffles.
- **converted**: what the plugins do. Parameters in their final shapes; `copy_share` fills them from
  the eight tensors of the converted file.

Both read through `safe_open`, with the files in the page cache, on one thread, and end with a
synchronised GPU. Not included: the engine's own loops around it, other tensors, alphas (the same
few kilobytes either way), and the first shuffle of a process, in which FlashInfer compiles a
kernel; its time is shown apart. The results of both ways are compared bit for bit.
"""

from __future__ import annotations

import ast
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open

from fp4moe_convert import convert
from fp4moe_convert.format.contract import round_up
from fp4moe_convert.serving.slices import copy_share
from tests.support.make_checkpoint import Spec, make_checkpoint

from .report import parser_of, table, write_json

MATRICES = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
SCALARS = ("w13_weight_scale_2", "w13_input_scale", "w2_weight_scale_2", "w2_input_scale")
Params = dict[str, torch.Tensor]
Shuffle = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Measured:
    """One load of the layer."""

    way: str
    tp_size: int
    load_s: float
    shuffle_s: float
    peak_allocated: int
    peak_reserved: int
    weights: int
    """Bytes of the finished parameters."""
    copies: int
    """To the GPU, matrices and scalars."""


class Layer:
    """The tensors of one MoE layer in a folder, read one at a time."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._prefix = prefix
        self._files = {
            name: file
            for path in folder.glob("*.safetensors")
            for file in [safe_open(path, "pt")]
            for name in file.keys()  # noqa: SIM118 (not a dict)
        }

    def get(self, name: str) -> torch.Tensor:
        return self._files[f"{self._prefix}.{name}"].get_tensor(f"{self._prefix}.{name}")


def engine_shuffle(source: Path | None) -> Shuffle:
    """The engine's function: imported, or taken by name out of a copy of its file."""
    name = "prepare_static_weights_for_trtllm_fp4_moe"
    if source is None:
        from sglang.srt.layers.quantization import utils

        return getattr(utils, name)
    tree = ast.parse(source.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(tree, str(source), "exec"), namespace)
    return namespace[name]


def empty_params(spec: Spec, tp_size: int) -> Params:
    """A rank's parameters; the shapes are the same in linear and in final layout."""
    e, h, p = spec.experts, spec.hidden, round_up(-(-spec.intermediate // tp_size), 64)
    shapes = {
        "w13_weight": ((e, 2 * p, h // 2), torch.uint8),
        "w13_weight_scale": ((e, 2 * p, h // 16), torch.float8_e4m3fn),
        "w2_weight": ((e, h, p // 2), torch.uint8),
        "w2_weight_scale": ((e, h, p // 16), torch.float8_e4m3fn),
        "w13_weight_scale_2": ((e, 2), torch.float32),
        "w13_input_scale": ((e, 2), torch.float32),
        "w2_weight_scale_2": ((e,), torch.float32),
        "w2_input_scale": ((e,), torch.float32),
    }
    return {
        name: torch.empty(shape, dtype=dtype, device="cuda")
        for name, (shape, dtype) in shapes.items()
    }


def load_per_expert(layer: Layer, params: Params, tp_rank: int) -> int:
    """Fill linear parameters, rows [up; gate] as the kernels want them; returns the copies made."""
    copies = 0
    p = params["w13_weight"].shape[1] // 2
    for expert in range(params["w13_weight"].shape[0]):
        for leaf in ("weight", "weight_scale"):
            for half, projection in enumerate(("up", "gate")):
                part = layer.get(f"{expert}.{projection}_proj.{leaf}").narrow(0, tp_rank * p, p)
                params[f"w13_{leaf}"][expert, half * p : (half + 1) * p].copy_(part)
            target = params[f"w2_{leaf}"][expert]
            cols = target.shape[1]
            part = layer.get(f"{expert}.down_proj.{leaf}").narrow(1, tp_rank * cols, cols)
            target.copy_(part)
            copies += 3
        for leaf in ("weight_scale_2", "input_scale"):
            for column, projection in enumerate(("gate", "up")):
                value = layer.get(f"{expert}.{projection}_proj.{leaf}")
                params[f"w13_{leaf}"][expert, column].copy_(value)
            params[f"w2_{leaf}"][expert].copy_(layer.get(f"{expert}.down_proj.{leaf}"))
            copies += 3
    return copies


def shuffled(params: Params, shuffle: Shuffle) -> Params:
    """What the engine does once a layer is loaded; its results replace the parameters."""
    experts, rows, half_hidden = params["w13_weight"].shape
    w13, w13_scale, w2, w2_scale = shuffle(
        params["w13_weight"],
        params["w2_weight"],
        params["w13_weight_scale"],
        params["w2_weight_scale"],
        2 * half_hidden,
        rows // 2,
        experts,
    )
    return {
        **params,
        "w13_weight": w13,
        "w13_weight_scale": w13_scale,
        "w2_weight": w2,
        "w2_weight_scale": w2_scale,
    }


def load_converted(layer: Layer, params: Params, tp_rank: int) -> int:
    """Fill final parameters; returns the copies made."""
    experts = range(params["w13_weight"].shape[0])
    width = 2 * params["w2_weight"].shape[2]
    part = range(width * tp_rank, width * (tp_rank + 1))
    return sum(
        copy_share(leaf, layer.get(leaf), target, experts=experts, part=part, gated=True)
        for leaf, target in params.items()
    )


def measure(
    way: str, layer: Layer, spec: Spec, tp_size: int, shuffle: Shuffle
) -> tuple[Measured, Params]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    params = empty_params(spec, tp_size)
    load = load_per_expert if way == "per expert" else load_converted
    copies = load(layer, params, tp_size - 1)
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    if way == "per expert":
        params = shuffled(params, shuffle)
    torch.cuda.synchronize()
    finished = time.perf_counter()
    return Measured(
        way=way,
        tp_size=tp_size,
        load_s=loaded - started,
        shuffle_s=finished - loaded,
        peak_allocated=torch.cuda.max_memory_allocated(),
        peak_reserved=torch.cuda.max_memory_reserved(),
        weights=sum(tensor.nbytes for tensor in params.values()),
        copies=copies,
    ), params


def assert_equal(ours: Params, theirs: Params) -> None:
    for name in (*MATRICES, *SCALARS):
        a, b = (x[name].reshape(-1).view(torch.uint8) for x in (ours, theirs))
        if not torch.equal(a, b):
            raise SystemExit(f"{name} differs in {int((a != b).sum())} bytes")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shuffle-from", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    spec = Spec(layers=1, dense_layers=0, experts=arguments.experts)
    shuffle = engine_shuffle(arguments.shuffle_from)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", end=", ")
    print(f"flashinfer {version('flashinfer-python')}, {spec.experts} experts, H 7168, I 2048")
    started = time.perf_counter()
    shuffled(empty_params(Spec(experts=1), 1), shuffle)
    torch.cuda.synchronize()
    print(f"first shuffle of the process: {time.perf_counter() - started:.1f} s")

    runs: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        make_checkpoint(source, spec)
        convert(source, out, direct_io=False)
        prefix = "model.layers.0.mlp.experts"
        layers = {"per expert": Layer(source, prefix), "converted": Layer(out, prefix)}
        for tp_size in (1, 8):
            for number in range(arguments.rounds + 1):
                results = {}
                for way, layer in layers.items():
                    run, results[way] = measure(way, layer, spec, tp_size, shuffle)
                    # The first round brings the files into the page cache.
                    if number:
                        runs.append(run)
                    if number == 1:
                        results[way] = {k: v.cpu() for k, v in results[way].items()}
                    else:
                        results.clear()
                if number == 1:
                    assert_equal(results["converted"], results["per expert"])
                    print(f"T = {tp_size}: all eight tensors are equal")
    print_table(runs)
    write_json(arguments.json, [asdict(run) for run in runs])


def print_table(runs: list[Measured]) -> None:
    """Medians of each way and size."""
    head = (
        "T, way",
        "load s",
        "shuffle s",
        "weights GB",
        "peak allocated",
        "peak reserved",
        "copies",
    )
    rows = []
    for tp_size in (1, 8):
        for way in ("per expert", "converted"):
            some = [run for run in runs if (run.way, run.tp_size) == (way, tp_size)]
            rows.append(
                (
                    f"{tp_size}  {way}",
                    f"{median(r.load_s for r in some):.2f}",
                    f"{median(r.shuffle_s for r in some):.3f}",
                    f"{some[0].weights / 1e9:.2f}",
                    f"{max(r.peak_allocated for r in some) / 1e9:.2f}",
                    f"{max(r.peak_reserved for r in some) / 1e9:.2f}",
                    str(some[0].copies),
                )
            )
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    main()
