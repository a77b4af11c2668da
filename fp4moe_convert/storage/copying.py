"""Whole files, read in pieces: their checksums, and copies of them."""

from __future__ import annotations

from pathlib import Path

import xxhash

from ..errors import OutputError, naming
from ..format.manifest import FileRecord
from .buffers import block_buffer
from .durable import WriteFile, make_folder, partial_path, publish
from .local import LocalReader
from .reader import Reader

_PIECE_NBYTES = 8 * 2**20


def record_of(reader: Reader) -> FileRecord:
    """Size and checksum of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _read_through(reader)


def copy_file(reader: Reader, target: Path) -> FileRecord:
    """Copy a file, and make the folders above it. A copy that an earlier run made is kept.

    Raises:
        CheckpointError: it cannot be read.
        OutputError: the copy cannot be written.
    """
    if target.is_file() and (record := record_of(reader)) == record_of(LocalReader(target)):
        return record
    with naming(target.name, OutputError):
        make_folder(target.parent)
    copy = WriteFile(partial_path(target), reader.nbytes, direct=False)
    record = _read_through(reader, copy)
    copy.sync()
    publish(copy.path, target)
    return record


def _read_through(reader: Reader, copy: WriteFile | None = None) -> FileRecord:
    digest = xxhash.xxh3_128()
    buffer = block_buffer(min(reader.nbytes, _PIECE_NBYTES))
    for offset in range(0, reader.nbytes, _PIECE_NBYTES):
        data = reader.read(buffer, offset, min(_PIECE_NBYTES, reader.nbytes - offset))
        digest.update(data.data)
        if copy is not None:
            copy.write(data, offset)
    return FileRecord(reader.nbytes, digest.hexdigest())
