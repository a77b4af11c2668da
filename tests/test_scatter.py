"""Threads that fill shards together: in order, to the end, and what is told when one fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from support.folders import contents
from support.processes import our_threads
from support.specs import SMALL_SHARD_NBYTES

from fp4moe_convert import convert, preview, readback, verify
from fp4moe_convert.execution import scatter
from fp4moe_convert.execution.checksum import Checksum
from fp4moe_convert.execution.crew import Crew, crew_size
from fp4moe_convert.layouts.base import MOVE_NBYTES

SIZES = pytest.mark.parametrize("size", [1, 2, 7])


@SIZES
def test_every_job_is_done_once_and_each_thread_has_a_worker_of_its_own(size: int) -> None:
    done: list[tuple[int, int]] = []
    workers: list[int] = []

    def make_worker() -> Callable[[int], None]:
        workers.append(threading.get_ident())
        return lambda job: done.append((job, threading.get_ident()))

    Crew(size).run(iter(range(100)), make_worker)
    assert sorted(job for job, _ in done) == list(range(100))
    assert len(workers) == size
    assert {thread for _, thread in done} <= set(workers)


@SIZES
def test_threads_have_let_go_of_their_workers(size: int) -> None:
    """A file that a worker has open takes room after it has been deleted."""
    closed = []

    class Slow:
        def __del__(self) -> None:
            time.sleep(0.05)
            closed.append(self)

    def make_worker() -> Callable[[int], None]:
        own = Slow()
        return lambda _job, _own=own: None  # type: ignore[misc]

    Crew(size).run(iter(range(100)), make_worker)
    assert len(closed) == size


@SIZES
def test_no_job_is_no_work(size: int) -> None:
    def fail(_: object) -> None:
        pytest.fail("there is no job")

    Crew(size).run(iter([]), lambda: fail)


def test_large_moves_take_no_more_memory_than_they_may() -> None:
    """Llama 4 Scout's have 40 MiB, and a worker holds what they read and what they write."""
    assert crew_size(6, 2 * MOVE_NBYTES + 2**16) == 6
    assert crew_size(50, 2 * MOVE_NBYTES + 2**16) == 50
    assert crew_size(6, 80 * 2**20) == 3
    assert crew_size(2, 80 * 2**20) == 2
    assert crew_size(6, 2**30) == 1


def test_the_first_failure_is_the_one_that_is_told() -> None:
    """Others may be its consequences."""
    both = threading.Barrier(2)

    def work(job: str) -> None:
        both.wait()
        if job == "first":
            raise ValueError(job)
        while not crew._stopped:
            time.sleep(0.001)
        raise ValueError(job)

    for jobs in (["first", "second"], ["second", "first"]):
        crew = Crew(2)
        with pytest.raises(ValueError, match=r"^first$"):
            crew.run(iter(jobs), lambda: work)


@SIZES
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_after_a_failure_no_job_is_begun(size: int, kind: type[BaseException]) -> None:
    begun: list[int] = []

    def work(job: int) -> None:
        begun.append(job)
        if job == 0:
            raise kind
        time.sleep(0.01)

    with pytest.raises(kind):
        Crew(size).run(iter(range(10_000)), lambda: work)
    assert len(begun) < 1000
    assert our_threads() == []


def test_a_job_that_waits_for_one_that_failed_waits_no_longer() -> None:
    crew = Crew(2)
    both = threading.Barrier(2)

    def work(job: int) -> None:
        both.wait()
        if job == 0:
            time.sleep(0.05)
            raise ValueError
        crew.wait_for(lambda: False)

    with pytest.raises(ValueError, match=r"^$"):
        crew.run(iter(range(2)), lambda: work)


def test_a_checksum_is_of_the_pieces_in_order_whoever_has_them_first() -> None:
    crew = Crew(4)
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    checksum = Checksum(crew)

    def work(start: int) -> None:
        time.sleep(0.002 * (start // 10 % 4 == 0))  # every fourth piece comes late
        checksum.update(start, data[start : start + 10])

    crew.run(iter(range(0, 1000, 10)), lambda: work)
    assert checksum.hexdigest() == xxhash.xxh3_128_hexdigest(data.tobytes())


def test_workers_are_as_many_as_what_they_hold_allows(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker holds a move's sources and its output, or, on the way back, its output twice."""
    plan = preview(source).work.plan
    moves = [move for shard in plan.shards for move in shard.moves]
    asked: list[int] = []
    names: set[str] = set()

    def one(threads: int, nbytes: int) -> int:
        assert threads == 5
        asked.append(nbytes)
        return 1

    monkeypatch.setattr(scatter, "crew_size", one)
    monkeypatch.setattr(readback, "crew_size", one)
    convert(
        source,
        tmp_path / "out",
        threads=5,
        on_progress=lambda _: names.add(threading.current_thread().name),
    )
    verify(tmp_path / "out", source, threads=5)
    assert names == {"crew-0"}
    largest = max(move.nbytes for move in moves)
    copied = max(move.nbytes for move in moves if move.arrangement is None)
    assert copied == largest
    assert 0 < asked[0] - 2 * largest < 2**14  # blocks around them
    assert asked[1:] == [2 * largest]


def test_moves_that_end_at_the_same_time_are_all_counted(
    source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last move of a shard finishes it. Counting down takes a lock: here there is time for
    another thread between reading the count and writing it."""

    class SlowlyCounted(scatter._OpenShard):
        @property
        def moves_left(self) -> Any:
            left = self._left
            time.sleep(0.001)
            return left

        @moves_left.setter
        def moves_left(self, left: int) -> None:
            self._left = left

    monkeypatch.setattr(scatter, "_OpenShard", SlowlyCounted)
    convert(source, tmp_path / "out", max_shard_nbytes=SMALL_SHARD_NBYTES, threads=4)
    assert contents(tmp_path / "out") == expected
