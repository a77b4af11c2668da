"""What the converter says of engines that are not installed is what they do; see reasons.py."""

from __future__ import annotations

import pytest
import reasons
from running import Results, results_of

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module", params=reasons.CASES)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Results]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, results_of(reasons, request.param, folder, request.config)


def test_every_reason(results: tuple[str, Results]) -> None:
    engine, found = results
    assert found.keys() == reasons.CASES[engine].keys()
    assert {name: r["detail"] for name, r in found.items() if not r["passed"]} == {}
