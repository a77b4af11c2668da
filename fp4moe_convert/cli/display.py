"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from ..ci import JobReport
from ..conversion import ConversionReport
from ..errors import printable
from ..execution.forecast import source_shards
from ..format.contract import Geometry
from ..inspection import Inspection
from ..parts import PartReport
from ..preparation import Preview
from ..progress import OnProgress, Progress
from ..prospects import Prospects
from ..report import RunReport, Written
from ..storage.remote import Fetched
from ..verification import Verified
from .process import when_interrupted

if TYPE_CHECKING:  # it takes huggingface_hub along
    from ..publication import PushReport

LOG_INTERVAL = 10.0
"""Seconds between two lines of a log."""
FORESEEABLE = 0.01
"""Of a phase, from which on a log says how long the rest takes."""


@contextmanager
def progress_on(stream: TextIO, *, quiet: bool) -> Iterator[OnProgress | None]:
    """Show progress on ``stream``: a bar on a terminal, a plain line now and then in a log."""
    console = Console(file=stream, highlight=False, emoji=False)
    if quiet:
        yield None
    elif console.is_terminal and not console.is_dumb_terminal:  # where nothing can be redrawn
        bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        line = Text("", style="dim", no_wrap=True, overflow="ellipsis")
        # Drawing takes the interpreter's lock from the workers: a few times a second is enough.
        live = Live(Group(bar, line), console=console, refresh_per_second=4, transient=True)
        with live:
            when_interrupted(clean_up=live.stop)
            yield bar_updater(bar, line)
    else:
        yield log_writer(console)


def bar_updater(bar: Bar, line: Text) -> OnProgress:
    """Shows one phase at a time. A phase may come back."""
    task: TaskID | None = None
    shown: Progress | None = None

    def on_progress(progress: Progress) -> None:
        nonlocal task, shown
        if task is None or _begins(progress, after=shown):
            if task is not None:
                bar.remove_task(task)
            task = bar.add_task(progress.phase, total=progress.total)
        bar.update(task, completed=progress.done)
        line.plain = printable(progress.item)
        shown = progress

    return on_progress


def _begins(progress: Progress, *, after: Progress | None) -> bool:
    """Whether a phase begins: another one, or the same once more."""
    return after is None or progress.phase != after.phase or progress.done < after.done


def log_writer(console: Console, clock: Callable[[], float] = time.monotonic) -> OnProgress:
    """Writes a line at the start and the end of each phase and every `LOG_INTERVAL` between."""
    started = last_line = 0.0
    last: Progress | None = None

    def on_progress(progress: Progress) -> None:
        nonlocal started, last_line, last
        now = clock()
        first, last = _begins(progress, after=last), progress
        if first:
            started = now
        seconds = now - started
        left = progress.total - progress.done
        if not first and left and now - last_line < LOG_INTERVAL:
            return
        last_line = now
        share = progress.done / progress.total if progress.total else 1  # files may all be empty
        words = [
            f"{progress.phase} {share:4.0%}",
            f"{progress.done / 1e9:.2f} of {progress.total / 1e9:.2f} GB",
        ]
        if seconds > 0 and progress.done:
            rate = progress.done / seconds
            words.append(_rate(rate))
            if share >= FORESEEABLE:
                words.append(f"{left / rate:.0f} s left" if left else f"{seconds:.1f} s")
        words.append(progress.item)
        console.print(printable(", ".join(words)), markup=False, soft_wrap=True)

    return on_progress


def conversion_tables(report: ConversionReport | PartReport) -> Iterator[Table]:
    """What a conversion did, or the run of a part."""
    if isinstance(report, PartReport):
        yield _part_table(report)
        if report.whole:
            yield report_table(report.whole)
    else:
        yield report_table(report)


def report_table(report: ConversionReport) -> Table:
    """What a conversion did, and what to do with it."""
    return _table(
        {
            "converted": _layers(report.layers),
            "passed through": _passed(report.passed_layers),
            **_written(report, report.verified_with or ""),
            "dropped": f"{source_shards(report.dropped_shards)}, {report.dropped_bytes:,} bytes"
            if report.dropped_shards
            else "",
            "fetched": "" if report.fetched is None else _fetched(report.fetched),
            "row order": f"{report.row_order} ({_release(report)})",
            **_prospects(report.prospects, report.serve),
        }
    )


def job_table(job: JobReport) -> Table:
    """What a job found or did."""
    table = report_table(job.conversion)
    what = "unchanged" if job.unchanged else "converted"
    before = " before" if job.conversion.verify_seconds is None else ""
    table.add_row("job", f"{what}, verified{before}")
    table.add_row("report", _cell(str(job.path)))
    return table


def _part_table(share: PartReport) -> Table:
    """What the run of a part did."""
    waits = "" if share.whole else "for another run, which finishes the folder"
    if share.shards_missing:
        waits = f"for {share.shards_missing} shards of other parts"
    return _table(
        {
            "written": f"{share.part}: {share.shards:,} shards, {share.bytes_out:,} bytes",
            **_effort(share),
            "waits": waits,
        }
    )


def restored_table(report: RunReport) -> Table:
    """What a restoration did."""
    rows = {"restored": _layers(report.layers), **_written(report, "converted checkpoint")}
    return _table(rows)


def _written(report: RunReport, source: str) -> dict[str, str]:
    return {
        "tensors": f"{report.tensors_in:,} -> {report.tensors_out:,}",
        "bytes": f"{report.bytes_in:,} -> {report.bytes_out:,}",
        "other files": _files(report.other_files, report.other_bytes),
        **_effort(report),
        "verified": ""
        if report.verify_seconds is None
        else f"every byte against the {source}, {report.verify_seconds:.1f} s",
    }


def _effort(report: Written) -> dict[str, str]:
    """What was left to do, and what it took."""
    rate = f", {_rate(report.bytes_per_second)}" if report.bytes_written else ""
    return {
        "kept": f"{report.shards_kept} of {report.shards} shards, finished by an earlier run"
        if report.shards_kept
        else "",
        "time": f"{report.seconds:.1f} s{rate}",
        "peak memory": f"{report.peak_rss / 1e6:.0f} MB",
    }


def _release(report: ConversionReport) -> str:
    note = "" if report.flashinfer_installed else ", the newest on record; none is installed"
    return f"flashinfer {report.flashinfer}{note}"


def pushed_table(report: PushReport) -> Table:
    """What a push did."""
    rate = f", {_rate(report.bytes_per_second)}" if report.uploaded_files else ""
    return _table(
        {
            "pushed": report.url,
            "commit": report.commit,
            "files": f"{report.files:,}, {report.nbytes:,} bytes",
            "uploaded": f"{report.uploaded_files:,}, {report.uploaded_nbytes:,} bytes"
            if report.uploaded_files
            else "nothing: all of it was there",
            "time": f"{report.seconds:.1f} s{rate}",
        }
    )


def verified_table(verified: Verified) -> Table:
    """What was compared."""
    against = "the manifest's checksums"
    if verified.source is not None:
        against += f", and every byte with {verified.source}"
    return _table(
        {
            "verified": against,
            "files": f"{verified.files:,}",
            "tensors": f"{verified.tensors:,}",
            "bytes": f"{verified.nbytes:,}",
            "left aside": "\n".join(
                ["what no engine reads:", *verified.documentation] if verified.documentation else []
            ),
            "time": f"{verified.seconds:.1f} s, {_rate(verified.nbytes / verified.seconds)}",
        }
    )


def preview_tables(preview: Preview, out_dir: Path) -> Iterator[Table]:
    """What a conversion to ``out_dir`` would do."""
    plan, copied = preview.work.plan, preview.work.copied_nbytes
    yield _table(
        {
            "only": f"{preview.part}, {len(plan.shards)} shards" if preview.part else "",
            "would convert": _layers(len(plan.layers)),
            "pass through": _passed(plan.passed_reasons),
            "tensors": f"{plan.tensors_in:,} -> {plan.tensors_out:,}",
            "bytes": f"{plan.bytes_in:,} -> {plan.bytes_out:,}",
            "other files": _files(len(copied), sum(copied.values())),
            **_to_fetch(preview),
            **({} if preview.dropping is None else {"disk": str(preview.dropping)}),
            **_prospects(preview.prospects, preview.prospects.commands(str(out_dir))),
        }
    )
    yield _geometry_table(plan.geometries, plan.families)
    shards = Table("shard", box=box.SIMPLE_HEAD)
    shards.add_column("bytes", justify="right")
    shards.add_column("tensors", justify="right")
    shards.add_column("expert layers")
    for shard in plan.shards:
        prefixes = {plan.layer_of.get(name) for name in shard.tensors}
        held = [prefix for prefix in plan.geometries if prefix in prefixes]
        shards.add_row(
            _cell(shard.name), f"{shard.nbytes:,}", str(len(shard.tensors)), _cell("\n".join(held))
        )
    yield shards


def _to_fetch(preview: Preview) -> dict[str, str]:
    """Where the source is on the network: what a conversion costs there, and what this has cost."""
    if (fetched := preview.fetched) is None:
        return {}
    nbytes, rate = preview.to_fetch_nbytes or 0, fetched.bytes_per_second
    return {
        "to fetch": f"{nbytes:,} bytes, {nbytes / rate / 60:,.0f} min at the {_rate(rate)} "
        "at which the headers came; larger reads are faster",
        "disk": f"{preview.to_write_nbytes:,} bytes, nothing of the source",
        "fetched": f"{_fetched(fetched)}, headers and configurations",
    }


def _fetched(fetched: Fetched) -> str:
    return f"{fetched.nbytes:,} bytes, {fetched.requests:,} requests, {fetched.seconds:.1f} s"


def inspection_tables(inspection: Inspection) -> Iterator[Table]:
    """What a folder holds."""
    state = inspection.state + (f": {inspection.reason}" if inspection.reason else "")
    fingerprint = f"{inspection.row_order} (flashinfer {inspection.flashinfer})"
    yield _table(
        {
            "folder": inspection.folder,
            "state": state,
            "quantization": inspection.quantization,
            "shards": f"{inspection.shards:,}",
            "tensors": f"{inspection.tensors:,}",
            "bytes": f"{inspection.nbytes:,}",
            "by dtype": ", ".join(f"{k} {v:,}" for k, v in inspection.dtypes.items()),
            "converted" if inspection.state == "converted" else "to convert": _layers(
                len(inspection.layers)
            ),
            "passed through": _passed(inspection.passed_layers),
            "warnings": "\n".join(inspection.warnings),
            **_prospects(inspection.prospects, inspection.serve),
            "row order": fingerprint if inspection.row_order else "",
        }
    )
    if inspection.layers:
        yield _geometry_table(inspection.layers, inspection.families)


def _table(rows: Mapping[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows.items():
        if value:
            table.add_row(label, _cell(value))
    return table


def _cell(value: str) -> Text:
    """A Text is not read as markup."""
    return Text(printable(value))


def _geometry_table(layers: Mapping[str, Geometry], families: Mapping[str, str]) -> Table:
    table = Table("layer", box=box.SIMPLE_HEAD)
    for title in ("experts", "hidden", "intermediate"):
        table.add_column(title, justify="right")
    if families:
        table.add_column("tensors")
    for prefix, geometry in layers.items():
        sizes = (geometry.experts, geometry.hidden, geometry.intermediate)
        stored = [_cell(families[prefix])] if families else []
        table.add_row(_cell(prefix), *map(str, sizes), *stored)
    return table


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second < 1e8:
        return f"{bytes_per_second / 1e6:.1f} MB/s"
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def _layers(count: int) -> str:
    return f"{count} MoE layer{'' if count == 1 else 's'}"


def _passed(layers: Mapping[str, str]) -> str:
    return "\n".join(f"{prefix}: {reason}" for prefix, reason in layers.items())


def _files(count: int, nbytes: int) -> str:
    return f"{count:,}, {nbytes:,} bytes, copied as they are" if count else ""


def _prospects(prospects: Prospects, commands: Mapping[str, str]) -> dict[str, str]:
    sizes = prospects.tensor_parallel.items()
    note = ["with this package installed beside the engine:"] if commands else []
    return {
        "tensor parallel": "; ".join(f"{name} {', '.join(map(str, s))}" for name, s in sizes),
        "serve": "\n".join([*note, *commands.values()]),
        "cannot serve": "\n".join(prospects.cannot_serve.values()),
        "not tried": "\n".join(prospects.not_tried.values()),
    }
