"""Kill runs at random moments, run them again, and compare with an unbroken run.

    python -m tests.support.kill                   # 200 kills, a few minutes
    python -m tests.support.kill --kills 20 --seed 7
    python -m tests.support.kill --power-cuts      # as root
    python -m tests.support.kill --restore         # kill restorations
    python -m tests.support.kill --parts           # kill conversions in three parts
    python -m tests.support.kill --drop-source     # of sources that are deleted meanwhile

A small checkpoint is converted into many small shards, so that every phase takes its share of the
kills: claiming the folder, scattering, renaming, journal, copies, manifest, config, index. Half of
the kills (SIGKILL) come after a random time, half right before or after a random call that changes
the disk. After each the folder must not look finished unless it verifies; then the same command
runs again, and is perhaps killed again, until it ends. Its folder must equal the unbroken one's,
byte for byte and with no file more.

With --power-cuts the output lies on a disk of its own, an ext4 file system in a file. Instead of
the process it is the disk that is stopped: at once, with all that is not synced lost. It then
starts again with what it has. The same happens after the last run of each folder, which has ended
well: what it says is finished must be on the disk.

With --drop-source each folder is made from a source of its own, which loses its shards. At no
moment may one be gone whose data is not all in the folder. With --power-cuts as well, the source is
on another disk, which loses nothing: what is deleted there is gone at once. Three stops in ten are
kills then, so that runs build on what is not on the disk yet before the power goes.

The interpreter is loaded once and each run is a fork, so that kills fall on our work rather than on
imports.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fp4moe_convert import (
    Part,
    VerifyError,
    convert,
    convert_part,
    preview,
    restore,
    verify,
)

from .faulty_disk import Disk
from .folders import INDEX, MANIFEST, every_file
from .make_checkpoint import Spec, make_checkpoint

SPEC = Spec(layers=3, experts=4, hidden=256, intermediate=128, shards=5, vocab_size=256, mtp=True)
MAX_SHARD_NBYTES = 400_000
DISK_NBYTES = 200 * 2**20
NOT_IN_TIME = "not stopped in time"
CALLS = ("pwrite", "write", "fsync", "rename", "unlink", "ftruncate", "mkdir")
"""What of the os module changes the disk."""


class WrongError(Exception):
    """What must not be."""


@dataclass(frozen=True)
class Case:
    """A run that is killed: a conversion, all parts of one in turn, or the restoration of one."""

    source: Path
    """The folder that is read."""
    restores: bool = False
    parts: int = 0
    pristine: Path | None = None
    """What ``source`` is a copy of, where its shards are deleted."""

    def renew(self) -> None:
        """Put back what a run has deleted of the source."""
        if self.pristine is not None:
            shutil.rmtree(self.source, ignore_errors=True)
            shutil.copytree(self.pristine, self.source)

    @cached_property
    def made_of(self) -> dict[str, list[str]]:
        """Of each shard of a source that is deleted, the names of those that it goes into."""
        if self.pristine is None:
            return {}
        work = preview(self.pristine, max_shard_nbytes=MAX_SHARD_NBYTES).work
        checkpoint, plan = work.checkpoint, work.plan
        names = [shard.name for shard in checkpoint.shards]
        return {n: [s.name for s in plan.shards if n in s.source_files] for n in names}

    def check_loss(self, out: Path, contents: dict[str, bytes]) -> None:
        """Raises WrongError: a shard is gone, and not all of its data is in the folder."""
        for name, shards in self.made_of.items():
            for shard in shards if not (self.source / name).exists() else ():
                path = out / shard
                if not path.is_file() or path.read_bytes() != contents[shard]:
                    raise WrongError(f"{name} is gone, and {shard} is not as it should be")

    def run(self, out: Path) -> None:
        if self.restores:
            restore(self.source, out)
        elif self.parts:
            for number in range(self.parts, 0, -1):
                part = Part(number, self.parts)
                convert_part(self.source, out, part, max_shard_nbytes=MAX_SHARD_NBYTES)
        else:
            drop = self.pristine is not None
            convert(self.source, out, max_shard_nbytes=MAX_SHARD_NBYTES, drop_source=drop)

    def verify(self, out: Path) -> None:
        if self.pristine is not None:
            verify(out)
            return
        converted, original = (self.source, out) if self.restores else (out, self.source)
        verify(converted, original)


def run(case: Case, out: Path, prepare: Callable[[], object]) -> int:
    """Run in a fork and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        prepare()
        case.run(out)
        code = 0
    except BaseException as failure:
        if "Input/output error" not in str(failure):  # as it should be when the power is gone
            traceback.print_exc()
    os._exit(code)


def die_at(number: int, disk: Disk | None, *, after: bool) -> None:
    """Stop at this process's ``number``-th call that changes the disk."""
    left = number

    def die() -> None:
        if disk is not None:
            disk.cut_power()
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                die()
            result = call(*arguments, **options)
            if left == 0:
                die()
            return result

        return wrapped

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def count_calls(case: Case, out: Path) -> int:
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

    child = run(case, out, counting)
    os.close(writing)
    total = 0
    while data := os.read(reading, 65536):
        total += len(data)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the unbroken run failed"
    return total


def phase_of(case: Case, out: Path) -> str:
    """How far a killed run had come, by what it left."""
    if not out.exists():
        return "before the folder"
    names = {path.name for path in out.iterdir()}
    finished = sum(name.endswith(".safetensors") for name in names)
    for name, phase in (
        (INDEX, "index written"),
        ("config.json", "config written"),
        (MANIFEST, "manifest written"),
        ("tokenizer.json", "copying files"),
    ):
        # Where the source is deleted, copies come first.
        if name in names and not (case.pristine and name == "tokenizer.json"):
            return phase
    if finished:
        return "some shards finished"
    return "first shard" if any(name.endswith(".partial") for name in names) else "folder claimed"


@dataclass(frozen=True)
class Unbroken:
    """What an unbroken run does."""

    contents: dict[str, bytes]
    calls: int
    """That change the disk."""
    seconds: float


def unbroken_run(case: Case, out: Path) -> Unbroken:
    case.renew()
    calls = count_calls(case, out)
    expected = every_file(out)
    shutil.rmtree(out)
    case.renew()
    started = time.perf_counter()
    os.waitpid(run(case, out, lambda: None), 0)
    seconds = time.perf_counter() - started
    assert every_file(out) == expected, "two unbroken runs differ"
    return Unbroken(expected, calls, seconds)


def interrupt(
    case: Case, out: Path, choose: random.Random, plan: Unbroken, disk: Disk | None
) -> bool:
    """Run and stop it somewhere; whether it had not ended by then."""
    if disk is not None and case.pristine is not None and choose.random() < 0.3:
        # Only the process: the next run builds on what is not on the disk yet.
        disk = None
    if choose.random() < 0.5:
        child = run(case, out, lambda: None)
        time.sleep(choose.uniform(0, 1.1 * plan.seconds))
        if disk is not None:
            disk.cut_power()
        os.kill(child, signal.SIGKILL)
    else:
        number, after = choose.randint(1, plan.calls), choose.random() < 0.5
        child = run(case, out, lambda: die_at(number, disk, after=after))
    _, status = os.waitpid(child, 0)
    if disk is not None:
        disk.restart()
    return status != 0


def check_folder(
    case: Case, out: Path, choose: random.Random, plan: Unbroken, disk: Disk | None
) -> Iterator[str]:
    """Run into a new folder with interruptions, each of which is told of, until it ends well.

    Raises:
        WrongError: what is there afterwards is not what an unbroken run leaves.
    """
    case.renew()
    for _ in range(choose.choice((1, 1, 2, 3))):
        yield phase_of(case, out) if interrupt(case, out, choose, plan, disk) else NOT_IN_TIME
        case.check_loss(out, plan.contents)
        if (out / INDEX).exists():
            try:
                case.verify(out)
            except VerifyError as error:
                raise WrongError(f"looks finished, but {error}") from None
    _, status = os.waitpid(run(case, out, lambda: None), 0)
    if status != 0:
        raise WrongError("cannot be resumed")
    if disk is not None:
        disk.cut_power()
        disk.restart()
    found = every_file(out)
    for name in sorted(plan.contents.keys() | found.keys()):
        if found.get(name) != plan.contents.get(name):
            raise WrongError(f"{name} differs")
    if left := [name for name in case.made_of if (case.source / name).exists()]:
        raise WrongError(f"{left[0]} of the source is still there")


def main() -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--power-cuts", action="store_true")
    parser.add_argument("--restore", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--drop-source", action="store_true")
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    phases: Counter[str] = Counter()
    runs = 0
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model, out, disk = folder / "model", folder / "out", None
        make_checkpoint(model, SPEC)
        case = Case(model, parts=3 if arguments.parts else 0)
        if arguments.restore:
            case.run(folder / "converted")
            case = Case(folder / "converted", restores=True)
        if arguments.drop_source:
            case = Case(folder / "source", pristine=model)
        if arguments.power_cuts:
            disk = stack.enter_context(Disk(folder / "image", folder / "disk", DISK_NBYTES))
            out = disk.where / "out"
        plan = unbroken_run(case, out)
        print(
            f"{len(plan.contents)} files, {plan.calls} calls that change the disk, "
            f"{plan.seconds:.2f} s a run"
        )
        while phases.total() - phases[NOT_IN_TIME] < arguments.kills:
            runs += 1
            shutil.rmtree(out, ignore_errors=True)
            try:
                phases.update(check_folder(case, out, choose, plan, disk))
            except WrongError as error:
                sys.exit(f"seed {arguments.seed}, run {runs}: {error}")
    for phase, count in phases.most_common():
        print(f"{count:5} {phase}")
    kills, what = phases.total() - phases[NOT_IN_TIME], "power cuts" if disk else "kills"
    print(f"{kills} {what}, {runs} of {runs} resumed runs equal the unbroken one")


if __name__ == "__main__":
    main()
