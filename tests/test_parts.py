"""Conversions that several machines share."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.folders import INDEX, MANIFEST, contents, every_file, flip_bit, without_source
from support.hub import Hub
from support.processes import FP4MOE_CONVERT, kill_at_rename, run_kills
from support.specs import SMALL_SHARD_NBYTES
from typer.testing import CliRunner

from fp4moe_convert import (
    CheckpointError,
    InUseError,
    OutputError,
    Part,
    PartReport,
    Progress,
    VerifyError,
    conversion,
    convert,
    convert_part,
    finish,
    preview,
    verify,
)
from fp4moe_convert.cli.commands import app
from fp4moe_convert.execution import folder_files
from fp4moe_convert.execution.journal import Division, FilledMove, Journal
from fp4moe_convert.execution.output_folder import OutputFolder
from fp4moe_convert.format.files import JOURNAL_NAME, is_journal
from fp4moe_convert.parts import source_of
from fp4moe_convert.plan import Plan
from fp4moe_convert.storage.header import read_header
from fp4moe_convert.storage.local import LocalReader

COUNT = 3


def run(source: Path, out: Path, number: int, count: int = COUNT, **options: Any) -> PartReport:
    options = {"max_shard_nbytes": SMALL_SHARD_NBYTES, **options}
    return convert_part(source, out, Part(number, count), **options)


def shards_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def files_of(folder: Path) -> dict[str, bytes]:
    """All but the journal that the folder's lock is held on: it comes and goes."""
    return {name: data for name, data in every_file(folder).items() if name != JOURNAL_NAME}


@pytest.fixture
def apart(source: Path, tmp_path: Path) -> Callable[[], Path]:
    """Three parts in folders of their own, and then together in one."""

    def gather(*numbers: int) -> Path:
        out = tmp_path / "together"
        for number in numbers or (1, 2, 3):
            run(source, tmp_path / f"own-{number}", number)
            shutil.copytree(tmp_path / f"own-{number}", out, dirs_exist_ok=True)
        return out

    return gather


# --- who writes what ------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=60), st.integers(1, 20))
def test_parts_share_all_shards_in_order(plan: Plan, sizes: list[int], count: int) -> None:
    shards = [replace(plan.shards[0], name=str(n), nbytes=size) for n, size in enumerate(sizes)]
    whole = replace(plan, shards=tuple(shards))
    parts = [whole.only(Part(number + 1, count)) for number in range(count)]
    assert [shard for part in parts for shard in part.shards] == shards
    for part in parts:
        assert abs(part.bytes_out - sum(sizes) / count) <= max(sizes) + 1


@pytest.fixture(scope="module")
def plan(tiny: Path) -> Plan:
    return preview(tiny).work.plan


@pytest.mark.parametrize(("number", "count"), [(0, 4), (5, 4), (-1, 4), (1, 0)])
def test_there_is_no_such_part(number: int, count: int) -> None:
    with pytest.raises(ValueError, match="there is no part"):
        Part(number, count)


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 3))))
def test_the_last_part_finishes(
    source: Path, tmp_path: Path, expected: dict[str, bytes], order: tuple[int, ...]
) -> None:
    out = tmp_path / "out"
    for number in order[:-1]:
        report = run(source, out, number)
        assert report.whole is None
        assert report.shards_missing
        assert report.bytes_written == report.bytes_out > 0
        assert not {INDEX, MANIFEST, "config.json"} & every_file(out).keys()
        with pytest.raises(VerifyError, match="unfinished"):
            verify(out)
    report = run(source, out, order[-1])
    assert report.whole is not None
    assert report.shards_missing == 0
    assert report.whole.bytes_written == 0
    assert contents(out) == expected
    verify(out, source)


def test_one_machine_or_four_processes(made: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """The very manifest, because it is the same source."""
    out = tmp_path / "out"
    command = [*FP4MOE_CONVERT, made[0], out, "--max-shard-size", str(SMALL_SHARD_NBYTES), "--json"]
    runs = [
        subprocess.Popen([*command, "--part", f"{n}/4"], stdout=-1, stderr=-1) for n in (3, 1, 4, 2)
    ]
    for each in runs:
        _, stderr = each.communicate(timeout=60)
        assert each.returncode == 0, stderr
    convert(made[0], tmp_path / "one", max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert every_file(out) == every_file(tmp_path / "one")


def test_more_parts_than_shards(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    reports = [run(source, out, number, 20) for number in range(1, 21)]
    assert min(report.shards for report in reports) == 0
    assert sum(report.shards for report in reports) == len(shards_in(out))
    assert contents(out) == expected


def test_a_finished_folder_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    report = run(source, out, 2)
    assert report.whole is not None
    assert (report.bytes_written, report.shards_kept) == (0, report.shards)
    assert finish(out).bytes_written == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_advice_is_for_the_command_at_hand(source: Path, tmp_path: Path) -> None:
    """Neither a part nor `finish` takes --overwrite."""
    out = tmp_path / "out"
    convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES)
    (out / "config.json").write_text("{}")
    for call in (lambda: run(source, out, 2), lambda: finish(out)):
        with pytest.raises(OutputError, match="put it right, or fp4moe-convert --overwrite starts"):
            call()
    with pytest.raises(OutputError, match="put it right, or --overwrite starts afresh"):
        convert(source, out)


def test_a_part_repairs_no_finished_folder(source: Path, tmp_path: Path) -> None:
    """Its shards may be another part's."""
    out = tmp_path / "out"
    convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES)
    sorted(out.glob("*.safetensors"))[0].unlink()
    before = every_file(out)
    lacks = r"lacks 1 of 8 shards: model-00001-\S+: it is missing; convert with --max-"
    lacks += r"shard-size 500000 and without --part, which keeps the other 7$"
    with pytest.raises(OutputError, match=lacks):
        run(source, out, 1)
    assert every_file(out) == before


# --- in folders of their own ----------------------------------------------------------------------


def test_parts_that_are_copied_together(
    apart: Callable[..., Path], source: Path, expected: dict[str, bytes]
) -> None:
    out = apart()
    assert not (out / INDEX).exists()
    report = finish(out, verify=True)
    assert report.verify_seconds is not None
    assert contents(out) == expected
    finish(out, source)
    assert contents(out) == expected


def test_parts_of_a_model_on_the_hub(
    hub: Hub, source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Each fetches what its own shards need; the journals know where from."""
    commit = hub.add("org/model", source).commit
    out = tmp_path / "out"
    for number in (1, 2, 3):
        run("org/model", tmp_path / f"own-{number}", number)
        shutil.copytree(tmp_path / f"own-{number}", out, dirs_exist_ok=True)
    for name in shards_in(source):
        header = read_header(LocalReader(source / name)).nbytes
        weights = [sent for sent in hub.served()[name] if sent[0] >= header]
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(weights)), name
    assert source_of(out) == f"hf://org/model@{commit}"
    finish(out)
    assert source_of(out) == f"hf://org/model@{commit}"
    finish(out)
    assert without_source(every_file(out)) == without_source(expected)


def test_parts_of_a_branch_that_has_moved(hub: Hub, source: Path, tmp_path: Path) -> None:
    """Not one byte of a shard need be another."""
    first = hub.add("org/model", source).commit
    run("org/model", tmp_path / "out", 1)
    (source / "README.md").write_text("new")
    second = hub.add("org/model", source).commit
    moved = (
        f"was begun from org/model@{first}, and this is org/model@{second}; --revision {first} "
        "goes on with that, "
    )
    before = files_of(tmp_path / "out")
    for number in (2, 1):
        with pytest.raises(OutputError, match=moved):
            run("org/model", tmp_path / "out", number)
    after = files_of(tmp_path / "out")
    assert after.keys() == before.keys()
    run(f"hf://org/model@{first}", tmp_path / "out", 2)
    # Where they meet only later:
    run("org/model", tmp_path / "own", 3)
    shutil.copytree(tmp_path / "own", tmp_path / "out", dirs_exist_ok=True)
    differs = f"was begun from org/model@{second}, not org/model@{first}; give all parts the same"
    with pytest.raises(OutputError, match=differs):
        finish(tmp_path / "out")


def test_finish_wants_all_parts(apart: Callable[..., Path]) -> None:
    out = apart(1, 3)
    before = files_of(out)
    with pytest.raises(OutputError, match=r"lacks 2 of 8 shards: model-00004-\S+: it is not there"):
        finish(out)
    assert files_of(out) == before


@pytest.mark.parametrize(
    "damage", [lambda path: flip_bit(path, 9), lambda path: os.truncate(path, 400_000)]
)
def test_finish_looks_at_every_shard(
    apart: Callable[..., Path], damage: Callable[[Path], object]
) -> None:
    out = apart()
    damage(sorted(out.glob("*.safetensors"))[4])
    before = files_of(out)
    with pytest.raises(OutputError, match=r"lacks 1 of 8 shards: model-00005-\S+: it is damaged"):
        finish(out)
    assert files_of(out) == before


@pytest.mark.parametrize("repair", ["parts", "whole"])
def test_finish_reads_every_byte_if_asked(
    apart: Callable[..., Path], source: Path, expected: dict[str, bytes], repair: str
) -> None:
    """And says how to write again what only such reading finds damaged."""
    out = apart()
    flip_bit(sorted(out.glob("*.safetensors"))[4])
    with pytest.raises(
        OutputError, match=r"lacks 1 of 8 shards: model-00005-\S+: it is dam"
    ) as bad:
        finish(out, verify=True)
    assert str(bad.value).endswith(
        "; run the parts they belong to with --verify, or convert with --verify, --max-shard-size "
        "500000 and without --part, which keeps the other 7"
    )
    assert not (out / INDEX).exists()
    if repair == "parts":
        run(source, out, 2, verify=True)
    else:
        convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES, verify=True)
    assert contents(out) == expected


def test_what_only_reading_finds_in_a_finished_folder(
    apart: Callable[..., Path], source: Path, expected: dict[str, bytes]
) -> None:
    """No part repairs it."""
    out = apart()
    finish(out)
    flip_bit(sorted(out.glob("*.safetensors"))[4])
    for call in (lambda: finish(out, verify=True), lambda: run(source, out, 2, verify=True)):
        with pytest.raises(
            OutputError, match=r"damaged .*; convert with --verify, --max-.* the other 7$"
        ):
            call()
    convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES, verify=True)
    assert contents(out) == expected


def test_finish_where_no_part_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="holds no part of a conversion"):
        finish(tmp_path / "out")


@pytest.mark.slow
def test_finish_can_be_killed(
    apart: Callable[..., Path], source: Path, expected: dict[str, bytes]
) -> None:
    """At each of its renames. It knows the source then, too."""
    out = apart()
    for count in range(4):
        kill_at_rename(f"finish({str(out)!r})", count)
        assert not (out / INDEX).exists()
    shutil.move(source, moved := source.with_name("moved"))
    why = f"{source}: does not exist, and {out} was made from it; --source says where it lies now"
    with pytest.raises(CheckpointError, match=f"^{why}$"):
        finish(out)
    result = CliRunner().invoke(app, ["finish", str(out)])
    assert (result.exit_code, result.stderr) == (1, f"error: {why}\n")
    finish(out, moved)
    assert contents(out) == expected


# --- parts of different things --------------------------------------------------------------------


def rewritten(source: Path) -> None:
    os.utime(sorted(source.glob("*.safetensors"))[1])


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (None, {"count": 4}, "is of 3 parts, not 4"),
        (None, {"max_shard_nbytes": 400_000}, "has files of at most 500,000 bytes"),
        (rewritten, {}, "was made from another model-00002-of-00003.safetensors"),
    ],
    ids=["count", "size", "source"],
)
@pytest.mark.parametrize("number", [1, 2])
def test_parts_of_something_else(
    source: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    change: Callable[[Path], object] | None,
    options: dict[str, Any],
    why: str,
    number: int,
) -> None:
    out = tmp_path / "out"
    run(source, out, 1)
    before = files_of(out)
    if change:
        change(source)
    with pytest.raises(OutputError, match=rf"-1-of-3\.jsonl {why}; give all parts the same"):
        run(source, out, number, **options)
    after = files_of(out)
    own = ".fp4moe-journal-1-of-3.jsonl"  # a run says there who it is
    assert after.pop(own).startswith(before.pop(own))
    assert after == before
    # Away from each other they do not notice; it is found out before anything is finished.
    other = tmp_path / "other"
    run(source, other, 2, **options)
    shutil.copytree(out, other, dirs_exist_ok=True)
    with pytest.raises(OutputError, match=r"give all parts the same number of parts, options"):
        finish(other)
    assert not (other / INDEX).exists()
    report = convert(source, other, max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert report.shards_kept >= (0 if change else 2)
    left = contents(other)
    assert left == expected if change is None else left.keys() == expected.keys()
    verify(other, source)


def test_no_advice_to_convert_where_nothing_would_fit(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", 1)
    for path in source.glob("*.safetensors"):
        os.utime(path)
    with pytest.raises(OutputError, match=r"give all parts the same number of .* and source$"):
        run(source, tmp_path / "out", 2)
    with pytest.raises(OutputError, match=r"lacks 8 of 8 shards: .*, which keeps none$"):
        finish(tmp_path / "out")


def test_a_copy_of_the_source_keeps_its_times(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """As rsync -t makes it on another machine."""
    shutil.copytree(source, copy := tmp_path / "copy")
    out = tmp_path / "out"
    for number, folder in ((1, source), (2, copy), (3, source)):
        run(folder, out, number)
    assert contents(out) == expected


# --- side by side ---------------------------------------------------------------------------------


@contextmanager
def at_work(folder: Path, number: int) -> Iterator[Path]:
    """A part that has begun a shard."""
    journal = Journal(folder, Part(number, COUNT))
    journal.declare([name := "model-00008-of-00008.safetensors"])
    partial = folder / f"{name}.partial"
    partial.write_bytes(b"x")
    yield partial
    partial.unlink()
    journal.close(remove=False)


def test_a_part_leaves_the_others_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with at_work(out, 3) as partial:
        run(source, out, 1)
        assert partial.read_bytes() == b"x"
        with pytest.raises(InUseError, match=r"in use by process \d+ on .*, part 3 of 3, at work"):
            run(source, out, 3)
        for whole in (lambda: convert(source, out), lambda: finish(out)):
            with pytest.raises(
                InUseError, match=r"in use by process \d+ on .*, part \d of 3, at w"
            ):
                whole()


def test_a_part_that_begins_a_shard_while_another_starts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later finds a file whose name was not on record a moment ago."""
    out = tmp_path / "out"
    files_below = folder_files.files_below
    with ExitStack() as stack:

        def begin_before(folder: Path, *rest: Any) -> Iterator[str]:
            monkeypatch.setattr(folder_files, "files_below", files_below)
            stack.enter_context(at_work(out, 3))
            return files_below(folder, *rest)

        monkeypatch.setattr(folder_files, "files_below", begin_before)
        assert run(source, out, 1).shards_missing


def test_parts_of_something_else_that_start_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    join = Journal.join

    def join_after_another(own: Journal, division: Division) -> None:
        monkeypatch.setattr(Journal, "join", join)
        other = Journal(out, Part(1, 4))
        other.join(msgspec.structs.replace(division, parts=4))
        other.close(remove=False)
        own.join(division)

    monkeypatch.setattr(Journal, "join", join_after_another)
    with pytest.raises(OutputError, match=r"-1-of-4\.jsonl is of 4 parts, not 3"):
        run(source, out, 1)


def test_a_whole_run_keeps_parts_out(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, 1)
    with OutputFolder(out, source=source), pytest.raises(InUseError, match="in use by process"):
        run(source, out, 2)


def test_two_parts_that_end_at_once(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """The one that is still there finishes."""
    out = tmp_path / "out"
    for number in (1, 2):
        run(source, out, number)
    journal = Journal(out, Part(2, COUNT))
    report = run(source, out, 3)
    assert (report.shards_missing, report.whole) == (0, None)
    assert not (out / INDEX).exists()
    journal.close(remove=False)
    assert run(source, out, 2).whole is not None
    assert contents(out) == expected


def test_a_part_that_fails_at_once_leaves_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OutputError, match="bytes of free disk"):
            run(source, out, 1)
    assert not out.exists()


# --- after a kill ---------------------------------------------------------------------------------


def kill_part(source: Path, out: Path, number: int, shards: int) -> None:
    """Let a part be killed when it has finished some shards."""
    call = f"""
part = Part({number}, {COUNT})
convert_part({str(source)!r}, {str(out)!r}, part, max_shard_nbytes={SMALL_SHARD_NBYTES}, threads=1)
"""
    kill_at_rename(call, shards)


def test_a_part_resumes(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    kill_part(source, out, 2, 1)
    assert list(out.glob("*.partial"))
    run(source, out, 3)
    notes: list[str] = []
    report = run(source, out, 2, on_note=notes.append)
    assert report.shards_kept == 1
    assert notes == [f"resuming: 1 of {report.shards} shards were finished before and are kept"]
    assert run(source, out, 1).whole is not None
    assert contents(out) == expected


def test_a_whole_run_takes_over(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    run(source, out, 1)
    kill_part(source, out, 2, 1)
    kept = shards_in(out)
    report = convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert report.shards_kept == len(kept)
    assert contents(out) == expected


def test_what_a_part_has_fetched_is_taken_over(tmp_path: Path) -> None:
    """Of a shard that it has not finished."""
    part = Journal(tmp_path, Part(1, COUNT))
    part.note(FilledMove("a shard", "key", 3, "checksum"))
    part.close(remove=False)
    for _ in range(2):
        whole = Journal(tmp_path)
        whole.take_over([])
        whole.close(remove=False)
        assert whole.records.filled == {("a shard", "key"): {3: "checksum"}}
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL_NAME]


def test_a_part_takes_up_what_a_whole_run_left(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"

    def interrupt(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES, on_progress=interrupt)
    done = shards_in(out)
    assert done
    reports = [run(source, out, number) for number in (3, 1, 2)]
    assert sum(report.shards_kept for report in reports) == len(done)
    assert contents(out) == expected


def test_overwrite_starts_afresh(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    run(source, out, 1)
    report = convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES, overwrite=True)
    assert report.shards_kept == 0
    assert contents(out) == expected


def test_what_was_rejected_is_not_taken_from_a_part(
    apart: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = apart()
    write = conversion.write_surroundings

    def write_and_damage(*args: Any, **options: Any) -> None:
        write(*args, **options)
        flip_bit(sorted(out.glob("*.safetensors"))[0])

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_surroundings", write_and_damage)
        with pytest.raises(VerifyError):
            finish(out, verify=True)
    assert not (out / INDEX).exists()
    assert [path.name for path in out.iterdir() if is_journal(path.name)] == [JOURNAL_NAME]
    with pytest.raises(OutputError, match="lacks 8 of 8 shards"):
        finish(out)


def test_a_planted_journal_is_no_file_to_wait_for(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, 1)
    os.mkfifo(out / ".fp4moe-journal-2-of-3.jsonl")
    for again in (lambda: run(source, out, 3), lambda: finish(out)):
        with pytest.raises(OutputError, match=r"2-of-3\.jsonl: is not a regular file$"):
            again()


@pytest.mark.slow
def test_kills_at_random_moments() -> None:
    run_kills("--kills", "4", "--parts")
