"""Where scripts put environments is where tests look for them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.environments import environments

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "variables",
    [
        {"HOME": "/some one"},
        {"HOME": "/home", "XDG_CACHE_HOME": "/caches"},
        {"HOME": "/home", "XDG_CACHE_HOME": ""},
        {"HOME": "/home", "FP4MOE_ENGINES": "/engines", "FP4MOE_RAY": "/ray"},
    ],
)
@pytest.mark.parametrize("name", ["engines", "exporters", "ray"])
def test_scripts_and_tests_name_the_same_folder(
    name: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [*os.environ]:
        if variable.startswith(("FP4MOE_", "XDG_")):
            monkeypatch.delenv(variable)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    script = f'. scripts/environment.sh; printf %s "$FP4MOE_{name.upper()}"'
    told = subprocess.run(["bash", "-euc", script], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert told.stdout.decode() == str(environments(name))
