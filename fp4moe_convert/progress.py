"""How a run tells its caller how far it has come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run."""

    phase: str
    """"checking" (finished shards of an earlier run), "converting" or "verifying"."""
    tensor: str
    """The output tensor in work."""
    done: int
    """Bytes, of ``total``."""
    total: int


OnProgress = Callable[[Progress], None]
"""Called from any thread, one call at a time."""

OnMove = Callable[[str, int], None]
"""Told the tensor and the number of bytes after each move, from any thread."""


def track(phase: str, total: int, on_progress: OnProgress | None) -> OnMove:
    """Adds moves up and passes them on as `Progress`."""
    done = 0
    lock = threading.Lock()

    def on_move(tensor: str, nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if on_progress is not None:
                on_progress(Progress(phase, tensor, done, total))

    return on_move
