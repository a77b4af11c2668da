#!/usr/bin/env python3
"""Kill conversions at random moments, run them again, and compare with an unbroken run.

    scripts/kill_harness.py                   # 200 kills, a few minutes
    scripts/kill_harness.py --kills 20 --seed 7

A small checkpoint is converted into many small shards, so that every phase takes its share of the
kills: claiming the folder, scattering, renaming, journal, copies, manifest, config, index. Half of
the kills (SIGKILL) come after a random time, half right before or after a random call that changes
the disk. After each the folder must not look finished unless it verifies; then the same command
runs again, and is perhaps killed again, until it ends. Its folder must equal the unbroken one's,
byte for byte and with no file more.

The interpreter, torch and FlashInfer are loaded once and each run is a fork: a run takes half a
second instead of four, and kills fall on our work rather than on imports.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashinfer  # noqa: F401 (before the forks)
from make_checkpoint import Spec, make_checkpoint

from fp4moe_convert import VerifyError, convert, verify
from fp4moe_convert.contract import INDEX_NAME

SPEC = Spec(layers=3, experts=4, hidden=256, intermediate=128, shards=5, vocab_size=256, mtp=True)
MAX_SHARD_NBYTES = 400_000
CALLS = ("pwrite", "write", "fsync", "rename", "unlink", "ftruncate", "mkdir")
"""What of the os module changes the disk."""


def run(model: Path, out: Path, prepare: Callable[[], object]) -> int:
    """Convert in a fork and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        prepare()
        convert(model, out, max_shard_nbytes=MAX_SHARD_NBYTES)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def die_at(number: int, *, after: bool) -> None:
    """Kill this process at its ``number``-th call that changes the disk."""
    left = number

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def count_calls(model: Path, out: Path) -> int:
    """How many calls of an unbroken run change the disk."""
    reading, writing = os.pipe()

    def counting() -> None:
        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                tell(writing, b".")
                return call(*arguments, **options)

            return wrapped

        tell = os.write
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))

    child = run(model, out, counting)
    os.close(writing)
    total = 0
    while data := os.read(reading, 65536):
        total += len(data)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the unbroken run failed"
    return total


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def phase_of(out: Path) -> str:
    """How far a killed run had come, by what it left."""
    if not out.exists():
        return "before the folder"
    names = {path.name for path in out.iterdir()}
    finished = sum(name.endswith(".safetensors") for name in names)
    for name, phase in (
        (INDEX_NAME, "index written"),
        ("config.json", "config written"),
        ("fp4moe_manifest.json", "manifest written"),
        ("tokenizer.json", "copying files"),
    ):
        if name in names:
            return phase
    if finished:
        return "some shards finished"
    return "first shard" if any(name.endswith(".partial") for name in names) else "folder claimed"


def main() -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    phases: Counter[str] = Counter()
    kills = runs = 0
    with tempfile.TemporaryDirectory() as folder:
        model, unbroken, out = (Path(folder, name) for name in ("model", "unbroken", "out"))
        make_checkpoint(model, SPEC)
        calls = count_calls(model, unbroken)
        expected = contents(unbroken)
        shutil.rmtree(unbroken)
        started = time.perf_counter()
        os.waitpid(run(model, unbroken, lambda: None), 0)
        seconds = time.perf_counter() - started
        assert contents(unbroken) == expected, "two unbroken runs differ"
        print(f"{len(expected)} files, {calls} calls that change the disk, {seconds:.2f} s a run")

        while kills < arguments.kills:
            runs += 1
            shutil.rmtree(out, ignore_errors=True)
            for _ in range(choose.choice((1, 1, 2, 3))):
                if choose.random() < 0.5:
                    child = run(model, out, lambda: None)
                    time.sleep(choose.uniform(0, 1.1 * seconds))
                    os.kill(child, signal.SIGKILL)
                else:
                    number, after = choose.randint(1, calls), choose.random() < 0.5
                    child = run(
                        model, out, lambda number=number, after=after: die_at(number, after=after)
                    )
                _, status = os.waitpid(child, 0)
                kills += os.WIFSIGNALED(status)
                phases[phase_of(out) if os.WIFSIGNALED(status) else "not killed in time"] += 1
                if (out / INDEX_NAME).exists():
                    try:
                        verify(out, model)
                    except VerifyError as error:
                        sys.exit(f"seed {arguments.seed}, run {runs}: looks finished, but {error}")
            _, status = os.waitpid(run(model, out, lambda: None), 0)
            if status != 0:
                sys.exit(f"seed {arguments.seed}, run {runs}: cannot be resumed")
            found = contents(out)
            for name in sorted(expected.keys() | found.keys()):
                if found.get(name) != expected.get(name):
                    sys.exit(f"seed {arguments.seed}, run {runs}: {name} differs")
    for phase, count in phases.most_common():
        print(f"{count:5} {phase}")
    print(f"{kills} kills, {runs} of {runs} resumed runs equal the unbroken one")


if __name__ == "__main__":
    main()
