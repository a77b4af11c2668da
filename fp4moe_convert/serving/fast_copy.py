"""Copies from host memory to a GPU at the speed of the bus.

A plain copy from pageable memory, as that of a mapped file is, goes through a small buffer of the
driver's, filled by one thread: 8 to 10 GB/s. Here torch's own threads fill chunks of pinned memory,
and the GPU fetches one chunk while the next is filled. One Python thread does it all, because many
would wait for each other at the interpreter's lock (docs/performance.md has the figures).
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from .checks import refusal

logger = logging.getLogger(__name__)

Copy: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""Target and source, of the same shape and dtype."""

CHUNK_NBYTES = 16 << 20
CHUNKS = 4
"""Larger and more ones are slower: together they should stay in a processor's cache."""
MIN_NBYTES = 1 << 20
"""Less is not worth the detour."""

THREADS_VARIABLE = "FP4MOE_LOAD_THREADS"
MAX_THREADS = 16
"""Unless `THREADS_VARIABLE` asks for more."""
MAX_THREADS_WANTED = 1024
"""OpenMP crashes when it is asked for many thousands."""
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time in a period, and the period."""
GPUS_OF_A_HOST = 8
"""At most this many ranks are taken to share a host, where a rank sees only its own GPU."""


def copy_plainly(copies: Iterable[Copy]) -> None:
    """Carry out copies as torch does it."""
    for target, source in copies:
        target.copy_(source)


class Sent(Protocol):
    """A copy that has been asked for."""

    def synchronize(self) -> None:
        """Wait until it is done."""


class Bus(Protocol):
    """Takes chunks to one GPU, in order, while the caller goes on."""

    def pin(self, memory: torch.Tensor) -> None:
        """Let the GPU fetch from memory of the host.

        Raises:
            RuntimeError: the system does not allow it.
        """

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`."""

    def follow(self) -> None:
        """Let later copies wait for what the GPU has been asked so far on the current stream."""

    def send(self, target: torch.Tensor, chunk: torch.Tensor) -> Sent:
        """Ask for a copy out of pinned memory."""

    def synchronize(self) -> None:
        """Wait for all copies."""


class CudaBus:
    """A stream of its own on an NVIDIA GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def pin(self, memory: torch.Tensor) -> None:
        # Not torch's pinned memory: that goes back to a cache of torch's, not to the system.
        runtime = torch.cuda.cudart()
        try:
            torch.cuda.check_error(
                int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
            )
        except RuntimeError:
            # CUDA would report it once more, as that of the next kernel launched.
            with suppress(RuntimeError):
                torch.zeros(1, device=self._device)
            raise

    def unpin(self, memory: torch.Tensor) -> None:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())))

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def send(self, target: torch.Tensor, chunk: torch.Tensor) -> Sent:
        with torch.cuda.stream(self._stream):
            target.copy_(chunk, non_blocking=True)
            sent: Sent = self._stream.record_event()
        return sent

    def synchronize(self) -> None:
        self._stream.synchronize()


def cuda_bus(device: torch.device) -> Bus | None:
    """The bus to a device; None if it is no GPU."""
    return CudaBus(device) if device.type == "cuda" else None


class _Ring:
    """Pinned memory in chunks, used in turn, on the way to one GPU."""

    def __init__(self, bus: Bus) -> None:
        """Raises RuntimeError, or OSError: memory cannot be pinned, or there is none."""
        memory = mmap.mmap(-1, CHUNKS * CHUNK_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)  # pinned in half the time
        self._bus = bus
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._chunks = self._memory.split(CHUNK_NBYTES)
        self._sent: list[Sent | None] = [None] * CHUNKS
        self._next = 0
        bus.pin(self._memory)

    def copy(self, copies: Iterable[Copy]) -> None:
        """Carry out copies; all are complete when it returns or raises."""
        self._bus.follow()
        try:
            for copy in copies:
                for target, source in _pieces(*copy):
                    self._copy_piece(target, source)
        finally:
            self._bus.synchronize()

    def _copy_piece(self, target: torch.Tensor, source: torch.Tensor) -> None:
        number, self._next = self._next, (self._next + 1) % CHUNKS
        if (sent := self._sent[number]) is not None:
            sent.synchronize()
        chunk = self._chunks[number][: source.nbytes].view(source.dtype).view(source.shape)
        chunk.copy_(source)
        self._sent[number] = self._bus.send(target, chunk)

    def close(self) -> None:
        self._bus.unpin(self._memory)


def _pieces(target: torch.Tensor, source: torch.Tensor) -> Iterator[Copy]:
    """A copy in parts of at most a chunk, cut along the first axes."""
    if source.nbytes <= CHUNK_NBYTES:
        yield target, source
        return
    axis = next(axis for axis, extent in enumerate(source.shape) if extent > 1)
    step = max(1, CHUNK_NBYTES * source.shape[axis] // source.nbytes)
    for piece in zip(target.split(step, axis), source.split(step, axis), strict=True):
        yield from _pieces(*piece)


class Copier:
    """Copies tensors to wherever their targets are, one call at a time."""

    def __init__(self, bus_to: Callable[[torch.device], Bus | None] = cuda_bus) -> None:
        self._bus_to = bus_to
        self._rings: dict[torch.device, _Ring] = {}
        self._lock = threading.Lock()
        self._said: set[str] = set()

    def copy(self, copies: Sequence[Copy]) -> None:
        """Carry out copies. When this returns or raises, none is under way any more.

        Args:
            copies: all targets on one device, all sources on one.

        Raises:
            ServingError: `THREADS_VARIABLE` is not a number of threads.
        """
        threads = load_threads()
        if sum(source.nbytes for _, source in copies) < MIN_NBYTES or copies[0][0].is_meta:
            # On the meta device vLLM counts what a load will fill.
            copy_plainly(copies)
            return
        with self._lock:
            ring = self._ring(*copies[0], threads)
            if isinstance(ring, str):
                self._say(f"experts are loaded by plain copies: {ring}")
                copy_plainly(copies)
                return
            with _intra_op_threads(threads):
                ring.copy(copies)

    def _ring(self, target: torch.Tensor, source: torch.Tensor, threads: int) -> _Ring | str:
        """What copies go through; or why they have to be plain."""
        if source.device.type != "cpu":
            return f"they come on {source.device}"
        if not threads:
            return f"{THREADS_VARIABLE} is 0"
        if ring := self._rings.get(target.device):
            return ring
        if (bus := self._bus_to(target.device)) is None:
            return f"they go to {target.device}"
        try:
            ring = self._rings[target.device] = _Ring(bus)
        except (RuntimeError, OSError) as error:
            return f"memory cannot be pinned ({str(error).splitlines()[0]})"
        self._say(
            f"experts go to {target.device} through {CHUNKS * CHUNK_NBYTES >> 20} MiB of pinned "
            f"memory, filled by {threads} threads"
        )
        return ring

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.info("fp4moe: %s", message)

    def give_back(self) -> None:
        """Loading has ended: free the pinned memory."""
        with self._lock:
            while self._rings:
                self._rings.popitem()[1].close()


COPIER = Copier()
"""The one of this process."""


def load_threads() -> int:
    """How many threads fill pinned memory: the cores that this process may use, over the ranks of
    its host. 0: copies are plain.

    Raises:
        ServingError: `THREADS_VARIABLE` is set, and is not a number up to `MAX_THREADS_WANTED`.
    """
    if (wanted := os.environ.get(THREADS_VARIABLE, "")) == "":
        return max(1, min(MAX_THREADS, _cores() // _ranks_of_host()))
    if not wanted.isdecimal() or int(wanted) > MAX_THREADS_WANTED:
        raise refusal(
            f"{THREADS_VARIABLE} is {wanted!r}, not a number of threads up to {MAX_THREADS_WANTED}",
            f"unset {THREADS_VARIABLE}",
        )
    return int(wanted)


def _cores() -> int:
    """What `taskset` and the limit of a container (of cgroups, version 2) leave to this process."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # there is none, or it is "max"
        quota, period = CPU_LIMIT.read_text().split()
        cores = min(cores, int(quota) // int(period))
    return cores


def _ranks_of_host() -> int:
    """Processes like this one on this host, as far as one can tell from here."""
    if (said := os.environ.get("LOCAL_WORLD_SIZE", "")).isdecimal():
        return max(1, int(said))
    distributed = torch.distributed
    world = 1
    if distributed.is_available() and distributed.is_initialized():
        world = distributed.get_world_size()
    visible = torch.cuda.device_count()
    return max(1, min(world, visible if visible > 1 else GPUS_OF_A_HOST))


@contextmanager
def _intra_op_threads(count: int) -> Iterator[None]:
    """torch's threads for operations on the host. Engines often have it use a single one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
