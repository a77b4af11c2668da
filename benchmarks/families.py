"""Compare kinds of checkpoints: the time for a byte to convert and restore them, and the memory.

    python -m benchmarks.families                 # models of 3 GB, by turns: a quarter of an hour
    python -m benchmarks.families --warm --work-dir /dev/shm --hidden 4096 --gb 1.3    # no disk

A kind is a way of its own through the program: names, scales, experts without a gate, what stands
beside the experts. The models are those of `tests/support/model_zoo.py`, all of one width, with as
many experts as it takes to make them equally large, because every run has a start and a last sync.
They take turns, and turns at being the first, so that a disk that is slow for a while is slow for
all of them; files are evicted from the page cache before each run, and synced by the program, as in
`benchmarks.convert`. In memory there is no disk, and what is left is the program's own time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from fp4moe_convert.source.text_config import EXPERT_COUNT_KEYS

from .common import environment, model_files, scratch_folder
from .convert import Bench, Run
from .report import Json, parser_of, say, table, where, write_json

if TYPE_CHECKING:
    from tests.support.model_zoo import Family

KINDS = {
    "deepseek_v3": "gate_proj, up_proj, down_proj",
    "minimax_m2": "w1, w3, w2",
    "nemotron_h": "without a gate",
    "step3p5": "all experts in one tensor",
    "llama4": "all experts in one tensor, transposed",
    "deepseek_v3-ct": "compressed-tensors",
    "qwen3_5_moe-mixed": "mixed precision",
    "deepseek_v4": "amid FP8",
}
"""What is special, by the model's name in the zoo. The others are compared with the first."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run with one kind of model."""

    kind: str
    model_bytes: int
    run: Run

    @property
    def seconds_for_gb(self) -> float:
        return self.run.wall_s / self.model_bytes * 1e9

    @property
    def cpu_seconds_for_gb(self) -> float:
        return self.run.cpu_s / self.model_bytes * 1e9


def make_model(folder: Path, kind: str, arguments: argparse.Namespace) -> None:
    from tests.support.model_zoo import FAMILIES, tensors_of_family, write_family

    def with_experts(count: int) -> Family:
        spec = replace(
            family.spec,
            hidden=arguments.hidden,
            intermediate=arguments.intermediate,
            experts=count,
        )
        counts = {
            key: count if key in EXPERT_COUNT_KEYS and value else value
            for key, value in family.config.items()
        }
        return replace(family, spec=spec, config=counts)

    def nbytes(count: int) -> int:
        return sum(tensor.nbytes for tensor in tensors_of_family(with_experts(count)))

    family = FAMILIES[kind]
    few, more = nbytes(1), nbytes(2)
    write_family(folder, with_experts(1 + round((arguments.gb * 1e9 - few) / (more - few))))


def measure(arguments: argparse.Namespace, scratch: Path) -> list[Measured]:
    benches = {}
    for kind in KINDS:
        say(f"making {kind}")
        (scratch / kind).mkdir()
        bench = Bench(scratch / kind / "model", scratch / kind, cold=not arguments.warm)
        make_model(bench.model, kind, arguments)
        bench.converted = bench.out("ours")
        benches[kind] = bench
    runs = []
    for number in range(1, arguments.rounds + 1):
        first = number % len(KINDS)
        for kind in [*list(KINDS)[first:], *list(KINDS)[:first]]:
            bench = benches[kind]
            nbytes = sum(path.stat().st_size for path in model_files(bench.model))
            for program in ("ours", "restore"):
                run = bench.run(program, number)
                runs.append(Measured(kind, nbytes, run))
                say(f"round {number}/{arguments.rounds}  {kind}  {program}  {run.wall_s:.2f} s")
            bench.remove("restore")
            bench.remove("ours")
    return runs


def lines(runs: list[Measured]) -> Iterator[str]:
    """Medians; the ratios are medians of those of each round."""

    def of(kind: str, program: str) -> list[Measured]:
        return [m for m in runs if (m.kind, m.run.program) == (kind, program)]

    def ratio(some: list[Measured], others: list[Measured]) -> str:
        pairs = zip(some, others, strict=True)
        return f"{median(a.seconds_for_gb / b.seconds_for_gb for a, b in pairs):.2f}"

    first = next(iter(KINDS))
    rows = []
    for kind, special in KINDS.items():
        ours, restored = of(kind, "ours"), of(kind, "restore")
        rows.append(
            (
                f"{kind}: {special}",
                f"{ours[0].model_bytes / 1e9:.2f}",
                f"{median(m.seconds_for_gb for m in ours):.2f}",
                ratio(ours, of(first, "ours")),
                f"{median(m.cpu_seconds_for_gb for m in ours):.2f}",
                f"{max(m.run.peak_rss_bytes for m in ours) / 1e6:.0f}",
                f"{median(m.seconds_for_gb for m in restored):.2f}",
                ratio(restored, ours),
                f"{max(m.run.peak_rss_bytes for m in restored) / 1e6:.0f}",
            )
        )
    head = (
        *("kind", "GB", "convert s/GB", f"to {first}", "CPU s/GB", "MB"),
        *("restore s/GB", "to convert", "MB"),
    )
    yield from table(head, rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--gb", type=float, default=3, help="size of a model")
    parser.add_argument("--warm", action="store_true", help="leave files in the page cache")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    with scratch_folder(arguments.work_dir) as scratch:
        runs = measure(arguments, scratch)
        surroundings: Json = environment(scratch, max(m.model_bytes for m in runs))
    print(where(surroundings))
    print("\n".join(lines(runs)))
    write_json(arguments.json, {"environment": surroundings, "runs": [asdict(run) for run in runs]})


if __name__ == "__main__":
    main()
