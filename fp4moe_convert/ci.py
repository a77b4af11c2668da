"""A conversion as a job that is repeated: verified once, and skipped while it is up to date."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from . import defaults
from .conversion import ConversionReport, convert
from .errors import CheckpointError, OutputError, naming
from .execution.folder_files import check_local, check_place
from .format.files import MANIFEST_NAME
from .format.manifest import FileIdentity, to_json
from .format.untrusted import decode
from .progress import Running
from .storage.copying import record_of
from .storage.durable import make_folder, partial_path, write_file
from .storage.local import LocalReader, files_below
from .storage.opening import open_store
from .storage.reader import Store, read_all

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .publication import PushReport

MAX_REPORT_NBYTES = 10_000_000


class VerifiedFolder(msgspec.Struct, frozen=True, rename="verified_{}".format):
    """A finished folder whose bytes a job has verified."""

    manifest: str
    """XXH3-128 of the manifest."""
    shards: dict[str, FileIdentity]
    """The same conversion always has the same manifest; these tell whether the bytes are those that
    were read."""

    @classmethod
    def of(cls, out_dir: Path) -> VerifiedFolder:
        """What would be on record of a folder as it is now.

        Raises:
            CheckpointError: there is no manifest, or a file cannot be read.
        """
        manifest = record_of(LocalReader(out_dir / MANIFEST_NAME)).checksum
        with naming(out_dir):
            shards = sorted(out_dir.glob("*.safetensors"))
            return cls(manifest, {path.name: FileIdentity.of(path.stat()) for path in shards})


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a job found or did."""

    model: str
    unchanged: bool
    """The folder held just this conversion, which an earlier job has verified, and no file of it
    has been written."""
    verified: VerifiedFolder
    """The folder, which is verified now."""
    conversion: ConversionReport
    path: Path
    """Where the report lies."""
    pushed: PushReport | None = None
    """The upload that followed, if one did."""

    def as_json(self) -> dict[str, Any]:
        pushed = {} if self.pushed is None else {"pushed": self.pushed.as_json()}
        return {
            "model": self.model,
            "unchanged": self.unchanged,
            **msgspec.to_builtins(self.verified),
            "conversion": self.conversion.as_json(),
            **pushed,
        }

    def with_push(self, pushed: PushReport) -> JobReport:
        """Write the report again, with the upload.

        Raises:
            OutputError: it cannot be written.
        """
        job = replace(self, pushed=pushed)
        write_file(job.path, to_json(job.as_json()))
        return job


def run_job(
    model_dir: str | Path | Store,
    out_dir: str | Path,
    report: str | Path | None = None,
    *,
    max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES,
    overwrite: bool = False,
    **running: Unpack[Running],
) -> JobReport:
    """Convert and verify, unless that has been done; write a report.

    A folder that a report calls verified is looked at as `convert` looks at any finished folder: at
    names, sizes, headers, and all of the files beside the shards.

    Args:
        report: a file, in neither of the folders; None for ``OUT_DIR.report.json``, beside that.

    The other arguments, and the errors, are those of `conversion.convert`. In particular:

    Raises:
        OutputError: the report cannot be written; that is tried before anything else is done.
    """
    store, out_dir = open_store(model_dir), Path(out_dir)
    check_place(out_dir, store.local_path)
    report = _beside(out_dir) if report is None else Path(report)
    _try_place(report, out_dir, store.local_path)

    def run(*, verify: bool) -> ConversionReport:
        return convert(
            store,
            out_dir,
            max_shard_nbytes=max_shard_nbytes,
            verify=verify,
            overwrite=overwrite,
            **running,
        )

    verified = None if overwrite else _verified_before(out_dir, report)
    before = _files(out_dir) if verified else set()
    conversion = run(verify=verified is None)
    if verified and VerifiedFolder.of(out_dir) != verified:
        # A shard had been lost, or another release has written the manifest again.
        verified, conversion = None, run(verify=True)
    job = JobReport(
        model=str(model_dir if isinstance(model_dir, (str, Path)) else model_dir.location),
        unchanged=verified is not None and _files(out_dir) <= before,
        verified=verified or VerifiedFolder.of(out_dir),
        conversion=conversion,
        path=report,
    )
    with naming(report, OutputError):
        make_folder(report.parent)
        # A job that was killed while it wrote its report has left this.
        partial_path(report).unlink(missing_ok=True)
    write_file(report, to_json(job.as_json()))
    return job


def _files(out_dir: Path) -> set[tuple[str, FileIdentity]]:
    """Every file of a folder, as it is now."""
    with naming(out_dir):
        return {(name, FileIdentity.of((out_dir / name).lstat())) for name in files_below(out_dir)}


def _beside(out_dir: Path) -> Path:
    """Where a job's report lies, unless another place is named."""
    path = out_dir.absolute()
    if path.name in ("", ".."):
        raise OutputError(f"{out_dir}: has no name to call the report by; name it with --report")
    return path.with_name(f"{path.name}.report.json")


def _try_place(report: Path, out_dir: Path, source: Path | None) -> None:
    """Raises OutputError: no report can be written there, or one would be in a folder's way."""
    check_local(report)
    place = Path(os.path.realpath(report))
    for folder in filter(None, (out_dir, source)):
        inside = Path(os.path.realpath(folder))
        if inside == place or inside in place.parents or place in inside.parents:
            raise OutputError(f"{report}: is in the way of {folder}; name another with --report")
    with naming(report, OutputError):
        if report.is_symlink() or (report.exists() and not report.is_file()):
            raise OutputError(f"{report}: is not a regular file")
        # Folders are made when there is a report to write.
        there = next(path for path in report.absolute().parents if path.exists())
        # Its name is as long as that of the unfinished report, which another job may be writing.
        with tempfile.NamedTemporaryFile(dir=there, prefix=report.name):
            pass


def _verified_before(out_dir: Path, report: Path) -> VerifiedFolder | None:
    """The folder, if it is as it was when a job had verified it."""
    try:
        recorded = decode(read_all(LocalReader(report), MAX_REPORT_NBYTES), VerifiedFolder)
        return recorded if recorded == VerifiedFolder.of(out_dir) else None
    except (CheckpointError, ValueError):  # one is not there, or it may be anything
        return None
