"""Threads that take jobs in order and stop together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Job = TypeVar("Job")

USUAL_NBYTES = 32 * 2**20
"""A worker with moves of `layouts.base.MOVE_NBYTES` takes less than this."""
MAX_NBYTES = 256 * 2**20
"""The most that workers with larger moves take together."""


def crew_size(threads: int, nbytes: int) -> int:
    """How many workers that take ``nbytes`` each may stand in for ``threads`` usual ones."""
    return threads if nbytes <= USUAL_NBYTES else max(1, min(threads, MAX_NBYTES // nbytes))


class _Stopped(Exception):  # noqa: N818 (not an error: another thread has already failed)
    """Ends a thread that waits for one that will not come."""


class Crew:
    """Runs jobs on a few threads. The first failure, or a KeyboardInterrupt, stops them all.

    Jobs are handed out in order, one at a time, so a job may wait for an earlier one: that one is
    done, or is in the hands of a thread that waits for nothing later.
    """

    def __init__(self, size: int, on_stop: Callable[[], None] | None = None) -> None:
        """
        Args:
            size: number of threads.
            on_stop: called, perhaps more than once, when they stop together: ends what jobs wait
                for.
        """
        self._size = size
        self._on_stop = on_stop
        self._stopped = False
        self._changed = threading.Condition()

    def run(self, jobs: Iterator[Job], make_worker: Callable[[], Callable[[Job], None]]) -> None:
        """Do all jobs.

        Args:
            jobs: advanced by one thread at a time.
            make_worker: called once on each thread, so that a worker can own its scratch memory.

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

        # Events rather than Thread.join: before Python 3.13 a join that Ctrl-C interrupts marks
        # its thread as ended.
        ends: list[threading.Event] = []
        threads: list[threading.Thread] = []
        try:
            for n in range(self._size):
                ended = threading.Event()
                threads.append(threading.Thread(target=loop, args=(ended,), name=f"crew-{n}"))
                threads[-1].start()
                ends.append(ended)
            for ended in ends:
                ended.wait()
        finally:
            if any(not ended.is_set() for ended in ends):
                self._stop()
                for ended in ends:
                    ended.wait()
        for thread in threads:
            # It may still hold what its jobs have opened.
            thread.join()
        if failures:
            raise failures[0]

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._on_stop is not None:
            self._on_stop()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait, inside a job, for something that another job does and then `announce`\\ s."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or condition())
            if self._stopped:
                raise _Stopped

    def announce(self) -> None:
        """Let waiting jobs look again."""
        with self._changed:
            self._changed.notify_all()
