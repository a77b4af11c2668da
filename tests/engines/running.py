"""Run a driver in its engine's environment, and read what it found."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from driver import Outcomes, read_outcomes
from support.processes import finding_support


def outcomes_of(
    driver: ModuleType,
    engine: str,
    folder: Path,
    config: pytest.Config,
    shares: Sequence[Sequence[str]] = ((),),
) -> Outcomes:
    """What became of the driver's cases; its table goes to the terminal.

    Args:
        engine: The environment's name.
        folder: For the results and the engine's own output; empty.
        shares: The driver's other arguments in each of several processes, side by side.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    engines = Path(os.environ.get("FP4MOE_ENGINES") or home / "fp4moe-engines")
    python = engines / engine / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} does not exist: run scripts/setup_engines.sh")
    assert driver.__file__ is not None
    log = folder / "log"
    paths = [folder / f"results-{number}.json" for number in range(len(shares))]
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with log.open("w") as errors, capture.global_and_fixture_disabled():
        print("\n")
        runs = [
            subprocess.Popen(
                [python, driver.__file__, path, *share], env=finding_support(), stderr=errors
            )
            for path, share in zip(paths, shares, strict=True)
        ]
        for run in runs:
            run.wait()
    found = Outcomes()
    for path in paths:
        if not path.exists():
            pytest.fail(f"the driver did not finish:\n{log.read_text()[-4000:]}")
        found |= read_outcomes(path)
    return found


def shared_out(names: Sequence[str]) -> list[Sequence[str]]:
    """Names for as many processes as there are cores, four at most: each takes 4 GB."""
    processes = min(4, os.cpu_count() or 1)
    return [names[first::processes] for first in range(processes)]
