"""Runs that were stopped, and what the next one makes of what they left."""

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from make_checkpoint import Spec, make_checkpoint

from fp4moe_convert import CheckpointError, OutputError, Report, VerifyError, convert, verify
from fp4moe_convert.contract import INDEX_NAME, MANIFEST_NAME
from fp4moe_convert.journal import JOURNAL_NAME

SPEC = Spec(layers=2, experts=3, hidden=256, intermediate=128, shards=3, vocab_size=128)
SHARD_NBYTES = 500_000


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest only what does not name the source's path."""
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


def run(source: Path, out: Path, **options: object) -> tuple[Report, list[str]]:
    notes: list[str] = []
    arguments = {"max_shard_nbytes": SHARD_NBYTES, **options}
    return convert(source, out, on_note=notes.append, **arguments), notes  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A source, and what an unbroken run makes of it."""
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder / "source", SPEC)
    run(folder / "source", folder / "out")
    return folder / "source", contents(folder / "out")


@pytest.fixture
def source(made: tuple[Path, dict[str, bytes]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "source"))


@pytest.fixture
def expected(made: tuple[Path, dict[str, bytes]]) -> dict[str, bytes]:
    return made[1]


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
    assert not (out / INDEX_NAME).exists()
    assert not list(out.rglob("*.partial"))
    kept = sorted(path.name for path in out.glob("*.safetensors")) if out.exists() else []
    report, notes = run(source, out)
    assert report.shards_kept == len(kept) <= count
    assert bool(notes) == bool(kept)
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
        note for note in notes if note.endswith(f"done again: {first.name} has changed since")
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
        assert json.loads(lines[-2])["shard"].startswith("model-00003")
        journal.write_bytes(b"\n".join([*lines[:-2], lines[-2][:-20]]))
    report, notes = run(source, stopped)
    assert report.shards_kept == 2
    assert "done again" in notes[0]
    assert contents(stopped) == expected


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
    assert contents(stopped) == before
    assert precious.read_text() == "mine"


def test_a_second_run_stops_and_says_who_is_there(stopped: Path, source: Path) -> None:
    with open(stopped / JOURNAL_NAME, "r+b") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        before = contents(stopped)
        with pytest.raises(OutputError, match=rf"in use by process {os.getpid()} on .*, at work"):
            run(source, stopped)
        assert contents(stopped) == before
    run(source, stopped)


def test_the_lock_ends_with_its_process(source: Path, tmp_path: Path) -> None:
    """Killed while it holds the folder; the next run is not in the way of anybody."""
    out = tmp_path / "out"
    program = f"""
import os, signal, sys
from fp4moe_convert import conversion
conversion.scatter = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
conversion.convert({str(source)!r}, {str(out)!r})
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert (out / JOURNAL_NAME).exists()
    convert(source, out)
    verify(out, source)


def test_a_result_that_does_not_verify_is_not_built_on(
    stopped: Path, source: Path, expected: dict[str, bytes]
) -> None:
    shard = sorted(stopped.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerifyError, match=rf"^{shard.name}: "):
        run(source, stopped, verify=True)
    assert not (stopped / INDEX_NAME).exists()
    report, notes = run(source, stopped, verify=True)
    assert report.shards_kept == 0
    assert all(note.endswith("no run has finished it") for note in notes)
    assert contents(stopped) == expected


def test_a_source_that_fails_leaves_what_was_finished(source: Path, tmp_path: Path) -> None:
    """A NaN in the last layer does not cost the first."""
    spec = dataclasses.replace(SPEC, layout="single")
    shutil.rmtree(source)
    make_checkpoint(source, spec)
    path = source / "model.safetensors"
    header_nbytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    entries = json.loads(path.read_bytes()[8:header_nbytes])
    scale = "model.layers.2.mlp.experts.2.down_proj.weight_scale"
    position = header_nbytes + entries[scale]["data_offsets"][0]
    with path.open("r+b") as file:
        file.seek(position)
        good = file.read(1)
        file.seek(position)
        file.write(b"\x7f")
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="NaN"):
        run(source, out, threads=1, max_shard_nbytes=300_000)
    assert list(out.glob("*.safetensors"))
    assert not (out / INDEX_NAME).exists()
    assert not (out / MANIFEST_NAME).exists()
    with path.open("r+b") as file:
        file.seek(position)
        file.write(good)
    run(source, out, max_shard_nbytes=300_000)
    verify(out, source)


def test_kills_at_random_moments() -> None:
    """A handful; scripts/kill_harness.py does hundreds."""
    script = Path(__file__).parent.parent / "scripts" / "kill_harness.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "8"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal the unbroken one" in done.stdout
