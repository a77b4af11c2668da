"""Memory that direct I/O can use.

Direct I/O needs memory, file offset and length in whole blocks. A range of a file is read by
reading the blocks around it, so buffers are larger than the range and start on a block.
"""

from __future__ import annotations

import mmap
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..format.sizes import round_up

Bytes: TypeAlias = npt.NDArray[np.uint8]

BLOCK = 4096
"""A multiple of every logical block size in use. A device that needs more gets buffered I/O."""


def aligned_buffer(nbytes: int) -> Bytes:
    """[nbytes] uint8 that starts on a block; anonymous memory, resident once touched."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]


def spanned_nbytes(nbytes: int) -> int:
    """Size of the whole blocks that can hold a range of ``nbytes``, wherever it begins."""
    return round_up(nbytes, BLOCK) + BLOCK


def block_buffer(nbytes: int) -> Bytes:
    """A buffer for a range of ``nbytes`` at any file offset, to read it or to write it."""
    return aligned_buffer(spanned_nbytes(nbytes))


def view_at(buffer: Bytes, nbytes: int, offset: int) -> Bytes:
    """[nbytes] of a `block_buffer`, placed relative to a block as the file's ``offset`` is."""
    phase = offset % BLOCK
    return buffer[phase : phase + nbytes]
