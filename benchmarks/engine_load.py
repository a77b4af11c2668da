"""Load whole models onto GPUs through an engine's own loader: original against converted.

    python -m benchmarks.engine_load sglang        # in SGLang's environment, on a Blackwell GPU
    python -m benchmarks.engine_load vllm --tp 1 8 --loaders all --cold 2 --copies
    python -m benchmarks.engine_load sglang --tp 2 --gpus 2       # both ranks at once
    python -m benchmarks.engine_load sglang vllm --stand-ins      # on another NVIDIA GPU

It makes a model of DeepSeek-V3's width (a dense layer and some MoE layers of 256 experts), converts
it, and loads it again and again, in turns:

- **original**: the engine as it is. It copies each expert's tensors and shuffles each layer.
- **plain**: the converted model with FP4MOE_LOAD_THREADS=0, through torch's own copies.
- **converted**: the converted model as users load it.

With `--gpus 1` a size of 1 is loaded whole, and of a larger one the last rank; with more GPUs, all
ranks of a size that has a GPU for each load at once, a process each, and the slowest counts. With
`--processes` there are more of them than GPUs, which they share.

Included: all that the engine's loader does, from a configuration to a model that could serve, and a
synchronised GPU. Not included: the process's start, reading config.json, the tokenizer, the KV
cache, CUDA graphs, warm-up. Every kind of load is done once before it is timed. `--fresh` also
times the first load of a process, which is the one that a server makes, once the kernel that
FlashInfer compiles is there. After every load a checksum of each tensor that the model holds is
compared with the original's.

`--stand-ins` (benchmarks/engine_stand_ins.py) is for a machine without a Blackwell GPU, or without
the engines' compiled packages. Loading needs none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fp4moe_convert import convert
from tests.support.make_checkpoint import Spec, make_checkpoint

from .common import cached_pages, environment, evict, installed, scratch_folder
from .engine_worker import LOADERS, Job
from .raw_copy import read_folder
from .report import parser_of, say, table, write_json

WAYS = {"original": None, "plain": "0", "converted": None}
"""Each way's FP4MOE_LOAD_THREADS."""
SAMPLE_S = 0.005


# --- memory while a model is loaded ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """How far memory rose while a model was loaded, in bytes; ranks added up."""

    anonymous: int
    """Of the processes: RssAnon."""
    machine: int
    """Of the whole machine, other than page cache; memory that CUDA pins is only seen here."""
    gpu: int | None
    """Of the GPUs, as the driver sees them: what was not allocated through torch counts too. None:
    the driver does not tell."""


class Watch:
    """Samples memory from this process, which is idle meanwhile, not to disturb those that load."""

    def __init__(self, processes: Sequence[int], gpus: Iterable[int]) -> None:
        self._processes, self._gpus = processes, [Gpu(number) for number in gpus]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._before = self._now()
        self._peak = self._before

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._end.set()
        self._thread.join()

    def risen(self) -> Memory:
        anonymous, machine, gpu = (
            now - before for now, before in zip(self._peak, self._before, strict=True)
        )
        return Memory(anonymous, machine, gpu if any(g.known for g in self._gpus) else None)

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_S):
            self._peak = tuple(map(max, self._peak, self._now()))

    def _now(self) -> tuple[int, ...]:
        info = read_sizes(Path("/proc/meminfo"))
        cache = sum(info[key] for key in ("MemFree", "Buffers", "Cached", "SReclaimable"))
        return (
            sum(read_sizes(Path(f"/proc/{pid}/status"))["RssAnon"] for pid in self._processes),
            info["MemTotal"] - cache,
            sum(gpu.used() for gpu in self._gpus),
        )


class Gpu:
    """A GPU's memory, asked of its driver; 0 where there is none to ask."""

    def __init__(self, number: int) -> None:
        import pynvml

        self._nvml = pynvml
        self.known = True
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        except pynvml.NVMLError:
            self.known = False

    def used(self) -> int:
        if not self.known:
            return 0
        used: int = self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used
        return used


def read_sizes(path: Path) -> dict[str, int]:
    """Bytes, from lines such as ``MemFree: 12 kB``."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


# --- processes that load --------------------------------------------------------------------------


class Worker:
    """A process of an engine, on one GPU."""

    def __init__(
        self, engine: str, gpu: int, ranks: int, log: Path, options: Sequence[str]
    ) -> None:
        """
        Args:
            ranks: how many processes like this one there are, on all GPUs.
        """
        self.gpu, self.log = gpu, log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine_worker", engine, *options],
                env=os.environ | environment_of_rank(gpu, ranks),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
            )
        self.pid = self._process.pid

    def send(self, content: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(content) + "\n")

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            lines = self.log.read_text().splitlines()[-15:]
            raise RuntimeError("\n".join(("a process of an engine died:", *lines)))
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.kill()
        self._process.wait()


def environment_of_rank(gpu: int, ranks: int) -> dict[str, str]:
    """The variables of a process that shares its host's cores with others like it."""
    cores = len(os.sched_getaffinity(0))
    return {
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "HF_HUB_OFFLINE": "1",
        "LOCAL_WORLD_SIZE": str(ranks),  # as torchrun has it
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),  # as vLLM has it
    }


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is loaded; several loads share one."""

    engine: str
    loader: str
    tp_size: int
    way: str
    cold: bool = False
    fresh: bool = False
    """In a process that has loaded nothing before."""
    counts_copies: bool = False
    warms_up: bool = False

    def __str__(self) -> str:
        marks = ("cold", "fresh", "counts_copies", "warms_up")
        names = [self.engine, self.loader, f"T = {self.tp_size}", self.way]
        return ", ".join((*names, *(mark for mark in marks if getattr(self, mark))))


@dataclass(frozen=True, slots=True)
class Measured:
    """One load, of all ranks that took part. Sizes are those of the rank that has most."""

    setting: Setting
    ranks: int
    seconds: float = 0.0
    weights: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    memory: Memory | None = None
    copies: int | None = None
    error: str | None = None
    """Why there is nothing to measure."""


class Bench:
    """The models, what was measured, and what the original's tensors look like."""

    def __init__(self, models: Path, links: Path) -> None:
        self.models, self.links = models, links
        self.runs: list[Measured] = []
        self.layers = len(section_of(models / "converted")["layers"])
        self._expected: dict[tuple[str, int, int], dict[str, str]] = {}

    def load(self, setting: Setting, workers: Sequence[Worker]) -> None:
        """Load once, compare, and note what was measured.

        Raises:
            SystemExit: a tensor is not as it is in the original's model.
        """
        folder = self.models / ("original" if setting.way == "original" else "converted")
        whole = setting.tp_size <= len(workers)
        ranks = range(setting.tp_size) if whole else [setting.tp_size - 1]
        workers = workers[: len(ranks)]
        for worker, rank in zip(workers, ranks, strict=True):
            link = self._link(folder)
            job = Job(
                str(link),
                setting.loader,
                setting.tp_size,
                rank,
                WAYS[setting.way],
                setting.counts_copies,
                sharing=sum(other.gpu == worker.gpu for other in workers),
            )
            worker.send(asdict(job))
        answers = [worker.answer() for worker in workers]
        memory = None
        if any(answer != "ready" for answer in answers) and len(answers) > 1:
            sys.exit(f"{setting}: not all ranks are ready: {answers}")
        if answers[0] == "ready":
            if setting.cold:
                evict_model(folder)
            with Watch([w.pid for w in workers], {w.gpu for w in workers}) as watch:
                for worker in workers:
                    worker.send("go")
                answers = [worker.answer() for worker in workers]
            memory = watch.risen()
        measured = Measured(setting, len(ranks), memory=memory)
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            measured = replace(measured, error=errors[0])
        else:
            for rank, answer in zip(ranks, answers, strict=True):
                self._check(setting, rank, answer)
            most = max(answers, key=lambda answer: answer["peak_allocated"])
            measured = replace(
                measured,
                seconds=max(answer["seconds"] for answer in answers),
                **{key: most[key] for key in ("weights", "peak_allocated", "peak_reserved")},
                copies=most["copies"],
            )
        self.runs.append(measured)
        say(described(measured))

    def _link(self, folder: Path) -> Path:
        """A path of its own: SGLang keeps configurations by path, and changes them."""
        link = self.links / f"{folder.name}-{len(list(self.links.iterdir()))}"
        link.symlink_to(folder.resolve())
        return link

    def _check(self, setting: Setting, rank: int, answer: Mapping[str, Any]) -> None:
        taken_over = 0 if setting.way == "original" else self.layers
        if answer["taken_over"] != taken_over:
            sys.exit(f"{setting}: {answer['taken_over']} layers taken over, expected {taken_over}")
        found: dict[str, str] = answer["checksums"]
        key = setting.engine, setting.tp_size, rank
        if setting.way == "original":
            expected = self._expected.setdefault(key, found)
        else:
            expected = self._expected[key]
        names = expected.keys() | found.keys()
        differing = sorted(name for name in names if expected.get(name) != found.get(name))
        if differing:
            name = differing[0]
            sys.exit(
                f"{setting}: {len(differing)} of {len(names)} tensors differ from the original's, "
                f"{name}: {found.get(name)}, not {expected.get(name)}"
            )


def described(measured: Measured) -> str:
    if measured.error:
        return f"{measured.setting}: {measured.error}"
    if measured.copies is not None:
        return f"{measured.setting}: {measured.copies} copies"
    return f"{measured.setting}: {measured.seconds:.2f} s"


# --- models ---------------------------------------------------------------------------------------


def make_models(folder: Path, spec: Spec) -> None:
    """``original`` and ``converted`` in a folder, unless they are there."""
    original, converted = folder / "original", folder / "converted"
    if (converted / "model.safetensors.index.json").exists():
        return
    say(f"making {original}")
    make_checkpoint(original, spec)
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))  # for SGLang
    say(f"converting to {converted}")
    convert(original, converted, direct_io=False)  # leaves both in the page cache
    os.sync()


def section_of(folder: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return section["quantization_config"]


def evict_model(folder: Path) -> None:
    """Drop a model's weights from the page cache.

    Raises:
        RuntimeError: something holds them there.
    """
    shards = sorted(folder.glob("*.safetensors"))
    for _ in range(5):
        for shard in shards:
            evict(shard)
        if not (left := sum(cached_pages(shard)[0] for shard in shards)):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{left} pages of {folder} stay in the page cache")


def read_rate(folder: Path) -> float:
    """Bytes per second at which a model can be read from its disk, past the page cache."""
    evict_model(folder)
    started = time.perf_counter()
    return read_folder(folder) / (time.perf_counter() - started)


# --- the run --------------------------------------------------------------------------------------


def groups(arguments: argparse.Namespace) -> Iterator[list[Setting]]:
    """All loads, in order; the original before what is compared with it. Each group has processes
    of its own."""
    for engine in arguments.engines:
        for loader in loaders_of(engine, arguments.loaders):
            yield list(settings(arguments, engine, loader))
        if arguments.fresh:
            for way in arguments.ways:
                yield [Setting(engine, "default", arguments.tp[0], way, fresh=True)]


def settings(arguments: argparse.Namespace, engine: str, loader: str) -> Iterator[Setting]:
    for tp_size in arguments.tp:
        for turn in range(arguments.rounds + 1):
            for way in arguments.ways:
                yield Setting(engine, loader, tp_size, way, warms_up=not turn)
        for _ in range(arguments.cold):
            for way in arguments.ways:
                yield Setting(engine, loader, tp_size, way, cold=True)
        if arguments.copies:
            for way in arguments.ways:
                yield Setting(engine, loader, tp_size, way, counts_copies=True)


def loaders_of(engine: str, wanted: Sequence[str]) -> list[str]:
    return [name for name in LOADERS[engine] if wanted == ["all"] or name in wanted]


def print_table(runs: Sequence[Measured]) -> None:
    """Of each setting the median time and the largest memory, in GB."""
    head = (
        "load",
        "s",
        "weights",
        "allocated",
        "reserved",
        "GPU",
        "anonymous",
        "machine",
        "copies",
    )
    rows = []
    for setting in dict.fromkeys(run.setting for run in runs):
        if setting.warms_up or setting.counts_copies:
            continue
        some = [run for run in runs if run.setting == setting]
        if failed := [run.error for run in some if run.error]:
            rows.append((str(setting), failed[0][:60], *[""] * 7))
            continue
        counted = [r.copies for r in runs if r.setting == replace(setting, counts_copies=True)]
        memory = [asdict(run.memory) for run in some if run.memory]
        sizes = [
            max(getattr(run, key) for run in some)
            for key in ("weights", "peak_allocated", "peak_reserved")
        ] + [max(each[key] or 0 for each in memory) for key in ("gpu", "anonymous", "machine")]
        rows.append(
            (
                str(setting),
                f"{median(run.seconds for run in some):.2f}",
                *(f"{size / 1e9:.2f}" for size in sizes),
                str(counted[0]) if counted else "",
            )
        )
    print("\n".join(table(head, rows)))


def surroundings(arguments: argparse.Namespace, spec: Spec) -> dict[str, Any]:
    shards = (arguments.models / "converted").glob("*.safetensors")
    where = environment(arguments.models, sum(shard.stat().st_size for shard in shards))
    packages = (*arguments.engines, "fastsafetensors", "runai-model-streamer", "instanttensor")
    where["versions"] |= {name: version(name) for name in packages if installed(name)}
    where |= {"model": asdict(spec), "stand_ins": arguments.stand_ins, "gpus": arguments.gpus}
    where["gpu"] = torch.cuda.get_device_name()
    if arguments.cold:
        where["disk_bytes_per_second"] = read_rate(arguments.models / "converted")
    return where


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("engines", nargs="+", choices=LOADERS)
    add("--tp", nargs="+", type=int, default=[1, 8], help="tensor-parallel sizes; 1 8")
    add("--gpus", type=int, default=1)
    add("--processes", type=int, help="at once; as many as GPUs")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--loaders", nargs="+", default=["default"], help="names in engine_worker.py, or all")
    add("--rounds", type=int, default=3)
    add("--cold", type=int, default=0, metavar="ROUNDS", help="also with an empty page cache")
    add("--fresh", action="store_true", help="also as the first load of a process")
    add("--copies", action="store_true", help="also count copies to the GPU, by the profiler")
    add("--layers", type=int, default=3, help="MoE layers")
    add("--experts", type=int, default=256)
    add("--hidden", type=int, default=7168)
    add("--intermediate", type=int, default=2048)
    add("--models", type=Path, metavar="DIR", help="make the models here, and leave them")
    add("--stand-ins", action="store_true")
    add("--log", type=Path, metavar="PATH", help="what the engines print")
    add("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    if arguments.ways[0] != "original":
        parser.error("--ways begins with original, which the others are compared with")
    known = {"all"}.union(*(LOADERS[engine] for engine in arguments.engines))
    if unknown := set(arguments.loaders) - known:
        parser.error(f"--loaders: {min(unknown)} is none of {', '.join(sorted(known))}")
    sizes = ("layers", "experts", "hidden", "intermediate")
    spec = Spec(**{size: getattr(arguments, size) for size in sizes})
    if arguments.models:
        arguments.models.mkdir(parents=True, exist_ok=True)
    with scratch_folder(arguments.models or Path(tempfile.gettempdir())) as scratch:
        arguments.models = arguments.models or scratch
        make_models(arguments.models, spec)
        report = surroundings(arguments, spec)
        print(json.dumps(report, indent=1))
        links = scratch / "links"
        links.mkdir()
        bench = Bench(arguments.models, links)
        for group in groups(arguments):
            with started(arguments, group[0].engine, arguments.log or scratch / "log") as workers:
                for setting in group:
                    bench.load(setting, workers)
                    runs = [asdict(run) for run in bench.runs]
                    write_json(arguments.json, {"environment": report, "runs": runs})
    print_table(bench.runs)


@contextmanager
def started(arguments: argparse.Namespace, engine: str, log: Path) -> Iterator[list[Worker]]:
    """Processes, on the GPUs in turn; they import the engine at the same time."""
    options = ["--stand-ins"] if arguments.stand_ins else []
    processes = arguments.processes or arguments.gpus
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(engine, number % arguments.gpus, processes, log, options))
            for number in range(processes)
        ]
        for worker in workers:
            worker.answer()
        yield workers


if __name__ == "__main__":
    main()
