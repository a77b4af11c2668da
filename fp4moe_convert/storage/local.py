"""Source files in a local folder."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from ..errors import CheckpointError, ConvertError, MissingFileError, naming
from ..format.files import FOREIGN_FOLDERS
from ..format.manifest import FileIdentity, Provenance
from ..format.sizes import round_up
from .buffers import BLOCK, Bytes
from .files import LocalFile, refuses_direct
from .reader import Listing

_SMALL_NBYTES = 64 * 1024
"""Reads below this (scalars, norms) are buffered: they lie side by side, and one block in the page
cache serves a thousand of them."""


class LocalReader(LocalFile):
    """A `reader.Reader` of a local file."""

    def __init__(self, path: Path, *, direct: bool = False, name: str | None = None) -> None:
        """
        Args:
            path: of the file.
            direct: bypass the page cache where the file system allows.
            name: for messages, where it is not the last part of the path.
        """
        self.name = path.name if name is None else name
        with naming(self.name):
            super().__init__(path, os.O_RDONLY, direct=direct)
            status = os.fstat(self._fd)
        self.nbytes = status.st_size
        self.identity = FileIdentity.of(status)

    def read(self, buffer: Bytes, offset: int, nbytes: int) -> Bytes:
        with naming(self.name):
            direct_fd = self._direct_fd  # another thread may give it up in the middle of this
            if direct_fd is not None and nbytes >= _SMALL_NBYTES:
                try:
                    return self._read_direct(direct_fd, buffer, offset, nbytes)
                except OSError as error:
                    if not refuses_direct(error):
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
                f"{self.name}: ends at byte {offset + max(got, 0)}, "
                f"expected at least {offset + view.size}: it has become shorter"
            )
        return view


def _read_until(fd: int, into: Bytes, offset: int, wanted: int) -> int:
    """Fill ``into`` until ``wanted`` bytes are there or the file ends; one read may stop short."""
    got = 0
    while got < wanted:
        count = os.preadv(fd, [into[got:].data], offset + got)
        if count == 0:
            break
        got += count
    return got


class LocalFolder:
    """A `reader.Store` that is a folder, such as a snapshot in the Hub's cache.

    Only regular files of the folder's own are read, or links to such files that do not lead out of
    it: what is copied, or published, must not come from elsewhere. The Hub's cache keeps the files
    of its snapshots in a folder beside them, and links there.
    """

    connections = 1
    """A disk reads fastest forwards."""

    def __init__(self, path: Path) -> None:
        self.local_path = path
        self.location = os.fspath(path)

    def check_exists(self) -> None:
        path = self.local_path
        with naming(path):
            if not path.is_dir():
                reason = "is not a folder" if path.exists() else "does not exist"
                raise CheckpointError(f"{path}: {reason}; expected a model folder")
            os.scandir(path).close()  # it may be read

    def listing(self) -> Listing:
        path = self.local_path
        # Links to folders may lead anywhere, and round in circles.
        names = sorted(files_below(path))
        links = {name for name in names if (path / name).is_dir()}
        return Listing(
            files=tuple(name for name in names if name not in links),
            folders=tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir())),
            left_out=dict.fromkeys(sorted(links), "is a link to a folder"),
        )

    def open(self, name: str, *, direct: bool = False) -> LocalReader:
        path = self.local_path / name
        with naming(name):
            try:
                is_regular = stat.S_ISREG(path.stat().st_mode)
            except (OSError, ValueError) as error:
                # ValueError: a NUL in the name. No file can have one, or a name that is too long.
                if getattr(error, "errno", None) not in (None, errno.ENOENT, errno.ENAMETOOLONG):
                    raise
                raise MissingFileError(f"{name}: {os.strerror(errno.ENOENT)}") from None
            if not is_regular:  # opening a device may do something to it
                raise OSError(errno.EINVAL, "is not a regular file")
        target = os.path.realpath(path)
        if not any(os.path.commonpath([home, target]) == home for home in self._homes):
            raise CheckpointError(
                f"{name}: is a link to {target}, outside the model folder; "
                "put the file itself, or a hard link, in its place"
            )
        return LocalReader(path, direct=direct, name=name)

    @cached_property
    def _homes(self) -> tuple[str, ...]:
        """Folders that a file of this one may lie in."""
        own = os.path.realpath(self.local_path)
        snapshots = os.path.dirname(own)
        if os.path.basename(snapshots) != "snapshots":
            return (own,)
        # Not where a link called "blobs" leads: that may be anywhere.
        return own, os.path.join(os.path.dirname(snapshots), "blobs")

    def provenance(self) -> Provenance:
        path = self.local_path.resolve()
        # A Hub cache keeps revisions as models--ORG--NAME/snapshots/REVISION.
        repo = path.parent.parent.name
        if path.parent.name == "snapshots" and repo.startswith("models--"):
            hub_id = repo.removeprefix("models--").replace("--", "/")
            return Provenance(str(path), hub_id, path.name)
        return Provenance(str(path))


class UnlistedSnapshot(LocalFolder):
    """A snapshot in the Hub's cache. What of it has never been downloaded cannot be told."""


def files_below(root: Path, kind: type[ConvertError] = CheckpointError) -> Iterator[str]:
    """Everything in a folder and its sub-folders that is not a folder, and links to folders, as
    paths relative to it. `FOREIGN_FOLDERS` are left out.

    Raises:
        ConvertError: of this ``kind``: a sub-folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        relative = os.path.relpath(error.filename, root)
        with naming(root if relative == "." else relative, kind):
            raise error

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = set(folders) - FOREIGN_FOLDERS
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(folder, name), root)
