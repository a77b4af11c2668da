"""Checksums of tensors whose bytes arrive from several threads."""

from __future__ import annotations

import xxhash

from ..storage.buffers import Bytes
from .crew import Crew


class Checksum:
    """XXH3-128 of one tensor, each piece added in its turn.

    The digest is that of the whole in order, so that any tool can recompute it. Waiting for a turn
    costs little: pieces are handed out in order, and hashing runs at ten times disk speed.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._hash = xxhash.xxh3_128()
        self._position = 0

    def update(self, offset: int, data: Bytes) -> None:
        """Add the piece that starts at ``offset``, once all before it have been added."""
        self._crew.wait_for(lambda: self._position == offset)
        self._hash.update(data.data)
        self._position += data.size
        self._crew.announce()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
