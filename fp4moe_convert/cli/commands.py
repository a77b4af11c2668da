"""The commands: parse, call the library, print the result.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a known failure, 2 wrong
usage, 75 a failure that may pass (EX_TEMPFAIL of sysexits.h), 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from .. import defaults
from ..errors import ConvertError, printable
from .process import when_interrupted

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..plan import Part
    from ..progress import Running
    from ..publication import PushReport
    from ..storage.reader import Store

# The library is imported inside the commands: --help does not need it, and numpy would double its
# time.

Params = ParamSpec("Params")

app = typer.Typer(
    name="fp4moe",
    help="Lay NVFP4 mixture-of-experts checkpoints out for FlashInfer's TRT-LLM kernels, offline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(
    name="fp4moe-convert", add_completion=False, pretty_exceptions_enable=False
)

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes from "5GB", "500 MiB" or "1000000"; units of a thousand unless they say "i"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not 1 <= (nbytes := float(match[1]) * unit) < 2**63:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB or 500MiB")
    return round(nbytes)


def parse_part(text: str) -> Part:
    """ "2/4" is part 2 of 4."""
    from ..plan import Part

    number, _, count = text.partition("/")
    try:
        return Part(int(number), int(count))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a part such as 2/4") from None


def _fails_plainly(command: Callable[Params, None]) -> Callable[Params, None]:
    """Known failures become one line and exit code 1, or 75 where it is worth trying again."""

    @functools.wraps(command)
    def wrapped(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ConvertError as error:
            _say(f"error: {error}", style="red")
            raise typer.Exit(os.EX_TEMPFAIL if error.try_again else 1) from None
        except _StdoutError as error:
            # The interpreter would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error.__cause__, BrokenPipeError):  # its reader left on purpose
                _say(f"error: stdout: {error}", style="red")
            raise typer.Exit(1) from None

    return wrapped


class _StdoutError(Exception):
    """The result could not be printed."""


def _say(text: str, style: str | None = None) -> None:
    """One line on stderr, whatever its length: logs are read by line."""
    from rich.console import Console

    line = printable(text).replace("\n", "\\n")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(line, style=style, markup=False, emoji=False)


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        _say(f"warning: {warning}", style="yellow")


def _render(result: dict[str, Any] | Iterable[RenderableType]) -> None:
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


def _print(result: dict[str, Any] | Iterable[RenderableType]) -> None:
    try:
        _render(result)
        sys.stdout.flush()
    except OSError as error:
        raise _StdoutError(error.strerror) from error


@contextmanager
def _running(*, quiet: bool, direct_io: bool, threads: int) -> Iterator[Running]:
    """How to run, with what is shown on stderr meanwhile."""
    from .display import progress_on

    with progress_on(sys.stderr, quiet=quiet) as on_progress:
        yield {
            "direct_io": direct_io,
            "threads": threads,
            "on_progress": on_progress,
            "on_note": None if quiet else _say,
        }


def _print_with_push(
    content: dict[str, Any], tables: list[Table], pushed: PushReport | None, *, as_json: bool
) -> None:
    """Print a result, and the upload of it that followed, if one did."""
    if pushed:
        from .display import pushed_table

        _warn(pushed.warnings)
        content["pushed"] = pushed.as_json()
        tables.append(pushed_table(pushed))
    _print(content if as_json else tables)


# readable=False: what may not be read is for the library to refuse, by one line and exit code 1.
_argument = functools.partial(typer.Argument, show_default=False, readable=False)
Model = Annotated[
    str,
    _argument(
        metavar="MODEL",
        help="A model with NVFP4 experts: a folder, OWNER/NAME on the Hub, or a URL for fsspec.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a model on the Hub.", show_default=False),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        help="The Hub's cache, where it is not in its usual place. It is read, never written.",
        readable=False,
        show_default=False,
    ),
]
Connections = Annotated[
    int, typer.Option(min=1, max=256, help="Requests under way, where MODEL is on the network.")
]
OutDir = Annotated[
    Path, _argument(help="The converted checkpoint: a new or empty folder, or one to resume.")
]
MaxShardSize = Annotated[
    int, typer.Option(parser=parse_size, metavar="SIZE", help="Upper bound of an output file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DirectIo = Annotated[
    bool,
    typer.Option(
        "--direct-io/--no-direct-io",
        help="Read and write past the page cache where the file system allows.",
    ),
]
Threads = Annotated[
    int, typer.Option(min=1, max=256, help="Workers; each takes about 17 MB of memory.")
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME",
        show_default=False,
        help="Upload the result to a repository on the Hub, as fp4moe push does.",
    ),
]
Private = Annotated[
    bool,
    typer.Option("--private", help="Make the repository private. One that is there must be."),
]


def _check_repository(push_to_hub: str | None, *, private: bool) -> None:
    """Look at the repository before hours are spent on what cannot be pushed there."""
    if push_to_hub is None:
        if private:
            raise typer.BadParameter("--private goes with --push-to-hub")
        return
    from ..publication import check_repository

    check_repository(push_to_hub, private=private)


def _ask_whether_to_drop(store: Store, out_dir: Path, max_shard_nbytes: int) -> None:
    from ..preparation import preview

    foreseen = preview(store, out_dir, max_shard_nbytes=max_shard_nbytes, drop_source=True)
    if foreseen.dropping is None:  # an earlier run has deleted it
        return
    _say(f"{store.location}: {foreseen.dropping}")
    _say(f"Then {out_dir} has the only copy. fp4moe restore writes the shards again.")
    if not typer.confirm("Delete them?", default=False, err=True):
        _say("error: not confirmed; nothing has been written or deleted", style="red")
        raise typer.Exit(1)


@app.command("convert")
@convert_app.command()
@_fails_plainly
def convert_command(
    model: Model,
    out_dir: OutDir,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    max_shard_size: MaxShardSize = defaults.MAX_SHARD_SIZE,  # type: ignore[assignment]  # typer parses it
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read finished shards before they are kept, then all of the result, and compare "
            "it with the source.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Start afresh: delete what earlier conversions left in OUT_DIR."
        ),
    ] = False,
    drop_source: Annotated[
        bool,
        typer.Option(
            "--drop-source",
            help="Delete each shard of the model folder once what was converted from it has been "
            "read back. Asks first. fp4moe restore is the way back.",
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask whether --drop-source may delete.")
    ] = False,
    part: Annotated[
        Any,
        typer.Option(
            parser=parse_part,
            metavar="I/N",
            show_default=False,
            help="Write part I of N only, as one of several machines. The last to end finishes "
            "the folder.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            show_default=False,
            help="Convert with the nodes of this Ray cluster; auto finds the one that runs here.",
        ),
    ] = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    direct_io: DirectIo = True,
    threads: Threads = defaults.THREADS,
    connections: Connections = defaults.CONNECTIONS,
) -> None:
    """Convert a checkpoint with NVFP4 experts to the layout of FlashInfer's TRT-LLM MoE kernels."""
    from ..storage.opening import open_store

    if part and overwrite:
        raise typer.BadParameter("--overwrite would delete the other parts; take a new folder")
    if part and ray:
        raise typer.BadParameter("--part and --ray are two ways of sharing the work; take one")
    if drop_source and (part or ray):
        raise typer.BadParameter("--drop-source is for one machine; others may need the source")
    if drop_source and not (yes or dry_run or (sys.stdin and sys.stdin.isatty())):
        raise typer.BadParameter("--drop-source asks first; without a terminal it takes --yes")
    _check_repository(push_to_hub, private=private)
    store = open_store(model, revision=revision, cache_dir=cache_dir, connections=connections)
    if dry_run:
        from ..preparation import preview
        from .display import preview_tables

        foreseen = preview(store, out_dir, max_shard_nbytes=max_shard_size, drop_source=drop_source)
        if part:
            foreseen = foreseen.only(part)
        _warn(foreseen.warnings)
        _print(foreseen.as_json(out_dir) if as_json else preview_tables(foreseen, out_dir))
        return
    if drop_source and not yes:
        _ask_whether_to_drop(store, out_dir, max_shard_size)
    from ..conversion import convert
    from .display import part_tables, report_table

    when_interrupted(advice="; run the same command again to resume")
    pushed = None
    options: dict[str, Any] = {"max_shard_nbytes": max_shard_size, "verify": verify}
    with _running(quiet=quiet, direct_io=direct_io, threads=threads) as running:
        options |= running
        if part:
            from ..parts import convert_part

            share = convert_part(store, out_dir, part, **options)
        elif ray:
            from ..cluster import convert_on_ray

            report = convert_on_ray(store, out_dir, ray, overwrite=overwrite, **options)
        else:
            report = convert(
                store, out_dir, overwrite=overwrite, drop_source=drop_source, **options
            )
        if push_to_hub is not None and (part is None or share.whole):
            from ..publication import push

            pushed = push(out_dir, push_to_hub, private=private, **running)
    if part:
        whole = share.whole
        content, tables = share.as_json(), list(part_tables(share))
    else:
        whole = report
        content, tables = report.as_json(), [report_table(report)]
    _warn(whole.warnings if whole else [])
    _print_with_push(content, tables, pushed, as_json=as_json)


@app.command("finish")
@_fails_plainly
def finish_command(
    out_dir: Annotated[Path, _argument(help="A folder with all parts of a conversion.")],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint that was converted, where it lies elsewhere than for the parts.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read all of the result and compare it with the source."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    direct_io: DirectIo = True,
    threads: Threads = defaults.THREADS,
    connections: Connections = defaults.CONNECTIONS,
) -> None:
    """Finish a conversion whose parts lie together: check that all are there and write the rest."""
    from ..parts import finish, source_of
    from ..storage.opening import open_store
    from .display import report_table

    store = open_store(
        source or source_of(out_dir),
        revision=revision,
        cache_dir=cache_dir,
        connections=connections,
    )

    when_interrupted(advice="; run the same command again to resume")
    with _running(quiet=quiet, direct_io=direct_io, threads=threads) as running:
        report = finish(out_dir, store, verify=verify, **running)
    _warn(report.warnings)
    _print(report.as_json() if as_json else [report_table(report)])


@app.command("ci")
@_fails_plainly
def ci_command(
    model: Model,
    out_dir: OutDir,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    max_shard_size: MaxShardSize = defaults.MAX_SHARD_SIZE,  # type: ignore[assignment]  # as above
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    direct_io: DirectIo = True,
    threads: Threads = defaults.THREADS,
    connections: Connections = defaults.CONNECTIONS,
) -> None:
    """Convert and verify as a CI job, or find in seconds that it has been done."""
    from ..ci import run_job
    from ..storage.opening import open_store
    from .display import job_table
    from .summary import add_summary, done_summary, failed_summary

    when_interrupted(advice="; run the same command again to resume")
    pushed = None
    try:
        _check_repository(push_to_hub, private=private)
        store = open_store(model, revision=revision, cache_dir=cache_dir, connections=connections)
        with _running(quiet=quiet, direct_io=direct_io, threads=threads) as running:
            job = run_job(store, out_dir, max_shard_nbytes=max_shard_size, **running)
            if push_to_hub is not None:
                from ..publication import push

                pushed = push(out_dir, push_to_hub, private=private, **running)
    except ConvertError as error:
        add_summary(failed_summary(model, error))
        raise
    add_summary(done_summary(job, pushed))
    _warn(job.conversion.warnings)
    content, tables = job.as_json(), [job_table(job)]
    _print_with_push(content, tables, pushed, as_json=as_json)


@app.command("verify")
@_fails_plainly
def verify_command(
    out_dir: Annotated[Path, _argument(help="A converted checkpoint.")],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint it was converted from: undo each layout and compare.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    direct_io: DirectIo = True,
    threads: Threads = defaults.THREADS,
    connections: Connections = defaults.CONNECTIONS,
) -> None:
    """Read every byte of a converted checkpoint and compare it with its manifest, or its source."""
    from ..storage.opening import open_store
    from ..verification import verify
    from .display import progress_on, verified_table

    store = source and open_store(
        source, revision=revision, cache_dir=cache_dir, connections=connections
    )
    with progress_on(sys.stderr, quiet=quiet) as on_progress:
        verified = verify(
            out_dir, store, direct_io=direct_io, threads=threads, on_progress=on_progress
        )
    _print(verified.as_json() if as_json else [verified_table(verified)])


@app.command("restore")
@_fails_plainly
def restore_command(
    converted_dir: Annotated[Path, _argument(help="A converted checkpoint.")],
    out_dir: Annotated[
        Path, _argument(help="The original: a new or empty folder, or one to resume.")
    ],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read all of the result and compare it with the converted checkpoint."
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Start afresh: delete what an unfinished run left in OUT_DIR."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    direct_io: DirectIo = True,
    threads: Threads = defaults.THREADS,
) -> None:
    """Write the original that a checkpoint was converted from, byte for byte."""
    from ..restoration import restore
    from .display import restored_table

    when_interrupted(advice="; run the same command again to resume")
    with _running(quiet=quiet, direct_io=direct_io, threads=threads) as running:
        report = restore(converted_dir, out_dir, verify=verify, overwrite=overwrite, **running)
    _warn(report.warnings)
    _print(report.as_json() if as_json else [restored_table(report)])


@app.command("inspect")
@_fails_plainly
def inspect_command(
    model: Annotated[
        str,
        _argument(
            metavar="MODEL",
            help="A model, source or converted: a folder, OWNER/NAME on the Hub, or a URL.",
        ),
    ],
    revision: Revision = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model holds, and what a conversion would do or did."""
    from ..inspection import inspect
    from ..storage.opening import open_store
    from .display import inspection_tables

    inspection = inspect(open_store(model, revision=revision, cache_dir=cache_dir))
    _print(inspection.as_json() if as_json else inspection_tables(inspection))


@app.command("push")
@_fails_plainly
def push_command(
    out_dir: Annotated[Path, _argument(help="A converted checkpoint.")],
    repo_id: Annotated[
        str,
        _argument(
            metavar="OWNER/NAME",
            help="The repository on the Hub: not there yet, empty, or with this conversion.",
        ),
    ],
    private: Private = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    direct_io: DirectIo = True,
    threads: Threads = defaults.THREADS,
) -> None:
    """Verify a converted checkpoint and upload it to the Hub, with a model card."""
    from ..publication import push
    from .display import pushed_table

    when_interrupted(advice="; run the same command again to resume")
    with _running(quiet=quiet, direct_io=direct_io, threads=threads) as running:
        report = push(out_dir, repo_id, private=private, **running)
    _warn(report.warnings)
    _print(report.as_json() if as_json else [pushed_table(report)])
