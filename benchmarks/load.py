"""Load one MoE layer onto a GPU: expert by expert and shuffled there, or in slices as converted.

    python -m benchmarks.load                            # a DeepSeek-V3 layer; needs sglang
    python -m benchmarks.load --shuffle-from utils.py    # the engine's function from its source
    python -m benchmarks.load --cold                     # from the disk as well

What is compared, for tensor-parallel size 1 and for one rank of 8:

- **original**: what SGLang's loader does. Parameters in linear layout; for each of the 3,072
  expert tensors, the rank's part is copied into its place, by one thread or by as many as there are
  cores; then the engine's own `prepare_static_weights_for_trtllm_fp4_moe`
  (sglang/srt/layers/quantization/utils.py) shuffles.
- **converted, plain**: `copy_share` fills parameters in their final shapes from the eight tensors
  of the converted file, by torch's copies (`FP4MOE_LOAD_THREADS=0`).
- **converted**: the same as the plugins do it, through pinned memory.

And all eight ranks of T = 8 at once, each in its process, on this one host: from the first start to
the last end. If there is one GPU, they share it.

All read through `safe_open`, with the files in the page cache (but for `--cold`), and end with a
synchronised GPU. Included: opening the files, and creating the parameters. Not included: the
engine's own loops around it, other tensors, alphas (the same few kilobytes either way). Shown
apart, because a process does it once: pinning memory, and the first shuffle, in which FlashInfer
compiles a kernel. The results of all ways are compared bit for bit.

The floors beside them: copies out of pinned memory alone, and direct reads of the disk alone.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open

from fp4moe_convert import convert
from fp4moe_convert.format.sizes import round_up
from fp4moe_convert.serving.fast_copy import COPIER, MIN_NBYTES, THREADS_VARIABLE
from fp4moe_convert.serving.slices import copy_share
from tests.support.make_checkpoint import Spec, make_checkpoint

from .common import evict, model_files, scratch_folder
from .raw_copy import read_folder
from .report import parser_of, say, table, write_json

MATRICES = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
SCALARS = ("w13_weight_scale_2", "w13_input_scale", "w2_weight_scale_2", "w2_input_scale")
PREFIX = "model.layers.0.mlp.experts"
RANKS = 8
PLAIN, CONVERTED = "converted, plain", "converted"
Params = dict[str, torch.Tensor]
Shuffle = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Measured:
    """One load of the layer."""

    way: str
    tp_size: int
    cold: bool
    load_s: float
    shuffle_s: float
    peak_allocated: int
    peak_reserved: int
    weights: int
    """Bytes of the finished parameters."""
    copies: int
    """To the GPU, matrices and scalars."""

    @property
    def seconds(self) -> float:
        return self.load_s + self.shuffle_s


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


def load_per_expert(layer: Layer, params: Params, tp_rank: int, threads: int) -> int:
    """Fill linear parameters, rows [up; gate] as the kernels want them; returns the copies made."""
    p = params["w13_weight"].shape[1] // 2

    def load(expert: int) -> int:
        for leaf in ("weight", "weight_scale"):
            for half, projection in enumerate(("up", "gate")):
                part = layer.get(f"{expert}.{projection}_proj.{leaf}").narrow(0, tp_rank * p, p)
                params[f"w13_{leaf}"][expert, half * p : (half + 1) * p].copy_(part)
            target = params[f"w2_{leaf}"][expert]
            cols = target.shape[1]
            part = layer.get(f"{expert}.down_proj.{leaf}").narrow(1, tp_rank * cols, cols)
            target.copy_(part)
        for leaf in ("weight_scale_2", "input_scale"):
            for column, projection in enumerate(("gate", "up")):
                value = layer.get(f"{expert}.{projection}_proj.{leaf}")
                params[f"w13_{leaf}"][expert, column].copy_(value)
            params[f"w2_{leaf}"][expert].copy_(layer.get(f"{expert}.down_proj.{leaf}"))
        return 12

    experts = range(params["w13_weight"].shape[0])
    if threads == 1:
        return sum(map(load, experts))
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(load, experts))


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
    way: str, folder: Path, spec: Spec, tp_size: int, shuffle: Shuffle, *, cold: bool
) -> tuple[Measured, Params]:
    """Load the last rank's share in one of the `ways`."""
    if cold:
        for path in model_files(folder):
            evict(path)
    os.environ[THREADS_VARIABLE] = "0" if way == PLAIN else ""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    layer = Layer(folder, PREFIX)
    params = empty_params(spec, tp_size)
    if threads := ways().get(way):
        copies = load_per_expert(layer, params, tp_size - 1, threads)
    else:
        copies = load_converted(layer, params, tp_size - 1)
    torch.cuda.synchronize()
    loaded = time.perf_counter()
    if threads:
        params = shuffled(params, shuffle)
    torch.cuda.synchronize()
    finished = time.perf_counter()
    return Measured(
        way=way,
        tp_size=tp_size,
        cold=cold,
        load_s=loaded - started,
        shuffle_s=finished - loaded,
        peak_allocated=torch.cuda.max_memory_allocated(),
        peak_reserved=torch.cuda.max_memory_reserved(),
        weights=sum(tensor.nbytes for tensor in params.values()),
        copies=copies,
    ), params


def ways() -> dict[str, int]:
    """Names, and the threads that load expert by expert; 0 for converted files."""
    cores = len(os.sched_getaffinity(0))
    return {"original": 1, f"original, {cores} threads": cores, PLAIN: 0, CONVERTED: 0}


def assert_equal(ours: Params, theirs: Params) -> None:
    for name in (*MATRICES, *SCALARS):
        a, b = (x[name].reshape(-1).view(torch.uint8) for x in (ours, theirs))
        if not torch.equal(a, b):
            raise SystemExit(f"{name} differs in {int((a != b).sum())} bytes")


def measure_all(
    source: Path, out: Path, spec: Spec, shuffle: Shuffle, rounds: int, *, cold: bool
) -> list[Measured]:
    """The ways by turns. The first round warms up and is not counted; its results are compared."""
    runs = []
    for tp_size in (1, RANKS):
        for number in range(rounds + 1):
            expected: Params | None = None
            for way, threads in ways().items():
                folder = source if threads else out
                run, found = measure(way, folder, spec, tp_size, shuffle, cold=cold)
                if number:
                    runs.append(run)
                else:
                    on_host = {name: tensor.cpu() for name, tensor in found.items()}
                    expected = expected or on_host
                    assert_equal(on_host, expected)
                del found  # the next one's peak would have it
        say(f"T = {tp_size}: all eight tensors are equal")
    return runs


# --- all ranks at once ----------------------------------------------------------------------------


def measure_ranks(out: Path, spec: Spec, rounds: int) -> dict[str, list[float]]:
    """Seconds from the first start to the last end, by way."""
    threads = max(1, len(os.sched_getaffinity(0)) // RANKS)
    seconds: dict[str, list[float]] = {PLAIN: [], CONVERTED: []}
    for way, taken in seconds.items():
        environment = {**os.environ, THREADS_VARIABLE: "0" if way == PLAIN else str(threads)}
        command = (sys.executable, "-m", "benchmarks.load", "--rank-of", out)
        ranks = [
            subprocess.Popen(
                (*command, "--rank", str(rank), "--experts", str(spec.experts)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(RANKS)
        ]
        for _ in range(rounds + 1):  # the first warms up
            spans = ask(ranks)
            taken.append(max(stop for _, stop in spans) - min(start for start, _ in spans))
        del taken[0]
        for rank in ranks:
            rank.communicate()
    return seconds


def ask(ranks: Iterable[subprocess.Popen[str]]) -> list[tuple[float, float]]:
    """Let processes load at the same time; start and end of each."""
    ranks = list(ranks)
    for word in ("make ready", "go"):
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{word}\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in ranks if rank.stdout is not None]
    return [(float(start), float(stop)) for start, stop in map(str.split, answers)]


def be_a_rank(out: Path, rank: int, spec: Spec) -> None:
    """Load a share whenever the parent says so."""
    torch.cuda.set_device(rank % torch.cuda.device_count())
    while sys.stdin.readline():
        params = empty_params(spec, RANKS)
        torch.cuda.synchronize()
        print("ready", flush=True)
        sys.stdin.readline()
        started = time.time()
        load_converted(Layer(out, PREFIX), params, rank)
        torch.cuda.synchronize()
        print(started, time.time(), flush=True)
        del params


# --- floors ---------------------------------------------------------------------------------------


def pinned_rate(nbytes: int = 1 << 30) -> float:
    """Bytes per second of a copy out of pinned memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    rates = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(nbytes / (time.perf_counter() - started))
    return median(rates)


def pinning_time() -> float:
    """Seconds that it takes to pin memory and to give it back, once a load."""
    source = torch.empty(MIN_NBYTES, dtype=torch.uint8)
    target = torch.empty(MIN_NBYTES, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(5):
        COPIER.give_back()
        started = time.perf_counter()
        COPIER.copy([(target, source)])
        COPIER.give_back()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def disk_rate(folder: Path) -> float:
    """Bytes per second of direct reads of a folder's files."""
    started = time.perf_counter()
    nbytes = read_folder(folder)
    return nbytes / (time.perf_counter() - started)


# --- the whole ------------------------------------------------------------------------------------


def main() -> None:
    arguments = parse()
    spec = Spec(layers=1, dense_layers=0, experts=arguments.experts)
    if arguments.rank_of:
        be_a_rank(arguments.rank_of, arguments.rank, spec)
        return
    shuffle = engine_shuffle(arguments.shuffle_from)
    cores = len(os.sched_getaffinity(0))
    place = f"{torch.cuda.get_device_name()}, {cores} cores, torch {torch.__version__}"
    print(f"{place}, flashinfer {version('flashinfer-python')}, {spec.experts} experts, "
          f"H {spec.hidden}, I {spec.intermediate}")  # fmt: skip
    started = time.perf_counter()
    shuffled(empty_params(Spec(experts=1), 1), shuffle)
    torch.cuda.synchronize()
    first_shuffle = time.perf_counter() - started

    with scratch_folder(arguments.scratch) as folder:
        source, out = folder / "source", folder / "out"
        make_checkpoint(source, spec)
        convert(source, out, direct_io=False)
        runs = measure_all(source, out, spec, shuffle, arguments.rounds, cold=False)
        ranks = measure_ranks(out, spec, arguments.rounds)
        os.environ.pop(THREADS_VARIABLE)
        floors = {
            "first_shuffle_s": first_shuffle,
            "pinning_s": pinning_time(),
            "pinned_bytes_per_s": pinned_rate(),
        }
        if arguments.cold:
            runs += measure_all(source, out, spec, shuffle, 1, cold=True)
            floors["disk_bytes_per_s"] = disk_rate(out)
    for line in report(runs, ranks, floors):
        print(line)
    write_json(
        arguments.json,
        {"place": place, "floors": floors, "ranks_s": ranks, "runs": [asdict(run) for run in runs]},
    )


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shuffle-from", type=Path, metavar="FILE")
    parser.add_argument("--cold", action="store_true", help="also with files that are not cached")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"), metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def report(
    runs: Sequence[Measured], ranks: dict[str, list[float]], floors: dict[str, float]
) -> Iterable[str]:
    """Medians of each way and size."""
    head = ("T, way", "load s", "shuffle s", "GB/s", "times", "weights GB", "peak allocated",
            "peak reserved", "copies")  # fmt: skip
    for cold in sorted({run.cold for run in runs}):
        rows = []
        for tp_size in (1, RANKS):
            groups = {
                way: [r for r in runs if (r.way, r.tp_size, r.cold) == (way, tp_size, cold)]
                for way in ways()
            }
            stock = median(run.seconds for run in groups["original"])
            for way, some in groups.items():
                seconds = median(run.seconds for run in some)
                rows.append(
                    (
                        f"{tp_size}  {way}",
                        f"{median(r.load_s for r in some):.3f}",
                        f"{median(r.shuffle_s for r in some):.3f}",
                        f"{some[0].weights / 1e9 / seconds:.1f}",
                        f"{stock / seconds:.1f}",
                        f"{some[0].weights / 1e9:.2f}",
                        f"{max(r.peak_allocated for r in some) / 1e9:.2f}",
                        f"{max(r.peak_reserved for r in some) / 1e9:.2f}",
                        str(some[0].copies),
                    )
                )
        yield "files on the disk" if cold else "files in the page cache"
        yield from table(head, rows)
    weights = next(run.weights for run in runs if run.tp_size == 1)
    yield f"{RANKS} ranks at once"
    yield from table(
        ("way", "s", "GB/s"),
        [
            (way, f"{median(taken):.3f}", f"{weights / 1e9 / median(taken):.1f}")
            for way, taken in ranks.items()
        ],
    )
    for name, value in floors.items():
        yield f"{name} {value / 1e9:.1f} GB/s" if name.endswith("per_s") else f"{name} {value:.3f}"


if __name__ == "__main__":
    main()
