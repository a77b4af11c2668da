"""The commands: parse, call the library, print the result.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a known failure, 2 wrong
usage, 75 a failure that may pass (EX_TEMPFAIL of sysexits.h), 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import defaults
from ..errors import ConvertError, OutputError, PushError, UnreachableError
from .options import (
    AsJson,
    CacheDir,
    Connections,
    DirectIo,
    MaxShardSize,
    Model,
    OutDir,
    Overwrite,
    Private,
    PushToHub,
    Quiet,
    Revision,
    TakesBareRay,
    Threads,
    argument,
    not_empty,
    parse_part,
    parse_path,
    path_argument,
)
from .output import fails_plainly, print_result, print_with_push, running, say, warn

if TYPE_CHECKING:
    from ..conversion import ConversionReport
    from ..parts import PartReport
    from ..plan import Part
    from ..progress import Running
    from ..publication import PushReport
    from ..storage.reader import Store

# The library is imported inside the commands: --help does not need it, and numpy would double its
# time.

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


def _check_repository(
    push_to_hub: str | None, source: Store, max_shard_nbytes: int | None = None, *, private: bool
) -> None:
    """Look at the repository before hours are spent on what cannot be pushed there."""
    if push_to_hub is None:
        if private:
            raise typer.BadParameter("--private goes with --push-to-hub")
        return
    from ..publication import check_repository

    check_repository(push_to_hub, source, max_shard_nbytes=max_shard_nbytes, private=private)


def _push(
    out_dir: Path,
    push_to_hub: str | None,
    private: bool,
    options: Running,
) -> PushReport | None:
    """Upload a result, if that was asked for."""
    if push_to_hub is None:
        return None
    from ..publication import push

    try:
        return push(out_dir, push_to_hub, private=private, **options)
    except (PushError, UnreachableError) as error:
        advice = f"{out_dir} is finished, so fp4moe push {out_dir} OWNER/NAME is enough then"
        raise type(error)(f"{error}; {advice}") from error


def _ask_whether_to_drop(store: Store, out_dir: Path, **options: Any) -> None:
    from ..preparation import preview

    foreseen = preview(store, out_dir, drop_source=True, **options)
    if foreseen.dropping is None:  # an earlier run has deleted it
        return
    say(f"{store.location}: {foreseen.dropping}")
    say(f"Then {out_dir} has the only copy. fp4moe restore writes the shards again.")
    try:
        confirmed = typer.confirm("Delete them?", default=False, err=True)
    except typer.Abort:  # Ctrl-D
        typer.echo(err=True)
        confirmed = False
    if not confirmed:
        say("error: not confirmed; nothing has been written or deleted", style="red")
        raise typer.Exit(1)


@app.command("convert", cls=TakesBareRay)
@convert_app.command(cls=TakesBareRay)
@fails_plainly
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
    overwrite: Overwrite = False,
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
            metavar="[ADDRESS]",
            show_default=False,
            help="Convert with the nodes of this Ray cluster, or of the one that runs here (auto).",
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
    if part and ray is not None:
        raise typer.BadParameter("--part and --ray are two ways of sharing the work; take one")
    if drop_source and (part or ray is not None):
        raise typer.BadParameter("--drop-source is for one machine; others may need the source")
    # The question goes to stderr.
    can_ask = all(stream and stream.isatty() for stream in (sys.stdin, sys.stderr))
    if drop_source and not (yes or dry_run or can_ask):
        raise typer.BadParameter("--drop-source asks first; without a terminal it takes --yes")
    store = open_store(model, revision=revision, cache_dir=cache_dir, connections=connections)
    _check_repository(push_to_hub, store, max_shard_size, private=private)
    if dry_run:
        from ..preparation import preview
        from .display import preview_tables

        foreseen = preview(
            store,
            out_dir,
            max_shard_nbytes=max_shard_size,
            drop_source=drop_source,
            overwrite=overwrite,
        )
        if part:
            foreseen = foreseen.only(part)
        warn([*foreseen.warnings, *foreseen.shortage])
        print_result(foreseen.as_json(out_dir) if as_json else preview_tables(foreseen, out_dir))
        return
    if drop_source and not yes:
        _ask_whether_to_drop(store, out_dir, max_shard_nbytes=max_shard_size, overwrite=overwrite)
    from ..parts import PartReport
    from .display import conversion_tables

    with running(quiet=quiet, direct_io=direct_io, threads=threads) as options:
        report = _convert(
            store,
            out_dir,
            part,
            ray,
            overwrite=overwrite,
            drop_source=drop_source,
            max_shard_nbytes=max_shard_size,
            verify=verify,
            **options,
        )
        whole = report.whole if isinstance(report, PartReport) else report
        pushed = _push(out_dir, push_to_hub, private, options) if whole is not None else None
    if push_to_hub is not None and whole is None and not quiet:
        say(
            f"nothing is pushed to {push_to_hub} yet: the part that finishes the folder does that, "
            f"or fp4moe finish {out_dir} --push-to-hub {push_to_hub}"
            f"{' --private' if private else ''}"
        )
    warn(whole.warnings if whole else [])
    print_with_push(report.as_json(), list(conversion_tables(report)), pushed, as_json=as_json)


def _convert(
    store: Store,
    out_dir: Path,
    part: Part | None,
    ray: str | None,
    *,
    overwrite: bool,
    drop_source: bool,
    **options: Any,
) -> ConversionReport | PartReport:
    """Convert: one part of it, on a cluster, or all of it here."""
    if part:
        from ..parts import convert_part

        return convert_part(store, out_dir, part, **options)
    if ray is not None:
        from ..cluster import convert_on_ray

        # Ray prints what befalls its nodes, and not on stderr.
        with contextlib.redirect_stdout(sys.stderr):
            return convert_on_ray(store, out_dir, ray, overwrite=overwrite, **options)
    from ..conversion import convert

    return convert(store, out_dir, overwrite=overwrite, drop_source=drop_source, **options)


@app.command("finish")
@fails_plainly
def finish_command(
    out_dir: Annotated[
        Path, path_argument(metavar="OUT_DIR", help="A folder with all parts of a conversion.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            parser=not_empty,
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
    push_to_hub: PushToHub = None,
    private: Private = False,
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
    _check_repository(push_to_hub, store, private=private)
    with running(quiet=quiet, direct_io=direct_io, threads=threads) as options:
        report = finish(out_dir, store, verify=verify, **options)
        pushed = _push(out_dir, push_to_hub, private, options)
    warn(report.warnings)
    print_with_push(report.as_json(), [report_table(report)], pushed, as_json=as_json)


@app.command("ci")
@fails_plainly
def ci_command(
    model: Model,
    out_dir: OutDir,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    max_shard_size: MaxShardSize = defaults.MAX_SHARD_SIZE,  # type: ignore[assignment]  # as above
    report: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path,
            metavar="FILE",
            show_default=False,
            help="Where the report goes, if not to OUT_DIR.report.json. The next job looks there.",
        ),
    ] = None,
    overwrite: Overwrite = False,
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
    from .summary import done_summary, failed_summary

    try:
        store = open_store(model, revision=revision, cache_dir=cache_dir, connections=connections)
        _check_repository(push_to_hub, store, max_shard_size, private=private)
        with running(quiet=quiet, direct_io=direct_io, threads=threads) as options:
            job = run_job(
                store,
                out_dir,
                report,
                max_shard_nbytes=max_shard_size,
                overwrite=overwrite,
                **options,
            )
            if pushed := _push(out_dir, push_to_hub, private, options):
                job = job.with_push(pushed)
    except ConvertError as error:
        _add_summary(failed_summary(model, error))
        raise
    _add_summary(done_summary(job))
    warn(job.conversion.warnings)
    content, tables = job.as_json(), [job_table(job)]
    print_with_push(content, tables, pushed, as_json=as_json)


def _add_summary(text: str) -> None:
    """A page that cannot be written does not change how the job has ended."""
    from .summary import add_summary

    try:
        add_summary(text)
    except OutputError as error:
        warn([str(error)])


@app.command("verify")
@fails_plainly
def verify_command(
    out_dir: Annotated[Path, path_argument(metavar="OUT_DIR", help="A converted checkpoint.")],
    source: Annotated[
        str | None,
        typer.Option(
            parser=not_empty,
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
    print_result(verified.as_json() if as_json else [verified_table(verified)])


@app.command("restore")
@fails_plainly
def restore_command(
    converted_dir: Annotated[
        Path, path_argument(metavar="CONVERTED_DIR", help="A converted checkpoint.")
    ],
    out_dir: Annotated[
        Path,
        path_argument(
            metavar="OUT_DIR", help="The original: a new or empty folder, or one to resume."
        ),
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
            "--overwrite", help="Start afresh: delete what an unfinished fp4moe restore left."
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

    with running(quiet=quiet, direct_io=direct_io, threads=threads) as options:
        report = restore(converted_dir, out_dir, verify=verify, overwrite=overwrite, **options)
    warn(report.warnings)
    print_result(report.as_json() if as_json else [restored_table(report)])


@app.command("inspect")
@fails_plainly
def inspect_command(
    model: Annotated[
        str,
        argument(
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
    print_result(inspection.as_json() if as_json else inspection_tables(inspection))


@app.command("push")
@fails_plainly
def push_command(
    out_dir: Annotated[Path, path_argument(metavar="OUT_DIR", help="A converted checkpoint.")],
    repo_id: Annotated[
        str,
        argument(
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

    with running(quiet=quiet, direct_io=direct_io, threads=threads) as options:
        report = push(out_dir, repo_id, private=private, **options)
    warn(report.warnings)
    print_result(report.as_json() if as_json else [pushed_table(report)])
