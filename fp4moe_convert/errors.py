"""Everything that can go wrong and is not a bug.

ConvertError
├── CheckpointError     the source is not a checkpoint that can be converted
│   └── HeaderError     a safetensors file breaks a rule of its own format
├── FormatError         a converted checkpoint has a version or a form that is not known here
├── OutputError         the output folder cannot be used, or writing to it failed
├── RowOrderError       the installed FlashInfer orders rows differently, or cannot be asked
└── VerifyError         a converted checkpoint is not what it should be

A message is one line: the file, the tensor where there is one, the rule and both values, as in
``model-00007.safetensors: 'a.weight' starts at byte 7, expected 6``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class ConvertError(Exception):
    """Base of all known failures; the CLI prints it as one line and exits with 1."""


class CheckpointError(ConvertError):
    """The source folder is not a checkpoint that can be converted."""


class HeaderError(CheckpointError):
    """A safetensors file breaks a rule of its own format."""


class FormatError(ConvertError):
    """A converted checkpoint has a version or a form that is not known here."""


class OutputError(ConvertError):
    """The output folder cannot be used, or writing to it failed."""


class RowOrderError(ConvertError):
    """The installed FlashInfer does not give the row order this package writes."""


class VerifyError(ConvertError):
    """A converted checkpoint differs from its manifest or from its source."""


def printable(text: str) -> str:
    """``text`` with control characters, which a name may hold, shown and not obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


@contextmanager
def naming(
    file: str | os.PathLike[str], kind: type[ConvertError] = CheckpointError
) -> Iterator[None]:
    """Turn an OSError inside the block into ``kind``, naming ``file`` and the system's reason."""
    try:
        yield
    except OSError as error:
        raise kind(f"{os.fspath(file)}: {error.strerror or error}") from error
