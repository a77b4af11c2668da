"""Stock SGLang loads every family's original, and stops at what is converted; see sglang_zoo.py."""

from __future__ import annotations

import originals
import pytest
import sglang_zoo
from running import Results, results_of, shared_out

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def results(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("zoo")
    return results_of(sglang_zoo, "sglang", folder, pytestconfig, shared_out(originals.NAMES))


@pytest.mark.parametrize("case", sglang_zoo.CASES)
def test_case(case: str, results: Results) -> None:
    assert results[case]["passed"], results[case]["detail"]
