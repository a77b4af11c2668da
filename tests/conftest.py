"""A small DeepSeek-V3-shaped checkpoint that every test may read, and a copy to damage."""

from __future__ import annotations

import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from make_checkpoint import Spec, make_checkpoint

from fp4moe_convert import convert
from fp4moe_convert.contract import MANIFEST_NAME

# A busy machine is no reason to fail.
hypothesis.settings.register_profile("fp4moe", deadline=None)
hypothesis.settings.load_profile("fp4moe")

TINY = Spec(experts=4, hidden=256, intermediate=128, layers=2, shards=3, vocab_size=64)


MANY_SHARDS = Spec(layers=2, experts=3, hidden=256, intermediate=128, shards=3, vocab_size=128)
SMALL_SHARD_NBYTES = 500_000


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name; of a manifest only what does not name the source's path."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    if MANIFEST_NAME in found:
        manifest = json.loads(found[MANIFEST_NAME])
        del manifest["source"]["path"], manifest["manifest"]
        found[MANIFEST_NAME] = json.dumps(manifest).encode()
    return found


FP4MOE_CONVERT = (
    *(sys.executable, "-c"),
    "from fp4moe_convert.__main__ import main_convert; main_convert()",
)
"""The command, in a process of its own."""


def until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def child_of(pid: int) -> int:
    """The process that does a command's work, once there is one."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    until(lambda: bool(children.read_text()))
    return int(children.read_text())


def state_of(task: Path) -> str:
    """Of a process or a thread, by its folder in /proc: a letter of proc(5); X if it is gone."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


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
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """`MANY_SHARDS`, for reading only, and what an unbroken run makes of it."""
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder / "source", MANY_SHARDS)
    convert(folder / "source", folder / "out", max_shard_nbytes=SMALL_SHARD_NBYTES)
    return folder / "source", contents(folder / "out")


@pytest.fixture
def source(made: tuple[Path, dict[str, bytes]], tmp_path: Path) -> Path:
    """A copy of `MANY_SHARDS` that the test may damage."""
    return Path(shutil.copytree(made[0], tmp_path / "source"))


@pytest.fixture
def expected(made: tuple[Path, dict[str, bytes]]) -> dict[str, bytes]:
    """The output of `source`, in shards of `SMALL_SHARD_NBYTES`."""
    return made[1]


@pytest.fixture(scope="session")
def flashinfer() -> None:
    """FlashInfer and torch, imported once; what they warn of on the way is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        __import__("flashinfer")
