"""SGLang itself serves converted checkpoints as it serves their originals; see sglang_driver.py."""

from __future__ import annotations

import pytest
import sglang_driver
from running import Results, results_of

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def results(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(sglang_driver, "sglang", tmp_path_factory.mktemp("sglang"), pytestconfig)


@pytest.mark.parametrize("case", sglang_driver.CASES)
def test_case(case: str, results: Results) -> None:
    assert results[case]["passed"], results[case]["detail"]
