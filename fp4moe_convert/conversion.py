"""The whole conversion, in order: headers, plan, checks, shards, the files beside them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import defaults, layouts
from .errors import CheckpointError, OutputError, VerifyError
from .execution.output_folder import OutputFolder, Planned
from .execution.scatter import scatter
from .execution.stock import Work
from .format.contract import TensorSpec
from .format.files import GENERATED, JOURNAL_NAME, PARTIAL_SUFFIX
from .plan import Plan, make_plan
from .progress import OnProgress, track
from .prospects import Prospects, prospects
from .source.checkpoint import Checkpoint, open_checkpoint
from .source.completeness import remarks
from .source.experts import require_layers
from .source.quantization import require_nvfp4
from .storage.buffers import Bytes
from .storage.header import spec_nbytes
from .storage.local import LocalFolder, LocalReader
from .storage.reader import keep_open, read_bytes
from .verification import damaged_shards
from .verification import verify as verify_folder

OnNote = Callable[[str], None]
"""Told something worth knowing, in words."""


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did."""

    out_dir: Path
    layers: int
    passed_layers: dict[str, str]
    """Expert layers left as they were, with the reason."""
    tensors_in: int
    tensors_out: int
    bytes_in: int
    bytes_out: int
    bytes_written: int
    """Of ``bytes_out``: the shards that were not there from an earlier run."""
    shards: int
    shards_kept: int
    """Of ``shards``: finished by an earlier run."""
    other_files: int
    """Copied as they are: tokenizer, code, whatever lies in sub-folders."""
    other_bytes: int
    """Of these."""
    seconds: float
    """Wall time of the conversion, from the first header to the index."""
    peak_rss: int
    """Bytes; of the whole process so far."""
    prospects: Prospects
    flashinfer: str
    """The FlashInfer release whose row order was written."""
    flashinfer_installed: bool
    """Whether that release is installed here; otherwise it is the newest on record."""
    row_order: str
    """Its fingerprint."""
    warnings: list[str]
    verify_seconds: float | None
    """Wall time of reading the result back; None if that was not asked for."""

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_written / self.seconds

    @property
    def serve(self) -> dict[str, str]:
        """The command that serves the result, by engine."""
        return self.prospects.commands(str(self.out_dir))

    def as_json(self) -> dict[str, Any]:
        return {
            "out_dir": str(self.out_dir),
            "layers": self.layers,
            "passed_layers": self.passed_layers,
            "tensors_in": self.tensors_in,
            "tensors_out": self.tensors_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "bytes_written": self.bytes_written,
            "shards": self.shards,
            "shards_kept": self.shards_kept,
            "other_files": self.other_files,
            "other_bytes": self.other_bytes,
            "seconds": round(self.seconds, 3),
            "bytes_per_second": round(self.bytes_per_second),
            "peak_rss_bytes": self.peak_rss,
            **self.prospects.as_json(),
            "serve": self.serve,
            "flashinfer": self.flashinfer,
            "flashinfer_installed": self.flashinfer_installed,
            "row_order": self.row_order,
            "warnings": self.warnings,
            "verify_seconds": None
            if self.verify_seconds is None
            else round(self.verify_seconds, 3),
        }


@dataclass(frozen=True)
class Preview:
    """What a conversion will do, from headers and config.json. Nothing has been written."""

    work: Work
    prospects: Prospects
    warnings: list[str]
    """Those that need no tensor."""

    def as_json(self, out_dir: Path) -> dict[str, Any]:
        """The plan and what else there is to say, if the result lies in ``out_dir``."""
        return {
            **self.work.plan.as_json(),
            "other_files": len(self.work.copied),
            "other_bytes": sum(self.work.copied.values()),
            **self.prospects.as_json(),
            "serve": self.prospects.commands(str(out_dir)),
            "warnings": self.warnings,
        }


def prepare(
    model_dir: Path, *, max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES
) -> tuple[Checkpoint, Plan]:
    """Open a checkpoint and plan its conversion; reads headers, writes nothing.

    Raises:
        CheckpointError: it cannot be converted, and why.
    """
    work = preview(model_dir, max_shard_nbytes=max_shard_nbytes).work
    return work.checkpoint, work.plan


def preview(model_dir: str | Path, *, max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES) -> Preview:
    """As `prepare`, with all that a conversion would say beforehand.

    Raises:
        CheckpointError: it cannot be converted, and why.
    """
    checkpoint = open_checkpoint(LocalFolder(Path(model_dir)))
    require_nvfp4(checkpoint)
    plan = make_plan(checkpoint, layouts.DEFAULT, max_shard_nbytes=max_shard_nbytes)
    _check_folders(checkpoint, plan)
    require_layers(checkpoint, plan.layers, plan.passed)
    warnings = remarks(checkpoint, plan.geometries)
    outlook = prospects(checkpoint, checkpoint.quantization or {}, plan.geometries.values())
    outlook.require_one(checkpoint.location)
    return Preview(Work(checkpoint, plan), outlook, warnings)


def convert(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES,
    direct_io: bool = True,
    threads: int = defaults.THREADS,
    verify: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
) -> ConversionReport:
    """Convert a checkpoint with NVFP4 experts to the layout of FlashInfer's TRT-LLM MoE kernels.

    All checks that headers and sizes allow come before the first byte. After a failure, or a kill
    at any moment, the same call keeps the shards that are finished and ends with the same bytes.
    Until it does, the folder has no index.

    Args:
        model_dir: a local model folder; a Hub cache snapshot will do.
        out_dir: empty, not there yet, or left by an earlier run.
        max_shard_nbytes: no output file is larger, unless a single tensor is.
        direct_io: bypass the page cache where the file systems allow.
        threads: workers that read, arrange and write.
        verify: read every byte of finished shards before they are kept and, afterwards, of the
            result, which is compared with the source.
        overwrite: start afresh and delete what earlier runs left in ``out_dir``.
        on_progress: called after each few MiB, from any thread, one call at a time.
        on_note: told, in words, what of an earlier run is kept and what is written again.

    Raises:
        CheckpointError: the source cannot be converted, or has changed during the run.
        OutputError: ``out_dir`` cannot be used, or writing failed.
        RowOrderError: the installed FlashInfer orders rows differently.
        VerifyError: ``verify`` found a difference.
    """
    started = time.perf_counter()
    model_dir, out_dir = Path(model_dir), Path(out_dir)

    foreseen = preview(model_dir, max_shard_nbytes=max_shard_nbytes)
    work, plan = foreseen.work, foreseen.work.plan
    store = work.checkpoint.store
    with OutputFolder(out_dir, source=store.local_path) as opened:
        # What earlier runs left, and whether it may stay.
        planned = opened.plan(work, overwrite=overwrite)
        if verify:
            damaged = damaged_shards(
                out_dir, planned.records, direct_io=direct_io, threads=threads,
                on_progress=on_progress,
            )  # fmt: skip
            planned.redo(damaged)
        # Before anything is deleted: what cannot be written again stays.
        row_order = plan.layout.authority(plan.geometries.values())

        # The shards.
        writing = planned.start()
        _tell(planned, on_note)
        on_bytes = track(
            "converting",
            sum(shard.nbytes - len(shard.header) for shard in writing.shards_to_write),
            on_progress,
        )
        scatter(
            writing.shards_to_write,
            out_dir,
            open_source=keep_open(partial(store.open, direct=direct_io)),
            direct=direct_io,
            threads=threads,
            on_bytes=lambda tensor, n: on_bytes(plan.layer_of.get(tensor, tensor), n),
            on_filled=writing.finish_shard,
        )
        warnings = [*foreseen.warnings, *_remarks(plan, out_dir)]

        # The files beside them, and the reading back.
        done = writing.finish(row_order)
        seconds = time.perf_counter() - started
        verified = None
        if verify:
            try:
                verified = verify_folder(
                    out_dir, model_dir, direct_io=direct_io, threads=threads,
                    on_progress=on_progress,
                )  # fmt: skip
            except VerifyError:
                with suppress(OutputError):  # the difference is what has to be reported
                    done.reject()
                raise
    return ConversionReport(
        out_dir=out_dir,
        layers=len(plan.layers),
        passed_layers=plan.passed_reasons,
        tensors_in=plan.tensors_in,
        tensors_out=plan.tensors_out,
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
        bytes_written=sum(shard.nbytes for shard in writing.shards_to_write),
        shards=len(plan.shards),
        shards_kept=len(planned.kept),
        other_files=len(work.copied),
        other_bytes=sum(work.copied.values()),
        seconds=seconds,
        peak_rss=peak_rss(),
        prospects=foreseen.prospects,
        flashinfer=row_order.flashinfer,
        flashinfer_installed=row_order.installed,
        row_order=row_order.fingerprint,
        warnings=warnings,
        verify_seconds=verified.seconds if verified else None,
    )


def _check_folders(checkpoint: Checkpoint, plan: Plan) -> None:
    """A file of the output and a folder of the source may want the same name."""
    files = {shard.name for shard in plan.shards}
    files |= {*GENERATED, JOURNAL_NAME, *checkpoint.other_files}
    for name in checkpoint.other_files:
        folder = Path(name).parts[0]
        if folder != name and folder.removesuffix(PARTIAL_SUFFIX) in files:
            raise CheckpointError(f"{name}: its folder has the name of a file of the output")


def _tell(planned: Planned, on_note: OnNote | None) -> None:
    if on_note is None:
        return
    for name, why in planned.to_redo.items():
        on_note(f"{name}: written again: {why}")
    for name in sorted(planned.users):
        on_note(f"{name}: left as it is; no engine reads it")
    if planned.kept:
        is_whole = planned.folder.has_index and not planned.shards_to_write
        what = "already finished" if is_whole else "resuming"
        kept, count = len(planned.kept), len(planned.work.plan.shards)
        on_note(f"{what}: {kept} of {count} shards were finished before and are kept")


def _remarks(plan: Plan, out_dir: Path) -> Iterator[str]:
    """What the layout has to say about the values it wrote."""
    shard_of = {name: shard for shard in plan.shards for name in shard.tensors}

    def read(tensor: TensorSpec) -> Bytes:
        shard = shard_of[tensor.name]
        reader = LocalReader(out_dir / shard.name)
        nbytes = spec_nbytes(tensor.dtype, tensor.shape)
        return np.frombuffer(read_bytes(reader, shard.offsets[tensor.name], nbytes), np.uint8)

    for layer in plan.layers:
        yield from plan.layout.remarks(layer.prefix, layer.geometry, read)


def peak_rss() -> int:
    """The most memory this process has had resident, in bytes."""
    # getrusage would count what the parent had when it started us.
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024
