"""Models on the Hub: a conversion streams them, and nothing of a source touches the disk.

The real huggingface_hub talks to a Hub on this machine (`support.hub`), which counts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import close_session, constants, snapshot_download
from support.folders import MANIFEST, every_file, flip_bit, without_source
from support.hub import Fault, Hub
from support.make_checkpoint import Spec, make_checkpoint
from support.specs import SMALL_SHARD_NBYTES
from typer.testing import CliRunner, Result

from fp4moe_convert import (
    CheckpointError,
    Progress,
    VerifyError,
    convert,
    inspect,
    open_store,
    restore,
    verify,
)
from fp4moe_convert.cli.commands import app
from fp4moe_convert.format.manifest import FileIdentity
from fp4moe_convert.storage import hub as hub_store
from fp4moe_convert.storage.header import read_header
from fp4moe_convert.storage.hub import HubStore
from fp4moe_convert.storage.local import LocalFolder, LocalReader
from fp4moe_convert.storage.remote import RemoteStore

ID = "org/model"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def weights(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.glob("*.safetensors")}


def header_nbytes(path: Path) -> int:
    return read_header(LocalReader(path)).nbytes


def fetched_once(hub: Hub, folder: Path) -> None:
    """Every byte of every shard has been sent, and none twice."""
    served = hub.served()
    for name, path in weights(folder).items():
        position = 0
        for start, stop in served[name]:
            assert start == position, name
            position = stop
        assert position == path.stat().st_size, name


# --- which store ----------------------------------------------------------------------------------


def test_a_folder_that_exists_wins(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, source)
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_store(ID), HubStore)
    Path(ID).mkdir(parents=True)
    assert isinstance(open_store(ID), LocalFolder)
    assert isinstance(open_store(f"hf://{ID}"), HubStore)


@pytest.mark.parametrize("place", ["model", "./org/model", "../model", "/org/model", "a/b/c"])
def test_what_is_no_id_is_a_folder(hub: Hub, place: str) -> None:
    assert isinstance(open_store(place), LocalFolder)
    assert isinstance(open_store(Path(place)), LocalFolder)
    assert hub.requests == []


def test_a_folder_has_no_revisions(source: Path) -> None:
    with pytest.raises(CheckpointError, match="has no revisions"):
        open_store(source, revision="main")


def test_a_local_conversion_does_not_import_the_library(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from fp4moe_convert import convert; convert(*sys.argv[1:]);"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "out"], check=True)


# --- converting -----------------------------------------------------------------------------------


def test_the_same_bytes_as_from_a_folder_each_fetched_once(
    hub: Hub, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    commit = hub.add(ID, source).commit
    report = convert(ID, tmp_path / "out", max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert without_source(every_file(tmp_path / "out")) == without_source(expected)
    fetched_once(hub, source)
    assert all(f"/resolve/{commit}/" in each for each in hub.requests if "/resolve/" in each)
    assert report.fetched is not None
    # The manifest says where it came from.
    recorded = json.loads((tmp_path / "out" / MANIFEST).read_text())["source"]
    assert (recorded["path"], recorded["hub_id"]) == (f"hf://{ID}", ID)
    assert recorded["revision"] == commit
    for name, file in hub.repositories[ID].files.items():
        if name in recorded["shards"]:
            assert recorded["shards"][name]["bytes"] == file.nbytes
            assert recorded["shards"][name]["etag"] == file.etag


def test_the_report_counts_what_was_sent(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(ID, source)
    result = run("convert", ID, tmp_path / "out", "--json", "--quiet")
    fetched = json.loads(result.stdout)["fetched"]
    # The library asks one question of its own, now and then.
    assert fetched["requests"] == len([each for each in hub.requests if "agent" not in each])
    assert fetched["bytes"] == hub.sent_nbytes


def test_a_dry_run_fetches_no_weight_byte(hub: Hub, tmp_path: Path) -> None:
    many = Spec(layers=2, experts=64, hidden=256, intermediate=128, shards=163, vocab_size=64)
    make_checkpoint(tmp_path / "model", many)
    hub.add(ID, tmp_path / "model")
    result = run("convert", ID, tmp_path / "out", "--dry-run", "--json")
    foreseen = json.loads(result.stdout)
    served = hub.served()
    shards = weights(tmp_path / "model")
    headers = {name: header_nbytes(path) for name, path in shards.items()}
    assert len(headers) == 163
    for name, nbytes in headers.items():
        assert served[name] == [(0, 8), (8, nbytes)]
    # An address and two reads for each shard; one for each other file, and one that lists them.
    others = len(hub.repositories[ID].files) - len(headers)
    assert foreseen["fetched"]["requests"] <= 3 * 163 + others + 1
    every_byte = sum(path.stat().st_size for path in shards.values())
    assert foreseen["to_fetch_bytes"] == (
        every_byte - sum(headers.values()) + foreseen["other_bytes"]
    )
    assert foreseen["source"]["hub_id"] == ID
    assert not (tmp_path / "out").exists()


def test_the_dry_run_says_what_it_will_cost(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(ID, source)
    lines = run("convert", ID, tmp_path / "out", "--dry-run").stdout.splitlines()
    said = {line.split("  ")[0]: line for line in lines}
    assert "min at the" in said["to fetch"]
    assert "nothing of the source" in said["disk"]
    assert "requests" in said["fetched"]


def test_the_disk_holds_the_result_and_no_more(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(ID, source)
    out, cache = tmp_path / "out", Path(constants.HF_HUB_CACHE)
    most = 0

    def on_progress(_: Progress) -> None:
        nonlocal most
        most = max(most, nbytes_in(out))

    convert(ID, out, max_shard_nbytes=SMALL_SHARD_NBYTES, on_progress=on_progress)
    shards = [path.stat().st_size for path in weights(out).values()]
    assert max(shards) < most <= sum(shards) + max(shards)
    assert not cache.exists()


def nbytes_in(folder: Path) -> int:
    """Of shards and what will be shards; one may get its name in the meantime."""
    nbytes = 0
    for path in folder.glob("model-*"):
        with suppress(FileNotFoundError):
            nbytes += path.stat().st_size
    return nbytes


def test_one_connection_and_one_thread_are_enough(
    hub: Hub, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, source)
    store = open_store(ID, connections=1)
    convert(store, tmp_path / "out", max_shard_nbytes=SMALL_SHARD_NBYTES, threads=1)
    assert without_source(every_file(tmp_path / "out")) == without_source(expected)
    fetched_once(hub, source)


def test_a_whole_path_on_the_command_line(hub: Hub, source: Path, tmp_path: Path) -> None:
    """Through the environment, as people set it, in a process of its own."""
    hub.add(ID, source)
    result = subprocess.run(
        [sys.executable, "-m", "fp4moe_convert", "convert", ID, tmp_path / "out", "--verify"],
        env={**os.environ, **hub.environment(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    verify(tmp_path / "out", source)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_the_original_comes_back(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(ID, source)
    convert(ID, tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    assert every_file(tmp_path / "back") == every_file(source)


# --- other commands -------------------------------------------------------------------------------


def test_verify_against_the_hub(hub: Hub, source: Path, tmp_path: Path) -> None:
    commit = hub.add(ID, source).commit
    convert(source, tmp_path / "out")
    hub.forget()
    verified = verify(tmp_path / "out", ID)
    assert verified.source == f"hf://{ID}"
    fetched_once(hub, source)
    assert run("verify", tmp_path / "out", "--source", ID, "--revision", commit).exit_code == 0


def test_verify_finds_a_byte_that_differs(hub: Hub, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    flip_bit(max(weights(source).values()))
    hub.add(ID, source)
    with pytest.raises(VerifyError, match="differs"):
        verify(tmp_path / "out", ID)


def test_one_revision_is_meant(hub: Hub, source: Path, tmp_path: Path) -> None:
    commit = hub.add(ID, source).commit
    url = f"hf://{ID}@{commit}"
    stopped = run("convert", url, tmp_path / "out", "--revision", "main")
    assert (stopped.exit_code, stopped.stderr) == (
        1,
        f"error: {url}: --revision main is another; give one of them\n",
    )
    assert run("convert", url, tmp_path / "out", "--revision", commit).exit_code == 0


def test_verify_wants_the_commit_that_was_converted(hub: Hub, source: Path, tmp_path: Path) -> None:
    first = hub.add(ID, source).commit
    convert(ID, tmp_path / "out")
    newer = Path(shutil.copytree(source, tmp_path / "newer"))
    (newer / "tokenizer.json").write_text("{}")
    second = hub.add(ID, newer).commit
    advice = re.escape(f"(--revision {first} of {ID} is)")
    with pytest.raises(VerifyError, match=f"revision {second} is not {first} {advice}"):
        verify(tmp_path / "out", ID)
    assert run("verify", tmp_path / "out", "--source", ID, "--revision", first).exit_code == 0


def test_no_revision_of_another_model_is_the_one(hub: Hub, source: Path, tmp_path: Path) -> None:
    first = hub.add(ID, source).commit
    convert(ID, tmp_path / "out")
    (source / "README.md").write_text("other words")
    second = hub.add("org/other", source).commit
    with pytest.raises(VerifyError, match=rf"revision {second} is not {first} \(converted from"):
        verify(tmp_path / "out", "org/other")


def test_advice_for_a_job_whose_branch_has_moved(hub: Hub, source: Path, tmp_path: Path) -> None:
    """Both ways out are options of the command that names them."""
    first = hub.add(ID, source).commit
    job = ("ci", ID, tmp_path / "out")
    assert run(*job).exit_code == 0
    (source / "README.md").write_text("better words")
    second = hub.add(ID, source).commit
    stopped = run(*job)
    assert stopped.exit_code == 1
    assert f"revision {second} is not {first} (--revision {first} of {ID} is)" in stopped.stderr
    assert stopped.stderr.endswith("; choose another folder, or --overwrite starts afresh\n")
    assert json.loads(run(*job, "--revision", first, "--json").stdout)["unchanged"] is True
    assert run(*job, "--overwrite").exit_code == 0
    assert json.loads(run(*job, "--json").stdout)["unchanged"] is True


def test_inspect(hub: Hub, source: Path) -> None:
    hub.add(ID, source)
    there, here = inspect(ID), inspect(source)
    assert (there.state, there.layers, there.nbytes) == (here.state, here.layers, here.nbytes)
    result = run("inspect", ID, "--json")
    assert json.loads(result.stdout)["folder"] == f"hf://{ID}"


# --- the cache, tokens, settings ------------------------------------------------------------------


def test_a_snapshot_that_is_complete_is_used(hub: Hub, source: Path, tmp_path: Path) -> None:
    commit = hub.add(ID, source).commit
    snapshot = Path(snapshot_download(ID))
    hub.forget()
    store = open_store(ID)
    assert isinstance(store, LocalFolder)
    assert store.local_path == snapshot
    convert(ID, tmp_path / "out")
    assert hub.served() == {}
    recorded = json.loads((tmp_path / "out" / MANIFEST).read_text())["source"]
    assert (recorded["hub_id"], recorded["revision"]) == (ID, commit)
    # Not if a file is too short, or missing.
    first = min(weights(snapshot).values())
    os.truncate(first, 100)
    assert isinstance(open_store(ID), HubStore)
    first.unlink()
    assert isinstance(open_store(ID), HubStore)


def test_another_cache(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(ID, source)
    snapshot_download(ID, cache_dir=tmp_path / "elsewhere")
    assert isinstance(open_store(ID), HubStore)
    assert isinstance(open_store(ID, cache_dir=tmp_path / "elsewhere"), LocalFolder)
    arguments = ("convert", ID, tmp_path / "out", "--cache-dir", tmp_path / "elsewhere", "-q")
    assert run(*arguments).exit_code == 0
    assert not any("GET /signed" in each and "Range" in each for each in hub.requests)


def test_offline(hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, source)
    snapshot_download(ID)
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert isinstance(open_store(ID), LocalFolder)
    assert hub.requests == []


def leave_no_list(snapshot: Path) -> None:
    """As older releases of huggingface_hub do."""
    shutil.rmtree(snapshot.parent.parent / "trees", ignore_errors=True)
    with suppress(AttributeError):
        huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()


@pytest.fixture(params=["offline, and not in the cache", "no network"])
def alone(
    request: pytest.FixtureRequest,
    hub: Hub,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, Callable[[], None]]:
    """A snapshot whose Hub does not answer, and what makes sure that it is refused."""
    hub.add(ID, source)
    snapshot = Path(snapshot_download(ID))
    if request.param == "no network":
        down(hub)
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def refused() -> None:
        result = run("convert", ID, tmp_path / "out")
        said = result.stderr.strip().replace(hub.endpoint, "https://huggingface.co")
        assert said.replace(constants.HF_HUB_CACHE, "CACHE") == documented()[request.param]
        assert result.exit_code == (75 if request.param == "no network" else 1)

    return snapshot, refused


@pytest.mark.skipif(
    not hasattr(huggingface_hub, "get_cached_repo_tree"), reason="this release keeps no list"
)
def test_a_snapshot_that_lacks_a_file_is_refused(alone: tuple[Path, Callable[[], None]]) -> None:
    snapshot, refused = alone
    first = min(weights(snapshot).values())
    content = first.read_bytes()
    first.unlink()
    refused()
    first.write_bytes(content[:100])
    refused()
    first.write_bytes(content)
    (snapshot / "tokenizer.json").unlink()
    refused()


def test_a_snapshot_that_may_lack_a_file_is_said_to(
    alone: tuple[Path, Callable[[], None]], tmp_path: Path
) -> None:
    snapshot, refused = alone
    leave_no_list(snapshot)
    (snapshot / "tokenizer.json").unlink()
    result = run("convert", ID, tmp_path / "done", "-q")
    assert (result.exit_code, result.stderr.strip()) == (0, warned(snapshot))
    [warning] = json.loads(run("inspect", ID, "--json").stdout)["warnings"]
    assert f"warning: {warning}" == warned(snapshot)
    for shard in weights(snapshot).values():
        shard.unlink()
    refused()


def warned(snapshot: Path) -> str:
    text = (Path(__file__).parent.parent / "docs" / "hub.md").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("warning: ")]
    return line.replace("SNAPSHOT", str(snapshot))


def test_the_cache_serves_while_the_hub_does_not(hub: Hub, source: Path) -> None:
    hub.add(ID, source)
    snapshot_download(ID)
    down(hub)
    assert isinstance(open_store(ID), LocalFolder)


def test_a_token_opens_a_private_model(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, source).private = True
    hub.repositories[ID].gated = True
    with pytest.raises(CheckpointError, match="private"):
        open_store(ID)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    convert(ID, tmp_path / "out")  # the storage refuses requests that come with a token
    fetched_once(hub, source)


@pytest.mark.parametrize("is_proxied", [False, True])
def test_a_private_mirror_that_sends_large_files_itself(
    hub: Hub,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_proxied: bool,
) -> None:
    hub.add(ID, source).private = True
    hub.leads_away = False
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(hub_store.ConnectionPool, "reach", lambda *_: not is_proxied)
    convert(ID, tmp_path / "out")
    fetched_once(hub, source)
    # A token that is withdrawn meanwhile is the Hub's to speak of.
    hub.faults.append(Fault("/resolve/", float("inf"), status=403))
    result = run("verify", tmp_path / "out", "--source", ID)
    assert result.exit_code == 1
    assert "the Hub answers 403" in result.stderr


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("name", ["tokenizer.json", "model-00002-of-00003.safetensors"])
def test_a_listed_file_that_is_not_there(
    hub: Hub, source: Path, tmp_path: Path, name: str, status: int
) -> None:
    hub.add(ID, source)
    hub.faults.append(Fault(f"/resolve/.*{name}", float("inf"), status=status))
    result = run("convert", ID, tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {ID}: {name}: the Hub answers {status} ")
    assert result.stderr.endswith(f"; has it been deleted? look at {hub.endpoint}/{ID}\n")


@pytest.mark.parametrize("revision", ["main", "v1", None])
def test_a_revision(hub: Hub, source: Path, revision: str | None) -> None:
    repository = hub.add(ID, source)
    repository.refs["v1"] = repository.commit
    given = f"hf://{ID}" + (f"@{revision}" if revision else "")
    for store in (open_store(ID, revision=revision), open_store(given)):
        assert store.provenance().revision == repository.commit


# --- refusals -------------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    text = (Path(__file__).parent.parent / "docs" / "hub.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if "| `error: " in line]
    return {what.removeprefix("| "): line.strip("` |") for what, line in rows}


def gated(hub: Hub) -> None:
    hub.repositories[ID].gated = True


def missing(hub: Hub) -> None:
    del hub.repositories[ID]


def private(hub: Hub) -> None:
    hub.repositories[ID].private = True


def down(hub: Hub) -> None:
    hub.__exit__()
    close_session()  # its connections would still be answered


def set_another_token(_: Hub) -> None:
    Path(constants.HF_TOKEN_PATH).write_text("hf_\N{EN DASH}1")


REFUSED = {
    "gated": gated,
    "missing": missing,
    "private": private,
    "no such revision": lambda _: None,
    "no network": down,
    "offline, and not in the cache": lambda _: None,
    "a token that was copied wrong": set_another_token,
    "`HF_ENDPOINT` is no URL": lambda _: None,
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_says_what_to_do(
    case: str, hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, source)
    endpoint, cache = hub.endpoint, constants.HF_HUB_CACHE
    REFUSED[case](hub)
    if case.startswith("offline"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if case.startswith("`HF_ENDPOINT`"):
        monkeypatch.setattr(constants, "ENDPOINT", "hub.local")
    revision = ("--revision", "v9") if case == "no such revision" else ()
    result = run("convert", ID, tmp_path / "out", *revision)
    assert result.exit_code == (75 if case == "no network" else 1)
    said = result.stderr.strip().replace(endpoint, "https://huggingface.co").replace(cache, "CACHE")
    assert said == documented()[case]
    assert not (tmp_path / "out").exists()


URLS_REFUSED = {
    "a URL whose package is missing": "s3://bucket/model",
    "a URL of an unknown kind": "foo://model",
    "a URL with nothing behind it": "memory://nothing",
    "a page of the Hub": "https://huggingface.co/org/model/tree/main",
}


@pytest.mark.parametrize("case", URLS_REFUSED)
def test_one_line_refuses_a_url(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    result = run("convert", URLS_REFUSED[case], tmp_path / "out")
    assert (result.exit_code, result.stderr.strip()) == (1, documented()[case])


def test_the_documented_refusals_are_those_that_are_tested() -> None:
    assert list(documented()) == [*REFUSED, *URLS_REFUSED]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a//b", "nul\0"])
def test_no_path_leads_out(name: str) -> None:
    class Store(RemoteStore):
        request = provenance = None  # type: ignore[assignment]

    with pytest.raises(CheckpointError, match="no path of a file"):
        Store("somewhere", {name: FileIdentity(0)}, connections=1)
