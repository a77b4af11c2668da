"""Copy a folder as fast as its disk can: the floor under any conversion.

    python -m benchmarks.raw_copy FROM TO

Threads read and write pieces of 8 MiB with direct I/O, in the order of the files, and do nothing
else: the same bytes, no layout, no checksums. Everything is on the disk at the end.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

PIECE_NBYTES = 8 * 2**20
THREADS = 4
BLOCK = 4096


def copy_folder(source: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        copy_file(path, target / path.name)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def copy_file(source: Path, target: Path) -> None:
    nbytes = source.stat().st_size
    reading = os.open(source, os.O_RDONLY | os.O_DIRECT)
    writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o666)
    os.ftruncate(writing, nbytes)
    pieces, lock = iter(range(0, nbytes, PIECE_NBYTES)), Lock()

    def taken() -> Iterator[int]:
        while True:
            with lock:
                offset = next(pieces, None)
            if offset is None:
                return
            yield offset

    def work() -> None:
        buffer = memoryview(mmap.mmap(-1, PIECE_NBYTES))
        for offset in taken():
            got = os.preadv(reading, [buffer], offset)
            # Direct I/O writes whole blocks; what is too much is cut off below.
            os.pwrite(writing, buffer[: -(-got // BLOCK) * BLOCK], offset)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work) for _ in range(THREADS)]:
            done.result()
    os.ftruncate(writing, nbytes)
    os.fsync(writing)
    os.close(reading)
    os.close(writing)


def read_folder(folder: Path) -> int:
    """Read all files with direct I/O; returns their bytes."""

    def read(path: Path) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        offsets, lock = iter(range(0, os.fstat(fd).st_size, PIECE_NBYTES)), Lock()

        def work() -> int:
            nbytes = 0
            with mmap.mmap(-1, PIECE_NBYTES) as buffer:
                while True:
                    with lock:
                        offset = next(offsets, None)
                    if offset is None:
                        return nbytes
                    nbytes += os.preadv(fd, [buffer], offset)

        with ThreadPoolExecutor(THREADS) as pool:
            total = sum(done.result() for done in [pool.submit(work) for _ in range(THREADS)])
        os.close(fd)
        return total

    return sum(read(path) for path in sorted(folder.iterdir()))


if __name__ == "__main__":
    copy_folder(Path(sys.argv[1]), Path(sys.argv[2]))
