"""Staged copies on a GPU: the same bytes as plain copies, complete, in the engine's order."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fp4moe_convert.serving import fast_copy
from fp4moe_convert.serving.fast_copy import Copier, CudaBus

pytestmark = [pytest.mark.flashinfer, pytest.mark.gpu]

GPU = "cuda:0"


@pytest.fixture
def copier() -> Iterator[Copier]:
    copier = Copier()
    yield copier
    copier.give_back()


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def staged(source: torch.Tensor, copier: Copier) -> torch.Tensor:
    target = torch.full(source.shape, 0x5A, dtype=torch.uint8, device=GPU)
    copier.copy([(target, source)])
    return target


def test_shares_of_a_file(tmp_path: Path, copier: Copier) -> None:
    save_file({"x": random_bytes(9, 400, 70_000)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        mapped = file.get_tensor("x")
    for source in (mapped, mapped[:, 100:201], mapped[:, :, 5:40_000], mapped[3:4, :, ::2]):
        assert torch.equal(staged(source, copier), source.cuda())


def test_many_random_ones_on_threads(copier: Copier) -> None:
    """What is copied comes from memory that is written again as soon as the call has returned."""
    failures = []

    def load(seed: int) -> None:
        chance = random.Random(seed)
        source = torch.empty(70 << 20, dtype=torch.uint8)
        for _ in range(15):
            part = source[: chance.randrange(1 << 20, source.numel())]
            part.random_()
            expected = part.clone()
            target = staged(part, copier)
            part.zero_()
            # Read on another stream, with no word of the copier's.
            with torch.cuda.stream(torch.cuda.Stream()):
                found = target.cpu()
            if not torch.equal(found, expected):
                failures.append(seed)
            if chance.random() < 0.2:
                copier.give_back()

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_engines_own_work_comes_first(copier: Copier) -> None:
    source = random_bytes(64 << 20)
    target = torch.empty(64 << 20, dtype=torch.uint8, device=GPU)
    for _ in range(5):
        torch.cuda._sleep(200_000_000)  # 0.1 s, and then
        target.fill_(0)
        copier.copy([(target, source)])
        assert torch.equal(target.cpu(), source)


def test_a_target_with_room_for_more(copier: Copier) -> None:
    source = random_bytes(100, 300_000)
    target = torch.full((100, 300_100), 9, dtype=torch.uint8, device=GPU)
    copier.copy([(target[:, :300_000], source)])
    assert torch.equal(target[:, :300_000].cpu(), source)
    assert (target[:, 300_000:] == 9).all()


def test_a_refused_pin_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = CudaBus.pin

    def pin_twice(self: CudaBus, memory: torch.Tensor) -> None:
        pin(self, memory)
        try:
            pin(self, memory)  # an error of CUDA's
        finally:
            self.unpin(memory)

    monkeypatch.setattr(CudaBus, "pin", pin_twice)
    source = random_bytes(5 << 20)
    assert torch.equal(staged(source, Copier()).cpu(), source)
    assert torch.ones(5, device=GPU).sum().item() == 5


def test_pinned_memory_goes_back(copier: Copier) -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096

    source = random_bytes(256 << 20)
    staged(source, copier)
    copier.give_back()
    before = resident()
    staged(source, copier)
    held = resident()
    copier.give_back()
    nbytes = fast_copy.CHUNKS * fast_copy.CHUNK_NBYTES
    assert 0.9 * nbytes < held - before < 1.5 * nbytes
    assert resident() - before < 0.1 * nbytes


def test_no_more_memory_of_the_gpu(copier: Copier) -> None:
    source = random_bytes(512 << 20)
    target = torch.empty_like(source, device=GPU)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    copier.copy([(target, source)])
    assert torch.cuda.max_memory_reserved() == before
    assert torch.equal(target.cpu(), source)
