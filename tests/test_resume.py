"""Runs that were stopped, and what the next one makes of what they left."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.folders import INDEX, MANIFEST, contents, edit_json, flip_bit, write_byte
from support.make_checkpoint import make_checkpoint
from support.processes import finding_support, kill_at_rename, run_kills
from support.specs import MANY_SHARDS, SMALL_SHARD_NBYTES
from support.strategies import json_values
from support.tensors import range_of

from fp4moe_convert import (
    CheckpointError,
    ConversionReport,
    ConvertError,
    OutputError,
    Progress,
    VerifyError,
    conversion,
    convert,
    verify,
)
from fp4moe_convert.execution import surroundings
from fp4moe_convert.execution.journal import Journal
from fp4moe_convert.format.files import JOURNAL_NAME
from fp4moe_convert.format.manifest import sign


def run(source: Path, out: Path, **options: object) -> tuple[ConversionReport, list[str]]:
    notes: list[str] = []
    arguments = {"max_shard_nbytes": SMALL_SHARD_NBYTES, **options}
    return convert(source, out, on_note=notes.append, **arguments), notes  # type: ignore[arg-type]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let renames fail after a number of them, as on a disk that is full."""

    def stop(count: int) -> None:
        rename, left = os.rename, [count]

        def failing(old: Path, new: Path) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, os.strerror(28))
            rename(old, new)

        monkeypatch.setattr(os, "rename", failing)

    return stop


@pytest.fixture
def stopped(
    source: Path, tmp_path: Path, stop_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with three finished shards."""
    out = tmp_path / "out"
    with monkeypatch.context():
        stop_after(3)
        with pytest.raises(OutputError, match="No space left"):
            run(source, out, threads=1)
    monkeypatch.undo()
    assert len(list(out.glob("*.safetensors"))) == 3
    return out


@pytest.mark.parametrize("count", [0, 1, 5, 8, 9, 11, 13])
def test_a_run_that_failed_is_taken_up(
    source: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    count: int,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    stop_after(count)
    with pytest.raises(OutputError):
        run(source, out)
    monkeypatch.undo()
    assert not (out / INDEX).exists()
    assert not list(out.rglob("*.partial"))
    kept = sorted(path.name for path in out.glob("*.safetensors")) if out.exists() else []
    report, notes = run(source, out)
    assert report.shards_kept == len(kept) <= count
    assert bool(notes) == bool(kept)
    assert contents(out) == expected


@pytest.mark.parametrize("threads", [1, 4])
def test_ctrl_c_in_the_library_deletes_nothing(
    source: Path, tmp_path: Path, expected: dict[str, bytes], threads: int
) -> None:
    """That would have to wait for a disk that is busy. The next run tidies up."""
    out = tmp_path / "out"

    def interrupt(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, threads=threads, on_progress=interrupt)
    kept = sorted(path.name for path in out.glob("*.safetensors"))
    assert kept
    assert list(out.glob("*.partial"))
    assert (out / JOURNAL_NAME).exists()
    report, _ = run(source, out)
    assert report.shards_kept == len(kept)
    assert contents(out) == expected


def test_it_says_what_it_keeps(stopped: Path, source: Path, expected: dict[str, bytes]) -> None:
    report, notes = run(source, stopped)
    assert notes == [f"resuming: 3 of {report.shards} shards were finished before and are kept"]
    assert report.bytes_written == report.bytes_out - sum(
        len(expected[f"model-{n:05d}-of-{report.shards:05d}.safetensors"]) for n in (1, 2, 3)
    )


def test_a_finished_folder_is_left_as_it_is(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    report, _ = run(source, out)
    assert report.shards_kept == report.shards
    assert report.bytes_written == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert contents(out) == expected


def test_a_finished_folder_of_something_else_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = contents(out)
    with pytest.raises(OutputError, match=r"holds a finished conversion .* --overwrite"):
        run(source, out, max_shard_nbytes=400_000)
    assert contents(out) == before
    run(source, out, max_shard_nbytes=400_000, overwrite=True)
    verify(out, source)
    assert contents(out).keys() != before.keys()


def rewritten(path: Path) -> None:
    """The same bytes, written at another time."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def add_a_space(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("name", "change", "difference"),
    [
        ("model-00002-of-00003.safetensors", rewritten, "has been written again since"),
        ("config.json", add_a_space, "differs"),
        ("tokenizer.json", add_a_space, "differs"),
        ("tokenizer.json", Path.unlink, "is missing"),
        ("notes.txt", Path.touch, "is new"),
    ],
)
def test_a_finished_folder_of_a_source_that_has_changed_is_refused(
    source: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[Path], None],
    difference: str,
) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = contents(out)
    change(source / name)
    with pytest.raises(OutputError, match=f"options: in the source, {name} {difference}; choose"):
        run(source, out)
    assert contents(out) == before
    run(source, out, overwrite=True)
    verify(out, source)


def state_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time of change and content of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def set_a_key(path: Path) -> None:
    edit_json(path, rope_scaling={"type": "yarn", "factor": 4.0})


def reformat(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())))


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"max_shard_nbytes": 400_000}], ids=str)
@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        ("config.json", set_a_key, "'config.json' has been changed since"),
        ("config.json", reformat, "'config.json' has been changed since"),
        ("config.json", Path.unlink, "'config.json' is missing"),
        ("generation_config.json", set_a_key, "'generation_config.json' has been changed since"),
        ("tokenizer_config.json", add_a_space, "'tokenizer_config.json' has been changed since"),
        ("tokenizer.json", Path.unlink, "'tokenizer.json' is missing"),
        ("sub/vocab.txt", add_a_space, "'sub/vocab.txt' has been changed since"),
        (INDEX, reformat, f"'{INDEX}' has been changed since"),
        (MANIFEST, reformat, f"{MANIFEST}: has been changed"),
        (
            MANIFEST,
            lambda path: edit_json(path, format_version=1),
            f"{MANIFEST}: format version is 1",
        ),
    ],
)
def test_a_finished_folder_that_a_person_has_edited_is_left_alone(
    source: Path,
    tmp_path: Path,
    name: str,
    edit: Callable[[Path], object],
    what: str,
    options: dict[str, object],
) -> None:
    (source / "sub").mkdir()
    (source / "sub" / "vocab.txt").write_text("a b c")
    out = tmp_path / "out"
    run(source, out)
    expected = contents(out)
    edit(out / name)
    flip_bit(sorted(out.glob("*.safetensors"))[1], 9)  # mended otherwise
    before = state_of(out)
    with pytest.raises(OutputError, match=rf"^{out}: {re.escape(what)}.*; .*--overwrite starts af"):
        run(source, out, **options)
    assert state_of(out) == before
    run(source, out, overwrite=True)
    assert contents(out) == expected


def test_an_edit_is_what_differs_not_when_it_was_made(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    for path in out.iterdir():
        os.utime(path, (0, 0))
    report, notes = run(source, out)
    count = report.shards
    assert report.bytes_written == 0
    assert notes == [
        f"already finished: {count} of {count} shards were finished before and are kept"
    ]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_a_finished_folder_that_has_become_a_link(
    source: Path, tmp_path: Path, overwrite: bool
) -> None:
    """To the same bytes; nothing is written through it, and it is not deleted."""
    out = tmp_path / "out"
    run(source, out)
    (out / "config.json").rename(tmp_path / "elsewhere")
    (out / "config.json").symlink_to(tmp_path / "elsewhere")
    before = state_of(out)
    with pytest.raises(OutputError, match=r"holds 'config\.json', a link, which no conversion has"):
        run(source, out, overwrite=overwrite)
    assert state_of(out) == before


def test_a_file_of_a_finished_folder_that_cannot_be_read(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / "tokenizer.json").unlink()
    os.mkfifo(out / "tokenizer.json")
    before = state_of(out)
    with pytest.raises(CheckpointError, match=rf"^{out}/tokenizer\.json: is not a regular file$"):
        run(source, out)
    assert state_of(out) == before


@pytest.mark.parametrize(
    ("renames", "name", "what"),
    [
        (10, "tokenizer.json", "'tokenizer.json' is not the source's"),
        (10, "config.json", "'config.json' is not the source's"),
        (14, "tokenizer.json", "'tokenizer.json' has been changed since"),
        (14, "config.json", "'config.json' has been changed since"),
        (14, MANIFEST, f"{MANIFEST}: "),
    ],
)
def test_an_unfinished_folder_that_a_person_has_edited_is_left_alone(
    source: Path,
    tmp_path: Path,
    renames: int,
    name: str,
    what: str,
) -> None:
    """Killed among the files beside the shards: after the copies, or before the index."""
    out = tmp_path / "out"
    call = f"convert({str(source)!r}, {str(out)!r}, max_shard_nbytes={SMALL_SHARD_NBYTES})"
    kill_at_rename(call, renames)
    assert not (out / INDEX).exists()
    assert (out / MANIFEST).exists() == (renames == 14)
    (out / name).write_text("mine")
    before = state_of(out)
    with pytest.raises(OutputError, match=rf"^{out}: {re.escape(what)}.*; .*--overwrite starts af"):
        run(source, out)
    after = state_of(out)
    assert {path: after[path] for path in before if path.name != JOURNAL_NAME} == {
        path: before[path] for path in before if path.name != JOURNAL_NAME
    }
    assert after.keys() == before.keys()
    run(source, out, overwrite=True)
    verify(out, source)


LEFT = "left as it is; no engine reads it"


def test_a_model_card_that_is_added_is_left_alone(source: Path, tmp_path: Path) -> None:
    """Before the conversion or later, whether shards are mended, and when all is done afresh."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    _, notes = run(source, out)
    assert notes == [f"README.md: {LEFT}"]
    (out / "figures").mkdir()
    (out / "figures" / "speed.png").write_text("mine")
    added = ["README.md", "figures/speed.png"]
    for options in ({}, {"overwrite": True}):
        sorted(out.glob("*.safetensors"))[1].unlink()
        _, notes = run(source, out, **options)
        assert {f"{name}: {LEFT}" for name in added} <= set(notes)
        assert [(out / name).read_text() for name in added] == ["mine", "mine"]
        assert verify(out, source).documentation == [f"{n}: is not in the manifest" for n in added]


@pytest.mark.parametrize("when", ["mended", "stopped", "afresh", "without its manifest"])
def test_a_model_card_that_was_copied_and_edited_is_left_alone(
    source: Path,
    tmp_path: Path,
    when: str,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (source / "README.md").write_text("theirs")
    (source / "LICENSE").write_text("theirs")
    out = tmp_path / "out"
    run(source, out)
    assert (out / "README.md").read_text() == "theirs"
    (out / "README.md").write_text("mine")
    (out / "LICENSE").unlink()
    if when == "without its manifest":
        edit_json(out / MANIFEST, format_version=1)
    if when in ("mended", "stopped"):
        sorted(out.glob("*.safetensors"))[1].unlink()
    if when == "stopped":
        with monkeypatch.context():
            stop_after(2)
            with pytest.raises(OutputError, match="No space"):
                run(source, out)
        monkeypatch.undo()
        assert (out / "README.md").read_text() == "mine"
    _, notes = run(source, out, overwrite=when in ("afresh", "without its manifest"))
    assert f"README.md: {LEFT}" in notes
    assert (out / "README.md").read_text() == "mine"
    assert (out / "LICENSE").read_text() == "theirs"
    assert verify(out, source).documentation == ["README.md: has 4 bytes, expected 6"]


def test_a_model_card_that_has_become_a_link_is_left_alone(source: Path, tmp_path: Path) -> None:
    """Even if it leads to the same bytes."""
    out = tmp_path / "out"
    (source / "README.md").write_text("theirs")
    run(source, out)
    (out / "README.md").rename(tmp_path / "mine")
    (out / "README.md").symlink_to(tmp_path / "mine")
    _, notes = run(source, out, overwrite=True)
    assert notes == [f"README.md: {LEFT}"]
    assert (out / "README.md").is_symlink()
    assert (tmp_path / "mine").read_text() == "theirs"
    verify(out, source)


def test_a_model_card_of_the_source_is_replaced_when_nobody_has_edited_it(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (source / "README.md").write_text("theirs")
    run(source, out)
    (source / "README.md").write_text("newer")
    with pytest.raises(OutputError, match=r"in the source, README\.md differs"):
        run(source, out)
    assert (out / "README.md").read_text() == "theirs"
    run(source, out, overwrite=True)
    assert (out / "README.md").read_text() == "newer"
    assert verify(out, source).documentation == []


def cut_off_a_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "options", "reason"),
    [
        (Path.unlink, {}, "it is missing"),
        (cut_off_a_byte, {}, r"it is damaged \(.*: is truncated: .*\)"),
        (flip_bit, {"verify": True}, r"it is damaged \(.*: '.*' has checksum .*\)"),
    ],
    ids=["missing", "truncated", "flipped"],
)
def test_damage_to_a_finished_folder_is_mended(
    source: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    damage: Callable[[Path], None],
    options: dict[str, bool],
    reason: str,
) -> None:
    out = tmp_path / "out"
    run(source, out)
    shard = sorted(out.glob("*.safetensors"))[2]
    damage(shard)
    report, notes = run(source, out, **options)
    assert re.fullmatch(f"{shard.name}: written again: {reason}", notes[0])
    assert report.shards_kept == report.shards - 1
    assert contents(out) == expected


@pytest.mark.parametrize("kill_in", ["WriteFile.__init__", "Writing.finish_shard"])
def test_a_kill_while_damage_is_mended_costs_no_other_shard(
    source: Path, tmp_path: Path, expected: dict[str, bytes], kill_in: str
) -> None:
    """Meanwhile the folder has no manifest. What only that had on record is in the journal."""
    out = tmp_path / "out"
    report, _ = run(source, out)
    sorted(out.glob("*.safetensors"))[2].unlink()
    program = f"""
import os, signal
from fp4moe_convert import convert
from fp4moe_convert.execution.output_folder import Writing
from fp4moe_convert.execution.scatter import WriteFile
{kill_in} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
convert({str(source)!r}, {str(out)!r}, max_shard_nbytes={SMALL_SHARD_NBYTES})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not (out / INDEX).exists()
    assert not (out / MANIFEST).exists()
    resumed, _ = run(source, out)
    assert resumed.shards_kept == report.shards - 1
    assert contents(out) == expected


@pytest.mark.parametrize("kill_at", [INDEX, "config.json", MANIFEST])
def test_a_kill_while_a_finished_folder_is_cleared(
    source: Path, tmp_path: Path, expected: dict[str, bytes], kill_at: str
) -> None:
    """What is left does not look like somebody's edits."""
    out = tmp_path / "out"
    run(source, out)
    sorted(out.glob("*.safetensors"))[2].unlink()
    program = f"""
import os, signal
from fp4moe_convert import convert
from fp4moe_convert.execution import folder_files
remove_file = folder_files.remove_file
def remove_and_die(path):
    remove_file(path)
    if path.name == {kill_at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
folder_files.remove_file = remove_and_die
convert({str(source)!r}, {str(out)!r}, max_shard_nbytes={SMALL_SHARD_NBYTES})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    run(source, out)
    assert contents(out) == expected


def test_a_finished_folder_stays_finished_on_a_full_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(source, out)
    usage = shutil.disk_usage(out)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    report, _ = run(source, out)
    assert report.shards_kept == report.shards


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_another_release_changes_what_stands_around_the_shards(
    source: Path,
    tmp_path: Path,
    stop_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    """A run of it that fails has left the folder unfinished, and not one shard is lost."""
    out = tmp_path / "out"
    run(source, out)
    monkeypatch.setattr(surroundings, "VERSION", "0.0.0+other")
    stop_after(count)
    if count < 3:  # the manifest, config.json, the index
        with pytest.raises(OutputError, match="No space"):
            run(source, out)
        assert not (out / INDEX).exists()
    else:
        run(source, out)
        assert surroundings.read_manifest(out).versions["fp4moe-convert"] == "0.0.0+other"
    monkeypatch.undo()
    report, _ = run(source, out)
    assert report.shards_kept == report.shards
    verify(out, source)


def test_a_manifest_without_an_index_vouches_for_shards(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / INDEX).unlink()
    report, _ = run(source, out)
    assert report.shards_kept == report.shards
    assert contents(out) == expected


def test_a_folder_whose_manifest_is_damaged_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / MANIFEST).write_text("{}")
    before = sorted(out.iterdir())
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"nothing tells what .*: fp4moe_manifest\.json: "):
            run(source, out, overwrite=overwrite)
    assert sorted(out.iterdir()) == before


def test_a_folder_whose_manifest_was_deleted_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / MANIFEST).unlink()
    before = state_of(out)
    for overwrite in (False, True):
        with pytest.raises(
            OutputError, match=rf"holds 'config\.json' but no {MANIFEST}; choose an"
        ):
            run(source, out, overwrite=overwrite)
    assert state_of(out) == before


def test_names_in_a_manifest_lead_to_no_other_folder(source: Path, tmp_path: Path) -> None:
    """Not even if somebody has made its checksum right."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    run(source, out)
    precious.write_text("mine")
    content = json.loads((out / MANIFEST).read_bytes())
    for name in ("../precious", str(precious), "nul\0", ""):
        content["files"][name] = {"bytes": 4, "xxh3_128": ""}
    del content["manifest"]
    (out / MANIFEST).write_bytes(sign(content))
    run(source, out, overwrite=True)
    assert precious.read_text() == "mine"
    verify(out, source)


def test_names_in_a_journal_lead_to_no_other_folder(
    stopped: Path, source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    names = ["../precious", str(precious), "nul\0", ""]
    with (stopped / JOURNAL_NAME).open("a") as journal:
        journal.write(json.dumps({"line": "files", "files": names}) + "\n")
    run(source, stopped, overwrite=True)
    assert precious.read_text() == "mine"
    assert contents(stopped) == expected


FIELDS = (
    *("name", "record", "format_version", "row_order", "plan", "sources", "owner", "files"),
    *("parts", "max_shard_nbytes", "source", "restored"),
)
KINDS = ("shard", "run", "files", "forget", "division")
lines = st.dictionaries(
    st.sampled_from(["line", *FIELDS]), st.sampled_from(KINDS) | json_values
) | st.fixed_dictionaries({"line": st.sampled_from(KINDS)} | dict.fromkeys(FIELDS, json_values))


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=20) | lines.map(lambda line: json.dumps(line).encode())))
def test_a_journal_of_anything_is_read(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(b"\n".join(lines))
    journal = Journal(tmp_path)
    assert all(
        isinstance(name, str) for name in journal.records.files | journal.records.finished.keys()
    )
    assert all(isinstance(each.parts, int) for each in journal.records.divisions.values())
    journal.close(remove=True)


def test_shards_of_other_options_are_done_again(stopped: Path, source: Path) -> None:
    report, notes = run(source, stopped, max_shard_nbytes=10**9)
    assert report.shards_kept == 0
    assert len(notes) == 3
    assert all("the options or the layout of shards have changed since" in n for n in notes)
    verify(stopped, source)


def test_shards_of_a_changed_source_are_done_again(stopped: Path, source: Path) -> None:
    first = sorted(source.glob("*.safetensors"))[0]
    os.utime(first)
    report, notes = run(source, stopped)
    redone = [
        note for note in notes if note.endswith(f"written again: {first.name} has changed since")
    ]
    assert redone
    assert report.shards_kept == 3 - len(redone)
    verify(stopped, source)


@pytest.mark.parametrize("damage", ["header", "size", "journal"])
def test_shards_that_were_damaged_are_done_again(
    stopped: Path, source: Path, expected: dict[str, bytes], damage: str
) -> None:
    shard = sorted(stopped.glob("*.safetensors"))[1]
    if damage == "header":
        data = shard.read_bytes()
        shard.write_bytes(data[:4095] + b"\n" + data[4096:])
    elif damage == "size":
        os.truncate(shard, shard.stat().st_size - 1)
    else:  # cut short in the line on the third shard, the last that got its name
        journal = stopped / JOURNAL_NAME
        lines = [line for line in journal.read_bytes().split(b"\n") if line]
        assert json.loads(lines[-2])["name"].startswith("model-00003")
        journal.write_bytes(b"\n".join([*lines[:-2], lines[-2][:-20]]))
    report, notes = run(source, stopped)
    assert report.shards_kept == 2
    assert "written again" in notes[0]
    assert contents(stopped) == expected


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("row_order", "xxh3_128:00", "it was written for another row order"),
        ("format_version", 0, "it has format version 0, not 2"),
    ],
)
def test_shards_of_another_format_are_done_again(
    stopped: Path, source: Path, expected: dict[str, bytes], key: str, value: object, reason: str
) -> None:
    journal = stopped / JOURNAL_NAME
    entries = [json.loads(line) for line in journal.read_text().splitlines() if line]
    changed = [entry | {key: value} if entry["line"] == "shard" else entry for entry in entries]
    journal.write_text("\n".join(map(json.dumps, changed)))
    report, notes = run(source, stopped)
    assert report.shards_kept == 0
    assert [note.partition(": written again: ")[2] for note in notes] == [reason] * 3
    assert contents(stopped) == expected


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", MANIFEST])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_a_name_that_was_not_written_yet_is_foreign(
    stopped: Path, source: Path, name: str, overwrite: bool
) -> None:
    (stopped / name).write_text("mine")
    with pytest.raises(OutputError, match=f"holds '{name}', which no conversion has left there"):
        run(source, stopped, overwrite=overwrite)
    assert (stopped / name).read_text() == "mine"


def test_a_folder_where_a_shard_will_be_is_foreign(stopped: Path, source: Path) -> None:
    (stopped / "model-00008-of-00008.safetensors").mkdir()
    with pytest.raises(OutputError, match=r"holds 'model-00008-.*', which no conversion has"):
        run(source, stopped)


def test_overwrite_deletes_nothing_that_it_cannot_replace(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    install_flashinfer: Callable[[str | None], None],
) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = contents(out)
    larger = tmp_path / "larger"
    make_checkpoint(larger, dataclasses.replace(MANY_SHARDS, experts=8))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
        with pytest.raises(ConvertError, match="of free disk"):
            run(larger, out, overwrite=True)
    assert contents(out) == before
    with monkeypatch.context():
        install_flashinfer("99.0")
        with pytest.raises(ConvertError, match="flashinfer: cannot be imported"):
            run(source, out, overwrite=True)
    monkeypatch.undo()
    assert contents(out) == before
    # What is deleted makes room.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10_000))
    run(source, out, overwrite=True)
    assert contents(out) == before


def test_a_config_that_changes_meanwhile_is_not_taken_for_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scatter = conversion.scatter

    def changing(*args: Any, **kwargs: Any) -> None:
        add_a_space(source / "config.json")
        scatter(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "scatter", changing)
        with pytest.raises(CheckpointError, match=r"^config\.json: has changed while it was read$"):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()
    run(source, tmp_path / "out")
    verify(tmp_path / "out", source)


def test_overwrite_starts_afresh(stopped: Path, source: Path, expected: dict[str, bytes]) -> None:
    report, notes = run(source, stopped, overwrite=True)
    assert (report.shards_kept, notes) == (0, [])
    assert contents(stopped) == expected


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "link in place of a shard"])
def test_foreign_files_are_never_touched(
    stopped: Path, source: Path, tmp_path: Path, kind: str, overwrite: bool
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    if kind == "file":
        (stopped / "notes.txt").write_text("mine")
    elif kind == "link":
        (stopped / "notes.txt").symlink_to(precious)
    else:
        shard = sorted(stopped.glob("*.safetensors"))[0]
        shard.unlink()
        shard.symlink_to(precious)
    before = contents(stopped)
    with pytest.raises(OutputError, match="which no conversion has left there"):
        run(source, stopped, overwrite=overwrite)
    assert contents(stopped) | {JOURNAL_NAME: before[JOURNAL_NAME]} == before
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("later", [{}, {"line": "run"}, {"line": "run", "owner": 1}], ids=str)
def test_a_second_run_stops_at_once_and_says_who_is_there(
    stopped: Path, source: Path, later: dict[str, object]
) -> None:
    """Whatever else the journal says."""
    first = Journal(stopped)
    with (stopped / JOURNAL_NAME).open("a") as journal:
        journal.write(f"\n{json.dumps(later)}\n")
    before = contents(stopped)
    who = rf"process {os.getpid()} on {socket.gethostname()}, at work since \d{{4}}-.* [+-]\d{{4}}"
    with pytest.raises(OutputError, match=rf"in use by {who}$"):
        run(source, stopped)
    assert contents(stopped) == before
    first.close(remove=False)
    run(source, stopped)


def test_a_closed_journal_takes_no_line(tmp_path: Path) -> None:
    """A thread that outlives its run must not write into the next file of that number."""
    journal = Journal(tmp_path)
    journal.close(remove=False)
    with (tmp_path / "next").open("wb", buffering=0):
        with pytest.raises(OutputError, match="is closed"):
            journal.declare(["x"])
        assert (tmp_path / "next").stat().st_size == 0


def test_a_refused_folder_keeps_its_journal(source: Path, tmp_path: Path) -> None:
    """Of a release whose lines this one does not know."""
    out = tmp_path / "out"
    out.mkdir()
    (out / JOURNAL_NAME).write_text('{"run": "process 1", "files": ["x"]}\n')
    (out / "x").write_text("mine")
    with pytest.raises(OutputError, match="holds 'x', which no conversion has left there"):
        run(source, out)
    assert (out / JOURNAL_NAME).exists()


def test_a_planted_journal_with_a_name_that_no_file_can_have(
    stopped: Path, source: Path, expected: dict[str, bytes]
) -> None:
    lines = (stopped / JOURNAL_NAME).read_text().splitlines()
    shard = next(line for line in map(json.loads, filter(None, lines)) if line["line"] == "shard")
    with (stopped / JOURNAL_NAME).open("a") as journal:
        journal.write(json.dumps(shard | {"name": "n" * 300}) + "\n")
    run(source, stopped)
    assert contents(stopped) == expected


def test_a_linked_journal_is_not_written_through(
    stopped: Path, source: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    (stopped / JOURNAL_NAME).rename(precious)
    (stopped / JOURNAL_NAME).symlink_to(precious)
    before = precious.read_bytes()
    with pytest.raises(OutputError, match=r"\.fp4moe-journal\.jsonl: Too many levels of symb"):
        run(source, stopped)
    assert precious.read_bytes() == before


def test_a_journal_that_is_removed_while_it_is_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last owner removes it between our opening it and its unlocking it. A lock on a file that
    nobody else can find would keep nobody out."""
    path, flock, calls = tmp_path / JOURNAL_NAME, fcntl.flock, [0]

    def removed_meanwhile(fd: int, operation: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            path.unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    journal = Journal(tmp_path)
    assert calls == [2]
    with pytest.raises(OutputError, match="in use by process"):
        Journal(tmp_path)
    journal.close(remove=True)


def test_the_lock_ends_with_its_process(source: Path, tmp_path: Path) -> None:
    """Killed while it holds the folder; the next run is not in the way of anybody."""
    out = tmp_path / "out"
    program = f"""
import os, signal, sys
from fp4moe_convert import conversion
conversion.scatter = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
conversion.convert({str(source)!r}, {str(out)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert (out / JOURNAL_NAME).exists()
    convert(source, out)
    verify(out, source)


def test_without_locks_there_is_no_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Lustre, unless it is mounted with them."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OutputError, match=r"out: its file system has no locks \(Function not"):
        run(source, tmp_path / "out")


def test_verify_reads_finished_shards_before_they_are_kept(
    stopped: Path, source: Path, expected: dict[str, bytes]
) -> None:
    shard = sorted(stopped.glob("*.safetensors"))[0]
    flip_bit(shard)
    report, notes = run(source, stopped, verify=True)
    assert report.shards_kept == 2
    assert re.fullmatch(rf"{shard.name}: written again: it is damaged \(.* checksum .*\)", notes[0])
    assert contents(stopped) == expected


def test_the_progress_of_checking_adds_up(stopped: Path, source: Path) -> None:
    """Headers are read as well, so that it ends with the size of the shards."""
    seen: list[Progress] = []
    report, _ = run(source, stopped, verify=True, on_progress=seen.append)
    assert report.shards_kept == 3
    checking = [progress for progress in seen if progress.phase == "checking"]
    done = [progress.done for progress in checking]
    assert done == sorted(done)
    assert done[-1] == report.bytes_out - report.bytes_written
    assert {progress.total for progress in checking} == {done[-1]}


@pytest.mark.parametrize("kill_at", ["model.safetensors.index.json", "fp4moe_manifest.json"])
def test_a_kill_while_a_result_is_taken_back(source: Path, tmp_path: Path, kill_at: str) -> None:
    """Neither the journal nor the manifest proves anything any more."""
    program = f"""
import os, signal
from fp4moe_convert import conversion
from fp4moe_convert.execution import output_folder
from support.folders import flip_bit
finish, remove_file = conversion.write_surroundings, output_folder.remove_file
def finish_and_damage(checkpoint, plan, out_dir, **rest):
    finish(checkpoint, plan, out_dir, **rest)
    flip_bit(out_dir / plan.shards[0].name)
def remove_and_die(path):
    remove_file(path)
    if path.name == {kill_at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
conversion.write_surroundings, output_folder.remove_file = finish_and_damage, remove_and_die
conversion.convert({str(source)!r}, {str(tmp_path / "out")!r}, verify=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=finding_support(), capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr
    report, _ = run(source, tmp_path / "out", max_shard_nbytes=10**9)
    assert report.shards_kept == 0
    verify(tmp_path / "out", source)


def test_a_result_that_cannot_be_taken_back_on_record_is_taken_back(
    stopped: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that is full there is no room for a line in the journal."""
    finish = conversion.write_surroundings

    def no_room(*_: object) -> None:
        raise OutputError("journal: No space left on device")

    def finish_and_damage(*args: Any, **kwargs: Any) -> None:
        finish(*args, **kwargs)
        flip_bit(sorted(stopped.glob("*.safetensors"))[0])
        monkeypatch.setattr(Journal, "_append", no_room)

    monkeypatch.setattr(conversion, "write_surroundings", finish_and_damage)
    with pytest.raises(VerifyError, match=r"^model-.*: '"):
        run(source, stopped, verify=True)
    assert not (stopped / INDEX).exists()
    assert not (stopped / MANIFEST).exists()


def test_a_result_that_does_not_verify_is_not_built_on(
    stopped: Path, source: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted(stopped.glob("*.safetensors"))[0]
    finish = conversion.write_surroundings

    def finish_and_damage(*args: Any, **kwargs: Any) -> None:
        finish(*args, **kwargs)
        flip_bit(shard)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_surroundings", finish_and_damage)
        with pytest.raises(VerifyError, match=rf"^{shard.name}: "):
            run(source, stopped, verify=True)
    assert not (stopped / INDEX).exists()
    report, notes = run(source, stopped, verify=True)
    assert report.shards_kept == 0
    assert all(note.endswith("no run has finished it") for note in notes)
    assert contents(stopped) == expected


def test_a_source_that_fails_leaves_what_was_finished(source: Path, tmp_path: Path) -> None:
    """A NaN in the last layer does not cost the first."""
    spec = dataclasses.replace(MANY_SHARDS, layout="single")
    shutil.rmtree(source)
    make_checkpoint(source, spec)
    path = source / "model.safetensors"
    position, _ = range_of(path, "model.layers.2.mlp.experts.2.down_proj.weight_scale")
    good = write_byte(path, position, 0x7F)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="NaN"):
        run(source, out, threads=1, max_shard_nbytes=300_000)
    assert list(out.glob("*.safetensors"))
    assert not (out / INDEX).exists()
    assert not (out / MANIFEST).exists()
    write_byte(path, position, good)
    run(source, out, max_shard_nbytes=300_000)
    verify(out, source)


@pytest.mark.slow
def test_kills_at_random_moments() -> None:
    """A handful; support/kill.py does hundreds."""
    run_kills("--kills", "6")
