"""Threads that take jobs in order and stop together, and checksums they compute as they go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import xxhash

from .layouts import Bytes

Job = TypeVar("Job")


STOP_SECONDS = 1.2
"""How long an interrupted run waits for its threads, which may be waiting for a disk. Less than
`foreground.PATIENCE_SECONDS`: afterwards it still has a line to print."""


class _Stopped(Exception):  # noqa: N818 (not an error: another thread has already failed)
    """Ends a thread that waits for one that will not come."""


class Crew:
    """Runs jobs on a few threads. The first failure, or Ctrl-C, stops them all.

    Jobs are handed out in order, one at a time, so a job may wait for an earlier one: that one is
    done or in the hands of a thread that waits for nothing later.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._stopped = False
        self._changed = threading.Condition()

    def run(self, jobs: Iterator[Job], make_worker: Callable[[], Callable[[Job], None]]) -> None:
        """Do all jobs.

        Args:
            jobs: advanced by one thread at a time.
            make_worker: called once on each thread, so that a worker can own its scratch.

        Raises:
            BaseException: what the first job to fail raised, once all threads have ended.
        """
        taking = threading.Lock()
        failures: list[BaseException] = []

        def loop(ended: threading.Event) -> None:
            try:
                work = make_worker()
                while not self._stopped:
                    with taking:
                        job = next(jobs, None)
                    if job is None:
                        return
                    work(job)
            except _Stopped:
                pass
            except BaseException as failure:
                failures.append(failure)
                self._stop()
            finally:
                ended.set()

        # Not Thread.join: before Python 3.13, one that Ctrl-C interrupts takes its thread for
        # ended from then on.
        ends: list[threading.Event] = []
        try:
            for n in range(self._size):
                ended = threading.Event()
                threading.Thread(target=loop, args=(ended,), name=f"crew-{n}").start()
                ends.append(ended)
            for ended in ends:
                ended.wait()
        except BaseException:
            # A thread may be waiting for a slow disk; Ctrl-C should not.
            self._stop()
            deadline = time.monotonic() + STOP_SECONDS
            for ended in ends:
                ended.wait(max(0.0, deadline - time.monotonic()))
            raise
        if failures:
            raise failures[0]

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait, inside a job, for something another job does and then `announce`\\ s."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or condition())
            if self._stopped:
                raise _Stopped

    def announce(self) -> None:
        """Let waiting jobs look again."""
        with self._changed:
            self._changed.notify_all()


class Checksum:
    """XXH3-128 of bytes that arrive from several threads, each piece in its turn.

    The digest is that of the whole in order, so that any tool can recompute it. Waiting for a
    turn costs little: pieces are handed out in order, and hashing runs at ten times disk speed.
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
