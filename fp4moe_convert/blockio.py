"""Files read and written at offsets, past the page cache where the file system allows.

Buffered I/O copies every byte through the page cache, which a 400 GB conversion fills with data
that nobody reads again, and then waits for the write-back: on a machine with 2 cores, 6.0 s a
layer for ``cp`` and ``sync`` against 2.5-3.5 s for direct I/O that moved the same bytes. Direct
I/O wants memory, file offset and length in whole blocks: reads take the blocks around a range,
writes send the whole blocks of a range directly and what is left at its ends through the cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import weakref
from pathlib import Path

import numpy as np

from .contract import PARTIAL_SUFFIX, round_up
from .errors import CheckpointError, OutputError, naming
from .layouts import Bytes

BLOCK = 4096
"""A multiple of every logical block size in use. A device that wants more gets buffered I/O."""

_SMALL_NBYTES = 64 * 1024
"""Reads below this (scalars, norms) are buffered: they lie side by side, and one block read by
the cache serves a thousand of them."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)


def aligned_buffer(nbytes: int) -> Bytes:
    """[nbytes] uint8 that starts on a block; anonymous memory, resident once touched."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]


def read_room(nbytes: int) -> int:
    """Bytes of whole blocks that hold a range of ``nbytes``, wherever it begins."""
    return round_up(nbytes, BLOCK) + BLOCK


def read_buffer(nbytes: int) -> Bytes:
    """A buffer that `ReadFile.read` can fill with ``nbytes`` from any offset."""
    return aligned_buffer(read_room(nbytes))


def write_view(buffer: Bytes, nbytes: int, offset: int) -> Bytes:
    """The [nbytes] of ``buffer`` whose memory lies as the file's blocks do at ``offset``."""
    phase = offset % BLOCK
    return buffer[phase : phase + nbytes]


write_buffer = read_buffer  # the same slack: up to one block before the data


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a regular file, or a link to one; it fits the ``opener`` of `open`.

    The answer holds for what has been opened, whatever comes to the path later. O_NONBLOCK:
    opening a FIFO would wait for a writer for ever; for a regular file it means nothing.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    fd = _open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
    return fd


def _open(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file under a number that is none of a standard stream: where one of them is closed, a
    shard would get its number, and the next library that warns would warn into the weights."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


class _File:
    """A buffered descriptor, and a direct one for as long as the file system takes it."""

    def __init__(self, path: Path, flags: int, *, direct: bool) -> None:
        self.path = path
        self._fd = open_regular(path, flags)
        weakref.finalize(self, os.close, self._fd)
        self._direct_fd: int | None = None
        if direct and _O_DIRECT:
            # Creation is the buffered descriptor's business.
            reopen = flags & (os.O_ACCMODE | os.O_NOFOLLOW) | _O_DIRECT
            try:
                self._direct_fd = _open(path, reopen)
            except OSError as error:
                if not _refuses_direct(error):
                    raise
            else:
                weakref.finalize(self, os.close, self._direct_fd)

    @property
    def direct(self) -> bool:
        """Whether direct I/O is in use."""
        return self._direct_fd is not None


def _refuses_direct(error: OSError) -> bool:
    """Some file systems say no when the file is opened, others at the first read or write."""
    return error.errno in (errno.EINVAL, errno.EOPNOTSUPP)


class ReadFile(_File):
    """A file read at offsets, by any number of threads; closed when the last one drops it."""

    def __init__(self, path: Path, *, direct: bool) -> None:
        with naming(path.name):
            super().__init__(path, os.O_RDONLY, direct=direct)
            self.nbytes = os.fstat(self._fd).st_size
            """When it was opened."""

    def read(self, buffer: Bytes, offset: int, nbytes: int) -> Bytes:
        """Read a range into ``buffer`` and return it.

        Args:
            buffer: block-aligned, of at least `read_room` (nbytes).
            offset: from the start of the file.
            nbytes: of the range.

        Returns:
            [nbytes] uint8, a view of ``buffer``.

        Raises:
            CheckpointError: the file cannot be read, or ends inside the range.
        """
        with naming(self.path.name):
            direct_fd = self._direct_fd  # another thread may give it up meanwhile
            if direct_fd is not None and nbytes >= _SMALL_NBYTES:
                try:
                    return self._read_direct(direct_fd, buffer, offset, nbytes)
                except OSError as error:
                    if not _refuses_direct(error):
                        raise
                    self._direct_fd = None
            got = _read_until(self._fd, buffer[:nbytes], offset, nbytes)
        return self._whole(buffer[:nbytes], got, offset)

    def _read_direct(self, fd: int, buffer: Bytes, offset: int, nbytes: int) -> Bytes:
        lead = offset % BLOCK
        blocks = buffer[: round_up(lead + nbytes, BLOCK)]
        got = _read_until(fd, blocks, offset - lead, lead + nbytes)
        return self._whole(buffer[lead : lead + nbytes], got - lead, offset)

    def _whole(self, view: Bytes, got: int, offset: int) -> Bytes:
        if got < view.size:
            raise CheckpointError(
                f"{self.path.name}: ends at byte {offset + max(got, 0)}, "
                f"expected at least {offset + view.size}: it has become shorter"
            )
        return view


def _read_until(fd: int, into: Bytes, offset: int, wanted: int) -> int:
    """Fill ``into`` until ``wanted`` bytes are there or the file ends; a single read may stop
    short."""
    got = 0
    while got < wanted:
        count = os.preadv(fd, [into[got:].data], offset + got)
        if count == 0:
            break
        got += count
    return got


class WriteFile(_File):
    """A new file of known size, written at offsets by any number of threads."""

    def __init__(self, path: Path, nbytes: int, *, direct: bool) -> None:
        with naming(path.name, OutputError):
            # O_EXCL: never follow or overwrite what somebody else put here.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            super().__init__(path, flags, direct=direct)
            os.ftruncate(self._fd, nbytes)

    def write(self, data: Bytes, offset: int) -> None:
        """Write ``data`` at ``offset``; from a `write_view`, its whole blocks go directly.

        Raises:
            OutputError: naming the file and the system's reason.
        """
        with naming(self.path.name, OutputError):
            first = min(round_up(offset, BLOCK) - offset, data.size)
            last = max(first, (offset + data.size) // BLOCK * BLOCK - offset)
            aligned = data.__array_interface__["data"][0] % BLOCK == offset % BLOCK
            direct_fd = self._direct_fd  # another thread may give it up meanwhile
            if direct_fd is None or first == last or not aligned:
                _write_all(self._fd, data, offset)
                return
            _write_all(self._fd, data[:first], offset)
            try:
                _write_all(direct_fd, data[first:last], offset + first)
            except OSError as error:
                if not _refuses_direct(error):
                    raise
                self._direct_fd = None
                _write_all(self._fd, data[first:last], offset + first)
            _write_all(self._fd, data[last:], offset + last)

    def sync(self) -> None:
        """Return once the file's bytes and size are on the disk."""
        # Once, at the end: syncing every 256 MiB, or every GiB, made a run take a third longer.
        with naming(self.path.name, OutputError):
            os.fsync(self._fd)


def _write_all(fd: int, data: Bytes, offset: int) -> None:
    """Write all of ``data``; a single write may stop short."""
    while data.size:
        written = os.pwrite(fd, data.data, offset)
        data, offset = data[written:], offset + written


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, durably, under a temporary name until it is whole; one that is there
    already with the same bytes is left alone.

    Raises:
        OutputError: naming the file and the system's reason.
    """
    if holds(path, data):
        return
    partial = partial_path(path)
    file = WriteFile(partial, len(data), direct=False)
    file.write(np.frombuffer(data, np.uint8), 0)
    file.sync()
    publish(partial, path)


def holds(path: Path, data: bytes) -> bool:
    """Whether a file is there and consists of just these bytes.

    Raises:
        OutputError: naming the file and the system's reason.
    """
    with naming(path.name, OutputError):
        return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def partial_path(path: Path) -> Path:
    """What a file is called until its last byte is on the disk."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def publish(partial: Path, path: Path) -> None:
    """Give a synced file its final name, durably."""
    with naming(path.name, OutputError):
        os.rename(partial, path)
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably; one that is there already will do."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        # A folder above that may be written but not read is no reason to fail.
        with contextlib.suppress(PermissionError):
            sync_folder(made.parent)


def remove_file(path: Path) -> None:
    """Delete a file if it is there, durably."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # So some network file systems say that they have nothing to sync in a folder.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)
