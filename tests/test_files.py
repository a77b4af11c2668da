"""Reads and writes at any offset, with and without direct I/O, and where a file system has none."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faulty_disk import mounted, needs_root
from support.processes import descriptors_of

from fp4moe_convert.errors import CheckpointError, OutputError
from fp4moe_convert.storage import durable
from fp4moe_convert.storage.buffers import BLOCK, block_buffer, view_at
from fp4moe_convert.storage.copying import copy_file
from fp4moe_convert.storage.durable import WriteFile, make_folder, remove_file, write_file
from fp4moe_convert.storage.local import LocalReader

CONTENT = np.random.default_rng(0).integers(0, 256, 40 * BLOCK + 123, np.uint8)

DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT.tobytes())
    return path


def ranges() -> Iterator[tuple[int, int]]:
    """(offset, nbytes): whole blocks, parts of one, across several, up to the end; the longer
    ones are past the bound below which reads are buffered."""
    for offset in (0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 17):
        for nbytes in (0, 1, BLOCK, 2 * BLOCK + 1, 20 * BLOCK, CONTENT.size - offset):
            yield offset, nbytes


@DIRECT
def test_reads_are_exact(file: Path, direct: bool) -> None:
    reader = LocalReader(file, direct=direct)
    buffer = block_buffer(CONTENT.size)
    for offset, nbytes in ranges():
        found = reader.read(buffer, offset, nbytes)
        np.testing.assert_array_equal(found, CONTENT[offset : offset + nbytes])
    assert reader.direct == direct


@DIRECT
@pytest.mark.parametrize("beyond", [1, BLOCK, 50 * BLOCK])
def test_a_file_that_ends_early_is_named(file: Path, direct: bool, beyond: int) -> None:
    reader = LocalReader(file, direct=direct)
    nbytes = 30 * BLOCK
    offset = CONTENT.size - nbytes + beyond
    message = (
        rf"file: ends at byte {max(offset, CONTENT.size)}, expected at least {offset + nbytes}"
    )
    with pytest.raises(CheckpointError, match=message):
        reader.read(block_buffer(nbytes), offset, nbytes)


def write_pieces(path: Path, *, direct: bool) -> WriteFile:
    """Write CONTENT in pieces that meet inside blocks, several at a time."""
    file = WriteFile(path, CONTENT.size, direct=direct)
    cuts = [0, 5, BLOCK, 2 * BLOCK + 1, 9 * BLOCK - 1, 9 * BLOCK + 1, 30 * BLOCK, CONTENT.size]

    def write(piece: tuple[int, int]) -> None:
        start, stop = piece
        data = view_at(block_buffer(stop - start), stop - start, start)
        data[:] = CONTENT[start:stop]
        file.write(data, start)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, pairwise(cuts)))
    file.sync()
    return file


@DIRECT
def test_writes_are_exact(tmp_path: Path, direct: bool) -> None:
    file = write_pieces(tmp_path / "out", direct=direct)
    assert (tmp_path / "out").read_bytes() == CONTENT.tobytes()
    assert file.direct == direct


def test_memory_that_does_not_suit_direct_io_is_written_all_the_same(tmp_path: Path) -> None:
    file = WriteFile(tmp_path / "out", CONTENT.size, direct=True)
    data = block_buffer(CONTENT.size)[1 : 1 + CONTENT.size]
    data[:] = CONTENT
    file.write(data, 0)
    assert (tmp_path / "out").read_bytes() == CONTENT.tobytes()


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A real file system that refuses O_DIRECT."""
    with mounted(tmp_path / "ramfs", "ramfs", "rw") as ramfs:
        yield ramfs


@needs_root
def test_a_file_system_without_direct_io_gets_ordinary_io(ramfs: Path) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(ramfs / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    assert not write_pieces(ramfs / "out", direct=True).direct
    reader = LocalReader(ramfs / "out", direct=True)
    assert not reader.direct
    np.testing.assert_array_equal(reader.read(block_buffer(CONTENT.size), 0, CONTENT.size), CONTENT)


def test_a_file_system_that_refuses_late_gets_ordinary_io(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems open with O_DIRECT and refuse the first read or write."""
    import fcntl

    def refusing(call: Any) -> Any:
        def wrapped(fd: int, *args: Any) -> Any:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(fd, *args)

        return wrapped

    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    monkeypatch.setattr(os, "pwrite", refusing(os.pwrite))
    assert not write_pieces(tmp_path / "out", direct=True).direct
    assert (tmp_path / "out").read_bytes() == CONTENT.tobytes()
    reader = LocalReader(file, direct=True)
    assert reader.direct
    np.testing.assert_array_equal(
        reader.read(block_buffer(CONTENT.size), 7, CONTENT.size - 7), CONTENT[7:]
    )
    assert not reader.direct


def test_other_errors_are_not_taken_for_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = WriteFile(tmp_path / "out", CONTENT.size, direct=True)
    monkeypatch.setattr(os, "pwrite", no_space)
    with pytest.raises(OutputError, match="out: No space left on device"):
        file.write(view_at(block_buffer(CONTENT.size), CONTENT.size, 0), 0)


def test_files_are_closed_when_dropped(file: Path) -> None:
    reader = LocalReader(file, direct=True)
    assert len(descriptors_of(file)) == 2
    del reader
    assert descriptors_of(file) == []


def test_an_existing_file_is_never_overwritten(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    for path in (file, link):
        with pytest.raises(OutputError, match="File exists"):
            WriteFile(path, 1, direct=False)
    assert file.read_bytes() == CONTENT.tobytes()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["fifo", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Without waiting for somebody to write."""
    make(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"^odd: is not a regular file$"):
        LocalReader(tmp_path / "odd", direct=False)


def test_folders_are_made_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2


def write_it(path: Path, _: Path) -> None:
    write_file(path, b"content")


def copy_it(path: Path, file: Path) -> None:
    copy_file(LocalReader(file), path)


@pytest.mark.parametrize("make", [write_it, copy_it])
def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(
    file: Path, tmp_path: Path, disk_calls: list[tuple[str, ...]], make: Callable[..., None]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder / "new", file)
    assert disk_calls == [
        ("sync", "new.partial"),
        ("rename", "new.partial", "new"),
        ("sync", "folder"),
    ]


def test_a_folder_is_synced_after_a_file_is_removed_from_it(
    file: Path, disk_calls: list[tuple[str, ...]]
) -> None:
    remove_file(file)
    assert disk_calls == [("unlink", "file"), ("sync", file.parent.name)]


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    write_file(tmp_path / "ours", b"content")
    (tmp_path / "theirs").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode
    assert (tmp_path / "ours").read_bytes() == b"content"
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "ours.partial").stat()
        pytest.fail("the temporary name is gone")
