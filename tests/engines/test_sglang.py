"""SGLang itself serves converted checkpoints as it serves their originals; see sglang_driver.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import sglang_driver
from support.processes import finding_support

pytestmark = pytest.mark.engines

HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ENGINES = Path(os.environ.get("FP4MOE_ENGINES") or HOME / "fp4moe-engines")


@pytest.fixture(scope="module")
def results(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the driver says of each case; its table goes to the terminal."""
    python = ENGINES / "sglang" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} does not exist: run scripts/setup_engines.sh")
    folder = tmp_path_factory.mktemp("sglang")
    path = folder / "results.json"
    log = folder / "log"
    capture: Any = pytestconfig.pluginmanager.getplugin("capturemanager")
    with log.open("w") as errors, capture.global_and_fixture_disabled():
        print("\n")
        subprocess.run(
            [python, sglang_driver.__file__, path],
            env=finding_support(),
            stderr=errors,
            check=False,
        )
    if not path.exists():
        pytest.fail(f"the driver did not finish:\n{log.read_text()[-4000:]}")
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("case", sglang_driver.CASES)
def test_case(case: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[case]["passed"], results[case]["detail"]
