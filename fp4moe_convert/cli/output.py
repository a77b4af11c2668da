"""What commands say: results on stdout; progress, warnings and errors on stderr."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from ..errors import ConvertError, printable
from .process import when_interrupted

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..progress import Running
    from ..publication import PushReport

Params = ParamSpec("Params")


def fails_plainly(command: Callable[Params, None]) -> Callable[Params, None]:
    """Known failures become one line and exit code 1, or 75 where it is worth trying again."""

    @functools.wraps(command)
    def wrapped(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ConvertError as error:
            say(f"error: {error}", style="red")
            raise typer.Exit(os.EX_TEMPFAIL if error.try_again else 1) from None

    return wrapped


def say(text: str, style: str | None = None) -> None:
    """One line on stderr, whatever its length: logs are read by line."""
    from rich.console import Console

    line = printable(text).replace("\n", "\\n")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(line, style=style, markup=False, emoji=False)


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        say(f"warning: {warning}", style="yellow")


def print_result(result: dict[str, Any] | Iterable[RenderableType]) -> None:
    """The result, on stdout: JSON values as one object, or tables."""
    if isinstance(result, dict):
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False).print(*result, sep="\n")
        return
    # In a pipe or a file a line is as long as it needs to be, and no longer.
    console = Console(highlight=False, width=1000)
    with console.capture() as captured:
        console.print(*result, sep="\n")
    print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n")


@contextmanager
def running(*, quiet: bool, direct_io: bool, threads: int) -> Iterator[Running]:
    """How to run what a second run resumes, with what is shown on stderr meanwhile."""
    from .display import progress_on

    when_interrupted(advice="; run the same command again to resume")
    with progress_on(sys.stderr, quiet=quiet) as on_progress:
        yield {
            "direct_io": direct_io,
            "threads": threads,
            "on_progress": on_progress,
            "on_note": None if quiet else say,
        }


def print_with_push(
    content: dict[str, Any], tables: list[Table], pushed: PushReport | None, *, as_json: bool
) -> None:
    """Print a result, and the upload of it that followed, if one did."""
    if pushed:
        from .display import pushed_table

        warn(pushed.warnings)
        content["pushed"] = pushed.as_json()
        tables.append(pushed_table(pushed))
    print_result(content if as_json else tables)
