"""What the benchmarks share: cold starts, measured children, models and surroundings.

Times and memory are those that the kernel reports for a child process. A child starts with its
parent's peak memory, so nothing large is imported here.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from .report import Json, say

MINCORE_NBYTES = 256 * 2**20
IMPORT_LIBRARIES = """
import contextlib, fp4moe_convert.cli.display, fp4moe_convert.conversion
with contextlib.suppress(ImportError):
    import flashinfer, safetensors.torch
"""


# --- child processes ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usage:
    """What a child process took."""

    wall_s: float
    cpu_s: float  # user and system
    peak_rss_bytes: int
    stdout: bytes


def run_child(*command: str | Path, cwd: Path | None = None) -> Usage:
    """Run to the end and measure.

    Raises:
        subprocess.CalledProcessError: the child failed; it has said why on stderr.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=cwd)
    assert process.stdout is not None
    try:
        with process.stdout as pipe:
            stdout = pipe.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        # Interrupted: it must not go on writing into a folder that is about to be removed.
        if process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [str(word) for word in command])
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, stdout)


def run_module(name: str, *arguments: str | Path) -> Usage:
    """A module of this repository in a process of its own."""
    return run_child(sys.executable, "-m", name, *arguments)


def our_command() -> str:
    """The console script of this interpreter's environment, active or not."""
    beside = Path(sys.executable).parent
    command = shutil.which("fp4moe-convert", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        raise FileNotFoundError("fp4moe-convert is not installed")
    return command


def sync_folder(folder: Path) -> Usage:
    """fsync of everything in a folder, and of itself, by coreutils."""
    return run_child("sync", *sorted(folder.rglob("*")), folder)


# --- cold starts ----------------------------------------------------------------------------------


def start_cold(model: Path) -> int:
    """Leave nothing dirty in memory, and in the page cache the libraries and nothing of the model.

    Returns:
        The model's pages, none of which is cached.

    Raises:
        RuntimeError: the model does not leave the page cache.
    """
    run_child(sys.executable, "-W", "ignore", "-c", IMPORT_LIBRARIES)
    os.sync()
    files = model_files(model)
    for _ in range(5):
        for path in files:
            evict(path)
        counts = [cached_pages(path) for path in files]
        cached, pages = (sum(column) for column in zip(*counts, strict=True))
        if not cached:
            return pages
        time.sleep(1)  # pages that are being read or written at the moment stay
    raise RuntimeError(f"{cached} of {pages} pages of the model stay in the page cache")


def model_files(model: Path) -> list[Path]:
    """All files of a model folder.

    Raises:
        ValueError: it has symbolic links, as a Hub cache does, which `cp -r` would copy as such.
    """
    paths = sorted(model.rglob("*"))
    if links := [path.name for path in paths if path.is_symlink()]:
        raise ValueError(f"{links[0]} is a symbolic link: cp -r would not copy what is behind it")
    return [path for path in paths if path.is_file()]


def evict(path: Path) -> None:
    """Drop a file's pages from the page cache; dirty ones would stay."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def cached_pages(path: Path) -> tuple[int, int]:
    """Pages of a file that lie in the page cache, and all its pages.

    The kernel counts all as cached for a file that the caller could not write.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    cached = pages = 0
    with path.open("rb") as file:
        for start in range(0, size, MINCORE_NBYTES):
            nbytes = min(MINCORE_NBYTES, size - start)
            # ctypes only takes the address of what is writable: a private copy, never made.
            with mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY, offset=start) as window:
                flags = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
                first = ctypes.c_char.from_buffer(window)
                failed = libc.mincore(ctypes.byref(first), ctypes.c_size_t(nbytes), flags)
                del first  # or the window cannot be closed
            if failed:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            cached += len(flags) - bytes(flags).count(0)
            pages += len(flags)
    return cached, pages


# --- models, and where they are -------------------------------------------------------------------


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder, removed whatever happens; SIGTERM would leave it otherwise."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="fp4moe-bench-", dir=parent) as folder:
        yield Path(folder)


def made_model(out: Path, layers: int, experts: int, sizes: argparse.Namespace) -> Path:
    say(f"making a model of {layers} x {experts} experts")
    make_model(
        out,
        # No dense layer: beside so few MoE layers it would weigh more than in a real model.
        *("--layers", str(layers), "--dense-layers", "0", "--experts", str(experts)),
        *("--hidden", str(sizes.hidden), "--intermediate", str(sizes.intermediate)),
    )
    return out


def make_model(out: Path, *options: str) -> None:
    run_module("tests.support.make_checkpoint", out, *options)


def environment(scratch: Path, nbytes: int) -> Json:
    packages = ("fp4moe-convert", "flashinfer-python", "torch", "safetensors", "numpy")
    file_system = run_child("df", "--output=fstype", scratch).stdout.split()[-1].decode()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": date.today().isoformat(),
        "model_bytes": nbytes,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_model(),
        "memory_bytes": memory,
        "file_system": file_system,
        "kernel": platform.release().split("-")[0],
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages if installed(name)},
            "cp": run_child("cp", "--version").stdout.decode().split("\n")[0],
        },
    }


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cpu_model() -> str:
    match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()
