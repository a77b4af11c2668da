"""What the library and the command line do unless told otherwise."""

from __future__ import annotations

MAX_SHARD_SIZE = "5GB"
MAX_SHARD_NBYTES = 5_000_000_000
"""No output file is larger, unless a single tensor is; the usual size on the Hub."""

THREADS = 8
"""Readers and writers. A disk is busy with four, but a few more keep reads and writes mixed, where
four are often all reading or all writing: 8.1 s against 9.2 s for 4 GB on 2 cores."""
