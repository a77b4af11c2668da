"""A small DeepSeek-V3-shaped checkpoint that every test may read, and a copy to damage."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from support.folders import contents
from support.golden import CASES
from support.hub import Hub
from support.make_checkpoint import make_checkpoint
from support.specs import MANY_SHARDS, SMALL_SHARD_NBYTES, TINY

from fp4moe_convert import convert
from fp4moe_convert.storage import remote

# The light installation has no torch. These files are about tensors of it, so that without it they
# cannot even be imported; all that is in them is marked `flashinfer`.
collect_ignore_glob = (
    []
    if importlib.util.find_spec("torch")
    else ["test_checks.py", "test_converted_layer.py", "test_fast_copy*.py", "test_gate.py"]
)

# A busy machine is no reason to fail.
hypothesis.settings.register_profile("fp4moe", deadline=None)
hypothesis.settings.load_profile("fp4moe")


@pytest.fixture(autouse=True, scope="session")
def _uncoloured() -> Iterator[None]:
    """CI systems like to force colours upon programs; the tests say themselves where they want
    any."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "PY_COLORS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def monkeypatch(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:  # noqa: ARG001  it has to be older
    """pytest's own, but undone before the test's folder is deleted: a test may have patched what
    that takes."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


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
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What the checkpoint of a case in data/golden is converted to, for reading only; made when
    first asked for."""
    made: dict[str, Path] = {}

    def folder_of(case: str) -> Path:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            make_checkpoint(folder / "source", CASES[case])
            made[case] = convert(folder / "source", folder / "out").out_dir
            shutil.rmtree(folder / "source")
        return made[case]

    return folder_of


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The calls that decide what a power cut leaves, with the names they are about.

    The power cuts of test_faults.py take root, and are on ext4. There the next sync of any file
    commits a rename as well, so they cannot tell whether the folder was synced.
    """
    calls: list[tuple[str, ...]] = []
    fsync, rename, unlink = os.fsync, os.rename, Path.unlink

    def recorded_fsync(fd: int) -> None:
        fsync(fd)
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))

    def recorded_rename(old: Path, new: Path) -> None:
        rename(old, new)
        calls.append(("rename", old.name, new.name))

    def recorded_unlink(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        calls.append(("unlink", path.name))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    monkeypatch.setattr(Path, "unlink", recorded_unlink)
    return calls


@pytest.fixture
def install_flashinfer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Let a release of FlashInfer seem installed, or none. Importing it fails."""

    def install(release: str | None) -> None:
        def version(_: str) -> str:
            if release is None:
                raise importlib.metadata.PackageNotFoundError
            return release

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setitem(sys.modules, "flashinfer", None)

    return install


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on this machine that huggingface_hub in this process takes for the only one, and that
    needs no waiting between tries. Its cache and its tokens are the test's own."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub() as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield hub
        _http.close_session()
