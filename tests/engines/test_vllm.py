"""vLLM with converted checkpoints; `vllm_driver.py` holds the cases and runs them."""

from __future__ import annotations

import pytest
import vllm_driver
from running import Results, results_of

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def results(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(vllm_driver, "vllm", tmp_path_factory.mktemp("vllm"), pytestconfig)


@pytest.mark.parametrize("case", vllm_driver.case_names())
def test_vllm(case: str, results: Results) -> None:
    assert results[case]["ok"], results[case]["result"]


def test_every_case_is_listed(results: Results) -> None:
    assert list(results) == vllm_driver.case_names()
