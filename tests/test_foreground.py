"""The process that was started, and the one that works for it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import child_of, state_of, until

ATTENDED = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.{interrupt})
from fp4moe_convert.foreground import STOPS, attend
def work():
    {work}
sys.exit(attend(work))
"""
SAY_READY = "print(os.getpid(), flush=True)"


def start(work: str, *, interrupt: str = "default_int_handler") -> subprocess.Popen[str]:
    program = ATTENDED.format(work=work, interrupt=interrupt)
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def started(process: subprocess.Popen[str]) -> int:
    """The process id of the worker, once it has said it."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def is_gone(pid: int) -> bool:
    return state_of(Path(f"/proc/{pid}")) in "ZX"


@pytest.mark.parametrize(
    ("work", "code"), [("pass", 0), ("sys.exit(3)", 3), ("os._exit(200)", 200), ("1 / 0", 1)]
)
def test_the_exit_code_is_the_worker_s(work: str, code: int) -> None:
    with start(work) as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr.count("Traceback") == (work == "1 / 0")


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGKILL, "Killed (was memory short?)"),
        (signal.SIGSEGV, "Segmentation fault"),
        (signal.SIGRTMIN + 2, "Real-time signal 2"),
    ],
)
def test_a_worker_that_is_killed_is_reported(number: int, name: str) -> None:
    with start(f"os.kill(os.getpid(), {int(number)})") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    words = rf"error: process [0-9]+ died: {re.escape(name)}; run the same command again\n"
    assert re.fullmatch(words, stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_does_not_end_is_given_up(number: signal.Signals) -> None:
    """Its signals are blocked here, as if it never got ready to answer them."""
    with start(f"{SAY_READY}; time.sleep(60)") as process:
        worker = started(process)
        process.send_signal(number)
        at = time.monotonic()
        process.send_signal(number)  # a second one changes nothing
        assert process.wait(timeout=60) == 128 + number
        assert time.monotonic() - at < 2
        assert process.stderr is not None
        assert process.stderr.read() == (
            "error: interrupted; run the same command again "
            f"(process {worker} has not ended yet and seems to wait for a disk)\n"
        )
    assert is_gone(worker)


def test_a_worker_is_asked_to_stop() -> None:
    answer = "signal.sigwait(STOPS); time.sleep(0.2); os._exit(7)"
    with start(f"{SAY_READY}; {answer}") as process:
        started(process)
        process.terminate()
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 7


def test_ctrl_c_that_was_ignored_stays_so() -> None:
    """As a shell has it for jobs in the background."""
    with start(f"{SAY_READY}; time.sleep(0.5)", interrupt="SIG_IGN") as process:
        started(process)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_a_worker_ends_with_the_process_that_was_started() -> None:
    with start(f"{SAY_READY}; time.sleep(60)") as process:
        worker = started(process)
        process.kill()
        process.wait(timeout=60)
        until(lambda: is_gone(worker), seconds=10)


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_while_the_command_starts(tiny: Path, tmp_path: Path, delay: float) -> None:
    """It imports for a while before it can do anything in order."""
    program = "from fp4moe_convert.__main__ import main; main()"
    arguments = [sys.executable, "-c", program, "convert", tiny, tmp_path / "out", "--quiet"]
    with subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        child_of(process.pid)
        assert process.poll() is None
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert stderr == "error: interrupted; run the same command again to resume\n"
    assert process.returncode == 130
    assert not list(tmp_path.rglob("*.safetensors"))
