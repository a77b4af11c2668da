"""The process that was started: it waits for its child, which does the work, and answers Ctrl-C.

The kernel lets no process go while one of its threads waits for a disk, and a busy disk makes them
wait for seconds (in fsync, in a write, in an import that looks a name up), a network share that is
gone for ever. The parent touches no file, so it can always end.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

STOPS = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask a command to stop."""

PATIENCE_SECONDS = 1.6
"""How long the child may take to stop."""

_FOREVER = 2**31  # seconds
_PR_SET_PDEATHSIG = 1
_SHOW_CURSOR = "\x1b[?25h"

_reported = mmap.mmap(-1, 1)  # shared by parent and child
"""Whether the child has said that it was interrupted."""


def attend(work: Callable[[], None]) -> int:
    """Run ``work`` in a child and wait for it, but not for long once it is asked to stop.

    The child starts with `STOPS` blocked, and unblocks them when it can handle them. It is killed
    if it is still there when the parent ends, whatever ends that.

    Returns:
        The exit code to end with: the child's, or 128 and the number of the signal it ended by.
    """
    if sys.platform != "linux":
        work()
        return 0
    stops = heeded_stops()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, exit codes are lost
    signal.pthread_sigmask(signal.SIG_BLOCK, {*stops, signal.SIGCHLD})
    parent = os.getpid()
    child = os.fork()
    if child:
        return _wait_for(child, stops)
    _die_with(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    work()
    return 0


def heeded_stops() -> set[signal.Signals]:
    """Those of `STOPS` that are not ignored: a shell starts background jobs with SIGINT ignored,
    and that is to stay so."""
    return {stop for stop in STOPS if signal.getsignal(stop) != signal.SIG_IGN}


def interruption_reported() -> None:
    """Called in the child: the parent need not say that it was interrupted."""
    _reported[0] = 1


def _wait_for(child: int, stops: set[signal.Signals]) -> int:
    stopped_by = 0
    deadline = time.monotonic() + _FOREVER
    while True:
        left = max(deadline - time.monotonic(), 0)
        signalled = signal.sigtimedwait({*stops, signal.SIGCHLD}, left)
        if signalled is None:
            why = f"process {child} has not ended yet and seems to wait for a disk"
            restart = "interrupted; run the same command again"
            _say(f"note: {why}" if _reported[0] else f"error: {restart} ({why})")
            return 128 + stopped_by
        if signalled.si_signo in stops:
            os.kill(child, signalled.si_signo)
            if not stopped_by:
                stopped_by = signalled.si_signo
                deadline = time.monotonic() + PATIENCE_SECONDS
            continue
        ended, status = os.waitpid(child, os.WNOHANG)  # or it has only been suspended
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code >= 0:
                return code
            why = " (was memory short?)" if code == -signal.SIGKILL else ""
            died = f"process {child} died: {signal.strsignal(-code)}{why}"
            _say(f"error: {died}; run the same command again")
            return 128 - code


def _say(line: str) -> None:
    """On stderr; which may be a file on a disk that does not answer, so this process cannot."""
    if not os.fork():
        # On a terminal the child may have hidden the cursor, and left a bar in this line.
        start = f"{_SHOW_CURSOR}\n" if os.isatty(2) else ""
        with suppress(OSError):
            os.write(2, f"{start}{line}\n".encode())
        os._exit(0)
    signal.sigtimedwait({signal.SIGCHLD}, 0.1)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    import ctypes  # only here, because the parent is to be ready for signals soon

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before the kernel was asked
        os._exit(1)
