"""Sources that are deleted as they are converted (docs/drop-source.md)."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from support.faulty_disk import mount, mounted, needs_root, unmount_later
from support.folders import INDEX, MANIFEST, SOURCE, edit_json, every_file, flip_bit
from support.hub import Hub, snapshot_without_links
from support.hub_upload import Uploads
from support.make_checkpoint import make_checkpoint
from support.processes import FP4MOE_CONVERT, descriptors_of, kill_at_rename, run_kills
from support.specs import MANY_SHARDS, SMALL_SHARD_NBYTES
from typer.testing import CliRunner, Result

from fp4moe_convert import (
    CheckpointError,
    ConversionReport,
    OutputError,
    VerifyError,
    conversion,
    convert,
    preparation,
    preview,
    restore,
    verify,
)
from fp4moe_convert.cli.commands import app
from fp4moe_convert.execution import dropping, scatter
from fp4moe_convert.execution.forecast import Forecast
from fp4moe_convert.execution.journal import Journal
from fp4moe_convert.format.files import JOURNAL_NAME
from fp4moe_convert.storage.buffers import block_buffer
from fp4moe_convert.storage.durable import WriteFile
from fp4moe_convert.storage.header import read_header
from fp4moe_convert.storage.local import LocalFolder

DOCUMENTED = (Path(__file__).parents[1] / "docs" / "drop-source.md").read_text()


def run(source: Path, out: Path, **options: Any) -> ConversionReport:
    options = {"max_shard_nbytes": SMALL_SHARD_NBYTES, "drop_source": True, **options}
    return convert(source, out, **options)


def command(*arguments: object, name: str = "convert") -> Result:
    size = ["--max-shard-size", str(SMALL_SHARD_NBYTES)] if name == "convert" else []
    return CliRunner().invoke(app, [name, *map(str, arguments), *size])


def shards_of(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def as_without(out: Path) -> dict[str, bytes]:
    """What is in a folder, but for what its manifest says of the source's end."""
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["source"].pop("dropped") is True
    del manifest["source"]["path"], manifest["manifest"]
    return {**every_file(out), MANIFEST: json.dumps(manifest).encode()}


def assert_way_back(out: Path, pristine: Path) -> None:
    verify(out)
    restore(out, out.parent / "restored")
    assert every_file(out.parent / "restored") == every_file(pristine)


@pytest.fixture
def pristine(made: tuple[Path, dict[str, bytes]]) -> Path:
    """What ``source`` is a copy of."""
    return made[0]


@pytest.fixture
def after_drops(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Do something once a number of shards has been deleted."""

    def install(count: int, act: Callable[[], object]) -> None:
        drop, left = dropping.Dropping.drop, [count]

        def counting(self: dropping.Dropping, name: str) -> None:
            drop(self, name)
            left[0] -= 1
            if left[0] == 0:
                act()

        monkeypatch.setattr(dropping.Dropping, "drop", counting)

    return install


class StopError(Exception):
    """Stands for whatever ends a run."""


def run_half(source: Path, out: Path, left: int = 2) -> Path:
    """Stop when the first shard of the source has been deleted."""
    drop = dropping.Dropping.drop

    def stopping(self: dropping.Dropping, name: str) -> None:
        drop(self, name)
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropping.Dropping, "drop", stopping)
        with pytest.raises(StopError):
            run(source, out)
    assert len(shards_of(source)) == left
    return out


@pytest.fixture
def half(source: Path, tmp_path: Path) -> Path:
    return run_half(source, tmp_path / "out")


# --- what it does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"threads": 1, "direct_io": False}])
def test_the_source_goes_and_can_be_had_back(
    source: Path,
    pristine: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    names, nbytes = shards_of(source), sum(p.stat().st_size for p in source.glob("*.safetensors"))
    report = run(source, tmp_path / "out", **options)
    assert (report.dropped_shards, report.dropped_bytes) == (len(names), nbytes)
    assert report.verified_with == ("source" if "verify" in options else None)
    assert as_without(tmp_path / "out") == expected
    left = {name: data for name, data in every_file(pristine).items() if name not in names}
    assert every_file(source) == left
    assert_way_back(tmp_path / "out", pristine)


@pytest.mark.parametrize("layout", ["no-index", "single"])
def test_a_source_without_an_index(tmp_path: Path, layout: Literal["no-index", "single"]) -> None:
    """Then the names of its shards are nowhere but on record."""
    shards = 3 if layout == "no-index" else 1
    spec = dataclasses.replace(MANY_SHARDS, layout=layout, shards=shards)
    for name in ("pristine", "source"):
        make_checkpoint(tmp_path / name, spec)
    out = run_half(tmp_path / "source", tmp_path / "out", left=shards - 1)
    run(tmp_path / "source", out)
    assert not shards_of(tmp_path / "source")
    run(tmp_path / "source", out)
    assert_way_back(out, tmp_path / "pristine")


def test_a_shard_goes_once_all_that_is_read_from_it_is_there_and_not_before(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = preview(source, max_shard_nbytes=SMALL_SHARD_NBYTES).work.plan
    out, unlink = tmp_path / "out", os.unlink
    gone = []

    def watching(path: Any, **options: Any) -> None:
        unlink(path, **options)
        if "dir_fd" not in options:
            return
        gone.append(path)
        there = shards_of(out)
        for shard in plan.shards:
            if path in shard.source_files:
                assert (out / shard.name).read_bytes() == expected[shard.name]
        (*_, last) = [shard.name for shard in plan.shards if path in shard.source_files]
        assert there == {shard.name for shard in plan.shards if shard.name <= last}
        # A file that is open makes no room.
        assert descriptors_of(source / path) == []

    monkeypatch.setattr(os, "unlink", watching)
    gc.disable()  # as the command does
    try:
        run(source, out, verify=True)
    finally:
        gc.enable()
    assert gone == sorted(gone)
    assert not shards_of(source)


def test_everything_is_on_the_disk_before_a_shard_goes(
    source: Path, tmp_path: Path, disk_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4 syncs more than it is asked to; the power cuts below cannot tell."""
    unlink = os.unlink

    def recorded(path: Any, **options: Any) -> None:
        unlink(path, **options)
        if "dir_fd" in options:
            disk_calls.append(("drop", path))

    def forgotten(fd: int, *_: int) -> None:
        disk_calls.append(("forget", Path(os.readlink(f"/proc/self/fd/{fd}")).name))

    monkeypatch.setattr(os, "unlink", recorded)
    monkeypatch.setattr(os, "posix_fadvise", forgotten)
    plan = preview(source, max_shard_nbytes=SMALL_SHARD_NBYTES).work.plan
    run(source, tmp_path / "out")
    drops = [at for at, call in enumerate(disk_calls) if call[0] == "drop"]
    assert len(drops) == MANY_SHARDS.shards

    def after(call: tuple[str, ...], start: int = 0) -> int:
        return disk_calls.index(call, start)

    first = drops[0]
    recorded_at = after(("rename", f"{SOURCE}.partial", SOURCE))
    for name in (SOURCE, "tokenizer.json"):
        renamed = after(("rename", f"{name}.partial", name))
        assert after(("sync", f"{name}.partial")) < renamed < after(("sync", "out"), renamed)
    assert recorded_at < after(("sync", tmp_path.name), recorded_at)
    assert recorded_at < after(("sync", JOURNAL_NAME), recorded_at) < first
    for at in drops:
        for shard in plan.shards:
            if disk_calls[at][1] in shard.source_files:
                renamed = after(("rename", f"{shard.name}.partial", shard.name))
                synced = after(("sync", f"{shard.name}.partial"))
                assert synced < after(("forget", f"{shard.name}.partial"), synced) < renamed
                assert synced < after(("sync", JOURNAL_NAME), synced) < renamed
                assert after(("sync", "out"), renamed) < at


def test_what_an_earlier_run_has_left_is_on_the_disk_before_a_shard_goes(
    source: Path, tmp_path: Path, disk_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between the renaming of a file and the folder's sync leaves a name that
    a power cut would still take back."""
    run(source, tmp_path / "out", drop_source=False)
    disk_calls.clear()
    unlink = os.unlink

    def recorded(path: Any, **options: Any) -> None:
        unlink(path, **options)
        if "dir_fd" in options:
            disk_calls.append(("drop", path))

    monkeypatch.setattr(os, "unlink", recorded)
    run(source, tmp_path / "out")
    first = [call[0] for call in disk_calls].index("drop")
    assert disk_calls.index(("sync", "out")) < first
    assert disk_calls.index(("sync", tmp_path.name)) < first
    assert ("sync", JOURNAL_NAME) in disk_calls[disk_calls.index(("sync", tmp_path.name)) : first]


def test_the_peak_is_as_foreseen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bytes of both folders, whenever a file is made or deleted."""
    out = tmp_path / "out"
    foreseen = preview(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES, drop_source=True).dropping
    assert foreseen is not None
    before = sum(map(len, every_file(source).values()))
    seen = []

    def looking(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            sizes = [len(d) for f in (source, out) if f.exists() for d in every_file(f).values()]
            journal = out / JOURNAL_NAME
            seen.append(sum(sizes) - (journal.stat().st_size if journal.exists() else 0))
            return result

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("ftruncate", "unlink"):
            patch.setattr(os, name, looking(getattr(os, name)))
        run(source, out)
    index = len(every_file(source)[INDEX])
    assert foreseen.peak_nbytes - index <= max(seen) <= foreseen.peak_nbytes
    assert foreseen.more_nbytes == foreseen.peak_nbytes - before
    source_nbytes = sum(p.stat().st_size for p in source.glob("*"))
    assert max(seen) < before + 0.8 * (before - source_nbytes)


def test_a_dry_run_states_the_peak_and_deletes_nothing(source: Path, tmp_path: Path) -> None:
    before = every_file(source)
    foreseen = preview(source, max_shard_nbytes=SMALL_SHARD_NBYTES, drop_source=True).dropping
    assert foreseen is not None
    done = command(source, tmp_path / "out", "--drop-source", "--dry-run")
    assert done.exit_code == 0
    assert f"disk             {foreseen}" in done.stdout
    assert f"{foreseen.peak_nbytes:,} bytes at most" in done.stdout
    done = command(source, tmp_path / "out", "--drop-source", "--dry-run", "--json")
    assert json.loads(done.stdout)["drop_source"] == foreseen.as_json()
    assert every_file(source) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", ["half", "finished", "afresh"])
def test_what_is_there_already_is_not_still_to_come(
    source: Path, tmp_path: Path, left: str
) -> None:
    """The dry run says what the run says."""
    out = tmp_path / "out"
    if left == "half":
        run_half(source, out)
    else:
        run(source, out, drop_source=False)
    afresh = ["--overwrite"] * (left == "afresh")
    dry = command(source, out, "--drop-source", "--dry-run", "--json", *afresh)
    foreseen = json.loads(dry.stdout)["drop_source"]
    wet = command(source, out, "--drop-source", "--yes", *afresh)
    assert wet.exit_code == 0, wet.stderr
    more = f"{foreseen['more_bytes']:,} more than now"
    assert more in wet.stderr
    assert f"take {foreseen['peak_bytes']:,} bytes at most, {more}" in wet.stderr
    assert (foreseen["more_bytes"] < 200_000) is (left == "finished")


def test_one_shard_is_no_plural() -> None:
    said = "1 shard of the source, 2 bytes, is deleted as it is converted; source and result take 3"
    assert str(Forecast(1, 2, 3, 4)) == f"{said} bytes at most, 4 more than now"


@needs_root
def test_it_needs_room_for_the_peak_only(
    source: Path, pristine: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    foreseen = preview(source, max_shard_nbytes=SMALL_SHARD_NBYTES, drop_source=True).dropping
    assert foreseen is not None
    room = foreseen.peak_nbytes + 400_000  # blocks, folders, the journal
    with mounted(tmp_path / "small", "tmpfs", f"size={room}") as small:
        shutil.copytree(source, small / "source")
        with pytest.raises(OutputError, match="bytes of free disk"):
            run(small / "source", small / "out", drop_source=False)
        run(small / "source", small / "out")
        assert not shards_of(small / "source")
        assert as_without(small / "out") == expected
        shutil.copytree(small / "out", tmp_path / "out")
    assert_way_back(tmp_path / "out", pristine)


def test_a_folder_that_is_finished_already(
    source: Path, pristine: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(source, out, drop_source=False)
    report = run(source, out)
    assert report.shards_kept == report.shards
    assert report.dropped_shards == MANY_SHARDS.shards
    assert as_without(out) == expected
    assert_way_back(out, pristine)


def test_a_finished_folder_is_read_before_its_source_goes(
    source: Path, pristine: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(source, out, drop_source=False)
    flip_bit(out / sorted(shards_of(out))[2])
    report = run(source, out)
    assert report.shards_kept == report.shards - 1
    assert as_without(out) == expected
    assert_way_back(out, pristine)


def test_once_more_and_the_source_is_gone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = every_file(out)
    for options in ([], ["--drop-source", "--yes"], ["--verify"]):
        done = command(source, out, *options)
        assert done.exit_code == 0, done.stderr
        count = len(shards_of(out))
        assert [line for line in done.stderr.splitlines() if " GB, " not in line] == [
            "3 of 3 shards of the source are gone, as --drop-source leaves it",
            f"already finished: {count} of {count} shards were finished before and are kept",
        ]
        assert every_file(out) == before
    assert "every byte against the checksums on record, because shards of" in done.stdout
    done = command(source, out, "--dry-run", "--drop-source")
    assert done.exit_code == 0


# As in test_push.py.
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_it_can_be_pushed(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    Uploads(hub, tmp_path / "objects")
    done = command(source, tmp_path / "out", "--drop-source", "--yes", "--push-to-hub", "org/new")
    assert done.exit_code == 0, done.stderr
    assert not shards_of(source)
    verify(tmp_path / "out")


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_source", [True, False])
@pytest.mark.parametrize("again", [{}, {"verify": True}])
def test_a_run_resumes_without_what_is_gone(
    half: Path,
    source: Path,
    pristine: Path,
    expected: dict[str, bytes],
    drop_source: bool,
    again: dict[str, Any],
) -> None:
    notes: list[str] = []
    report = run(source, half, drop_source=drop_source, on_note=notes.append, **again)
    assert notes[0] == "1 of 3 shards of the source are gone, as --drop-source leaves it"
    assert report.shards_kept > 0
    assert report.dropped_shards == (2 if drop_source else 0)
    assert len(shards_of(source)) == (0 if drop_source else 2)
    if again:
        assert report.verified_with is not None
        assert "checksums on record" in report.verified_with
    assert as_without(half) == expected
    assert_way_back(half, pristine)


@pytest.mark.parametrize("way", ["the same command", "no longer", "the cache is pruned"])
def test_a_snapshot_goes_on_by_its_id(
    hub: Hub, source: Path, pristine: Path, tmp_path: Path, way: str
) -> None:
    """A cache without links, whose snapshot is no longer complete when the first shard is gone."""
    hub.add("org/model", source)
    snapshot = snapshot_without_links("org/model")
    out = run_half(snapshot, tmp_path / "out")
    made = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    hub.forget()
    drop = ("--drop-source", "--yes")
    if way == "the cache is pruned":
        shutil.rmtree(snapshot.parent)
        refused = command("org/model", out, *drop)
        assert (refused.exit_code, refused.stderr.strip()) == (1, documented()["model on the Hub"])
    result = command("org/model", out, *(drop if way == "the same command" else ()))
    assert result.exit_code == 0, result.stderr
    assert "written again" not in result.stderr
    assert made.items() <= {p.name: p.stat().st_ino for p in out.glob("*.safetensors")}.items()
    if way == "the cache is pruned":
        verify(out, "org/model")
    else:
        assert not [name for name in hub.served() if name.endswith(".safetensors")]
        assert len(shards_of(snapshot)) == (0 if way == "the same command" else 2)
    assert command("org/model", out).exit_code == 0
    assert_way_back(out, pristine)


def test_a_finished_folder_whose_source_was_going(
    source: Path, pristine: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """It has an index all the time."""
    run(source, tmp_path / "out", drop_source=False)
    out = run_half(source, tmp_path / "out")
    assert (out / INDEX).exists()
    run(source, out)
    assert not shards_of(source)
    assert as_without(out) == expected
    assert_way_back(out, pristine)


def test_a_finished_folder_that_has_lost_its_index(
    source: Path, pristine: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The manifest is alone in knowing that the source was deleted, and it is written again."""
    out = tmp_path / "out"
    run(source, out)
    (out / INDEX).unlink()
    call = f"convert({str(source)!r}, {str(out)!r}, max_shard_nbytes={SMALL_SHARD_NBYTES})"
    kill_at_rename(call, 0)
    assert not (out / MANIFEST).exists()
    run(source, out)
    assert as_without(out) == expected
    assert_way_back(out, pristine)


def test_what_is_found_at_the_end_costs_no_record(
    half: Path,
    source: Path,
    pristine: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shard goes bad between the reading at the start and that at the end."""
    first = half / sorted(shards_of(half))[0]
    write = conversion.write_surroundings

    def damaging(*args: Any, **options: Any) -> None:
        write(*args, **options)
        flip_bit(first)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_surroundings", damaging)
        with pytest.raises(VerifyError, match="has checksum"):
            run(source, half, drop_source=False, verify=True)
    assert not (half / INDEX).exists()
    with pytest.raises(OutputError, match="may be all that --drop-source has left"):
        run(source, half, verify=True)
    flip_bit(first)
    run(source, half, verify=True)
    assert as_without(half) == expected
    assert_way_back(half, pristine)


@pytest.mark.parametrize("count", [0, 4, 6, 9, 12, 15])
def test_killed_at_a_rename(
    source: Path, pristine: Path, expected: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    out = tmp_path / "out"
    call = f"convert({str(source)!r}, {str(out)!r}, max_shard_nbytes={SMALL_SHARD_NBYTES}"
    kill_at_rename(f"{call}, drop_source=True)", count)
    run(source, out)
    assert not shards_of(source)
    assert as_without(out) == expected
    assert_way_back(out, pristine)


@pytest.mark.slow
@needs_root
def test_power_cuts_at_random_moments() -> None:
    """A handful; ``support/kill.py --drop-source --power-cuts`` does hundreds."""
    run_kills("--drop-source", "--power-cuts", "--kills", "5")


@needs_root
def test_a_disk_that_is_full(
    source: Path,
    pristine: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    after_drops: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with mounted(tmp_path / "small", "tmpfs", "size=20m") as small:
        filler = small / "filler"

        def fill() -> None:
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small).free)

        after_drops(1, fill)
        with pytest.raises(OutputError, match="No space left on device"):
            run(source, small / "out")
        monkeypatch.undo()
        filler.unlink()
        assert len(shards_of(source)) == 2
        run(source, small / "out")
        assert as_without(small / "out") == expected
        shutil.copytree(small / "out", tmp_path / "out")
    assert_way_back(tmp_path / "out", pristine)


def test_what_a_bad_disk_has_written_keeps_its_source(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = WriteFile.sync, [3]

    def failing(self: WriteFile) -> None:
        sync(self)
        if ".safetensors" in self.path.name:
            left[0] -= 1
            if left[0] == 0:
                flip_bit(self.path)

    before = every_file(source)
    with monkeypatch.context() as patch:
        patch.setattr(WriteFile, "sync", failing)
        with pytest.raises(VerifyError, match=r"\.partial: '.*' has checksum \w+, expected"):
            run(source, tmp_path / "out", direct_io=False)
    assert every_file(source) == before
    run(source, tmp_path / "out")
    assert as_without(tmp_path / "out") == expected


def test_verify_compares_with_the_source_before_that_goes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that went wrong in memory, before their checksums were taken."""
    fill = scatter.Scratch.fill

    def wrong(self: scatter.Scratch, move: Any, *args: Any) -> Any:
        data = fill(self, move, *args)
        if move.tensor == "model.embed_tokens.weight" and move.offset == 0:
            data[0] ^= 1
        return data

    before = every_file(source)
    monkeypatch.setattr(scatter.Scratch, "fill", wrong)
    with pytest.raises(VerifyError, match=r"embed_tokens\.weight' differs from"):
        run(source, tmp_path / "out", verify=True)
    assert every_file(source) == before


def test_a_shard_that_has_changed_since_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = dropping.Dropping.drop

    def touched_before(self: dropping.Dropping, name: str) -> None:
        os.utime(source / name)
        drop(self, name)

    before = every_file(source)
    monkeypatch.setattr(dropping.Dropping, "drop", touched_before)
    with pytest.raises(CheckpointError, match=r"^model-00001\S+: has changed since it was"):
        run(source, tmp_path / "out", threads=1)
    assert every_file(source) == before


def test_a_plan_that_does_not_take_every_byte_stops_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No plan is like that; if one were, the source could not be had back."""
    make_plan = preparation.make_plan

    def forgetful(*args: Any, **options: Any) -> Any:
        plan = make_plan(*args, **options)
        first, *others = plan.shards
        first = dataclasses.replace(first, moves=first.moves[:-1])
        return dataclasses.replace(plan, shards=(first, *others))

    before = every_file(source)
    monkeypatch.setattr(preparation, "make_plan", forgetful)
    with pytest.raises(VerifyError, match="the converted tensors hold its data up to byte"):
        run(source, tmp_path / "out")
    assert every_file(source) == before
    assert not (tmp_path / "out").exists()


def test_a_record_that_does_not_read_back_stops_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = every_file(source)
    monkeypatch.setattr(Journal, "allow_dropping", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"so nothing is deleted$"):
        run(source, tmp_path / "out")
    assert every_file(source) == before


def test_a_folder_whose_name_is_not_utf8(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    odd = source.rename(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xffel"))
    run_half(odd, tmp_path / "out")
    run(odd, tmp_path / "out")
    assert not shards_of(odd)
    assert as_without(tmp_path / "out") == expected


# --- what is refused ------------------------------------------------------------------------------


def link(source: Path, _: Path) -> None:
    first = source / "model-00001-of-00003.safetensors"
    first.rename(source / "blob")
    first.symlink_to("blob")


def hard_link(source: Path, _: Path) -> None:
    os.link(source / "model-00001-of-00003.safetensors", source.parent / "another")


def read_only(source: Path, _: Path) -> None:
    mount(source, "none", "bind", source)
    mount(source, "none", "remount,bind,ro")


def edit_config(source: Path, _: Path) -> None:
    edit_json(source / "config.json", rope_theta=1)


def change_a_shard(source: Path, _: Path) -> None:
    flip_bit(source / "model-00003-of-00003.safetensors")


def lose_a_shard(source: Path, _: Path) -> None:
    (source / "model-00003-of-00003.safetensors").unlink()


def lose_an_output(_: Path, out: Path) -> None:
    (out / "model-00001-of-00008.safetensors").unlink()


def damage_an_output(_: Path, out: Path) -> None:
    flip_bit(out / "model-00001-of-00008.safetensors")


def lose_the_record(_: Path, out: Path) -> None:
    (out / SOURCE).unlink()


def lose_the_journal(_: Path, out: Path) -> None:
    (out / JOURNAL_NAME).unlink()


def another_model(source: Path, _: Path) -> None:
    shutil.rmtree(source)
    make_checkpoint(source, dataclasses.replace(MANY_SHARDS, seed=1))


def nothing(*_: Path) -> None:
    pass


Damage = Callable[[Path, Path], None]

AT_THE_START: dict[str, Damage] = {
    "shard that is a link": link,
    "shard with two names": hard_link,
    "folder that is read-only": read_only,
}
HALF_DONE: dict[str, tuple[Damage, list[str]]] = {
    "`--overwrite`": (nothing, ["--overwrite"]),
    "another `--max-shard-size`": (nothing, ["--max-shard-size=400KB"]),
    "another model, whose files have the same names": (another_model, ["--overwrite"]),
    "configuration edited": (edit_config, []),
    "shard of the source changed": (change_a_shard, []),
    "shard of the source lost that is still needed": (lose_a_shard, []),
    "converted shard lost": (lose_an_output, []),
    "converted shard damaged, with `--verify`": (damage_an_output, ["--verify"]),
    "record lost": (lose_the_record, []),
    "journal lost": (lose_the_journal, []),
}
FINISHED: dict[str, list[str]] = {
    "finished, `--overwrite`": ["convert", "source", "out", "--overwrite"],
    "finished, another `--max-shard-size`": [
        "convert",
        "source",
        "out",
        "--max-shard-size=400KB",
    ],
    "finished, `fp4moe verify --source`": ["verify", "out", "--source", "source"],
}


def documented() -> dict[str, str]:
    rows = re.findall(r"^\| (.*?) \| `(error: .*)` \|$", DOCUMENTED, re.MULTILINE)
    return dict(rows)


def test_the_documented_refusals_are_those_that_are_tested() -> None:
    assert list(documented()) == [*AT_THE_START, "model on the Hub", *HALF_DONE, *FINISHED]


def error_of(done: Result, folder: Path) -> str:
    assert done.exit_code == 1, done.output
    line = done.stderr.splitlines()[-1].replace(f"{folder}/", "")
    return re.sub(r"\b[0-9a-f]{32}\b", "...", line)


@needs_root
@pytest.mark.parametrize("case", AT_THE_START)
def test_refused_at_the_start(source: Path, tmp_path: Path, case: str) -> None:
    AT_THE_START[case](source, tmp_path / "out")
    before = every_file(source)
    try:
        for options in (["--yes"], ["--dry-run"]):
            done = command(source, tmp_path / "out", "--drop-source", *options)
            assert error_of(done, tmp_path) == documented()[case]
    finally:
        if case == "folder that is read-only":
            unmount_later(source)
    assert every_file(source) == before
    assert not (tmp_path / "out").exists()


def test_refused_from_the_hub(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add("org/model", source)
    done = command("org/model", tmp_path / "out", "--drop-source", "--yes")
    assert error_of(done, tmp_path) == documented()["model on the Hub"]


@pytest.mark.parametrize("drop", [["--drop-source", "--yes"], []])
@pytest.mark.parametrize("case", HALF_DONE)
def test_refused_when_half_of_the_source_is_gone(
    half: Path, source: Path, tmp_path: Path, case: str, drop: list[str]
) -> None:
    damage, options = HALF_DONE[case]
    damage(source, half)
    before = every_file(source), every_file(half)
    done = CliRunner().invoke(
        app, ["convert", str(source), str(half), "--max-shard-size=500KB", *options, *drop, "-q"]
    )
    assert error_of(done, tmp_path) == documented()[case]
    after = every_file(half)
    for files in (before[1], after):  # a run that has the lock says so
        files.pop(JOURNAL_NAME, None)
    assert (every_file(source), after) == (before[0], before[1])


@pytest.mark.parametrize("case", FINISHED)
def test_refused_when_the_source_is_gone(source: Path, tmp_path: Path, case: str) -> None:
    run(source, tmp_path / "out")
    before = every_file(tmp_path / "out")
    arguments = [str(tmp_path / a) if a in ("source", "out") else a for a in FINISHED[case]]
    done = CliRunner().invoke(app, arguments)
    assert error_of(done, tmp_path) == documented()[case]
    assert every_file(tmp_path / "out") == before


def test_no_advice_to_start_afresh_where_the_source_is_gone(source: Path, tmp_path: Path) -> None:
    """It is refused."""
    run(source, out := tmp_path / "out")
    edit_json(out / "config.json", rope_theta=1)
    with pytest.raises(OutputError, match=r"'config.json' has been changed since; put it right$"):
        run(source, out)


def test_another_model_is_not_taken_for_what_is_left(half: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_checkpoint(other, dataclasses.replace(MANY_SHARDS, seed=1, shards=2))
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError, match="may be all that --drop-source has left of"):
            run(other, half, **options)


def test_what_is_gone_has_no_data(half: Path, source: Path) -> None:
    """Not even zeros, which would be taken for weights."""
    store = dropping.remaining(LocalFolder(source), half)
    gone = store.open("model-00001-of-00003.safetensors")
    header = read_header(gone).nbytes
    assert gone.nbytes > header
    with pytest.raises(CheckpointError, match=f"only its first {header} bytes are on record"):
        gone.read(block_buffer(1), header, 1)


def test_put_right_it_goes_on(
    half: Path, source: Path, pristine: Path, expected: dict[str, bytes]
) -> None:
    """After a refusal, the command that the folder was begun with."""
    for options in (["--overwrite"], ["--max-shard-size=400KB"]):
        arguments = ["convert", str(source), str(half), "--max-shard-size=500KB", *options]
        assert CliRunner().invoke(app, arguments).exit_code == 1
    run(source, half)
    assert as_without(half) == expected
    assert_way_back(half, pristine)


def test_a_part_of_it_is_refused(source: Path, tmp_path: Path) -> None:
    for options in (["--part", "1/2"], ["--ray", "auto"]):
        done = command(source, tmp_path / "out", "--drop-source", "--yes", *options)
        assert done.exit_code == 2
        assert "--drop-source is for one machine" in done.stderr


def test_no_part_goes_on_with_what_is_half_gone(half: Path, source: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in half.iterdir()}
    done = command(source, half, "--part", "1/2")
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: {half}: --drop-source has deleted model-00001-of-00003.safetensors, and no part "
        "goes on with that; convert without --part\n"
    )
    assert {path: path.stat().st_mtime_ns for path in half.iterdir()} == before


def test_a_part_finds_what_is_gone_finished(half: Path, source: Path) -> None:
    run(source, half)
    done = command(source, half, "--part", "1/2", "--json", "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["whole"]["bytes_written"] == 0


# --- asking ---------------------------------------------------------------------------------------


def test_without_a_terminal_it_wants_yes(source: Path, tmp_path: Path) -> None:
    before = every_file(source)
    done = command(source, tmp_path / "out", "--drop-source")
    assert done.exit_code == 2
    assert "--yes" in done.stderr
    assert every_file(source) == before
    assert not (tmp_path / "out").exists()


def test_it_does_not_ask_where_nobody_sees_the_question(source: Path, tmp_path: Path) -> None:
    """As with 2>log."""
    ours, theirs = os.openpty()
    call = [*FP4MOE_CONVERT, source, tmp_path / "out", "--drop-source"]
    done = subprocess.run(call, stdin=theirs, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, b"--yes" in done.stderr) == (2, True)


CTRL_D = "\x04"


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1), (CTRL_D, 1)])
def test_on_a_terminal_it_asks(source: Path, tmp_path: Path, answer: str, code: int) -> None:
    before = every_file(source)
    ours, theirs = os.openpty()
    shown, screen = os.openpty()
    call = [*FP4MOE_CONVERT, source, tmp_path / "out", "--drop-source", "--quiet"]
    dumb = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(call, stdin=theirs, stderr=screen, env=dumb) as process:
        os.write(ours, answer.encode())
        assert process.wait(timeout=60) == code
    said = os.read(shown, 10_000).decode().replace("\r\n", "\n")
    for each in (ours, theirs, shown, screen):
        os.close(each)
    nbytes = sum(len(data) for name, data in before.items() if name.endswith(".safetensors"))
    assert said.startswith(f"{source}: 3 shards of the source, {nbytes:,} bytes, are deleted as")
    assert "Delete them? [y/N]:" in said
    if code:
        assert said.endswith("error: not confirmed; nothing has been written or deleted\n")
        assert every_file(source) == before
        assert not (tmp_path / "out").exists()
    else:
        assert not shards_of(source)
        verify(tmp_path / "out")
