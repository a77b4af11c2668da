"""File systems to fill, to freeze and to cut the power of, for tests. Mounting takes root."""

from __future__ import annotations

import fcntl
import gc
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 and not os.environ.get("CI"), reason="mounting takes root"
)
"""For tests that mount, or that change who they are. In CI they fail rather than be skipped, as
nothing else tests what a power cut leaves."""

_EXT4_IOC_SHUTDOWN = 0x8004587D
_WITHOUT_FLUSHING_THE_JOURNAL = 2
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878


def mount(where: Path, kind: str, options: str, device: str | Path = "none") -> None:
    """Mount a file system on a folder, made if need be.

    Raises:
        subprocess.CalledProcessError: it cannot be mounted, as by anybody but root.
    """
    where.mkdir(exist_ok=True)
    command = ["mount", "-t", kind, "-o", options, device, where]
    subprocess.run(command, check=True, capture_output=True)


def unmount(where: Path) -> None:
    """Unmount a file system that nobody uses any more."""
    gc.collect()  # what failed may still have files open, in frames that refer to themselves
    subprocess.run(["umount", where], check=True)


def unmount_later(where: Path) -> None:
    """Unmount as soon as nobody uses it: the frames of a test that failed live on for a while."""
    subprocess.run(["umount", "--lazy", where], check=True)


@contextmanager
def mounted(where: Path, kind: str, options: str) -> Iterator[Path]:
    """A file system for a while; its content goes with it."""
    mount(where, kind, options)
    try:
        yield where
    finally:
        unmount_later(where)


class Disk:
    """An ext4 file system in a file, mounted so that it orders and flushes nothing unasked."""

    def __init__(self, image: Path, where: Path, nbytes: int) -> None:
        """Make and mount it.

        Args:
            image: the file, not there yet.
            where: the folder to mount it on.
            nbytes: its size.
        """
        self._image = image
        self.where = where
        with image.open("xb") as file:
            file.truncate(nbytes)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
        self.plug_in()

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        unmount_later(self.where)

    def plug_in(self, access: str = "rw") -> None:
        options = f"{access},loop,data=writeback,noauto_da_alloc"
        mount(self.where, "ext4", options, self._image)

    def cut_power(self) -> None:
        """From now on every call fails with EIO; what has not been synced is lost."""
        self._control(_EXT4_IOC_SHUTDOWN, _WITHOUT_FLUSHING_THE_JOURNAL)

    def freeze(self) -> None:
        """From now on whoever wants to write waits, and not even SIGKILL ends that."""
        self._control(_FIFREEZE, 0)

    def thaw(self) -> None:
        with suppress(OSError):  # it is not frozen
            self._control(_FITHAW, 0)

    def restart(self) -> None:
        """What is on the disk when the power is back; nobody may have a file open."""
        unmount(self.where)
        self.plug_in()

    def _control(self, request: int, argument: int) -> None:
        fd = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, request, struct.pack("I", argument))
        finally:
            os.close(fd)
