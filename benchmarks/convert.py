"""Compare a conversion with the disk's own rate, `cp -r` and a naive converter: time and memory.

    python -m benchmarks.convert                            # a model of 6.8 GB, ten minutes
    python -m benchmarks.convert --experts 32 --rounds 2    # 1.2 GB, one minute
    python -m benchmarks.convert --json bench.json --plot bench.png
    python -m benchmarks.convert --before ../other          # another checkout takes part
    python -m benchmarks.convert --restore                  # the way back takes part
    python -m benchmarks.convert --memory                   # our peak memory, models of 2 to 20 GB

It takes an environment with the package and, for --plot, the dependency group `bench`, and in
--work-dir room for the model three times over. The naive converter needs the extra `flashinfer`,
and twice the size of a layer in memory: 13 GB at the defaults.

The programs take turns, so that a disk that is slow for a while is slow for all of them:

- **ours**, `fp4moe-convert MODEL OUT --quiet --json`, the whole process. It syncs what it writes.
- **before**, the same of another checkout, where --before names one.
- **restore**, `fp4moe restore` of what ours has made, with --restore. It syncs what it writes, too.
- **floor**, `python -m benchmarks.raw_copy MODEL OUT`: the same bytes read and written with direct
  I/O by a few threads that do nothing else. The disk cannot do better.
- **cp**, `cp -r MODEL OUT` and then `sync` with the name of each copied file and folder, which
  calls fsync on it; the time is that of both.
- **naive**, `python -m benchmarks.naive MODEL OUT`, what one writes with safetensors, torch and
  FlashInfer's row functions, with fsync at the end. It is slow: --naive-rounds says how often it
  runs.

Before each run the outputs of the last one are removed, everything dirty is written back, and the
model is evicted from the page cache; mincore(2) must then find none of its pages. The disk may
have caches of its own behind it. Libraries are imported just before, so that they come from the
page cache. The tensors of ours and of the naive converter are compared byte for byte, on a tiny
model and in the first round. After each run `sync` is timed once more on what it has written, to
see whether that was on the disk.

Times and memory are those that the kernel reports for the child process. A child starts with its
parent's peak memory, so this script stays small: it imports numpy and matplotlib not before it
needs them, and works through whatever takes memory in processes of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .common import (
    Usage,
    environment,
    made_model,
    make_model,
    model_files,
    our_command,
    run_child,
    run_module,
    scratch_folder,
    start_cold,
    sync_folder,
)
from .report import (
    Bar,
    Json,
    Panel,
    headline,
    parser_of,
    plot,
    say,
    table,
    where,
    write_json,
)

COMPARE_NBYTES = 16 * 2**20
MEMORY_CASES = ("1x64", "1x256", "3x64", "3x256")


def this_module(*arguments: str | Path) -> Usage:
    return run_module("benchmarks.convert", *arguments)


# --- the programs ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one program."""

    program: str
    round: int  # from 1
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    parts_s: dict[str, float]  # of the wall time, as the program itself reports or as measured
    left_to_sync_s: float = 0.0  # a `sync` of its output afterwards; about 0 if that was durable


def run_ours(model: Path, out: Path) -> tuple[Usage, dict[str, float]]:
    usage = run_child(our_command(), model, out, "--quiet", "--json")
    return usage, {"conversion": json.loads(usage.stdout)["seconds"]}


def run_before(model: Path, out: Path) -> tuple[Usage, dict[str, float]]:
    # -m finds the package in the current folder, before the one that is installed.
    command = (sys.executable, "-m", "fp4moe_convert", "convert", model, out, "--quiet", "--json")
    usage = run_child(*command, cwd=Path(os.environ[BEFORE]))
    return usage, {"conversion": json.loads(usage.stdout)["seconds"]}


def run_restore(converted: Path, out: Path) -> tuple[Usage, dict[str, float]]:
    command = (sys.executable, "-m", "fp4moe_convert", "restore")
    usage = run_child(*command, converted, out, "--quiet", "--json")
    return usage, {"restoration": json.loads(usage.stdout)["seconds"]}


def run_floor(model: Path, out: Path) -> tuple[Usage, dict[str, float]]:
    return run_module("benchmarks.raw_copy", model, out), {}


def run_cp(model: Path, out: Path) -> tuple[Usage, dict[str, float]]:
    copy = run_child("cp", "-r", model, out)
    sync = sync_folder(out)
    both = Usage(
        copy.wall_s + sync.wall_s,
        copy.cpu_s + sync.cpu_s,
        max(copy.peak_rss_bytes, sync.peak_rss_bytes),
        b"",
    )
    return both, {"cp": copy.wall_s, "sync": sync.wall_s}


def run_naive(model: Path, out: Path) -> tuple[Usage, dict[str, float]]:
    usage = run_module("benchmarks.naive", model, out)
    return usage, json.loads(usage.stdout)


PROGRAMS: dict[str, Callable[[Path, Path], tuple[Usage, dict[str, float]]]] = {
    "ours": run_ours,
    "before": run_before,
    "restore": run_restore,
    "floor": run_floor,
    "cp": run_cp,
    "naive": run_naive,
}
TITLES = {
    "ours": "fp4moe-convert",
    "before": "another checkout",
    "restore": "fp4moe restore",
    "floor": "raw direct copy",
    "cp": "cp -r, then sync",
    "naive": "naive converter",
}
COLORS = {
    "ours": "#1b7f5c",
    "before": "#6fb39b",
    "restore": "#8f6fb3",
    "floor": "#3d5a80",
    "cp": "#7a869a",
    "naive": "#c2703d",
}
BEFORE = "FP4MOE_BENCH_BEFORE"
"""Environment variable with the other checkout's folder."""


# --- the same bytes? ------------------------------------------------------------------------------


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file."""

    dtype: str
    shape: list[int]
    path: Path
    start: int  # from the first byte of the file
    nbytes: int


def compare(folders: Sequence[Path]) -> Json:
    """Hold every tensor of one model folder against the other's: name, dtype, shape and bytes.

    Raises:
        ValueError: which tensor differs, and in what.
    """
    left, right = (stored_tensors(folder) for folder in folders)
    if odd := sorted(left.keys() ^ right.keys()):
        raise ValueError(f"only one folder has {odd[0]!r} ({len(odd)} such tensors)")
    for name, a in left.items():
        b = right[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise ValueError(
                f"{name!r} is {a.dtype} {a.shape} in one, {b.dtype} {b.shape} in the other"
            )
        with a.path.open("rb", buffering=0) as file_a, b.path.open("rb", buffering=0) as file_b:
            for offset in range(0, a.nbytes, COMPARE_NBYTES):
                count = min(COMPARE_NBYTES, a.nbytes - offset)
                piece = os.pread(file_a.fileno(), count, a.start + offset)
                if len(piece) != count or piece != os.pread(
                    file_b.fileno(), count, b.start + offset
                ):
                    raise ValueError(f"{name!r} differs in bytes {offset} to {offset + count}")
    return {"tensors": len(left), "bytes": sum(tensor.nbytes for tensor in left.values())}


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header_nbytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_nbytes))
        header.pop("__metadata__", None)
        for name, info in header.items():
            start, stop = info["data_offsets"]
            tensors[name] = StoredTensor(
                info["dtype"], info["shape"], path, 8 + header_nbytes + start, stop - start
            )
    return tensors


# --- the same start for everybody -----------------------------------------------------------------


@dataclass
class Bench:
    """A model and the place beside it where the programs write."""

    model: Path
    scratch: Path
    converted: Path | None = None  # what the model is converted to, where that is restored
    cold: bool = True  # evict the source before each run
    pages: int = 0  # of the model
    evictions: int = 0  # times that none of them was left in the page cache

    def out(self, program: str) -> Path:
        return self.scratch / f"out-{program}"

    def run(self, program: str, number: int) -> Run:
        """Run a program once, the libraries warm. Its output stays."""
        source = self.model
        if program == "restore":
            assert self.converted is not None
            source = self.converted
        if self.cold:
            self.pages = start_cold(source)
            self.evictions += 1
        out = self.out(program)
        usage, parts = PROGRAMS[program](source, out)
        left = sync_folder(out).wall_s
        return Run(
            program,
            number,
            round(usage.wall_s, 3),
            round(usage.cpu_s, 3),
            usage.peak_rss_bytes,
            {name: round(seconds, 3) for name, seconds in parts.items()},
            round(left, 3),
        )

    def remove(self, program: str) -> None:
        shutil.rmtree(self.out(program), ignore_errors=True)


# --- the comparison -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ratio:
    """One program's figure over another's, round by round."""

    title: str
    values: list[float]


@dataclass
class Results:
    environment: Json
    conditions: Json
    runs: list[Run] = field(default_factory=list)

    def of(self, program: str) -> list[Run]:
        return [run for run in self.runs if run.program == program]

    def programs(self) -> list[str]:
        return [program for program in PROGRAMS if self.of(program)]

    def ratios(self) -> list[Ratio]:
        return [
            Ratio("wall, floor / ours", self.paired("floor", lambda run: run.wall_s, inverse=True)),
            Ratio("wall, ours / before", self.paired("before", lambda run: run.wall_s)),
            Ratio("CPU time, ours / before", self.paired("before", lambda run: run.cpu_s)),
            Ratio("peak RSS, ours / before", self.paired("before", lambda r: r.peak_rss_bytes)),
            Ratio(
                "wall, restore / ours",
                self.paired("restore", lambda run: run.wall_s, inverse=True),
            ),
            Ratio(
                "peak RSS, restore / ours",
                self.paired("restore", lambda run: run.peak_rss_bytes, inverse=True),
            ),
            Ratio("wall, ours / cp and sync", self.paired("cp", lambda run: run.wall_s)),
            Ratio("wall, ours / naive", self.paired("naive", lambda run: run.wall_s)),
            Ratio("start-up aside, ours / naive", self.paired("naive", seconds_without_start_up)),
            Ratio("CPU time, ours / naive", self.paired("naive", lambda run: run.cpu_s)),
            Ratio("peak RSS, ours / naive", self.paired("naive", lambda run: run.peak_rss_bytes)),
        ]

    def paired(
        self, other: str, figure: Callable[[Run], float], *, inverse: bool = False
    ) -> list[float]:
        ours = {run.round: figure(run) for run in self.of("ours")}
        ratios = [ours[run.round] / figure(run) for run in self.of(other)]
        return [round(1 / ratio if inverse else ratio, 4) for ratio in ratios]

    def as_json(self) -> Json:
        nbytes = self.environment["model_bytes"]
        return {
            "environment": self.environment,
            "conditions": self.conditions,
            "summary": {
                program: {
                    **spread("wall_s", [run.wall_s for run in self.of(program)]),
                    "median_cpu_s": round(median(run.cpu_s for run in self.of(program)), 3),
                    "max_peak_rss_bytes": max(run.peak_rss_bytes for run in self.of(program)),
                    "bytes_per_s": round(nbytes / median(x.wall_s for x in self.of(program))),
                    "runs": len(self.of(program)),
                }
                for program in self.programs()
            },
            "ratios": {
                ratio.title: {"median": round(median(ratio.values), 4), "rounds": ratio.values}
                for ratio in self.ratios()
                if ratio.values
            },
            "runs": [asdict(run) for run in self.runs],
        }


def seconds_without_start_up(run: Run) -> float:
    """What each says of itself, from when its modules are loaded."""
    return run.parts_s["conversion" if run.program == "ours" else "work"]


def spread(name: str, values: Sequence[float]) -> Json:
    return {
        f"min_{name}": min(values),
        f"median_{name}": round(median(values), 3),
        f"max_{name}": max(values),
    }


def compare_programs(arguments: argparse.Namespace, scratch: Path) -> Results:
    if arguments.naive_rounds:
        check_on_tiny(scratch / "tiny")
    model: Path = arguments.model or made_model(
        scratch / "model", arguments.layers, arguments.experts, arguments
    )
    bench = Bench(model, scratch)
    if arguments.restore:
        bench.converted = scratch / "converted"
        run_ours(model, bench.converted)
    nbytes = sum(path.stat().st_size for path in model_files(model))
    free = shutil.disk_usage(scratch).free
    # Ours and the naive one's lie side by side until they are compared.
    if free < 2.1 * nbytes:
        raise OSError(
            f"{free / 1e9:.1f} GB free in the work folder, needs {2.1 * nbytes / 1e9:.1f}"
        )
    results = Results(environment(scratch, nbytes), {})
    compared: Json | None = None
    for number in range(1, arguments.rounds + 1):
        check = number == 1 and arguments.naive_rounds > 0
        for program in PROGRAMS:
            if program == "naive" and number > arguments.naive_rounds:
                continue
            if program == "before" and BEFORE not in os.environ:
                continue
            if program == "restore" and bench.converted is None:
                continue
            run = bench.run(program, number)
            results.runs.append(run)
            say(f"round {number}/{arguments.rounds}  {describe(run)}")
            if program == "naive" and check:
                outs = [bench.out("ours"), bench.out("naive")]
                compared = json.loads(this_module("--compare", *outs).stdout)
                say(f"ours and naive: all {compared['tensors']} tensors are equal")
                bench.remove("ours")
            if not (program == "ours" and check):
                bench.remove(program)
    results.conditions = {
        "order": "alternating, " + ", ".join(results.programs()),
        "model_pages": bench.pages,
        "starts_with_no_model_page_cached": bench.evictions,
        "compared_with_naive": compared,
        "rss_floor_bytes": rss_floor(),
    }
    return results


def check_on_tiny(tiny: Path) -> None:
    """Fail early if something is missing, or ours and the naive one's outputs differ."""
    say("checking on a tiny model; its gate and up scales differ on purpose")
    model = tiny / "model"
    sizes = ("--layers", "2", "--experts", "3", "--hidden", "256", "--intermediate", "128")
    make_model(model, *sizes, "--differing-scales")
    for program in ("ours", "naive"):
        PROGRAMS[program](model, tiny / program)
    this_module("--compare", tiny / "ours", tiny / "naive")
    shutil.rmtree(tiny)


def rss_floor() -> int:
    """Peak memory below which no child's can be seen."""
    return run_child("true").peak_rss_bytes


# --- peak memory ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryRun:
    """Our peak for one size of model."""

    layers: int
    experts: int
    model_bytes: int
    wall_s: float
    peak_rss_bytes: int


def measure_memory(arguments: argparse.Namespace, scratch: Path) -> Json:
    runs: list[MemoryRun] = []
    skipped: list[str] = []
    for case in arguments.memory:
        layers, experts = map(int, case.split("x"))
        needed = 2.1 * planned_nbytes(layers, experts, arguments)
        free = shutil.disk_usage(scratch).free
        if free < needed:
            skipped.append(f"{case}: {free / 1e9:.1f} GB free, needs {needed / 1e9:.1f}")
            say(f"skipped {skipped[-1]}")
            continue
        model = made_model(scratch / "model", layers, experts, arguments)
        bench = Bench(model, scratch)
        nbytes = sum(path.stat().st_size for path in model_files(model))
        run = bench.run("ours", 1)
        runs.append(MemoryRun(layers, experts, nbytes, run.wall_s, run.peak_rss_bytes))
        say(f"{case}  {describe(run)}")
        bench.remove("ours")
        shutil.rmtree(model)
    peaks = [run.peak_rss_bytes for run in runs]
    return {
        "environment": environment(scratch, max((run.model_bytes for run in runs), default=0)),
        "runs": [asdict(run) for run in runs],
        "skipped": skipped,
        "spread_percent": round(100 * (max(peaks) / min(peaks) - 1), 1) if peaks else None,
    }


def planned_nbytes(layers: int, experts: int, sizes: argparse.Namespace) -> int:
    from tests.support.make_checkpoint import Spec, tensors_of

    spec = Spec(
        layers=layers,
        dense_layers=0,
        experts=experts,
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
    )
    return sum(tensor.nbytes for tensor in tensors_of(spec))


# --- saying it ------------------------------------------------------------------------------------


def describe(run: Run) -> str:
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in run.parts_s.items())
    return (
        f"{TITLES[run.program]:17} {run.wall_s:7.2f} s ({parts}; left to sync "
        f"{run.left_to_sync_s:.2f}), CPU {run.cpu_s:.2f} s, {run.peak_rss_bytes / 1e6:.0f} MB"
    )


def comparison_lines(results: Results) -> Iterator[str]:
    content = results.as_json()
    conditions = results.conditions
    yield headline(results.environment)
    yield (
        f"before each of {conditions['starts_with_no_model_page_cached']} starts: nothing dirty, "
        f"0 of the model's {conditions['model_pages']} pages in the page cache"
    )
    if compared := conditions["compared_with_naive"]:
        yield (
            f"ours and naive: {compared['tensors']} tensors, {compared['bytes'] / 1e9:.2f} GB, "
            "equal byte for byte"
        )
    yield ""
    yield from table(
        ("wall, CPU, peak RSS", "runs", "min s", "median s", "max s", "CPU s", "MB", "GB/s"),
        [
            (
                TITLES[program],
                str(row["runs"]),
                f"{row['min_wall_s']:.2f}",
                f"{row['median_wall_s']:.2f}",
                f"{row['max_wall_s']:.2f}",
                f"{row['median_cpu_s']:.2f}",
                peak(row["max_peak_rss_bytes"], results),
                f"{row['bytes_per_s'] / 1e9:.2f}",
            )
            for program, row in content["summary"].items()
        ],
    )
    yield ""
    yield from table(
        ("same bytes, same round", "median", "rounds"),
        [
            (title, f"{ratio['median']:.3f}", " ".join(f"{x:.3f}" for x in ratio["rounds"]))
            for title, ratio in content["ratios"].items()
        ],
    )


def peak(nbytes: float, results: Results) -> str:
    """MB; a child that takes less memory than this script does cannot be told from it."""
    floor = results.conditions["rss_floor_bytes"]
    return f"{'<= ' if nbytes <= 1.05 * floor else ''}{nbytes / 1e6:.0f}"


def memory_lines(content: Json) -> Iterator[str]:
    yield where(content["environment"])
    yield from table(
        ("MoE layers x experts", "model GB", "wall s", "peak MB"),
        [
            (
                f"{run['layers']} x {run['experts']}",
                f"{run['model_bytes'] / 1e9:.2f}",
                f"{run['wall_s']:.2f}",
                f"{run['peak_rss_bytes'] / 1e6:.0f}",
            )
            for run in content["runs"]
        ],
    )
    yield f"spread of the peak: {content['spread_percent']} %"
    yield from (f"skipped {text}" for text in content["skipped"])


def panels(results: Results) -> list[Panel]:
    """Wall time, and peak memory beside it."""

    def bars(unit: str, figure_of: Callable[[Run], float]) -> Iterator[Bar]:
        for program in results.programs():
            values = [figure_of(run) for run in results.of(program)]
            middle = median(values)
            label = f"{middle:.1f}" if unit == "s" else peak(middle * 1e6, results)
            yield Bar(TITLES[program], COLORS[program], values, f"{label} {unit}")

    return [
        Panel("Wall time, durable on disk", "s", list(bars("s", lambda run: run.wall_s))),
        Panel(
            "Peak memory of the process",
            "MB",
            list(bars("MB", lambda run: run.peak_rss_bytes / 1e6)),
        ),
    ]


# --- command line ---------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, help="an existing model folder; default: make one")
    parser.add_argument("--layers", type=int, default=1, help="MoE layers to make (1)")
    parser.add_argument("--experts", type=int, default=256, help="experts of a layer (256)")
    parser.add_argument("--hidden", type=int, default=7168, help="(7168, as DeepSeek-V3)")
    parser.add_argument("--intermediate", type=int, default=2048, help="(2048, as DeepSeek-V3)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of ours and of cp (5)")
    parser.add_argument("--naive-rounds", type=int, default=2, help="of these with naive, too (2)")
    parser.add_argument("--restore", action="store_true", help="restorations take part")
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument(
        "--memory",
        nargs="*",
        metavar="LxE",
        help="instead: peak memory for each number of layers and experts "
        f"({' '.join(MEMORY_CASES)}), larger ones if the disk has room",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="for everything large, on the disk to be measured; all of it is removed at the end",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a PNG of the comparison")
    # This script's own child.
    parser.add_argument("--compare", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.before:
        os.environ[BEFORE] = str(arguments.before.resolve())
    with_naive = arguments.naive_rounds and arguments.memory is None
    if with_naive and not importlib.util.find_spec("flashinfer"):
        parser.error("the naive converter needs the extra `flashinfer`; or pass --naive-rounds 0")
    if arguments.rounds < 1 or arguments.naive_rounds < 0:
        parser.error("--rounds is at least 1, --naive-rounds at least 0")
    if arguments.memory is not None:
        arguments.memory = arguments.memory or list(MEMORY_CASES)
        if not all(re.fullmatch(r"\d+x\d+", case) for case in arguments.memory):
            parser.error("--memory takes sizes such as 1x64")
        if arguments.plot or arguments.model:
            parser.error("--memory goes without --plot and --model")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib (dependency group bench)")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.compare:
        print(json.dumps(compare(arguments.compare)))
        return
    results: Results | None = None
    with scratch_folder(arguments.work_dir) as scratch:
        if arguments.memory is not None:
            content = measure_memory(arguments, scratch)
            lines = memory_lines(content)
        else:
            results = compare_programs(arguments, scratch)
            content, lines = results.as_json(), comparison_lines(results)
    print("\n".join(lines))
    write_json(arguments.json, content)
    if arguments.plot and results:
        plot(
            arguments.plot,
            f"{headline(results.environment)}: model evicted from the page cache before each run\n"
            "dots are runs, bars medians",
            panels(results),
        )


if __name__ == "__main__":
    main()
