"""The process that was started: it waits for the one that works, and answers Ctrl-C in time.

The kernel lets no process go while one of its threads waits for a disk, and a busy disk makes them
wait for seconds (in fsync, in a write, in an import that looks a name up), a network share that is
gone for ever. So a child does the work, and what was started touches no file: it can always end.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

STOPS = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask for an end in order."""

PATIENCE_SECONDS = 1.8
"""How long such an end may take."""

_PR_SET_PDEATHSIG = 1
_SHOW_CURSOR = "\x1b[?25h"


def attend(work: Callable[[], None]) -> int:
    """Run ``work`` in a child and wait for it, but not for long once it is asked to stop.

    The child starts with `STOPS` blocked, and unblocks them when it is ready to end in order. It
    is killed if it is still there when this process ends, however that ends.

    Returns:
        The exit code to end with: the child's, or 128 and the number of the signal it ended by.
    """
    if sys.platform != "linux":
        work()
        return 0
    # A shell starts background jobs with SIGINT ignored, and that is to stay so.
    stops = {stop for stop in STOPS if signal.getsignal(stop) != signal.SIG_IGN}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, exit codes are lost
    signal.pthread_sigmask(signal.SIG_BLOCK, {*stops, signal.SIGCHLD})
    parent = os.getpid()
    child = os.fork()
    if child:
        return _wait_for(child, stops)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent:  # it may have ended before it was asked for
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        work()
    return 0


def _wait_for(child: int, stops: set[signal.Signals]) -> int:
    stopped_by = 0
    deadline = math.inf
    while True:
        left = min(max(deadline - time.monotonic(), 0), 2**31)
        signalled = signal.sigtimedwait({*stops, signal.SIGCHLD}, left)
        if signalled is None:
            _say(
                f"interrupted; process {child} still waits for a disk and ends when that answers, "
                "then run the same command again"
            )
            return 128 + stopped_by
        if signalled.si_signo in stops:
            os.kill(child, signalled.si_signo)
            if not stopped_by:
                stopped_by = signalled.si_signo
                deadline = time.monotonic() + PATIENCE_SECONDS
            continue
        ended, status = os.waitpid(child, os.WNOHANG)  # it may only have been suspended
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code >= 0:
                return code
            why = " (out of memory?)" if code == -signal.SIGKILL else ""
            _say(f"killed by {signal.Signals(-code).name}{why}; run the same command again")
            return 128 - code


def _say(text: str) -> None:
    # On a terminal the child may have hidden the cursor, and left a bar in this line.
    start = f"{_SHOW_CURSOR}\n" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{start}error: {text}\n".encode())
