"""Models wherever fsspec can read: in its file system in memory, and by file:// URLs."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
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


@pytest.fixture
def failures(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Exception]]]:
    """What calls of the file system of `url` raise, by their names, before they answer."""
    assert url.startswith("memory:")
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)
    left: dict[str, list[Exception]] = {"ls": [], "info": [], "cat_file": []}
    file_system = type(fsspec.filesystem("memory"))

    def failing(call: str) -> Callable[..., object]:
        answer = getattr(file_system, call)

        def fail_first(*arguments: object, **options: object) -> object:
            if left[call]:
                raise left[call].pop(0)
            return answer(*arguments, **options)

        return fail_first

    for call in left:
        monkeypatch.setattr(file_system, call, failing(call))
    yield left
    for own in left.values():
        own.clear()


class Answered(Exception):  # noqa: N818 (as libraries keep HTTP answers)
    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"{status} it says")
        self.status, self.headers = status, headers


class FromBotocore(Exception):  # noqa: N818
    def __init__(self, status: int) -> None:
        super().__init__(f"{status} it says")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}}}


class NoCredentialsError(Exception):
    """As botocore's."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


CALLS = pytest.mark.parametrize("call", ["ls", "info", "cat_file"])
MAY_PASS: list[Callable[[], Exception]] = [
    lambda: TimeoutError("slow"),
    lambda: ConnectionResetError(104, "reset"),
    lambda: RuntimeError("throttled\nby them"),
    lambda: Answered(503),
    lambda: caused(OSError(16, "slow down"), FromBotocore(503)),
    # As the file system of https:// says whatever has gone wrong with a HEAD.
    lambda: caused(FileNotFoundError("file"), Answered(503)),
    lambda: caused(FileNotFoundError("file"), TimeoutError("slow")),
]
FOR_GOOD: dict[str, Callable[[], Exception]] = {
    "not yours": lambda: PermissionError("not yours"),
    "403 it says": lambda: caused(FileNotFoundError("file"), Answered(403)),
    "who are you": lambda: NoCredentialsError("who are you"),
    "an expired token": lambda: caused(OSError(22, "an expired token"), FromBotocore(400)),
}


@CALLS
@pytest.mark.parametrize("make", MAY_PASS)
def test_what_may_pass_is_tried_again(
    url: str,
    tmp_path: Path,
    failures: dict[str, list[Exception]],
    call: str,
    make: Callable[[], Exception],
) -> None:
    failures[call] = [make(), make()]
    convert(url, tmp_path / "out")
    verify(tmp_path / "out", url)
    failures[call] = [make() for _ in range(100)]
    result = run("inspect", url)
    assert result.exit_code == 75
    tries = remote.FIRST_TRIES if call == "ls" else remote.TRIES
    assert len(failures[call]) == 100 - tries
    [line] = result.stderr.splitlines()
    assert f", {tries} times in a row; check the network" in line


@CALLS
@pytest.mark.parametrize("reason", FOR_GOOD)
def test_what_will_not_pass_is_said_at_once(
    url: str, failures: dict[str, list[Exception]], call: str, reason: str
) -> None:
    failures[call] = [FOR_GOOD[reason]()]
    result = run("inspect", url)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {url}: " if call == "ls" else "error: config.json: ")
    assert line.endswith(reason)


def test_a_server_that_is_down_when_it_is_reached_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)
    result = run("inspect", "ftp://127.0.0.1:9/model")
    assert result.exit_code == 75
    assert "Connection refused, 4 times in a row" in result.stderr


def test_a_server_says_how_long_to_wait(
    url: str, failures: dict[str, list[Exception]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda _, timeout: waits.append(timeout))
    failures["info"] = [caused(FileNotFoundError("file"), Answered(429, **{"retry-after": "7"}))]
    store = open_store(url)
    store.open("config.json")
    assert waits == [7]


def test_a_network_that_fails_once_a_shard_is_finished(
    url: str, source: Path, tmp_path: Path, failures: dict[str, list[Exception]]
) -> None:
    """Its sources are looked at again."""

    def on_progress(_: object) -> None:
        failures["info"][:] = [TimeoutError("slow")]

    convert(url, tmp_path / "out", on_progress=on_progress)
    verify(tmp_path / "out", source)


def test_a_folder_that_cannot_be_listed_is_not_left_out(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/models/tiny/sub/folder/vocabulary", b"some")
    assert "sub/folder/vocabulary" in open_store(url).listing().files
    ls = type(memory).ls

    def refusing(fs: object, path: str, **options: object) -> object:
        if path.endswith("sub/folder"):
            raise PermissionError("not yours")
        return ls(fs, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "ls", refusing)
        with pytest.raises(CheckpointError, match="not yours"):
            open_store(url)


def test_a_folder_that_is_not_there_any_more_is_named(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list may have a link that leads nowhere. There are files all the same."""
    memory = type(fsspec.filesystem("memory"))
    ls = memory.ls

    def with_a_dead_link(fs: object, path: str, **options: object) -> object:
        if path.endswith("/gone"):
            raise FileNotFoundError(path)
        return [*ls(fs, path, **options), {"name": f"{path}/gone", "type": "directory"}]

    with monkeypatch.context() as patch:
        patch.setattr(memory, "ls", with_a_dead_link)
        with pytest.raises(MissingFileError, match=r"^gone: is not in memory://models/tiny any"):
            open_store(url)


def test_an_object_in_the_place_of_a_folder_is_no_file(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Consoles of object stores make them."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/models/tiny/sub/vocabulary", b"some")
    expected = open_store(url).listing().files
    ls = type(memory).ls

    def with_markers(fs: object, path: str, **options: object) -> object:
        return [{"name": f"{path}/", "type": "file", "size": 0}, *ls(fs, path, **options)]

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "ls", with_markers)
        assert open_store(url).listing().files == expected


def test_links_that_sort_a_web_servers_page_are_no_files(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Apache writes it, and fsspec lists it."""
    place = "https://models.example/tiny"

    class Server:
        def invalidate_cache(self) -> None: ...

        def ls(self, path: str, *, detail: bool) -> list[dict[str, object]]:
            assert detail
            names = [*(p.name for p in source.iterdir()), "?C=N;O=D", "?C=M;O=A"]
            return [{"name": f"{path}/{name}", "type": "file", "size": None} for name in names]

        def info(self, path: str) -> dict[str, object]:
            return {"size": (source / path.removeprefix(f"{place}/")).stat().st_size}

    monkeypatch.setattr(UrlStore, "_connect", lambda _: (Server(), place))
    listed = open_store(place).listing().files
    assert set(listed) == {path.name for path in source.iterdir()}


def test_a_list_without_sizes(url: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As web servers give it."""
    memory = type(fsspec.filesystem("memory"))
    ls, info = memory.ls, memory.info

    def sizeless(fs: object, path: str, **options: object) -> object:
        return [{**each, "size": None} for each in ls(fs, path, **options)]

    with monkeypatch.context() as patch:
        patch.setattr(memory, "ls", sizeless)
        assert inspect(url).nbytes == inspect(source).nbytes
        patch.setattr(memory, "info", lambda *given: {**info(*given), "size": None})
        with pytest.raises(CheckpointError, match="its size is not stated"):
            open_store(url)


def test_a_server_that_sends_no_ranges_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type(fsspec.filesystem("memory"))
    cat_file = memory.cat_file
    monkeypatch.setattr(memory, "cat_file", lambda fs, path, **_: cat_file(fs, path))
    with pytest.raises(CheckpointError, match=r"safetensors: the server sends no ranges"):
        inspect(url)


def test_only_the_hub_has_revisions(url: str) -> None:
    with pytest.raises(CheckpointError, match="has no revisions"):
        open_store(url, revision="main")
