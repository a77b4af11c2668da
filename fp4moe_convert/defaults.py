"""What the library and the command line do unless told otherwise."""

from __future__ import annotations

MAX_SHARD_SIZE = "5GB"
MAX_SHARD_NBYTES = 5_000_000_000
"""No output file is larger, unless a single tensor is; the usual size on the Hub."""

THREADS = 6
"""Readers and writers. Four are often all reading or all writing; a few more keep the two mixed.
Six were as fast as eight on 2 cores (10.6 and 12.1 s for 6.8 GB, medians of 4 rounds), and take
33 MB less."""

CONNECTIONS = 16
"""Requests under way to a source on another machine."""
