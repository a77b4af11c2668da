"""Every way into both engines; see sglang_ways.py and vllm_ways.py."""

from __future__ import annotations

from types import ModuleType

import pytest
import sglang_ways
import vllm_ways
from running import Results, results_of

pytestmark = pytest.mark.engines

DRIVERS: dict[str, ModuleType] = {"sglang": sglang_ways, "vllm": vllm_ways}
CASES = [(engine, str(case)) for engine, driver in DRIVERS.items() for case, _ in driver.cases()]


@pytest.fixture(scope="module")
def results(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Results]:
    return {
        engine: results_of(driver, engine, tmp_path_factory.mktemp(engine), pytestconfig)
        for engine, driver in DRIVERS.items()
    }


@pytest.mark.parametrize(("engine", "case"), CASES)
def test_way(engine: str, case: str, results: dict[str, Results]) -> None:
    assert results[engine][case]["passed"], results[engine][case]["detail"]
