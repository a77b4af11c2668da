"""A lock that ends with the process that holds it.

It is the kernel's lock on an open file (flock), so no lock is ever left behind, and network file
systems carry it to other hosts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import InUseError, OutputError
from ..storage.files import open_regular


def open_locked(path: Path, owner: Callable[[], str], *, shared: bool = False) -> int:
    """Open or create a file for reading and appending, and lock it.

    Args:
        path: of the file, in the folder that the lock is for.
        owner: says who holds the lock, where somebody else does.
        shared: others may hold it, too, if they also share it.

    Returns:
        A descriptor; closing it unlocks.

    Raises:
        InUseError: somebody else holds the lock.
        OutputError: the file system has no locks.
        OSError: the file cannot be opened.
    """
    while True:
        # O_NOFOLLOW: a link planted here would have us write where it leads.
        fd = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise InUseError(f"{path.parent}: is in use by {owner()}") from None
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise OutputError(
                    f"{path.parent}: its file system has no locks ({error.strerror}), so a second "
                    "run could not be kept out; mount it with locks (Lustre: -o flock), or "
                    "convert to another one"
                ) from None
            raise
        # The last owner may have removed the file between our opening it and its unlocking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)
