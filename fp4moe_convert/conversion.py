"""The whole conversion, in order: headers, plan, checks, shards, the files around them."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .blockio import ReadFile, partial_path, read_buffer
from .checkpoint import Checkpoint, open_checkpoint, require_nvfp4
from .contract import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, layer_tensors
from .errors import CheckpointError, OutputError, VerifyError, naming
from .manifest import finish
from .plan import DEFAULT_MAX_SHARD_NBYTES, Plan, make_plan
from .progress import OnProgress, track
from .row_order import ask_flashinfer
from .scatter import DEFAULT_THREADS, scatter
from .verification import verify as verify_folder

Argument = TypeVar("Argument")
Result = TypeVar("Result")


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
        return self.bytes_out / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "out_dir": str(self.out_dir),
            "layers": self.layers,
            "passed_layers": self.passed_layers,
            "tensors_in": self.tensors_in,
            "tensors_out": self.tensors_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
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
    model_dir: Path, *, max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES
) -> tuple[Checkpoint, Plan]:
    """Open a checkpoint and plan its conversion; reads headers, writes nothing.

    Raises:
        CheckpointError: it cannot be converted, and why.
    """
    checkpoint = open_checkpoint(model_dir)
    require_nvfp4(checkpoint)
    plan = make_plan(checkpoint, max_shard_nbytes=max_shard_nbytes)
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
    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES,
    direct_io: bool = True,
    threads: int = DEFAULT_THREADS,
    verify: bool = False,
    on_progress: OnProgress | None = None,
) -> Report:
    """Convert a ModelOpt NVFP4 checkpoint to the layout of FlashInfer's TRT-LLM MoE kernels.

    All checks that headers and sizes allow come before the first byte. After a failure the output
    folder holds nothing of this run.

    Args:
        model_dir: a local model folder; a Hub cache snapshot will do.
        out_dir: empty, or not there yet.
        max_shard_nbytes: no output file is larger, unless a single tensor is.
        direct_io: bypass the page cache where the file systems allow.
        threads: workers that read, arrange and write.
        verify: afterwards, read the result back and compare it with the source.
        on_progress: called after each few MiB, from any thread, one call at a time.

    Raises:
        CheckpointError: the source cannot be converted.
        OutputError: ``out_dir`` cannot be used, or writing failed.
        RowOrderError: the installed FlashInfer orders rows differently.
        VerifyError: ``verify`` found a difference.
    """
    started = time.perf_counter()
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    checkpoint, plan = prepare(model_dir, max_shard_nbytes=max_shard_nbytes)
    check_out_dir(checkpoint, plan, out_dir)

    # FlashInfer and torch take seconds to import. Bytes move meanwhile, under temporary names:
    # no shard gets its own before the answer is there.
    row_order = _in_background(ask_flashinfer, [layer.geometry for layer in plan.layers])
    created = not out_dir.exists()
    try:
        with naming(out_dir, OutputError):
            out_dir.mkdir(parents=True, exist_ok=True)
        checksums = scatter(
            plan,
            out_dir,
            direct=direct_io,
            threads=threads,
            confirmation=row_order,
            on_move=track("converting", plan.moved_nbytes, on_progress),
        )
        warnings = _warnings(checkpoint, plan, out_dir)
        finish(checkpoint, plan, out_dir, row_order=row_order.result(), checksums=checksums)
    except BaseException:
        _discard(checkpoint, plan, out_dir, folder_too=created)
        raise
    seconds = time.perf_counter() - started
    verify_seconds = None
    if verify:
        try:
            verify_seconds = verify_folder(
                out_dir, model_dir, direct_io=direct_io, threads=threads, on_progress=on_progress
            ).seconds
        except VerifyError:
            # Whatever is wrong with the folder, it must not look finished.
            (out_dir / INDEX_NAME).unlink(missing_ok=True)
            raise
    return Report(
        out_dir=out_dir,
        layers=len(plan.layers),
        passed_layers={layer.prefix: layer.reason for layer in plan.passed},
        tensors_in=plan.tensors_in,
        tensors_out=plan.tensors_out,
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
        seconds=seconds,
        peak_rss=peak_rss(),
        tensor_parallel=plan.tensor_parallel,
        flashinfer=row_order.result().flashinfer,
        row_order=row_order.result().fingerprint,
        warnings=warnings,
        verify_seconds=verify_seconds,
    )


def check_out_dir(checkpoint: Checkpoint, plan: Plan, out_dir: Path) -> None:
    """Refuse an output folder that is in the way or too small.

    Raises:
        OutputError: not a folder, not empty, equal to, inside or around the source, or on a file
            system without enough free space.
    """
    # realpath, because Path.resolve raises RuntimeError for a link to itself.
    source, target = Path(os.path.realpath(checkpoint.root)), Path(os.path.realpath(out_dir))
    if target == source or source in target.parents or target in source.parents:
        relation = (
            "is" if target == source else "is inside" if source in target.parents else "holds"
        )
        raise OutputError(f"{out_dir}: {relation} the source folder {checkpoint.root}")
    with naming(out_dir, OutputError):
        if out_dir.exists() and not out_dir.is_dir():
            raise OutputError(f"{out_dir}: is not a folder")
        if out_dir.is_dir() and any(out_dir.iterdir()):
            raise OutputError(f"{out_dir}: is not empty")
        existing = next(path for path in (target, *target.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        needed = plan.bytes_out + sum(
            (checkpoint.root / name).stat().st_size for name in checkpoint.other_files
        )
    if free < needed:
        raise OutputError(f"{out_dir}: needs {needed:,} bytes of free disk, there are {free:,}")


def peak_rss() -> int:
    """The most memory this process has had resident, in bytes."""
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


def _discard(checkpoint: Checkpoint, plan: Plan, out_dir: Path, *, folder_too: bool) -> None:
    """Remove what a failed run has written; nothing else can be in the folder."""
    names = [
        INDEX_NAME,
        CONFIG_NAME,
        MANIFEST_NAME,
        *(shard.name for shard in plan.shards),
        *checkpoint.other_files,
    ]
    for path in (out_dir / name for name in names):
        with suppress(OSError):  # the failure that led here is the one to tell of
            path.unlink(missing_ok=True)
            partial_path(path).unlink(missing_ok=True)
    folders = {parent for name in names for parent in (out_dir / name).parents}
    for folder in sorted(folders, reverse=True):
        if (out_dir in folder.parents or (folder == out_dir and folder_too)) and folder.is_dir():
            with suppress(OSError):  # somebody else's file is in it
                folder.rmdir()
