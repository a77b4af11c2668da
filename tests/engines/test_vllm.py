"""vLLM with converted checkpoints; `vllm_driver.py` holds the cases and runs them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import vllm_driver
from support.processes import finding_support

pytestmark = pytest.mark.engines

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    """Run the driver once, in vLLM's environment, and let its table of cases be seen."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    engines = Path(os.environ.get("FP4MOE_ENGINES") or cache / "fp4moe-engines")
    python = engines / "vllm" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing, run scripts/setup_engines.sh")
    path = tmp_path_factory.mktemp("vllm") / "results.json"
    run = subprocess.run(
        [python, vllm_driver.__file__, path],
        env=finding_support() | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{run.stdout}")
    if not path.exists():
        pytest.fail(f"the driver failed:\n{run.stderr[-4000:]}")
    found: Results = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("case", vllm_driver.case_names())
def test_vllm(case: str, results: Results) -> None:
    assert results[case]["ok"], results[case]["result"]


def test_every_case_is_listed(results: Results) -> None:
    assert list(results) == vllm_driver.case_names()
