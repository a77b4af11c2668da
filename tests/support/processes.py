"""Programs in processes of their own, and what /proc says of them and of this one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

FP4MOE_CONVERT = (
    *(sys.executable, "-c"),
    "from fp4moe_convert.__main__ import main_convert; main_convert()",
)
"""The command, in a process of its own."""


def finding_support() -> dict[str, str]:
    """This process's environment, for a program elsewhere that imports `support`."""
    places = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def kill_at_rename(call: str, renames: int) -> None:
    """Call a public function, written as Python, in a process that is killed when it has renamed
    so many files."""
    program = f"""
import os, signal
from fp4moe_convert import *
rename, left = os.rename, [{renames}]
def dying(old, new):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(old, new)
os.rename = dying
{call}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def run_kills(*options: str) -> str:
    """Run `support.kill`, in which all must go well; what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "support.kill", *options],
        env=finding_support(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal the unbroken one" in done.stdout
    return done.stdout


def until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def child_of(pid: int) -> int:
    """The process that does a command's work, once there is one."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    until(lambda: bool(children.read_text()))
    return int(children.read_text())


def state_of(task: Path) -> str:
    """Of a process or a thread, by its folder in /proc: a letter of proc(5); X if it is gone."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def our_threads() -> list[str]:
    """Those of the package that run in this process, by name. Threads of a test's own servers are
    not among them: they may outlive the test."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("crew-", "fetch-"))]


def descriptors_of(path: Path) -> list[int]:
    """This process's open descriptors of a file, even of one that has been unlinked."""
    names = {str(path), f"{path} (deleted)"}
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread has closed it
            if os.readlink(f"/proc/self/fd/{fd}") in names:
                found.append(int(fd))
    return found
