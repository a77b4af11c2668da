"""What it costs to resume a conversion that was killed when nine tenths of it were done.

    python -m benchmarks.resume                            # a model of 32 GB, half an hour
    python -m benchmarks.resume --layers 4 --rounds 1      # 6 GB, two minutes
    python -m benchmarks.resume --json resume.json

In each round a model is converted whole; converted again and killed (SIGKILL) as soon as its files
hold nine tenths of the bytes; and converted on. The cost is the time of that last run over the time
of the first, both as whole processes from a cold page cache. What was in work when the kill came is
done again, so the cost depends on how many shards there are: DeepSeek-V3 has about a hundred of
5 GB, this model a hundred of --max-shard-size. Both results' manifests, with the checksum of every
tensor, must be equal, and in the first round every byte of the resumed one is verified.

It takes room for the model twice over in --work-dir.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from fp4moe_convert import verify

from .common import (
    environment,
    made_model,
    model_files,
    our_command,
    run_child,
    scratch_folder,
    start_cold,
)
from .report import Json, headline, parser_of, say, write_json

DONE = 0.9
POLL_SECONDS = 0.02


def convert_whole(command: list[str | Path], model: Path) -> tuple[float, Json]:
    """Wall time of a run, cold, and what it reports."""
    start_cold(model)
    usage = run_child(*command)
    return usage.wall_s, json.loads(usage.stdout)


def convert_and_kill(command: list[str | Path], model: Path, out: Path, nbytes: int) -> float:
    """Kill a run once its files hold ``nbytes`` on the disk; the wall time until then.

    Raises:
        RuntimeError: it ended before.
    """
    start_cold(model)
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while held_nbytes(out) < nbytes:
            if process.poll() is not None:
                raise RuntimeError("the run ended before it could be killed")
            time.sleep(POLL_SECONDS)
        process.kill()
    return time.perf_counter() - started


def held_nbytes(folder: Path) -> int:
    """Bytes that the files of a folder have been given; those with holes have fewer than a size."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += 512 * path.stat().st_blocks
        except FileNotFoundError:  # it has just got its final name
            continue
    return total


def measure(arguments: argparse.Namespace, scratch: Path) -> Json:
    model = made_model(scratch / "model", arguments.layers, arguments.experts, arguments)
    out = scratch / "out"
    nbytes = sum(path.stat().st_size for path in model_files(model))
    command: list[str | Path] = [
        *(our_command(), model, out, "--quiet", "--json"),
        *("--max-shard-size", arguments.max_shard_size),
    ]
    rounds: list[Json] = []
    for number in range(1, arguments.rounds + 1):
        whole_s, report = convert_whole(command, model)
        expected = (out / "fp4moe_manifest.json").read_bytes()
        shutil.rmtree(out)
        killed_s = convert_and_kill(command, model, out, int(DONE * report["bytes_out"]))
        resumed_s, resumed = convert_whole(command, model)
        if (out / "fp4moe_manifest.json").read_bytes() != expected:
            raise RuntimeError("the resumed run's manifest is not that of the whole one")
        if number == 1:
            verify(out, model)
        shutil.rmtree(out)
        rounds.append(
            {
                "whole_s": round(whole_s, 3),
                "until_killed_s": round(killed_s, 3),
                "resumed_s": round(resumed_s, 3),
                "cost": round(resumed_s / whole_s, 4),
                "shards": resumed["shards"],
                "shards_kept": resumed["shards_kept"],
            }
        )
        say(f"round {number}/{arguments.rounds}  {rounds[-1]}")
    return {
        "environment": environment(scratch, nbytes),
        "max_shard_size": arguments.max_shard_size,
        "median_cost": round(median(entry["cost"] for entry in rounds), 4),
        "rounds": rounds,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=20, help="MoE layers to make (20)")
    parser.add_argument("--experts", type=int, default=64, help="experts of a layer (64)")
    parser.add_argument("--hidden", type=int, default=7168, help="(7168, as DeepSeek-V3)")
    parser.add_argument("--intermediate", type=int, default=2048, help="(2048, as DeepSeek-V3)")
    parser.add_argument("--max-shard-size", default="300MB", help="(300MB)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results as JSON")
    arguments = parser.parse_args()
    with scratch_folder(arguments.work_dir) as scratch:
        content = measure(arguments, scratch)
    print(headline(content["environment"]))
    print(f"resumed after nine tenths: {content['median_cost']:.1%} of a whole run (median)")
    write_json(arguments.json, content)


if __name__ == "__main__":
    main()
