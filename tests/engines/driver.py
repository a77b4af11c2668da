"""What all drivers share: what becomes of their cases, and their command line."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn


class Outcome(NamedTuple):
    """What became of a case."""

    ok: bool
    detail: str
    """What was found, or how it failed."""


class Outcomes(dict[str, Outcome]):
    """By case, in the order of the run."""

    def record(self, case: str, ok: bool, detail: object) -> None:
        """Keep the outcome of a case, and print a line of it."""
        self[case] = Outcome(ok, str(detail))
        print(f"{'ok  ' if ok else 'FAIL'}  {case:46}  {self[case].detail[:150]}", flush=True)


def read_outcomes(path: Path) -> Outcomes:
    """What `main` has written."""
    return Outcomes({case: Outcome(*each) for case, each in json.loads(path.read_text()).items()})


def main(
    run: Callable[[Path, Sequence[str]], Outcomes], families: Sequence[str] | None = None
) -> NoReturn:
    """A driver's command line.

    Args:
        run: all cases, given an empty folder and the families that were asked for.
        families: all of them, where a process may run the cases of some.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path, help="JSON file to write")
    if families is not None:
        parser.add_argument("families", nargs="*", default=families)
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        outcomes = run(Path(work), getattr(arguments, "families", ()))
    failed = sum(not each.ok for each in outcomes.values())
    print(f"{len(outcomes)} cases, {failed} failed, {time.monotonic() - start:.0f} s")
    arguments.results.write_text(json.dumps(outcomes, indent=1) + "\n")
    sys.exit(failed > 0)
