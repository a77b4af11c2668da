"""The whole conversion, in order: headers, plan, checks, shards, the files around them."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import defaults
from .blockio import ReadFile, read_buffer
from .checkpoint import Checkpoint, open_checkpoint, require_nvfp4
from .contract import (
    CONFIG_NAME,
    INDEX_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    layer_tensors,
)
from .errors import CheckpointError, OutputError, VerifyError
from .manifest import finish
from .plan import Plan, PlannedShard, make_plan
from .progress import OnProgress, track
from .row_order import ask_flashinfer
from .scatter import scatter
from .verification import damaged_shards
from .verification import verify as verify_folder
from .workspace import Workspace

Argument = TypeVar("Argument")
Result = TypeVar("Result")

OnNote = Callable[[str], None]
"""Told something worth knowing, in words."""


@dataclass(frozen=True, slots=True)
class Report:
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
    seconds: float
    """Wall time of the conversion, from the first header to the index."""
    peak_rss: int
    """Bytes; of the whole process so far."""
    tensor_parallel: dict[str, list[int]]
    """Tensor-parallel sizes that each engine can serve."""
    flashinfer: str
    row_order: str
    warnings: list[str]
    verify_seconds: float | None
    """Wall time of reading the result back; None if that was not asked for."""

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_written / self.seconds

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
            "seconds": round(self.seconds, 3),
            "bytes_per_second": round(self.bytes_per_second),
            "peak_rss_bytes": self.peak_rss,
            "tensor_parallel": self.tensor_parallel,
            "flashinfer": self.flashinfer,
            "row_order": self.row_order,
            "warnings": self.warnings,
            "verify_seconds": None
            if self.verify_seconds is None
            else round(self.verify_seconds, 3),
        }


def prepare(
    model_dir: Path, *, max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES
) -> tuple[Checkpoint, Plan]:
    """Open a checkpoint and plan its conversion; reads headers, writes nothing.

    Raises:
        CheckpointError: it cannot be converted, and why.
    """
    checkpoint = open_checkpoint(model_dir)
    require_nvfp4(checkpoint)
    plan = make_plan(checkpoint, max_shard_nbytes=max_shard_nbytes)
    _check_folders(checkpoint, plan)
    if not plan.layers:
        reasons = "; ".join(f"{layer.prefix}: {layer.reason}" for layer in plan.passed[:3])
        raise CheckpointError(
            f"{model_dir}: has no layer with NVFP4 experts to convert"
            + (f" ({reasons})" if reasons else "")
        )
    return checkpoint, plan


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
) -> Report:
    """Convert a ModelOpt NVFP4 checkpoint to the layout of FlashInfer's TRT-LLM MoE kernels.

    All checks that headers and sizes allow come before the first byte. After a failure, or a kill
    at any moment, the same call takes up the shards that were finished and ends with the same
    bytes; until it does, the folder has no index.

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
        on_note: told, in words, what of an earlier run is kept and what is done again.

    Raises:
        CheckpointError: the source cannot be converted, or has changed meanwhile.
        OutputError: ``out_dir`` cannot be used, or writing failed.
        RowOrderError: the installed FlashInfer orders rows differently.
        VerifyError: ``verify`` found a difference.
    """
    started = time.perf_counter()
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    checkpoint, plan = prepare(model_dir, max_shard_nbytes=max_shard_nbytes)
    with Workspace(checkpoint, plan, out_dir, overwrite=overwrite) as workspace:
        # FlashInfer and torch take seconds to import. Bytes move meanwhile, under temporary
        # names: no shard gets its own before the answer is there.
        row_order = _in_background(ask_flashinfer, [layer.geometry for layer in plan.layers])
        if verify:
            workspace.redo(
                damaged_shards(
                    out_dir,
                    workspace.records,
                    direct_io=direct_io,
                    threads=threads,
                    on_progress=on_progress,
                )
            )
        if overwrite or workspace.redone:
            row_order.result()  # before a finished shard is deleted that may not be made again
        workspace.begin()
        _tell(workspace, plan, on_note)
        shards, records = workspace.shards_to_write, workspace.records
        to_move = sum(shard.nbytes - len(shard.header) for shard in shards)

        def seal(shard: PlannedShard, checksums: Mapping[str, str]) -> None:
            records[shard.name] = workspace.seal(shard, checksums)

        scatter(
            shards,
            out_dir,
            direct=direct_io,
            threads=threads,
            confirmation=row_order,
            on_move=track("converting", to_move, on_progress),
            on_synced=seal,
        )
        warnings = _warnings(checkpoint, plan, out_dir)
        workspace.finish()
        finish(
            checkpoint,
            plan,
            out_dir,
            row_order=row_order.result(),
            shards={shard.name: records[shard.name] for shard in plan.shards},
        )
        seconds = time.perf_counter() - started
        verified = None
        if verify:
            try:
                verified = verify_folder(
                    out_dir,
                    model_dir,
                    direct_io=direct_io,
                    threads=threads,
                    on_progress=on_progress,
                )
            except VerifyError:
                with suppress(OutputError):  # the difference is what is to be told
                    workspace.distrust()
                raise
    return Report(
        out_dir=out_dir,
        layers=len(plan.layers),
        passed_layers={layer.prefix: layer.reason for layer in plan.passed},
        tensors_in=plan.tensors_in,
        tensors_out=plan.tensors_out,
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
        bytes_written=sum(shard.nbytes for shard in shards),
        shards=len(plan.shards),
        shards_kept=len(workspace.kept),
        seconds=seconds,
        peak_rss=peak_rss(),
        tensor_parallel=plan.tensor_parallel,
        flashinfer=row_order.result().flashinfer,
        row_order=row_order.result().fingerprint,
        warnings=warnings,
        verify_seconds=verified.seconds if verified else None,
    )


def _check_folders(checkpoint: Checkpoint, plan: Plan) -> None:
    """A file of the output and a folder of the source may want the same name."""
    files = {shard.name for shard in plan.shards}
    files |= {CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, JOURNAL_NAME, *checkpoint.other_files}
    for name in checkpoint.other_files:
        folder = Path(name).parts[0]
        if folder != name and folder.removesuffix(PARTIAL_SUFFIX) in files:
            raise CheckpointError(f"{name}: its folder has the name of a file of the output")


def _tell(workspace: Workspace, plan: Plan, on_note: OnNote | None) -> None:
    if on_note is None:
        return
    for name, why in workspace.redone.items():
        on_note(f"{name}: done again: {why}")
    if workspace.kept:
        on_note(
            f"resuming: {len(workspace.kept)} of {len(plan.shards)} shards were finished before "
            "and are kept"
        )


def peak_rss() -> int:
    """The most memory this process has had resident, in bytes."""
    # getrusage would count what the parent had when it started us.
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


def _in_background(function: Callable[[Argument], Result], argument: Argument) -> Future[Result]:
    """Like an executor's ``submit``, but nobody waits for the thread when the process ends."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function(argument))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fp4moe-background", daemon=True).start()
    return future


def _warnings(checkpoint: Checkpoint, plan: Plan, out_dir: Path) -> list[str]:
    warnings = [f"{name}: {why}, left out" for name, why in checkpoint.left_out.items()]
    buffer = read_buffer(max(8 * layer.geometry.experts for layer in plan.layers))
    shard_of = {name: shard for shard in plan.shards for name in shard.tensors}
    for layer in plan.layers:
        tensors = layer_tensors(layer.prefix, layer.geometry)
        for tensor in (tensors.w13_weight_scale_2, tensors.w13_input_scale):
            shard = shard_of[tensor.name]
            file = ReadFile(out_dir / shard.name, direct=False)
            pairs = file.read(buffer, shard.offsets[tensor.name], 8 * layer.geometry.experts)
            gate, up = pairs.view("<f4").reshape(-1, 2).T
            if differing := int((gate != up).sum()):
                leaf = tensor.name.removeprefix(f"{layer.prefix}.w13_")
                warnings.append(
                    f"{layer.prefix}: gate and up {leaf} differ for {differing} of "
                    f"{layer.geometry.experts} experts; both are kept"
                )
    return warnings
