"""A bus to a GPU that is slower and less obliging than a real one.

It carries out nothing before it must, or at moments of its own choosing, on a thread of its own. A
chunk that is used again too early, a call that returns too early, or a copy that does not wait for
the engine's own work leaves other bytes than torch's plain copy does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch


class Stream:
    """Does what it is asked, in order, on a thread of its own."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self.ask = self._jobs.put
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._jobs.get()()

    def synchronize(self) -> None:
        done = threading.Event()
        self.ask(done.set)
        done.wait()


class SlowBus:
    """Stands in for a GPU's: memory of the host is its device."""

    def __init__(self, *, hesitates: Callable[[], float] = lambda: 0.0) -> None:
        self.pinned: list[torch.Tensor] = []
        self.sent = 0
        self._hesitates = hesitates
        self.engines = Stream()
        self._own = Stream()

    def pin(self, memory: torch.Tensor) -> None:
        self.pinned.append(memory)

    def unpin(self, memory: torch.Tensor) -> None:
        [at] = [n for n, each in enumerate(self.pinned) if each is memory]
        del self.pinned[at]
        memory.fill_(0xEE)  # whatever still reads it

    def follow(self) -> None:
        asked = threading.Event()
        self.engines.ask(asked.set)
        self._own.ask(asked.wait)

    def send(self, target: torch.Tensor, chunk: torch.Tensor) -> Any:
        assert any(
            memory.data_ptr() <= chunk.data_ptr() < memory.data_ptr() + memory.nbytes
            for memory in self.pinned
        )
        if target.shape != chunk.shape:
            raise RuntimeError(f"{target.shape} is not {chunk.shape}")
        self.sent += 1
        done = threading.Event()

        def carry_out() -> None:
            time.sleep(self._hesitates())
            target.copy_(chunk)
            done.set()

        self._own.ask(carry_out)
        done.synchronize = done.wait  # type: ignore[attr-defined]
        return done

    def synchronize(self) -> None:
        self._own.synchronize()
