"""Run a driver in its engine's environment, and read what it found."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.processes import finding_support

Results = dict[str, dict[str, Any]]


def results_of(driver: ModuleType, engine: str, folder: Path, config: pytest.Config) -> Results:
    """What the driver says of each of its cases; its table goes to the terminal.

    Args:
        engine: The environment's name.
        folder: For the results and the engine's own output; empty.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    engines = Path(os.environ.get("FP4MOE_ENGINES") or home / "fp4moe-engines")
    python = engines / engine / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} does not exist: run scripts/setup_engines.sh")
    assert driver.__file__ is not None
    path, log = folder / "results.json", folder / "log"
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with log.open("w") as errors, capture.global_and_fixture_disabled():
        print("\n")
        subprocess.run(
            [python, driver.__file__, path], env=finding_support(), stderr=errors, check=False
        )
    if not path.exists():
        pytest.fail(f"the driver did not finish:\n{log.read_text()[-4000:]}")
    found: Results = json.loads(path.read_text())
    return found
