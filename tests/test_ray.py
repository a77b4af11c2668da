"""Conversions on a Ray cluster: nodes that die, runs that are resumed. The cluster is Ray's own for
tests, with all nodes on this machine (`support.ray_driver`)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.environments import environments
from support.folders import INDEX, every_file, write_byte
from support.make_checkpoint import make_checkpoint
from support.processes import finding_support
from support.specs import MANY_SHARDS, SMALL_SHARD_NBYTES
from support.tensors import range_of
from test_dropping import StopError, as_without, run_half
from test_network import little_room
from typer.testing import CliRunner

from fp4moe_convert import (
    CheckpointError,
    ConvertError,
    Progress,
    cluster,
    convert,
    convert_on_ray,
    preview,
)
from fp4moe_convert.cli.commands import convert_app
from fp4moe_convert.storage.buffers import Bytes
from fp4moe_convert.storage.reader import Store
from fp4moe_convert.storage.urls import UrlStore

RAY = environments("ray")
DOCUMENTED = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
SPEC = dataclasses.replace(MANY_SHARDS, layers=8, experts=8)
MAX_SHARD_NBYTES = 300_000
"""So many shards that both nodes are at work before one could have done them all."""
TENSOR = "model.layers.2.mlp.experts.2.down_proj.weight_scale"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def expected_files(folder: Path) -> dict[str, bytes]:
    """What one process makes of the same source."""
    make_checkpoint(folder / "model", SPEC)
    convert(folder / "model", folder / "one", max_shard_nbytes=MAX_SHARD_NBYTES)
    return every_file(folder / "one")


@pytest.fixture(scope="module")
def found(folder: Path, expected_files: dict[str, bytes]) -> dict[str, Any]:  # noqa: ARG001
    bad = Path(shutil.copytree(folder / "model", folder / "model-bad"))
    [home] = [p for p in bad.glob("*.safetensors") if TENSOR.encode() in p.read_bytes()]
    write_byte(home, range_of(home, TENSOR)[0], 0x7F)
    driver = Path(__file__).parent / "support" / "ray_driver.py"
    python = RAY / "bin" / "python"
    assert python.exists(), "run scripts/setup_ray.sh"
    done = subprocess.run(
        [python, driver, folder / "model", folder, str(MAX_SHARD_NBYTES), folder / "found.json"],
        env={**finding_support(), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(json.loads((folder / "found.json").read_text()))


@pytest.mark.ray
def test_a_node_that_dies_costs_its_shard_only(
    folder: Path, found: dict[str, Any], expected_files: dict[str, bytes]
) -> None:
    """It had begun that shard; another node has written it."""
    assert found["killed"]["shard"] in expected_files
    assert found["killed"]["written"]
    assert every_file(folder / "killed") == expected_files


@pytest.mark.ray
def test_a_run_is_resumed(
    folder: Path, found: dict[str, Any], expected_files: dict[str, bytes]
) -> None:
    left, kept, (done, total, steps) = found["resumed"].values()
    assert 0 < kept == len(left) < len(shards := [n for n in expected_files if "-of-" in n])
    assert done == total
    assert steps == len(shards) - kept
    assert every_file(folder / "resumed") == expected_files


@pytest.mark.ray
def test_on_the_command_line(
    folder: Path, found: dict[str, Any], expected_files: dict[str, bytes]
) -> None:
    code, stdout, stderr = found["command"]
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["shards_kept"] == 0
    assert every_file(folder / "command") == expected_files


@pytest.mark.ray
def test_what_a_task_finds_wrong_is_told(folder: Path, found: dict[str, Any]) -> None:
    start, _, node = found["bad source"].partition(" (on ")
    assert start.endswith(f"{TENSOR!r} has a NaN block scale (0x7F or 0xFF)")
    assert start.startswith("CheckpointError: model-")
    assert node
    assert not (folder / "bad" / INDEX).exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("address", "code", "why"),
    [
        ("127.0.0.1:1", os.EX_TEMPFAIL, "does not answer: Connection refused"),
        ("ray://127.0.0.1:1", os.EX_TEMPFAIL, "does not answer: Connection refused"),
        ("ray://127.0.0.1:OPEN", 1, "Ray Client requires pip package `ray[client]`."),
        ("nonsense", 1, "is no address such as HOST:PORT;"),
        (None, os.EX_TEMPFAIL, "does not answer: Connection refused"),
    ],
)
def test_one_line_where_no_cluster_is(
    source: Path, tmp_path: Path, address: str | None, code: int, why: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        arguments = [] if address is None else [address.replace("OPEN", str(port))]
        command = [RAY / "bin" / "python", "-m", "fp4moe_convert", "convert", source]
        done = subprocess.run(
            [*command, tmp_path / "out", "--ray", *arguments],
            env={**finding_support(), "RAY_ADDRESS": "127.0.0.1:1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (code, "")
    named = repr(arguments[0]) if arguments else "'auto', which is '127.0.0.1:1'"
    assert done.stderr.startswith(f"error: Ray at {named}: {why}")
    assert done.stderr.count("\n") == 1


# --- without Ray ----------------------------------------------------------------------------------


def test_without_ray(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConvertError, match=r"Ray is not installed; pip install 'fp4moe-convert"):
        convert_on_ray(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def fail(error: BaseException) -> Callable[..., None]:
    def init(*_: object, **__: object) -> None:
        raise error

    return init


@pytest.mark.parametrize(
    ("init", "why", "try_again"),
    [
        (
            fail(ConnectionError("Could not find any running Ray instance. Please\n--address")),
            "Could not find any running Ray instance; --ray HOST:PORT names a cluster",
            True,
        ),
        (fail(ValueError("Ray Client requires\nray[client]")), "Ray Client requires ray[c", False),
        (fail(ImportError("No module named 'grpc'")), "No module named 'grpc'", False),
        (fail(RuntimeError("Version mismatch: Ray:\n2.40")), "Version mismatch: Ray: 2.40", False),
        (lambda *_, **__: time.sleep(5), "has not answered for 0.1 s", True),
    ],
    ids=["none", "client", "package", "version", "silent"],
)
def test_a_cluster_that_cannot_be_joined(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    init: Callable[..., None],
    why: str,
    try_again: bool,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "JOINING_SECONDS", 0.1 if "0.1" in why else 60)
    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ConvertError) as caught:
        convert_on_ray(tiny, tmp_path / "out")
    assert str(caught.value).startswith(f"Ray at 'auto': {why}")
    assert "\n" not in str(caught.value)
    assert caught.value.try_again is try_again
    assert not (tmp_path / "out").exists()


NO_ADDRESS = "is no address such as HOST:PORT; auto finds the cluster that runs here"


@pytest.mark.parametrize(
    ("address", "why", "try_again"),
    [
        ("127.0.0.1:CLOSED", "does not answer: Connection refused", True),
        ("ray://localhost:CLOSED", "does not answer: Connection refused", True),
        ("[::1]:CLOSED", "does not answer: ", True),
        ("nobody.invalid:6379", "does not answer: ", True),
        ("nonsense", NO_ADDRESS, False),
        ("", NO_ADDRESS, False),
        ("head:port", NO_ADDRESS, False),
        ("head:65536", NO_ADDRESS, False),
        ("a..b:6379", NO_ADDRESS, False),
        ("/head:6379", NO_ADDRESS, False),
    ],
)
@pytest.mark.parametrize("variable", [False, True])
def test_an_address_where_no_cluster_is(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    why: str,
    try_again: bool,
    variable: bool,
) -> None:
    """Ray is not even asked: it would try for a quarter of an hour."""
    with socket.socket() as bound:  # nobody listens there
        bound.bind(("127.0.0.1", 0))
        address = address.replace("CLOSED", str(bound.getsockname()[1]))
        if variable:
            monkeypatch.setenv("RAY_ADDRESS", address)
        ray = SimpleNamespace(is_initialized=lambda: False, init=fail(ConnectionError("x")))
        monkeypatch.setitem(sys.modules, "ray", ray)
        with pytest.raises(ConvertError) as caught:
            convert_on_ray(tiny, tmp_path / "out", "auto" if variable else address)
    if variable and not address:
        assert str(caught.value).startswith("Ray at 'auto': x")
        return
    named = f"'auto', which is {address!r}" if variable else repr(address)
    assert str(caught.value).startswith(f"Ray at {named}: {why}")
    assert caught.value.try_again is try_again


def lost(*_: object) -> None:
    raise TimeoutError("timed out")


def connected(*_: object) -> SimpleNamespace:
    return SimpleNamespace(close=lambda: None)


NO_CLUSTER = ConnectionError("Failed to connect to Ray cluster at head:6379")
NO_INSTANCE = ConnectionError("Could not find any running Ray instance. Please specify the one")


@pytest.mark.parametrize(
    ("case", "address", "connect", "init"),
    [
        ("nothing answers", "head:6379", lost, None),
        ("what answers is no cluster", "head:6379", connected, lambda *_, **__: time.sleep(5)),
        ("no cluster, or one that wants a token", "head:6379", connected, fail(NO_CLUSTER)),
        ("no cluster runs here", None, lost, fail(NO_INSTANCE)),
        ("no address", "head", lost, None),
        ("Ray is not installed", "head:6379", lost, None),
    ],
)
def test_documented_refusals(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    address: str | None,
    connect: Callable[..., object],
    init: Callable[..., object] | None,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(cluster, "JOINING_SECONDS", 0.1)
    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", None if "installed" in case else ray)
    words = [str(source), str(tmp_path / "out"), "--ray", *([address] if address else [])]
    result = CliRunner().invoke(convert_app, words)
    line = result.stderr.strip().replace("0.1 s", "60 s")
    assert f"| {case} | {result.exit_code} | `{line}` |" in DOCUMENTED


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ("MODEL OUT --ray", "auto"),
        ("--ray MODEL OUT", "auto"),
        ("MODEL --ray OUT", "auto"),
        ("--ray --quiet MODEL OUT", "auto"),
        ("MODEL --threads 2 --ray OUT --quiet", "auto"),
        ("--ray -- MODEL OUT", "auto"),
        ("MODEL OUT --ray auto", "auto"),
        ("--ray auto MODEL OUT", "auto"),
        ("MODEL OUT --ray=head:1", "head:1"),
        ("MODEL OUT --ray head:1", "head:1"),
        ("--ray head:1 MODEL OUT", "head:1"),
        ("MODEL --ray ray://head:1 OUT", "ray://head:1"),
        ("MODEL OUT --ray nonsense", "nonsense"),
        ("--ray nonsense MODEL OUT", "nonsense"),
        ("MODEL --ray head:1", None),
        ("--ray auto OUT", None),
        ("--ray MODEL", None),
        ("MODEL OUT more --ray", None),
        ("MODEL OUT -- --ray", None),
        ("MODEL OUT --ray --part 1/2", None),
        ("MODEL OUT --ray --drop-source", None),
    ],
)
def test_the_address_may_be_left_out(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    address: str | None,
) -> None:
    asked: list[object] = []

    def stop(store: Store, out: Path, ray: str, **_: object) -> None:
        asked.extend([store.location, out, ray])
        raise ConvertError("far enough")

    monkeypatch.setattr(cluster, "convert_on_ray", stop)
    words = {"MODEL": str(source), "OUT": str(tmp_path / "out")}
    result = CliRunner().invoke(convert_app, [words.get(w, w) for w in arguments.split()])
    assert result.exit_code == (2 if address is None else 1), result.stderr
    assert asked == ([] if address is None else [str(source), tmp_path / "out", address])


def task(model: Path, out: Path, **changes: Any) -> Any:
    """What a task does about the first shard, in this process."""
    work = preview(model, max_shard_nbytes=SMALL_SHARD_NBYTES).work
    checkpoint, plan = work.checkpoint, work.plan
    shard = plan.shards[0]
    identities = {each.name: each.identity for each in checkpoint.shards}
    arguments = {
        "source": str(model),
        "connections": 1,
        "max_shard_nbytes": SMALL_SHARD_NBYTES,
        "out_dir": out,
        "direct_io": True,
        "threads": 2,
        "run": str(out),
        "name": shard.name,
        "fingerprint": shard.fingerprint,
        "sources": {name: identities[name] for name in shard.source_files},
        "filled": {},
    }
    return cluster._write_shard(**{**arguments, **changes})


def test_a_task_replaces_what_a_dead_one_left(
    source: Path, tmp_path: Path, expected: dict[str, bytes], disk_calls: list[tuple[str, ...]]
) -> None:
    """And its bytes are on the disk when it says so."""
    name = "model-00001-of-00008.safetensors"
    partial = tmp_path / f"{name}.partial"
    partial.write_bytes(b"x" * 10**6)
    checksums = task(source, tmp_path).checksums
    assert partial.read_bytes() == expected[name]
    assert disk_calls[-1] == ("sync", partial.name)
    manifest = json.loads(expected["fp4moe_manifest.json"])
    assert checksums == manifest["shards"][name]["tensors"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sources": {"model-00001-of-00003.safetensors": {}}}, "is not the same file as on the"),
        ({"fingerprint": "x"}, "is planned otherwise"),
        ({"name": "x"}, "is planned otherwise"),
        ({"out_dir": Path("/nowhere")}, "No such file or directory"),
        ({"source": "/nowhere"}, "does not exist"),
    ],
)
def test_a_task_that_sees_something_else(
    source: Path, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    error = task(source, tmp_path, **change).error
    assert isinstance(error, ConvertError)
    assert why in str(error)
    assert list(tmp_path.iterdir()) == [source]


def test_a_task_whose_source_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cluster.write_here

    def write_and_touch(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        os.utime(source / "model-00001-of-00003.safetensors")

    monkeypatch.setattr(cluster, "write_here", write_and_touch)
    assert "has changed while it was read" in str(task(source, tmp_path).error)


def test_a_failure_that_may_pass_still_may_on_the_driver(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    failed = task(source, tmp_path)
    with pytest.raises(ConvertError) as caught:
        raise failed.error from failed.cause
    assert caught.value.try_again
    assert not CheckpointError("x").try_again


@pytest.fixture
def inline_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for Ray: one task after the other, in this process."""

    def remote(function: Callable[..., object]) -> SimpleNamespace:
        task = SimpleNamespace(remote=partial(partial, function))
        return SimpleNamespace(options=lambda **_: task)

    ray = SimpleNamespace(
        is_initialized=lambda: True,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2}}],
        remote=remote,
        wait=lambda tasks, **_: (tasks[:1], tasks[1:]),
        get=lambda task: task(),
        exceptions=SimpleNamespace(RayTaskError=StopError, RayError=StopError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)


def test_no_task_drops_a_source(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'drop_source'"):
        convert_on_ray(source, tmp_path / "out", drop_source=True)  # type: ignore[call-arg]


@pytest.mark.usefixtures("inline_ray")
def test_a_source_that_is_half_gone(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """One machine began with --drop-source, the cluster does the rest."""
    out = run_half(source, tmp_path / "out")
    convert_on_ray(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert as_without(out) == expected


@pytest.mark.usefixtures("inline_ray")
def test_what_one_machine_has_fetched_is_not_fetched_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, request, notes, asked = f"file://{source}", UrlStore.request, [], [0]

    def stop(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            raise StopError

    def counted(store: UrlStore, name: str, offset: int, into: Bytes) -> Iterator[int]:
        asked[0] += into.size
        return request(store, name, offset, into)

    with little_room(), monkeypatch.context() as patch:
        with pytest.raises(StopError):
            convert(url, tmp_path / "out", on_progress=stop)
        patch.setattr(UrlStore, "request", counted)
        convert_on_ray(url, tmp_path / "afresh")
        afresh, asked[0] = asked[0], 0
        convert_on_ray(url, tmp_path / "out", on_note=notes.append)
    assert notes == [
        "model-00001-of-00001.safetensors: resuming: what an earlier run has fetched for it is kept"
    ]
    assert asked[0] < 0.7 * afresh
    assert every_file(tmp_path / "out") == every_file(tmp_path / "afresh")


@pytest.mark.usefixtures("inline_ray")
def test_what_ray_prints_is_not_in_the_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells of a node that has died, for one, at any time."""
    get = sys.modules["ray"].get

    def get_and_tell(task: Callable[[], object]) -> object:
        print("(raylet) The node has been marked dead")
        return get(task)

    monkeypatch.setattr(sys.modules["ray"], "get", get_and_tell)
    arguments = [str(source), str(tmp_path / "out"), "--ray", "auto", "--json", "--quiet"]
    result = CliRunner().invoke(convert_app, arguments)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["layers"] == 2
    assert "marked dead" in result.stderr
