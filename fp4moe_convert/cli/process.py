"""The process of a command: its streams, its signals and its end.

The command runs in a thread, and the main thread only waits for signals. So Ctrl-C is answered at
once even while every other thread is in uninterruptible sleep on a slow disk. The process then ends
as soon as the kernel lets those threads go.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_WORDS_SECONDS = 0.3
_STEP_SECONDS = 0.1

_stopping = False
_advice = ""
_clean_up: Callable[[], None] | None = None


def when_interrupted(*, advice: str = "", clean_up: Callable[[], None] | None = None) -> None:
    """Say what an interruption should print after "interrupted", and what it should call first."""
    global _advice, _clean_up
    _advice = advice or _advice
    _clean_up = clean_up or _clean_up


def run(command: Callable[[], None]) -> None:
    """Run a command line and end the process with its exit code."""
    for number in _STOP_SIGNALS:
        # A shell starts background jobs with SIGINT ignored, and that has to stay so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    prepare_streams()
    # A plan of 180,000 tensors makes millions of objects and no cycles. Looking for cycles took
    # half of the 4.2 s in which DeepSeek-V3 was planned.
    gc.disable()
    code: Any = 1
    ended = threading.Event()

    def work() -> None:
        nonlocal code
        try:
            command()
        except SystemExit as end:
            code = end.code
        except BaseException:
            if _stdout_failure() is None:  # the end says that
                traceback.print_exc()
        finally:
            ended.set()

    threading.Thread(target=work, name="fp4moe", daemon=True).start()
    # In steps: the kernel may hand a signal to another thread, which does not wake this one. Python
    # runs the handler here, the next time that this thread runs.
    while not ended.wait(_STEP_SECONDS):
        pass
    _finish(code if isinstance(code, int) else int(code is not None))


def _finish(code: int) -> None:
    """End the process without the interpreter's shutdown, during which Ctrl-C would kill it."""
    global _stopping
    _stopping = True  # there is nothing left to interrupt
    with suppress(OSError):
        sys.stdout.flush()
    if (failure := _stdout_failure()) is not None:
        if not isinstance(failure, BrokenPipeError):  # its reader left on purpose
            print(f"error: stdout: {failure.strerror}", file=sys.stderr)
        code = code or 1
    sys.stderr.flush()
    os._exit(code)


def _stop(number: int, _frame: object) -> None:
    """End the process, whatever its other threads are doing, and delete nothing.

    It leaves what a kill leaves, and the same command resumes.
    """
    global _stopping
    if _stopping:  # people press Ctrl-C more than once
        return
    _stopping = True
    # In a thread, because a terminal or a pipe that takes nothing would keep this one waiting.
    last_words = threading.Thread(target=_say_interrupted, daemon=True)
    last_words.start()
    last_words.join(_LAST_WORDS_SECONDS)
    os._exit(128 + number)


def _say_interrupted() -> None:
    with suppress(Exception):
        if _clean_up is not None:
            _clean_up()
        print(f"error: interrupted{_advice}", file=sys.stderr, flush=True)


class _Noting:
    """A stream that remembers that it has failed. Whoever writes the result, the table or a help
    text need not catch that."""

    failure: OSError | None = None

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._noting():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._noting():
            self._stream.flush()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _stdout_failure() -> OSError | None:
    return getattr(sys.stdout, "failure", None)


class _Unfailing:
    """A stream whose reader may go, or whose disk may be full. A run does not stop because it
    cannot report."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Reopen closed standard streams on /dev/null, so that no file gets their numbers. Escape
    characters that stdout cannot encode."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (stays open)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = cast("TextIO", _Noting(sys.stdout))
    sys.stderr = cast("TextIO", _Unfailing(sys.stderr))
