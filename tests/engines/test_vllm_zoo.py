"""vLLM with a tiny model of each family; `vllm_zoo.py` holds the cases and runs them."""

from __future__ import annotations

import originals
import pytest
import vllm_zoo
from running import Results, results_of, shared_out

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def results(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("zoo")
    return results_of(vllm_zoo, "vllm", folder, pytestconfig, shared_out(originals.NAMES))


@pytest.mark.parametrize("case", vllm_zoo.case_names())
def test_case(case: str, results: Results) -> None:
    assert results[case]["ok"], results[case]["result"]


def test_every_case_is_listed(results: Results) -> None:
    assert sorted(results) == sorted(vllm_zoo.case_names())
