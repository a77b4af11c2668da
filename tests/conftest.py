"""A small DeepSeek-V3-shaped checkpoint that every test may read, and a copy to damage."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import hypothesis
import pytest
from make_checkpoint import Spec, make_checkpoint

# A busy machine is no reason to fail.
hypothesis.settings.register_profile("fp4moe", deadline=None)
hypothesis.settings.load_profile("fp4moe")

TINY = Spec(experts=4, hidden=256, intermediate=128, layers=2, shards=3, vocab_size=64)


@pytest.fixture(autouse=True)
def _uncoloured(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI systems like to force colours upon programs; the tests say themselves where they want
    any."""
    for name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two MoE layers of four experts in three shards; for reading only."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(folder, TINY)
    return folder


@pytest.fixture
def model_dir(tiny: Path, tmp_path: Path) -> Path:
    """A copy of `tiny` that the test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="session")
def flashinfer() -> None:
    """FlashInfer and torch, imported once; what they warn of on the way is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        __import__("flashinfer")
