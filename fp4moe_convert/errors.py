"""Known failures.

ConvertError            the command line prints it as one line and exits with 1, or 75: try again
├── CheckpointError     the source cannot be converted
│   ├── HeaderError     a safetensors file breaks a rule of its own format
│   ├── MissingFileError    the source has no file of that name
│   └── UnreachableError    the source, or the Hub, does not answer now; later it may
├── FormatError         a converted checkpoint has a version, layout or form unknown to this release
├── OutputError         the output folder cannot be used, or writing to it failed
│   ├── InUseError      another run holds it
│   └── NoSpaceError    its disk is too small
├── PushError           a repository on the Hub cannot be pushed to
│   └── StorageLimitError   its owner may store no more there
├── RowOrderError       FlashInfer orders rows differently, or cannot be asked
├── VerifyError         a converted checkpoint differs from its manifest or from its source
├── ClusterError        the machines of a Ray cluster cannot be reached, or too many have died
└── ServingError        an engine cannot serve a converted checkpoint as it was started

A message is one line: the file, the tensor where there is one, the rule and both values, as in
``model-00007.safetensors: 'a.weight' starts at byte 7, expected 6``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class ConvertError(Exception):
    """Base of all known failures."""

    @property
    def try_again(self) -> bool:
        """Whether the same command may do later, with nothing put right in the source or in the
        folder."""
        cause = self.__cause__
        if isinstance(cause, ConvertError):
            return cause.try_again
        return isinstance(cause, OSError) and cause.errno in _MAY_PASS


_MAY_PASS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
        *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT),
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN),
        *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
    }
)
"""Full disks, busy machines, and networks that are away."""


class CheckpointError(ConvertError):
    """The source cannot be converted."""


class HeaderError(CheckpointError):
    """A safetensors file breaks a rule of its own format."""


class MissingFileError(CheckpointError):
    """The source has no file of that name."""


class UnreachableError(CheckpointError):
    """The source, or the Hub, does not answer now; later it may."""

    try_again = True


class FormatError(ConvertError):
    """A converted checkpoint has a version, layout or form that this release does not know."""


class OutputError(ConvertError):
    """The output folder cannot be used, or writing to it failed."""


class InUseError(OutputError):
    """Another run holds the output folder."""

    try_again = True


class NoSpaceError(OutputError):
    """The disk of the output folder is too small for what will come."""

    try_again = True


class PushError(ConvertError):
    """A repository on the Hub cannot be pushed to."""


class StorageLimitError(PushError):
    """The owner of a repository may store no more on the Hub."""

    try_again = True


class RowOrderError(ConvertError):
    """FlashInfer orders rows differently from this release, or cannot be asked."""


class VerifyError(ConvertError):
    """A converted checkpoint differs from its manifest or from its source."""


class ClusterError(ConvertError):
    """The machines of a Ray cluster cannot be reached, or too many have died."""

    try_again = True


class ServingError(ConvertError, ValueError):
    """An engine cannot serve a converted checkpoint as it was started."""


def printable(text: str) -> str:
    """``text`` with control characters, which a name may hold, shown instead of obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(error: object) -> str:
    """What somebody else's error says, whose text may have line breaks."""
    return " ".join(str(error).split())


@contextmanager
def naming(
    file: str | os.PathLike[str], kind: type[ConvertError] = CheckpointError
) -> Iterator[None]:
    """Turn an OSError inside the block into ``kind``, naming ``file`` and the system's reason."""
    try:
        yield
    except OSError as error:
        raise kind(f"{os.fspath(file)}: {error.strerror or error}") from error
