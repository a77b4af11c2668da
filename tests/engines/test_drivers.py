"""SGLang and vLLM themselves with converted checkpoints, and with originals.

A driver runs all its cases in one process of an engine's environment, or in a few. Its first lines
say what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import originals
import pytest
import reasons
import sglang_driver
import sglang_ways
import sglang_zoo
import vllm_driver
import vllm_ways
import vllm_zoo
from running import outcomes_of, shared_out

pytestmark = pytest.mark.engines


class Run(NamedTuple):
    """A driver in an engine's environment."""

    engine: str
    driver: ModuleType
    cases: Sequence[str]
    shares: Sequence[Sequence[str]] = ((),)


FAMILIES = shared_out(originals.NAMES)
RUNS = {
    "sglang": Run("sglang", sglang_driver, sglang_driver.case_names()),
    "vllm": Run("vllm", vllm_driver, vllm_driver.case_names()),
    "sglang_ways": Run("sglang", sglang_ways, sglang_ways.case_names()),
    "vllm_ways": Run("vllm", vllm_ways, vllm_ways.case_names()),
    "sglang_zoo": Run("sglang", sglang_zoo, sglang_zoo.case_names(), FAMILIES),
    "vllm_zoo": Run("vllm", vllm_zoo, vllm_zoo.case_names(), FAMILIES),
    "sglang_reasons": Run("sglang", reasons, reasons.case_names("sglang")),
    "vllm_reasons": Run("vllm", reasons, reasons.case_names("vllm")),
}


@pytest.mark.parametrize("name", RUNS)
def test_driver(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    engine, driver, cases, shares = RUNS[name]
    outcomes = outcomes_of(driver, engine, tmp_path, pytestconfig, shares)
    assert sorted(outcomes) == sorted(cases)
    assert {case: each.detail for case, each in outcomes.items() if not each.ok} == {}
