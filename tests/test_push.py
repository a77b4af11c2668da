"""Pushing to the Hub: a repository gets all of a conversion, never half of one that looks whole,
and never in place of something else.

The real huggingface_hub uploads to a Hub on this machine (`support.hub_upload`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants, snapshot_download
from support.folders import INDEX, MANIFEST, change_byte, edit_json, every_file, flip_bit
from support.hub import Fault, Hub
from support.hub_upload import ATTRIBUTES, Uploads
from support.specs import SMALL_SHARD_NBYTES
from typer.testing import CliRunner, Result

from fp4moe_convert import (
    CheckpointError,
    PushError,
    PushReport,
    StorageLimitError,
    convert,
    publication,
    push,
    restore,
    verify,
)
from fp4moe_convert.cli.commands import app
from fp4moe_convert.publication import LAST, next_commit

# huggingface_hub uploads by LFS in a way that httpx no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

ID = "org/result"
SOURCE_ID = "org/model"
CARD = """---
license: other
license_name: some-license
license_link: LICENSE
pipeline_tag: text-generation
extra_gated_prompt: no
---
# The original
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def uploads(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uploads:
    """A Hub that takes what this process uploads."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return Uploads(hub, tmp_path / "objects")


@pytest.fixture
def original(source: Path) -> Path:
    """A source with a model card."""
    (source / "README.md").write_text(CARD)
    return source


@pytest.fixture
def converted(
    hub: Hub, original: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of what it is converted to, from the Hub."""
    hub.add(SOURCE_ID, original)
    made = tmp_path_factory.getbasetemp() / "converted-to-push"
    if not made.exists():
        convert(SOURCE_ID, made, max_shard_nbytes=SMALL_SHARD_NBYTES)
    hub.forget()
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """About one shard a commit."""
    monkeypatch.setattr(publication, "COMMIT_NBYTES", SMALL_SHARD_NBYTES)


def there(uploads: Uploads, repo_id: str = ID) -> dict[str, bytes]:
    """What the repository holds."""
    files = uploads.hub.repositories[repo_id].files
    return {name: file.path.read_bytes() for name, file in files.items()}


def download(tmp_path: Path) -> Path:
    return Path(snapshot_download(ID, local_dir=tmp_path / "downloaded"))


def pushed_whole(uploads: Uploads, converted: Path) -> None:
    """The repository has every file of the folder, and no commit left it with a part that loads."""
    found, expected = there(uploads), every_file(converted)
    assert found.pop(".gitattributes") == ATTRIBUTES
    expected["README.source.md"] = expected.pop("README.md")
    assert found.pop("README.md").startswith(b"---\nbase_model: org/model\n")
    assert found == expected
    for commit in uploads.commits[:-1]:
        assert commit.names.isdisjoint(LAST)


# --- what is there --------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_commits")
def test_a_new_repository(uploads: Uploads, converted: Path) -> None:
    before = every_file(converted)
    result = run("push", converted, ID, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    pushed_whole(uploads, converted)
    assert every_file(converted) == before
    assert not uploads.hub.repositories[ID].private
    assert len(uploads.commits) > 3
    assert uploads.commits[0].added == [MANIFEST]
    assert set(uploads.commits[-1].added) == set(LAST)
    said = json.loads(result.stdout)
    sizes = [len(content) for name, content in there(uploads).items() if name[0] != "."]
    assert said.pop("seconds") > 0
    assert said.pop("bytes_per_second") > 0
    assert said == {
        "repo_id": ID,
        "url": f"{uploads.hub.endpoint}/{ID}",
        "commit": uploads.hub.repositories[ID].commit,
        "files": len(sizes),
        "bytes": sum(sizes),
        "uploaded_files": len(sizes),
        "uploaded_bytes": sum(sizes),
        "warnings": [],
    }
    assert sorted(uploads.received) == sorted(set(uploads.received))


@pytest.mark.usefixtures("uploads")
def test_what_is_downloaded_verifies_and_comes_back(
    converted: Path, original: Path, tmp_path: Path
) -> None:
    push(converted, ID)
    folder = download(tmp_path)
    verified = verify(folder, SOURCE_ID)
    assert verified.documentation == [".gitattributes: is not in the manifest"]
    restore(folder, tmp_path / "back", verify=True)
    assert every_file(tmp_path / "back") == every_file(original)


def test_a_download_can_be_pushed_as_well(
    uploads: Uploads, converted: Path, tmp_path: Path
) -> None:
    push(converted, ID)
    push(download(tmp_path), "org/again")
    assert there(uploads, "org/again") == there(uploads)


def test_from_the_cache_as_well(uploads: Uploads, converted: Path) -> None:
    """A snapshot there is links."""
    push(converted, ID)
    push(snapshot_download(ID), "org/again")
    assert there(uploads, "org/again") == there(uploads)


def test_in_parts(uploads: Uploads, converted: Path) -> None:
    uploads.part_nbytes = 100_000
    push(converted, ID)
    pushed_whole(uploads, converted)


@pytest.mark.parametrize("made_before", [False, True])
def test_private(uploads: Uploads, converted: Path, made_before: bool) -> None:
    if made_before:
        uploads.add(ID, {".gitattributes": ATTRIBUTES}, private=True)
    push(converted, ID, private=True)
    assert uploads.hub.repositories[ID].private
    pushed_whole(uploads, converted)


def test_files_that_engines_do_not_read_stay_as_they_are_there(
    uploads: Uploads, converted: Path
) -> None:
    theirs = {"README.md": b"---\nlicense: mit\n---\n# Ours\n", "figures/a.png": b"png"}
    uploads.add(ID, {".gitattributes": ATTRIBUTES, **theirs})
    result = run("push", converted, ID)
    assert f"{ID} has a README.md, which stays as it is\n" in result.stderr
    found = there(uploads)
    assert theirs.items() <= found.items()
    assert found["README.source.md"] == CARD.encode()
    assert INDEX in found


def test_progress_counts_every_byte_once(uploads: Uploads, converted: Path) -> None:
    uploads.hub.faults.append(Fault(r"POST .*/commit/", times=2, status=503))
    seen = []
    report = push(converted, ID, on_progress=seen.append)
    uploading = [each for each in seen if each.phase == "uploading"]
    assert [each.done for each in uploading] == sorted({each.done for each in uploading})
    assert uploading[-1].done == uploading[-1].total == report.uploaded_nbytes


# --- the card -------------------------------------------------------------------------------------


def card_of(uploads: Uploads) -> ModelCard:
    return ModelCard(there(uploads)["README.md"].decode())


def test_the_card(uploads: Uploads, converted: Path, hub: Hub) -> None:
    commit = hub.repositories[SOURCE_ID].commit
    manifest = json.loads((converted / MANIFEST).read_text())
    push(converted, ID)
    card = card_of(uploads)
    assert card.data.to_dict() == {
        "base_model": SOURCE_ID,
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "some-license",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["fp4moe", "nvfp4", "moe", "flashinfer", "sglang", "vllm"],
    }
    for each in (
        f"[`{commit[:12]}`]({hub.endpoint}/{SOURCE_ID}/tree/{commit})",
        "(README.source.md)",
        "| format | fp4moe, version 2 |",
        f"fp4moe-convert {manifest['versions']['fp4moe-convert']} |",
        f"`{manifest['row_order']}` (FlashInfer {manifest['versions']['flashinfer']})",
        "| SGLang 0.5.23 | tensor parallel 1, 2",
        "| vLLM 0.33.0 | tensor parallel 1, 2",
        f"hf download {ID} --local-dir result\n",
        "--model-path result ",
        "vllm serve result ",
        f"fp4moe verify result --source {SOURCE_ID} --revision {commit}\n",
        "fp4moe restore result result-original\n",
    ):
        assert each in card.text


@pytest.mark.slow
def test_the_commands_of_the_card_work(
    uploads: Uploads, converted: Path, original: Path, tmp_path: Path
) -> None:
    push(converted, ID)
    blocks = card_of(uploads).text.split("```\n")[1::2]
    commands = "".join(blocks).splitlines()
    fetch, *ours = [line for line in commands if line.split()[0] in ("hf", "fp4moe")]
    assert len(ours) == 3
    # As that command does; it does not start with the oldest huggingface_hub and today's typer.
    assert fetch == f"hf download {ID} --local-dir result"
    snapshot_download(ID, local_dir=tmp_path / "result")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **uploads.hub.environment(tmp_path / "home"), "PATH": path}
    for line in ours:
        subprocess.run(line, shell=True, cwd=tmp_path, env=environment, check=True)
    assert every_file(tmp_path / "result-original") == every_file(original)


def test_the_card_of_a_local_source_without_one(
    uploads: Uploads, source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out")
    result = run("push", tmp_path / "out", ID)
    warning = f"the model card in {ID} names no licence: none is known of the source"
    assert f"warning: {warning}\n" in result.stderr
    card = card_of(uploads)
    assert list(card.data.to_dict()) == ["tags"]
    assert str(source.parent) not in card.content
    assert "README.source.md" not in card.content
    assert "README.source.md" not in there(uploads)


@pytest.mark.parametrize(
    "top",
    [
        "license: [mit]",
        "- mit",
        "license: {",
        f"license: {'m' * 1000}",
        "license: !!python/name:os",
    ],
)
def test_a_source_card_that_cannot_be_read(
    uploads: Uploads, source: Path, tmp_path: Path, top: str
) -> None:
    (source / "README.md").write_text(f"---\n{top}\n---\n# The original\n")
    report = push(convert(source, tmp_path / "out").out_dir, ID)
    assert list(card_of(uploads).data.to_dict()) == ["tags"]
    assert len(report.warnings) == 1
    assert there(uploads)["README.source.md"] == (source / "README.md").read_bytes()


def test_a_card_that_the_user_wrote(uploads: Uploads, converted: Path) -> None:
    (converted / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(converted, ID)
    assert card_of(uploads).text == "# Mine\n"
    assert "README.source.md" not in there(uploads)


# --- again, and after an interruption -------------------------------------------------------------


def test_what_is_there_is_not_even_read(
    uploads: Uploads, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = push(converted, ID)
    uploads.hub.forget()
    monkeypatch.setattr(publication, "verify", None)
    result = run("push", converted, ID)
    assert "nothing: all of it was there" in result.stdout
    assert not [each for each in uploads.hub.requests if not each.startswith("GET")]
    again = push(converted, ID)
    assert (again.uploaded_files, again.uploaded_nbytes) == (0, 0)
    assert (again.commit, again.nbytes) == (first.commit, first.nbytes)


@pytest.mark.parametrize("delay", [0.3, 0.7, 1.1, 1.5])
@pytest.mark.usefixtures("small_commits")
def test_a_run_that_was_killed_goes_on(
    uploads: Uploads, converted: Path, tmp_path: Path, delay: float
) -> None:
    large = sum(
        file.stat().st_size
        for file in converted.iterdir()
        if file.suffix in (".safetensors", ".dat")
    )
    code = (
        "import sys; from fp4moe_convert import publication, push;"
        f"publication.COMMIT_NBYTES = {SMALL_SHARD_NBYTES}; push(*sys.argv[1:])"
    )
    uploads.hub._rate = large / 2
    process = subprocess.Popen(
        [sys.executable, "-c", code, converted, ID],
        env={**os.environ, **uploads.hub.environment(tmp_path / "home")},
    )
    while not uploads.received_nbytes and process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    assert process.poll() is None
    process.kill()
    process.wait()
    time.sleep(0.2)  # what was under way comes, or does not
    uploads.hub._rate = None
    received, committed = set(uploads.received), set(uploads.commits[-1].names)
    uploads.received.clear()
    report = push(converted, ID)
    assert received.isdisjoint(uploads.received)
    assert report.uploaded_files == report.files - len(committed - {".gitattributes"})
    pushed_whole(uploads, converted)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(r"POST .*/commit/", times=3, status=503),
        Fault(r"POST .*/preupload/", times=1, status=429, headers={"Retry-After": "0"}),
        Fault(r"PUT /upload/", times=1, status=500),
        Fault(r"PUT /upload/", times=1, cut_after=1000),
        Fault(r"POST /api/repos/create", times=2, status=502),
        Fault(r"GET /api/models/org/result", times=2, status=503),
        Fault(r"GET /api/models/org/result", times=2, status=200),  # with a body that is no JSON
        Fault(r"POST .*/preupload/", times=1, status=200),
    ],
    ids=lambda fault: f"{fault.path} {fault.status}",
)
def test_what_passes_is_tried_again(uploads: Uploads, converted: Path, fault: Fault) -> None:
    uploads.hub.faults.append(fault)
    push(converted, ID)
    assert fault.times == 0
    pushed_whole(uploads, converted)


@pytest.mark.usefixtures("small_commits")
def test_a_commit_whose_answer_is_lost(
    uploads: Uploads, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    commit = publication.HubRepository.commit

    def sometimes(self, *arguments, **options):  # type: ignore[no-untyped-def]
        commit(self, *arguments, **options)
        calls.append(1)
        if len(calls) % 2:
            raise publication.TryAgainError("the answer is lost")

    monkeypatch.setattr(publication.HubRepository, "commit", sometimes)
    push(converted, ID)
    pushed_whole(uploads, converted)
    assert len(uploads.received) == len(set(uploads.received))


@pytest.mark.usefixtures("small_commits")
def test_two_at_once(uploads: Uploads, converted: Path) -> None:
    """Another run commits the same between each look at the repository and the commit after it."""
    others: list[PushReport] = []

    def other() -> None:
        uploads.on_commit = None
        others.append(push(converted, ID))

    uploads.on_commit = other
    report = push(converted, ID)
    assert others[0].commit == report.commit
    pushed_whole(uploads, converted)


@pytest.mark.usefixtures("small_commits")
def test_somebody_puts_something_else_there_meanwhile(uploads: Uploads, converted: Path) -> None:
    def somebody() -> None:
        if len(uploads.commits) == 2:
            uploads.on_commit = None
            uploads.add(ID, {**there(uploads), "other.safetensors": b"else"})

    uploads.on_commit = somebody
    with pytest.raises(PushError, match=r"holds something else: other\.safetensors"):
        push(converted, ID)
    assert INDEX not in there(uploads)


@pytest.mark.usefixtures("small_commits")
def test_the_same_converted_elsewhere_may_go_on(
    uploads: Uploads, converted: Path, original: Path, tmp_path: Path
) -> None:
    """Only what the manifest says of the place of the source differs."""
    uploads.hub.faults.append(Fault("POST .*/commit/", times=1, status=403))
    elsewhere = convert(original, tmp_path / "too", max_shard_nbytes=SMALL_SHARD_NBYTES).out_dir
    assert (elsewhere / MANIFEST).read_bytes() != (converted / MANIFEST).read_bytes()
    uploads.add(ID, {MANIFEST: (converted / MANIFEST).read_bytes()})
    with pytest.raises(PushError, match="403"):
        push(elsewhere, ID)
    push(elsewhere, ID)
    assert there(uploads)[MANIFEST] == (converted / MANIFEST).read_bytes()
    verify(download(tmp_path), original)


def test_what_somebody_deleted_there_comes_back(
    uploads: Uploads, converted: Path, tmp_path: Path
) -> None:
    push(converted, ID)
    uploads.add(ID, {n: c for n, c in there(uploads).items() if "00002" not in n})
    report = push(converted, ID)
    assert report.uploaded_files == 1
    verify(download(tmp_path), SOURCE_ID)


def test_next_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "COMMIT_NBYTES", 10)
    monkeypatch.setattr(publication, "COMMIT_FILES", 3)
    sizes = {"a": 6, "b": 4, "c": 1, "d": 20, "e": 0, "f": 0, "g": 0, "h": 0}
    sizes |= dict.fromkeys([MANIFEST, *LAST], 100)
    missing, commits = list(sizes), []
    while missing:
        commits.append(next_commit(missing, sizes))
        missing = [name for name in missing if name not in commits[-1]]
    assert commits == [[MANIFEST], ["a", "b"], ["c"], ["d"], ["e", "f", "g"], ["h"], list(LAST)]


# --- what is not pushed ---------------------------------------------------------------------------


def documented() -> dict[str, str]:
    text = (Path(__file__).parent.parent / "docs" / "push.md").read_text()
    section = text.split("## What it refuses")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if "| `error: " in line]
    return {what.removeprefix("| "): line.strip("` |") for what, line in rows}


Case = Callable[[Uploads, Path, pytest.MonkeyPatch], None]


def not_logged_in(_: Uploads, __: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def token_that_is_none(_: Uploads, __: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")


def another_token(_: Uploads, __: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\N{EN DASH}1")


def no_url(_: Uploads, __: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "hub.local")


def answered(path: str, message: str) -> Case:
    def case(uploads: Uploads, _: Path, __: pytest.MonkeyPatch) -> None:
        headers = {"X-Error-Message": message}
        uploads.hub.faults.append(Fault(path, times=float("inf"), status=403, headers=headers))

    return case


def holds(**files: bytes) -> Case:
    def case(uploads: Uploads, _: Path, __: pytest.MonkeyPatch) -> None:
        uploads.add(ID, {name.replace("_", "."): content for name, content in files.items()})

    return case


def another_conversion(uploads: Uploads, converted: Path, _: pytest.MonkeyPatch) -> None:
    out = convert(converted.parent / "source", converted.parent / "too").out_dir
    uploads.add(ID, {MANIFEST: (out / MANIFEST).read_bytes()})


def another_version(uploads: Uploads, converted: Path, _: pytest.MonkeyPatch) -> None:
    manifest = json.loads((converted / MANIFEST).read_text()) | {"format_version": 3}
    uploads.add(ID, {MANIFEST: json.dumps(manifest).encode()})


def changed_there(uploads: Uploads, converted: Path, _: pytest.MonkeyPatch) -> None:
    push(converted, ID)
    uploads.add(ID, {**there(uploads), "config.json": b"{}"})


def public_there(uploads: Uploads, _: Path, __: pytest.MonkeyPatch) -> None:
    uploads.add(ID, {".gitattributes": ATTRIBUTES})


def ignored(uploads: Uploads, _: Path, __: pytest.MonkeyPatch) -> None:
    uploads.add(ID, {".gitignore": b"tokenizer.json\n"})


def down(uploads: Uploads, _: Path, __: pytest.MonkeyPatch) -> None:
    uploads.hub.__exit__()


def offline(_: Uploads, __: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unfinished(_: Uploads, converted: Path, __: pytest.MonkeyPatch) -> None:
    (converted / INDEX).unlink()


def damaged(_: Uploads, converted: Path, __: pytest.MonkeyPatch) -> None:
    flip_bit(sorted(converted.glob("*.safetensors"))[-1])


def no_conversion(_: Uploads, converted: Path, __: pytest.MonkeyPatch) -> None:
    (converted / MANIFEST).unlink()


def link_outside(_: Uploads, converted: Path, __: pytest.MonkeyPatch) -> None:
    (converted.parent / "secret").write_text("secret")
    (converted / "NOTICE").symlink_to("../secret")


REFUSED: dict[str, Case] = {
    "nobody is logged in": not_logged_in,
    "a token that the Hub does not know": token_that_is_none,
    "a token that was copied wrong": another_token,
    "`HF_ENDPOINT` is no URL": no_url,
    "no right to make a repository": answered(
        "POST /api/repos/create", "You don't have the rights to create a model under org"
    ),
    "no right to write": answered("POST .*/preupload/", "Forbidden"),
    "another model": holds(config_json=b"{}", model_safetensors=b"weights"),
    "another conversion": another_conversion,
    "another format version": another_version,
    "a file was changed there": changed_there,
    "public, with --private": public_there,
    "no storage left": answered(
        r"POST .*\.git/info/lfs",
        "Private repository storage limit reached, please upgrade your plan",
    ),
    "a .gitignore there": ignored,
    "no network": down,
    "offline": offline,
    "no index": unfinished,
    "no manifest": no_conversion,
    "a damaged shard": damaged,
    "a link that leads outside": link_outside,
}
NO_ROOM = {"X-Error-Message": "Private repository storage limit reached, please upgrade your plan"}
MAY_PASS = {"no storage left", "no network"}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_says_what_to_do(
    case: str, uploads: Uploads, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    REFUSED[case](uploads, converted, monkeypatch)
    before = there(uploads) if ID in uploads.hub.repositories else {}
    options = ("--private",) if "--private" in case else ()
    result = run("push", converted, ID, *options, "--quiet")
    said = result.stderr.strip().replace(uploads.hub.endpoint, "https://huggingface.co")
    for given, shown in {
        f"hf://{SOURCE_ID}": "hf://org/model",
        str(converted.parent / "source"): "/models/source",
        str(converted.parent / "secret"): "secret",
        str(converted): "out",
    }.items():
        said = said.replace(given, shown)
    assert said == documented()[case]
    assert result.exit_code == (75 if case in MAY_PASS else 1)
    after = there(uploads) if ID in uploads.hub.repositories else {}
    assert before.items() <= after.items()
    assert INDEX not in after or INDEX in before
    assert result.stdout == ""


def test_the_documented_refusals_are_those_that_are_tested() -> None:
    assert list(documented()) == list(REFUSED)


@pytest.mark.parametrize("repo_id", ["result", "org/", "a/b/c", "org/re sult", "https://org/x"])
def test_what_is_no_id(uploads: Uploads, converted: Path, repo_id: str) -> None:
    with pytest.raises(PushError, match="is no id of a model on the Hub"):
        push(converted, repo_id)
    assert uploads.hub.requests == []


def test_storage_that_is_refused_file_by_file(uploads: Uploads, converted: Path) -> None:
    uploads.refusal = "Your storage patterns tripped our internal systems"
    with pytest.raises(StorageLimitError, match=uploads.refusal) as caught:
        push(converted, ID)
    assert caught.value.try_again
    uploads.refusal = ""
    push(converted, ID)
    pushed_whole(uploads, converted)


def test_nothing_is_made_for_a_damaged_folder(uploads: Uploads, converted: Path) -> None:
    flip_bit(max(converted.glob("*.safetensors")))
    assert run("push", converted, ID).exit_code == 1
    assert not [each for each in uploads.hub.requests if not each.startswith("GET")]


@pytest.mark.usefixtures("small_commits")
def test_a_file_that_changes_while_it_is_uploaded(uploads: Uploads, converted: Path) -> None:
    shard = max(converted.glob("*.safetensors"))
    real = uploads.batch

    def change(*arguments, **match):  # type: ignore[no-untyped-def]
        change_byte(shard, -1, lambda byte: byte)
        real(*arguments, **match)

    uploads.hub.routes = [
        (pattern, change if "batch" in pattern else answer)
        for pattern, answer in uploads.hub.routes
    ]
    with pytest.raises(CheckpointError, match=f"{shard.name}: has changed while it was uploaded"):
        push(converted, ID)
    assert shard.name not in there(uploads)
    assert INDEX not in there(uploads)


def test_a_gitignore_is_not_uploaded(uploads: Uploads, converted: Path) -> None:
    (converted / ".gitignore").write_text("*.safetensors\n")
    push(converted, ID)
    assert ".gitignore" not in there(uploads)


# --- in one run with the conversion ---------------------------------------------------------------


def test_convert_and_push(uploads: Uploads, original: Path, tmp_path: Path) -> None:
    uploads.hub.add(SOURCE_ID, original)
    arguments = ("convert", SOURCE_ID, tmp_path / "out", "--push-to-hub", ID, "--private")
    result = run(*arguments, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    pushed_whole(uploads, tmp_path / "out")
    said = json.loads(result.stdout)
    assert said["pushed"]["repo_id"] == ID
    assert said["layers"] == 2
    assert uploads.hub.repositories[ID].private
    # Again, in a table.
    again = run(*arguments)
    assert "nothing: all of it was there" in again.stdout
    assert "converted " in again.stdout


def test_the_last_part_pushes(uploads: Uploads, original: Path, tmp_path: Path) -> None:
    for part in ("2/2", "1/2"):
        assert ID not in uploads.hub.repositories
        result = run(
            *("convert", original, tmp_path / "out", "--part", part, "--push-to-hub", ID),
            *("--json", "--max-shard-size", SMALL_SHARD_NBYTES),
        )
        assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["pushed"]["repo_id"] == ID
    assert INDEX in there(uploads)


def test_finish_pushes(uploads: Uploads, original: Path, tmp_path: Path) -> None:
    """The parts lie apart, so none of them can. Each says so."""
    uploads.hub.add(SOURCE_ID, original)
    push_to = ("--push-to-hub", ID, "--private")
    for part in ("1/2", "2/2"):
        own = tmp_path / part[0]
        arguments = ("convert", SOURCE_ID, own, "--part", part, *push_to)
        result = run(*arguments, "--max-shard-size", SMALL_SHARD_NBYTES)
        assert result.exit_code == 0, result.stderr
        assert f"nothing is pushed to {ID} yet: " in result.stderr
        assert f", or fp4moe finish {own} --push-to-hub {ID} --private\n" in result.stderr
        shutil.copytree(own, tmp_path / "out", dirs_exist_ok=True)
    assert ID not in uploads.hub.repositories
    result = run("finish", tmp_path / "out", *push_to, "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["pushed"]["repo_id"] == ID
    pushed_whole(uploads, tmp_path / "out")
    assert uploads.hub.repositories[ID].private


def test_a_repository_is_looked_at_before_parts_are_finished(
    uploads: Uploads, original: Path, tmp_path: Path
) -> None:
    uploads.add(ID, {"config.json": b"{}"})
    convert(original, tmp_path / "out")
    assert "holds something else" in run("finish", tmp_path / "out", "--push-to-hub", ID).stderr
    assert run("finish", tmp_path / "out", "--private").exit_code == 2


def test_a_job_pushes(
    uploads: Uploads, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads.hub.add(SOURCE_ID, original)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    arguments = ("ci", SOURCE_ID, tmp_path / "out", "--push-to-hub", ID, "--json", "--quiet")
    for uploaded in (True, False):
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
        pushed_whole(uploads, tmp_path / "out")
        pushed = json.loads(result.stdout)["pushed"]
        report = (tmp_path / "out.report.json").read_text()
        assert json.loads(report) == json.loads(result.stdout)
        assert bool(pushed["uploaded_files"]) == uploaded
        row = f"| pushed | {pushed['uploaded_bytes']:,} bytes to {pushed['url']} at `"
        assert row in (tmp_path / "summary.md").read_text()


def test_a_job_says_why_it_does_not_push(
    uploads: Uploads, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads.add(ID, {"config.json": b"{}"})
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert run("ci", original, tmp_path / "out", "--push-to-hub", ID).exit_code == 1
    assert "holds something else: config.json" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("option", ["--quiet", "--dry-run"])
def test_a_repository_is_looked_at_before_the_conversion(
    uploads: Uploads, original: Path, tmp_path: Path, option: str
) -> None:
    uploads.add(ID, {"config.json": b"{}"})
    result = run("convert", original, tmp_path / "out", "--push-to-hub", ID, option)
    assert result.exit_code == 1
    assert "holds something else: config.json; choose another" in result.stderr
    assert not (tmp_path / "out").exists()


def of_another_source(source: Path) -> None:
    edit_json(source / "config.json", rope_theta=5)


def of_another_shard(source: Path) -> None:
    """The configuration and the index are the same."""
    with min(source.glob("*.safetensors")).open("ab") as shard:
        shard.write(b"more")


@pytest.mark.parametrize("on_hub", [False, True])
@pytest.mark.parametrize(
    ("change", "options", "difference"),
    [
        (of_another_source, (), "in the source, config.json differs"),
        (of_another_shard, (), "in the source, model-00001-of-00003.safetensors differs"),
        (
            lambda _: None,
            ("--max-shard-size", "1MB"),
            "its files have at most 5,000,000,000 bytes (--max-shard-size 5000000000)",
        ),
    ],
)
def test_another_conversion_is_found_before_hours_are_spent(
    uploads: Uploads,
    original: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    options: tuple[str, ...],
    difference: str,
    on_hub: bool,
) -> None:
    held = convert(original, tmp_path / "held").out_dir
    uploads.add(ID, {MANIFEST: (held / MANIFEST).read_bytes()})
    change(original)
    uploads.hub.add(SOURCE_ID, original)
    source = SOURCE_ID if on_hub else original
    for command in ("convert", "ci"):
        arguments = (command, source, tmp_path / "out", "--push-to-hub", ID, "--quiet")
        result = run(*arguments, *options)
        assert result.exit_code == 1
        what = f"another conversion, of {original}: {difference}; choose another repository"
        assert result.stderr == f"error: {ID}: holds {what}\n"
        assert not (tmp_path / "out").exists()


def test_a_finetune_is_found_by_its_etags(uploads: Uploads, original: Path, tmp_path: Path) -> None:
    """Everything has the same size. A copy in a folder is known by its bytes alone."""
    uploads.hub.add(SOURCE_ID, original)
    held = convert(SOURCE_ID, tmp_path / "held").out_dir
    uploads.add(ID, {MANIFEST: (held / MANIFEST).read_bytes()})
    flip_bit(original / "model-00002-of-00003.safetensors")
    uploads.hub.add("org/finetune", original)
    push_to = ("--push-to-hub", ID, "--dry-run")
    result = run("convert", "org/finetune", tmp_path / "out", *push_to)
    assert "in the source, model-00002-of-00003.safetensors differs" in result.stderr
    assert run("convert", original, tmp_path / "out", *push_to).exit_code == 0


def test_another_commit_of_the_same_model_and_a_source_that_goes(
    uploads: Uploads, original: Path, tmp_path: Path
) -> None:
    arguments = ("convert", original, tmp_path / "out", "--push-to-hub", ID, "--quiet")
    uploads.hub.add(SOURCE_ID, original)
    assert run("convert", SOURCE_ID, tmp_path / "held", *arguments[3:]).exit_code == 0
    for _ in range(2):  # the second time no shard of the source is there
        result = run(*arguments, "--drop-source", "--yes")
        assert (result.exit_code, result.stderr) == (0, "")


def test_a_conversion_is_finished_where_the_push_fails(
    uploads: Uploads, original: Path, tmp_path: Path
) -> None:
    """The line says so, or one would think that it is lost."""
    out = tmp_path / "out"
    for fault, code in (
        (Fault("POST .*/preupload/", times=1, status=403), 1),
        (Fault(r"POST .*\.git/info/lfs", times=1, status=403, headers=NO_ROOM), 75),
    ):
        uploads.hub.faults.append(fault)
        result = run("convert", original, out, "--push-to-hub", ID, "--quiet")
        assert result.exit_code == code
        advice = f"; {out} is finished, so fp4moe push {out} OWNER/NAME is enough then\n"
        assert result.stderr.endswith(advice)
        assert result.stderr.count("\n") == 1
    push(out, ID)
    assert INDEX in there(uploads)


def test_private_alone_is_wrong_usage(source: Path, tmp_path: Path) -> None:
    assert run("convert", source, tmp_path / "out", "--private").exit_code == 2


def test_no_more_is_imported_for_other_commands(converted: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner;"
        "from fp4moe_convert.cli.commands import app;"
        "result = CliRunner().invoke(app, ['verify', sys.argv[1]]); assert not result.exit_code;"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, converted], check=True)
