"""The whole conversion, in order: headers, plan, checks, shards, the files beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from . import defaults
from .converted_folder import open_converted
from .execution.dropping import Dropping, remaining
from .execution.forecast import forecast, growth
from .execution.output_folder import Opened, OutputFolder, Writing
from .execution.scatter import OnFilled, WriteRequest, scatter
from .execution.surroundings import write_surroundings
from .execution.work import Conversion
from .format.contract import TensorSpec
from .format.manifest import ShardRecord
from .layouts.base import Move, RowOrder, source_ranges
from .plan import Plan, PlannedShard
from .preparation import preview
from .progress import OnNote, OnProgress, RunOptions, tell, track
from .prospects import Prospects
from .report import RunReport, peak_rss
from .storage.buffers import Bytes
from .storage.header import spec_nbytes
from .storage.local import LocalReader
from .storage.prefetch import open_prefetching
from .storage.reader import Opener, Store, keep_open, read_bytes
from .storage.remote import Fetched, RemoteStore, fetched_from
from .verification import Origin, check_data, damaged_shards
from .verification import verify as verify_folder

_SOURCE = "source"
_RECORD = "checksums on record, because shards of the source are gone"
_PARTLY = "source as far as it was still there, otherwise the checksums on record"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport(RunReport):
    """What a conversion did."""

    passed_layers: dict[str, str]
    """Expert layers left as they were, with the reason."""
    prospects: Prospects
    flashinfer: str
    """The FlashInfer release whose row order was written."""
    flashinfer_installed: bool
    """Whether that release is installed here; otherwise it is the newest on record."""
    row_order: str
    """Its fingerprint."""
    dropped_shards: int
    """Shards of the source that this run has deleted."""
    dropped_bytes: int
    """Of these."""
    verified_with: str | None
    """What every byte of the result was compared with; None if that was not asked for."""
    fetched: Fetched | None
    """What came over the network, where the source is there."""

    @property
    def serve(self) -> dict[str, str]:
        """The command that serves the result, by engine."""
        return self.prospects.commands(str(self.out_dir))

    def as_json(self) -> dict[str, Any]:
        return {
            # Not super(): slots make a new class of this one.
            **RunReport.as_json(self),
            "passed_layers": self.passed_layers,
            **self.prospects.as_json(),
            "serve": self.serve,
            "flashinfer": self.flashinfer,
            "flashinfer_installed": self.flashinfer_installed,
            "row_order": self.row_order,
            "dropped_shards": self.dropped_shards,
            "dropped_bytes": self.dropped_bytes,
            "verified_with": self.verified_with,
            "fetched": None if self.fetched is None else self.fetched.as_json(),
        }


WriteShards: TypeAlias = Callable[[Conversion, WriteRequest, RunOptions], None]
"""Fills the temporary files of a conversion's shards; errors are those of `scatter`. Moves need not
be told of."""


def write_here(work: Conversion, request: WriteRequest, options: RunOptions) -> None:
    """`WriteShards` in this process."""
    moves = (
        move
        for shard in request.shards
        for number, move in enumerate(shard.moves)
        if number not in request.filled.get(shard.name, {})
    )
    if not isinstance(work.store, RemoteStore):
        # Reading a local source again is faster than comparing checksums.
        request = replace(request, on_move=None)
    direct = options.direct_io
    with open_prefetching(work.store, source_ranges(moves), direct=direct) as sources:
        scatter(
            request,
            open_source=sources.open,
            direct=direct,
            threads=options.threads,
            on_stop=sources.stop,
        )


def convert(
    model_dir: str | Path | Store,
    out_dir: str | Path,
    *,
    max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES,
    direct_io: bool = True,
    threads: int = defaults.THREADS,
    verify: bool = False,
    overwrite: bool = False,
    drop_source: bool = False,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
) -> ConversionReport:
    """Convert a checkpoint with NVFP4 experts to the layout of FlashInfer's TRT-LLM MoE kernels.

    All checks that headers and sizes allow come before the first byte. After a failure, or a kill
    at any moment, the same call keeps the shards that are finished and ends with the same bytes.
    Until it does, the folder has no index.

    Args:
        model_dir: a model folder, or what else `open_store` can open: a model on the Hub, a URL.
        out_dir: empty, not there yet, or left by an earlier run.
        max_shard_nbytes: no output file is larger, unless a single tensor is.
        direct_io: bypass the page cache where the file systems allow.
        threads: workers that read, arrange and write.
        verify: read every byte of finished shards before they are kept and, afterwards, of the
            result, which is compared with the source.
        overwrite: start afresh and delete what earlier runs left in ``out_dir``.
        drop_source: delete each shard of the source, without asking, once all that was converted
            from it has been read back. With ``verify`` it is compared with the source before that.
            From then on ``out_dir`` has the only copy; `restoration.restore` is the way back.
        on_progress: called after each few MiB, from any thread, one call at a time.
        on_note: told, in words, what of an earlier run is kept and what is written again.

    Raises:
        CheckpointError: the source cannot be converted, or has changed during the run.
        OutputError: ``out_dir`` cannot be used, or writing failed.
        RowOrderError: the installed FlashInfer orders rows differently.
        VerifyError: ``verify`` found a difference.
    """
    return convert_with(
        RunOptions(direct_io=direct_io, threads=threads, on_progress=on_progress, on_note=on_note),
        model_dir,
        out_dir,
        max_shard_nbytes=max_shard_nbytes,
        verify=verify,
        overwrite=overwrite,
        drop_source=drop_source,
    )


def convert_with(
    options: RunOptions,
    model_dir: str | Path | Store,
    out_dir: str | Path,
    *,
    max_shard_nbytes: int,
    verify: bool,
    overwrite: bool = False,
    drop_source: bool = False,
    write_shards: WriteShards = write_here,
    must_be_complete: bool = False,
) -> ConversionReport:
    """`convert`, by any means.

    Args:
        write_shards: does it, on this machine or on others.
        must_be_complete: all shards must be there; it is an error if one would have to be written.

    The other arguments, and the errors, are those of `convert`.
    """
    started = time.perf_counter()
    out_dir = Path(out_dir)

    foreseen = preview(model_dir, out_dir, max_shard_nbytes=max_shard_nbytes)
    work, plan, store = foreseen.work, foreseen.work.plan, foreseen.work.store
    dropping = Dropping(work) if drop_source and work.is_there else None
    with OutputFolder(
        out_dir, source=store.local_path, can_overwrite=not must_be_complete
    ) as opened:
        written = fill(
            opened,
            work,
            options,
            verify=verify,
            overwrite=overwrite,
            dropping=dropping,
            write_shards=write_shards,
            must_be_complete=must_be_complete,
        )
        row_order = written.row_order
        # What has gone meanwhile is read from the record.
        checkpoint = replace(work.checkpoint, store=remaining(store, out_dir))
        warnings = [*foreseen.warnings, *_value_warnings(plan, out_dir)]

        # The files beside them, and the reading back.
        done = written.writing.finish(
            lambda records: write_surroundings(
                checkpoint, plan, out_dir, row_order=row_order, shards=records
            )
        )
        seconds = time.perf_counter() - started
        verify_seconds, verified_with = None, None
        with done.rejected_if_wrong():
            if verify and dropping:  # each shard has been compared before that
                open_converted(out_dir).shards()
                verify_seconds = written.check_seconds
                verified_with = _PARTLY if work.gone else _SOURCE
            elif verify:
                verified_with = _RECORD if work.gone else _SOURCE
                verify_seconds = verify_folder(
                    out_dir,
                    None if work.gone else store,
                    direct_io=options.direct_io,
                    threads=options.threads,
                    on_progress=options.on_progress,
                ).seconds
    return ConversionReport(
        out_dir=out_dir,
        layers=len(plan.layers),
        passed_layers=plan.passed_reasons,
        tensors_in=plan.tensors_in,
        tensors_out=plan.tensors_out,
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
        bytes_written=written.nbytes,
        shards=len(plan.shards),
        shards_kept=written.kept,
        other_files=len(work.other_files),
        other_bytes=sum(work.copied_nbytes.values()),
        seconds=seconds,
        peak_rss=peak_rss(),
        prospects=foreseen.prospects,
        flashinfer=row_order.flashinfer,
        flashinfer_installed=row_order.installed,
        row_order=row_order.fingerprint,
        dropped_shards=dropping.count if dropping else 0,
        dropped_bytes=dropping.nbytes if dropping else 0,
        verified_with=verified_with,
        fetched=fetched_from(store),
        warnings=warnings,
        verify_seconds=verify_seconds,
    )


@dataclass(frozen=True, slots=True)
class Filled:
    """The shards of a plan are there."""

    writing: Writing
    row_order: RowOrder
    nbytes: int
    """Of the shards that this run has written."""
    kept: int
    """Shards that were there from an earlier run."""
    check_seconds: float
    """Wall time of reading shards back before their sources were deleted."""


def fill(
    opened: Opened,
    work: Conversion,
    options: RunOptions,
    *,
    verify: bool,
    overwrite: bool = False,
    dropping: Dropping | None = None,
    write_shards: WriteShards = write_here,
    must_be_complete: bool = False,
) -> Filled:
    """Write the shards of a plan that are not there yet. Arguments and errors are those of
    `convert_with`."""
    out_dir, plan = opened.folder.path, work.plan
    # What earlier runs left, and whether it may stay.
    planned = opened.plan(work, overwrite=overwrite)

    def open_source() -> Opener:
        # Anew each time: a file that is still open when it is deleted makes no room.
        return keep_open(partial(work.store.open, direct=options.direct_io))

    def origins_of(moves: Mapping[str, Sequence[Move]]) -> dict[str, Origin]:
        opener = open_source()
        return {name: Origin(own, opener) for name, own in moves.items()}

    if verify or dropping:
        planned.redo(
            damaged_shards(
                out_dir,
                planned.records if verify or not dropping else dropping.concerned(planned.records),
                origins=origins_of(dropping.comparable) if dropping and verify else {},
                options=options,
            )
        )
    if must_be_complete:
        planned.require_all(plan.max_shard_nbytes, verify=verify)
    # Before anything is deleted: what cannot be written again stays.
    row_order = plan.layout.authority(plan.geometries.values())

    needed = None
    if dropping and dropping.frees_room_for(out_dir):
        needed = growth(plan, dropping.on_disk, planned.kept)
    writing = planned.start(needed=needed)
    tell(planned.notes(), options.on_note)
    to_write = [shard for shard in plan.shards if shard.name not in planned.kept]
    nbytes = sum(shard.nbytes for shard in to_write)
    moved = nbytes - sum(len(shard.header) for shard in to_write)
    tell_progress = track("converting", moved + (nbytes if dropping else 0), options.on_progress)

    def on_bytes(item: str, nbytes: int) -> None:
        tell_progress(plan.layer_of.get(item, item), nbytes)

    def write(shards: Sequence[PlannedShard], on_filled: OnFilled) -> None:
        request = WriteRequest(
            shards, out_dir, on_bytes, on_filled, writing.note_move, planned.filled
        )
        write_shards(work, request, options)

    def check(path: Path, record: ShardRecord, moves: Sequence[Move]) -> None:
        origin = Origin(moves, open_source()) if verify else None
        check_data(path, record, origin, options, on_bytes=on_bytes)

    check_seconds = 0.0
    if dropping:
        tell([str(forecast(work, planned.kept))], options.on_note)
        check_seconds = dropping.write_and_drop(planned, writing, write, check)
    elif to_write:
        write(to_write, writing.finish_shard)
    return Filled(writing, row_order, nbytes, len(planned.kept), check_seconds)


def _value_warnings(plan: Plan, out_dir: Path) -> Iterator[str]:
    """What the layout has to say about the values it wrote."""
    shard_of = {name: shard for shard in plan.shards for name in shard.tensors}

    def read(tensor: TensorSpec) -> Bytes:
        shard = shard_of[tensor.name]
        reader = LocalReader(out_dir / shard.name)
        nbytes = spec_nbytes(tensor.dtype, tensor.shape)
        return np.frombuffer(read_bytes(reader, shard.offsets[tensor.name], nbytes), np.uint8)

    for layer in plan.layers:
        yield from plan.layout.value_warnings(layer.prefix, layer.geometry, read)
