"""Staged copies, over a bus that is slower and less obliging than a GPU's (`support.slow_bus`).

`test_fast_copy_on_gpu.py` tries the same on a GPU.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slow_bus import SlowBus

from fp4moe_convert.errors import ServingError
from fp4moe_convert.serving import fast_copy, slices
from fp4moe_convert.serving.fast_copy import Copier

pytestmark = pytest.mark.flashinfer


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_copy, "CHUNK_NBYTES", 4096)
    monkeypatch.setattr(fast_copy, "MIN_NBYTES", 1)
    monkeypatch.delenv(fast_copy.THREADS_VARIABLE, raising=False)


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_nothing_is_used_or_returned_too_early() -> None:
    moody = random.Random(1)
    bus = SlowBus(hesitates=lambda: moody.choice([0, 0, 0.003]))
    copier = Copier(lambda _: bus)
    for _ in range(5):
        source, target = random_bytes(40, 1000), torch.zeros(40, 1000, dtype=torch.uint8)
        copier.copy([(target, source)])
        assert torch.equal(target, source)
    assert bus.sent == 5 * 10


def test_chunks_are_filled_while_others_are_fetched() -> None:
    class LateBus(SlowBus):
        """Fetches nothing until it has been asked for as many chunks as there are."""

        def send(self, target: torch.Tensor, chunk: torch.Tensor) -> Any:
            sent = super().send(target, chunk)
            if self.sent == fast_copy.CHUNKS:
                all_asked.set()
            return sent

    all_asked = threading.Event()
    in_time: list[bool] = []
    bus = LateBus()
    bus.engines.ask(lambda: in_time.append(all_asked.wait(5)))  # the bus waits for the engine
    source, target = random_bytes(30_000), torch.zeros(30_000, dtype=torch.uint8)
    Copier(lambda _: bus).copy([(target, source)])
    assert torch.equal(target, source)
    assert in_time == [True]


BUS = SlowBus()


@st.composite
def views(draw: st.DrawFn) -> Any:
    """A share of a tensor: cut along one axis, as tensor parallelism does, and a target that may
    have room for more."""
    shape = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[axis] - 1))
    length = draw(st.integers(1, shape[axis] - start))
    return shape, axis, start, length, draw(st.integers(0, 3)), draw(st.integers(1, 700))


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(views())
def test_any_share_arrives_and_nothing_beside_it(case: Any) -> None:
    shape, axis, start, length, room, chunk = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_copy, "CHUNK_NBYTES", chunk)
        source = random_bytes(*shape).narrow(axis, start, length)
        wide = list(source.shape)
        wide[axis] += room
        staged, plain = (torch.full(wide, 7, dtype=torch.uint8) for _ in range(2))
        Copier(lambda _: BUS).copy([(staged.narrow(axis, 0, length), source)])
        plain.narrow(axis, 0, length).copy_(source)
        assert torch.equal(staged, plain)


def test_wide_types_and_many_copies() -> None:
    bus = SlowBus()
    copies = [
        (torch.zeros(n, 300, dtype=dtype), random_bytes(n, 300 * dtype.itemsize).view(dtype))
        for n in (1, 7, 90)
        for dtype in (torch.int64, torch.float8_e4m3fn, torch.uint8)
    ]
    Copier(lambda _: bus).copy(copies)
    for target, source in copies:
        assert torch.equal(target.view(torch.uint8), source.view(torch.uint8))


def test_the_engines_own_work_comes_first() -> None:
    bus = SlowBus()
    source, target = random_bytes(9000), torch.empty(9000, dtype=torch.uint8)
    bus.engines.ask(lambda: (time.sleep(0.05), target.zero_()))
    Copier(lambda _: bus).copy([(target, source)])
    bus.engines.synchronize()
    assert torch.equal(target, source)


def test_a_failure_leaves_nothing_under_way() -> None:
    bus = SlowBus(hesitates=lambda: 0.01)
    copier = Copier(lambda _: bus)
    target = torch.zeros(20_000, dtype=torch.uint8)
    other = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError):  # of other shapes
        copier.copy([(target, random_bytes(20_000)), (other, random_bytes(2, 4))])
    before = target.clone()
    time.sleep(0.1)
    assert torch.equal(target, before)
    source = random_bytes(20_000)
    copier.copy([(target, source)])
    assert torch.equal(target, source)


def test_threads_take_turns() -> None:
    bus = SlowBus(hesitates=lambda: random.random() / 1000)
    copier = Copier(lambda _: bus)
    results = []

    def load() -> None:
        for _ in range(5):
            source, target = random_bytes(12_000), torch.zeros(12_000, dtype=torch.uint8)
            copier.copy([(target, source)])
            results.append(torch.equal(target, source))
            copier.give_back()

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20
    assert not bus.pinned


def test_pinned_memory_is_bounded_and_given_back() -> None:
    bus = SlowBus()
    copier = Copier(lambda _: bus)
    for _ in range(3):
        source, target = random_bytes(90_000), torch.zeros(90_000, dtype=torch.uint8)
        copier.copy([(target, source)])
        assert [memory.nbytes for memory in bus.pinned] == [4 * 4096]
    copier.give_back()
    assert not bus.pinned
    copier.give_back()
    copier.copy([(target, source)])
    assert torch.equal(target, source)


def test_the_whole_takes_less_than_half_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert fast_copy.CHUNKS * fast_copy.CHUNK_NBYTES <= 512_000_000


def copy_twice(bus: Any) -> None:
    copier = Copier(lambda _: bus)
    source, target = random_bytes(9000), torch.zeros(9000, dtype=torch.uint8)
    copier.copy([(target, source)])
    copier.copy([(target, source)])
    assert torch.equal(target, source)


def test_where_memory_cannot_be_pinned(caplog: Any) -> None:
    class Forbidden(SlowBus):
        def pin(self, _memory: torch.Tensor) -> None:
            raise RuntimeError("CUDA error: operation not permitted\nCUDA kernel errors ...")

    bus = Forbidden()
    with caplog.at_level(logging.INFO):
        copy_twice(bus)
    assert bus.sent == 0
    reason = "memory cannot be pinned (CUDA error: operation not permitted)"
    assert caplog.messages == [f"fp4moe: experts are loaded by plain copies: {reason}"]


def test_where_there_is_no_memory_to_pin(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = mock.Mock(side_effect=OSError(errno.ENOMEM, "Cannot allocate memory"))
    monkeypatch.setattr(fast_copy.mmap, "mmap", refused)
    with caplog.at_level(logging.INFO):
        copy_twice(SlowBus())
    reason = f"memory cannot be pinned ([Errno {errno.ENOMEM}] Cannot allocate memory)"
    assert caplog.messages == [f"fp4moe: experts are loaded by plain copies: {reason}"]


def test_copies_that_are_only_counted(caplog: Any) -> None:
    """As vLLM does in a reload, before it makes the parameters."""
    target = torch.zeros(9000, dtype=torch.uint8, device="meta")
    with caplog.at_level(logging.INFO):
        Copier().copy([(target, random_bytes(9000))])
    assert caplog.messages == []


def test_switched_off(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fast_copy.THREADS_VARIABLE, "0")
    bus = SlowBus()
    with caplog.at_level(logging.INFO):
        copy_twice(bus)
    assert (bus.sent, bus.pinned) == (0, [])
    assert caplog.messages == [
        "fp4moe: experts are loaded by plain copies: FP4MOE_LOAD_THREADS is 0"
    ]


def test_without_a_gpu(caplog: Any) -> None:
    source, target = random_bytes(9000), torch.zeros(9000, dtype=torch.uint8)
    with caplog.at_level(logging.INFO):
        Copier().copy([(target, source)])
    assert torch.equal(target, source)
    assert caplog.messages == ["fp4moe: experts are loaded by plain copies: they go to cpu"]


def test_from_another_device() -> None:
    """Loaders that bring tensors to the GPU themselves. The meta device stands in for it."""
    bus = SlowBus()
    target = torch.zeros(9000, dtype=torch.uint8, device="meta")
    Copier(lambda _: bus).copy([(target, torch.zeros_like(target))])
    assert bus.sent == 0


def test_small_copies_go_straight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_copy, "MIN_NBYTES", 1000)
    bus = SlowBus()
    source, target = random_bytes(999), torch.zeros(999, dtype=torch.uint8)
    Copier(lambda _: bus).copy([(target, source)])
    assert torch.equal(target, source)
    assert bus.sent == 0


@pytest.mark.parametrize("wrong", ["four", "-1", "1.5", "²", "1025", "100000"])
def test_a_wrong_number_of_threads(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fast_copy.THREADS_VARIABLE, wrong)
    target = torch.zeros(9000, dtype=torch.uint8)
    with pytest.raises(ServingError, match="not a number of threads up to 1024; unset FP4MOE_LOAD"):
        Copier().copy([(target, target)])


@pytest.mark.parametrize(
    ("cores", "world", "visible", "local", "expected"),
    [
        (16, 1, 1, None, 16),
        (64, 1, 8, None, 16),
        (16, 8, 8, None, 2),
        (96, 8, 8, None, 12),
        (16, 16, 8, None, 2),  # two hosts
        (16, 8, 1, None, 2),  # each rank sees its own GPU
        (16, 16, 1, None, 2),
        (16, 8, 8, "4", 4),
        (4, 8, 8, None, 1),
    ],
)
def test_threads_of_a_rank(
    cores: int,
    world: int,
    visible: int,
    local: str | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(fast_copy, "CPU_LIMIT", Path("/none"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    else:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert fast_copy.load_threads() == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000\n", 12),
        ("400000 100000\n", 4),
        ("450000 100000\n", 4),
        ("50000 100000\n", 1),
        ("9900000 100000\n", 12),
        ("", 12),
        (None, 12),
    ],
)
def test_threads_in_a_container(
    limit: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(fast_copy, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert fast_copy.load_threads() == expected


def test_torchs_threads_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fast_copy.THREADS_VARIABLE, "3")
    seen = []

    class Counting(SlowBus):
        def send(self, target: torch.Tensor, chunk: torch.Tensor) -> Any:
            seen.append(torch.get_num_threads())
            return super().send(target, chunk)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        copy_twice(Counting())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {3}


def test_a_default_device_does_not_matter() -> None:
    """Engines set one while they build."""
    bus = SlowBus()
    source, target = random_bytes(9000), torch.zeros(9000, dtype=torch.uint8)
    with torch.device("meta"):
        Copier(lambda _: bus).copy([(target, source)])
    assert torch.equal(target, source)


def test_shares_of_a_layer_go_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = SlowBus()
    monkeypatch.setattr(slices, "COPIER", Copier(lambda _: bus))
    file = random_bytes(4, 64, 128)
    target = torch.empty(2, 32, 128, dtype=torch.uint8)
    slices.copy_share("w13_weight", file, target, experts=[3, 1], part=range(16, 32), gated=True)
    assert torch.equal(target, file[[3, 1], 32:])
    assert bus.sent == 2
