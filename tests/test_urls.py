"""Models wherever fsspec can read: in its file system in memory, and by file:// URLs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from support.folders import MANIFEST, every_file, flip_bit, without_source
from support.specs import SMALL_SHARD_NBYTES
from test_hub import header_nbytes, run, weights
from test_network import little_room

from fp4moe_convert import (
    CheckpointError,
    MissingFileError,
    UnreachableError,
    VerifyError,
    convert,
    inspect,
    open_store,
    preview,
    verify,
)
from fp4moe_convert.storage import remote
from fp4moe_convert.storage.buffers import Bytes
from fp4moe_convert.storage.urls import UrlStore


@pytest.fixture
def url(source: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(f"{source}/", "/models/tiny/", recursive=True)
    yield "memory://models/tiny"
    memory.rm("/models", recursive=True)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The ranges that are asked for."""
    asked: list[tuple[str, int, int]] = []
    request = UrlStore.request

    def counted(store: UrlStore, name: str, offset: int, into: Bytes) -> Iterator[int]:
        asked.append((name, offset, offset + into.size))
        return request(store, name, offset, into)

    monkeypatch.setattr(UrlStore, "request", counted)
    return asked


def test_the_same_bytes_as_from_a_folder_each_read_once(
    url: str,
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    read: list[tuple[str, int, int]],
) -> None:
    convert(url, tmp_path / "out", max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert without_source(every_file(tmp_path / "out")) == without_source(expected)
    recorded = json.loads((tmp_path / "out" / MANIFEST).read_text())["source"]
    assert recorded["path"] == url
    for name, path in weights(source).items():
        own = sorted(each for each in read if each[0] == name)
        assert [own[0][1], *(stop for _, _, stop in own)] == [
            *(start for _, start, _ in own),
            path.stat().st_size,
        ]


def test_a_preview_reads_no_weight(
    url: str, source: Path, read: list[tuple[str, int, int]]
) -> None:
    foreseen = preview(url)
    ends = {name: header_nbytes(path) for name, path in weights(source).items()}
    assert all(stop <= ends[name] for name, _, stop in read if name in ends)
    assert foreseen.fetched is not None
    assert foreseen.fetched.requests == len(read)


def test_verify_and_inspect(url: str, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    assert verify(tmp_path / "out", url).source == url
    assert run("verify", tmp_path / "out", "--source", url).exit_code == 0
    assert inspect(url).layers == inspect(source).layers
    flip_bit(max(weights(source).values()))
    fsspec.filesystem("memory").put(f"{source}/", "/models/tiny/", recursive=True)
    with pytest.raises(VerifyError, match="differs"):
        verify(tmp_path / "out", url)


def test_a_file_that_changes_during_a_run_stops_it(source: Path, tmp_path: Path) -> None:
    def on_progress(_: object) -> None:
        for path in weights(source).values():
            os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match="has changed while it was read"):
        convert(f"file://{source}", tmp_path / "out", on_progress=on_progress)


def test_a_file_that_goes_during_a_run_is_named(source: Path) -> None:
    store = open_store(f"file://{source}")
    first = min(weights(source).values())
    first.unlink()
    with pytest.raises(MissingFileError, match=first.name):
        store.open(first.name)


def test_what_was_made_from_other_bytes_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, request = f"file://{source}", UrlStore.request

    def failing(store: UrlStore, name: str, offset: int, into: Bytes) -> Iterator[int]:
        if offset > 500_000:
            raise CheckpointError("is gone")
        return request(store, name, offset, into)

    with little_room(), monkeypatch.context() as patch:
        patch.setattr(UrlStore, "request", failing)
        with pytest.raises(CheckpointError, match="is gone"):
            convert(url, tmp_path / "out")
    assert list((tmp_path / "out").glob("*.partial"))
    for path in weights(source).values():
        flip_bit(path, 300_000)
    convert(url, tmp_path / "out")
    verify(tmp_path / "out", source)


def test_failures_of_a_file_system(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)
    failures: list[Exception] = [TimeoutError("slow"), RuntimeError("throttled\nby them")]
    cat_file = fsspec.filesystem("memory").cat_file

    def failing(*arguments: object, **options: object) -> object:
        if failures:
            raise failures.pop()
        return cat_file(*arguments, **options)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", staticmethod(failing))
    convert(url, tmp_path / "out")
    verify(tmp_path / "out", url)
    failures[:] = [PermissionError("not yours")]
    with pytest.raises(CheckpointError, match=r"config\.json: not yours"):
        inspect(url)
    failures[:] = [RuntimeError("down\nagain")] * remote.TRIES
    with pytest.raises(UnreachableError, match=r"config\.json: down again, 8 times"):
        inspect(url)


def test_only_the_hub_has_revisions(url: str) -> None:
    with pytest.raises(CheckpointError, match="has no revisions"):
        open_store(url, revision="main")
