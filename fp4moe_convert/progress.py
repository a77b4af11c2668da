"""How a run is carried out, and how it reports. The bytes of its result do not depend on either."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypedDict

from . import defaults


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one phase of a run has come."""

    phase: str
    """"checking" (finished shards of an earlier run), "converting", "restoring", "verifying" or
    "uploading"."""
    item: str
    """What is being worked on: an expert layer, a tensor, a shard or another file."""
    done: int
    """Bytes, of ``total``."""
    total: int


OnProgress = Callable[[Progress], None]
"""Called from any thread, one call at a time."""

OnBytes = Callable[[str, int], None]
"""Told an item and how many of its bytes have been done, from any thread."""


OnNote = Callable[[str], None]
"""Told something worth knowing, in words."""


class Running(TypedDict, total=False):
    """The keywords of `conversion.convert` that the functions around it take as well."""

    direct_io: bool
    threads: int
    on_progress: OnProgress | None
    on_note: OnNote | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The same, as the package hands them on."""

    direct_io: bool = True
    threads: int = defaults.THREADS
    on_progress: OnProgress | None = None
    on_note: OnNote | None = None


def tell(notes: Iterable[str], on_note: OnNote | None) -> None:
    """Hand notes on, if somebody listens."""
    if on_note is not None:
        for note in notes:
            on_note(note)


def track(phase: str, total: int, on_progress: OnProgress | None) -> OnBytes:
    """Sum up bytes and report them as `Progress`."""
    done = 0
    lock = threading.Lock()

    def on_bytes(item: str, nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if on_progress is not None:
                on_progress(Progress(phase, item, done, total))

    return on_bytes
