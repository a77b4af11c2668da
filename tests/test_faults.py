"""Real faults, not mocks: full, failing and read-only disks, power cuts, and other people's files.

Mounting takes root; where that is not to be had, the tests that mount are skipped and say so. In CI
they fail.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.faulty_disk import Disk, mount, mounted, needs_root, unmount
from support.folders import INDEX, contents, flip_bit
from support.processes import FP4MOE_CONVERT, run_kills, state_of, until
from support.specs import SMALL_SHARD_NBYTES

from fp4moe_convert import CheckpointError, ConversionReport, OutputError, convert
from fp4moe_convert.execution.output_folder import Writing

MIB = 2**20


def run(source: Path, out: Path) -> ConversionReport:
    # One thread, so that nobody writes while a fault is being arranged.
    return convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES, threads=1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path / "image", tmp_path / "disk", 40 * MIB) as disk:
        yield disk


@pytest.fixture
def after_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Do something once a number of shards has been finished."""

    def install(count: int, act: Callable[[], object]) -> None:
        finish_shard, left = Writing.finish_shard, [count]

        def counting(*args: Any) -> None:
            finish_shard(*args)
            left[0] -= 1
            if left[0] == 0:
                act()

        monkeypatch.setattr(Writing, "finish_shard", counting)

    return install


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small", "tmpfs", "size=20m") as small:
        yield small


def fill(folder: Path) -> Path:
    """Leave no room for another shard in a file system."""
    path = folder / "filler"
    nbytes = shutil.disk_usage(folder).free
    with path.open("wb", buffering=0) as file:
        while nbytes >= 4096:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), nbytes)
            except OSError:
                nbytes //= 2
    assert shutil.disk_usage(folder).free < 100_000
    return path


def is_resumable(out: Path) -> int:
    """The number of finished shards in a folder that a run has left behind in order."""
    names = {path.name for path in out.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names == shards | {".fp4moe-journal.jsonl"}
    return len(shards)


# --- the output's disk ----------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("after", [1, 4])
def test_a_disk_that_is_full(
    source: Path,
    expected: dict[str, bytes],
    small: Path,
    after_shards: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    """Somebody else takes what was free at the start."""
    out = small / "out"
    after_shards(after, lambda: fill(small))
    with pytest.raises(OutputError, match=r"^model-.*\.safetensors.*: No space left on device$"):
        run(source, out)
    monkeypatch.undo()
    kept = is_resumable(out)
    assert kept == after
    (small / "filler").unlink()
    assert run(source, out).shards_kept == kept
    assert contents(out) == expected


@needs_root
def test_a_disk_with_room_for_no_more_files(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with mounted(tmp_path / "few", "tmpfs", "size=20m,nr_inodes=8") as few:
        out = few / "out"
        with pytest.raises(OutputError, match=r"\.partial: No space left on device$"):
            run(source, out)
        kept = is_resumable(out)
        assert kept > 0
        mount(few, "tmpfs", "remount,nr_inodes=100")
        assert run(source, out).shards_kept == kept
        assert contents(out) == expected


@needs_root
def test_a_disk_that_is_too_small_is_refused_at_the_start(source: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "tmpfs", "size=1m") as small:
        with pytest.raises(OutputError, match=r"out: needs \S+ bytes of free disk, there are"):
            run(source, small / "out")
        assert list(small.iterdir()) == []


@needs_root
def test_a_disk_that_has_room_for_the_rest_only(
    source: Path, expected: dict[str, bytes], disk: Disk, after_shards: Any, monkeypatch: Any
) -> None:
    out = disk.where / "out"
    after_shards(4, lambda: fill(disk.where))
    with pytest.raises(OutputError, match="No space left"):
        run(source, out)
    monkeypatch.undo()
    kept = is_resumable(out)
    whole = sum(map(len, expected.values()))
    have = sum(path.stat().st_size for path in out.iterdir())
    free = shutil.disk_usage(disk.where).free
    os.truncate(disk.where / "filler", (disk.where / "filler").stat().st_size - (whole - have))
    assert shutil.disk_usage(disk.where).free < whole
    os.truncate(
        disk.where / "filler",
        (disk.where / "filler").stat().st_size - 64 * 4096,  # folders, journal, half blocks
    )
    assert shutil.disk_usage(disk.where).free - free < whole
    assert run(source, out).shards_kept == kept
    assert contents(out) == expected


@needs_root
def test_a_disk_that_half_written_files_have_filled(
    source: Path, expected: dict[str, bytes], small: Path
) -> None:
    """There is no room for a line in the journal until they are gone."""
    out = small / "out"
    program = f"""
import os, signal
from fp4moe_convert import convert
from fp4moe_convert.execution.output_folder import Writing
Writing.finish_shard = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert({str(source)!r}, {str(out)!r}, max_shard_nbytes={SMALL_SHARD_NBYTES})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    partial = next(out.glob("*.partial"))
    nbytes = shutil.disk_usage(small).free
    with partial.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, partial.stat().st_blocks * 512 + nbytes)
    assert shutil.disk_usage(small).free == 0
    run(source, out)
    assert contents(out) == expected


@needs_root
def test_a_disk_that_fails(
    source: Path,
    expected: dict[str, bytes],
    disk: Disk,
    after_shards: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """EIO for every call from the third shard on. What was finished is there when it is back."""
    out = disk.where / "out"
    after_shards(3, disk.cut_power)
    with pytest.raises(OutputError, match=r"^model-.*\.safetensors.*: Input/output error$"):
        run(source, out)
    monkeypatch.undo()
    disk.restart()
    assert not (out / INDEX).exists()
    assert run(source, out).shards_kept == 3
    assert contents(out) == expected


def thread_states(pid: int) -> str:
    """One letter a thread; D waits for a disk."""
    return "".join(map(state_of, Path(f"/proc/{pid}/task").glob("*")))


def waits_for_a_disk(pid: int) -> bool:
    """It does, and for longer than a disk takes that answers."""
    return all(time.sleep(0.05) or "D" in thread_states(pid) for _ in range(6))


@needs_root
@pytest.mark.parametrize("frozen_from", ["the start", "the first progress"])
def test_a_disk_that_does_not_answer(
    source: Path, expected: dict[str, bytes], disk: Disk, frozen_from: str
) -> None:
    """No process can end while it waits for such a disk, but Ctrl-C is answered."""
    out = disk.where / "out"
    command = [*FP4MOE_CONVERT, source, out, f"--max-shard-size={SMALL_SHARD_NBYTES}"]
    if frozen_from == "the start":
        disk.freeze()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            if frozen_from == "the first progress":
                assert process.stderr.readline().startswith("converting")
                disk.freeze()
            until(lambda: waits_for_a_disk(process.pid))
            process.terminate()
            answer = process.stderr.readline()
            assert answer == "error: interrupted; run the same command again to resume\n"
            assert waits_for_a_disk(process.pid)
        finally:
            disk.thaw()
        assert process.wait(timeout=60) == 143
    run(source, out)
    assert contents(out) == expected


@pytest.mark.slow
@needs_root
def test_power_cuts_at_random_moments() -> None:
    """A handful; ``support/kill.py --power-cuts`` does hundreds."""
    assert "power cuts" in run_kills("--kills", "5", "--power-cuts")


@needs_root
def test_a_read_only_disk(source: Path, disk: Disk, after_shards: Any, monkeypatch: Any) -> None:
    out = disk.where / "out"
    after_shards(3, lambda: fill(disk.where))
    with pytest.raises(OutputError, match="No space left"):
        run(source, out)
    monkeypatch.undo()
    before = contents(disk.where)
    unmount(disk.where)
    disk.plug_in("ro")
    with pytest.raises(OutputError, match=r"new: Read-only file system$"):
        run(source, disk.where / "new")
    with pytest.raises(OutputError, match=r"/out/\.fp4moe-journal\.jsonl: Read-only file system$"):
        run(source, out)
    assert contents(disk.where) == before


# --- the source's disk ----------------------------------------------------------------------------


@needs_root
def test_a_source_on_a_read_only_disk_will_do(
    source: Path, expected: dict[str, bytes], disk: Disk, tmp_path: Path
) -> None:
    shutil.copytree(source, disk.where / "source")
    unmount(disk.where)
    disk.plug_in("ro")
    run(disk.where / "source", tmp_path / "out")
    assert contents(tmp_path / "out").keys() == expected.keys()


@needs_root
def test_a_source_whose_disk_fails(
    source: Path,
    expected: dict[str, bytes],
    disk: Disk,
    tmp_path: Path,
    after_shards: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(source, disk.where / "source")
    disk.restart()  # written back, and out of the page cache
    after_shards(2, disk.cut_power)
    with pytest.raises(CheckpointError, match=r"^model-.*\.safetensors: Input/output error$"):
        run(disk.where / "source", tmp_path / "out")
    monkeypatch.undo()
    kept = is_resumable(tmp_path / "out")
    disk.restart()
    assert run(disk.where / "source", tmp_path / "out").shards_kept == kept == 2
    assert contents(tmp_path / "out").keys() == expected.keys()


def put_a_fifo_there(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "No such file or directory"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "ends at byte .* shorter"),
        (flip_bit, "has changed while it was read"),
        (put_a_fifo_there, "is not a regular file"),
    ],
    ids=["vanished", "truncated", "rewritten", "fifo"],
)
def test_a_source_that_changes_while_it_is_read(
    source: Path,
    tmp_path: Path,
    after_shards: Callable[[int, Callable[[], object]], None],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    last = sorted(source.glob("*.safetensors"))[-1]
    after_shards(1, lambda: damage(last))
    with pytest.raises(CheckpointError, match=f"^{last.name}: {message}$"):
        run(source, tmp_path / "out")
    assert is_resumable(tmp_path / "out") == 2


# --- somebody else --------------------------------------------------------------------------------


AS_NOBODY = """
import contextlib, io, os, sys
from fp4moe_convert import __main__, conversion
from fp4moe_convert.cli import commands, display
with contextlib.redirect_stdout(io.StringIO()):
    commands.convert_app([sys.argv[1], sys.argv[2], "--dry-run"], standalone_mode=False)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.argv = ["fp4moe-convert", *sys.argv[1:], "--quiet"]
__main__.main_convert()
"""


def public_place() -> Path:
    """A folder for temporary files that everybody may reach; TMPDIR may lie in a home."""
    for place in map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")):
        with contextlib.suppress(OSError):
            if all(folder.stat().st_mode & 0o001 for folder in (place, *place.parents)):
                return place
    pytest.fail("there is no folder for temporary files that everybody may reach")


@pytest.fixture
def public(source: Path) -> Iterator[Path]:
    """A folder that everybody may enter, with a source that everybody may read."""
    with tempfile.TemporaryDirectory(dir=public_place()) as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(source, folder / "source")
        (folder / "home").mkdir()
        (folder / "home").chmod(0o777)
        yield folder


def as_nobody(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a user without rights. It is first run dry as root, who may be alone in being
    allowed to read the packages that it imports."""
    command = [sys.executable, "-W", "ignore", "-c", AS_NOBODY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def shut(path: Path) -> None:
    path.chmod(0o600 if path.is_file() else 0o700)


@needs_root
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("source/model-00002-of-00003.safetensors", "model-00002-of-00003.safetensors"),
        ("source/config.json", "config.json"),
        ("source/tokenizer.json", "tokenizer.json"),
        ("source/sub", "sub"),
        ("source", "{folder}/source"),
        ("home", "{folder}/home/out"),
    ],
)
def test_without_permission(public: Path, path: str, message: str) -> None:
    out = "home/out"
    if path == "source/sub":
        (public / path).mkdir()
    shut(public / path)
    done = as_nobody(public / "source", public / out)
    assert (done.returncode, done.stdout) == (1, "")
    named = message.replace("{folder}", str(public))
    assert done.stderr == f"error: {named}: Permission denied\n"
    assert not (public / out / INDEX).exists()


@needs_root
def test_an_output_folder_that_is_shut_meanwhile(source: Path, tmp_path: Path) -> None:
    """Tidying up is not possible either; what is told is what came first."""
    out = tmp_path / "out"
    program = f"""
import os
from fp4moe_convert import ConvertError, convert
from fp4moe_convert.execution.output_folder import Writing
finish_shard = Writing.finish_shard
def shutting(*args):
    os.chmod({str(out)!r}, 0)
    os.setuid(65534)
    finish_shard(*args)
Writing.finish_shard = shutting
try:
    convert({str(source)!r}, {str(out)!r}, threads=1)
except ConvertError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"\S+: Permission denied\n", done.stdout), done.stderr
    assert done.stderr == ""


@needs_root
def test_a_folder_above_may_be_unreadable(public: Path, expected: dict[str, bytes]) -> None:
    """One can make files in it all the same."""
    (public / "home").chmod(0o333)
    done = as_nobody(public / "source", public / "home" / "out")
    assert done.returncode == 0, done.stderr
    assert len(contents(public / "home" / "out")) < len(expected)  # larger shards
    assert (public / "home" / "out" / INDEX).stat().st_uid == 65534
