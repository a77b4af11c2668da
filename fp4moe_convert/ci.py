"""A conversion as a job that is repeated: verified once, and skipped while it is up to date."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import defaults
from .conversion import ConversionReport, convert
from .errors import CheckpointError, OutputError, naming
from .format.files import MANIFEST_NAME
from .format.manifest import to_json
from .format.untrusted import decode_object
from .progress import Running
from .storage.copying import record_of
from .storage.durable import make_folder, partial_path, write_file
from .storage.local import LocalReader
from .storage.reader import Store, read_all

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_REPORT_NBYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a job found or did."""

    model: str
    unchanged: bool
    """The folder held just this conversion, which an earlier job has verified."""
    manifest: str
    """XXH3-128 of the manifest of the folder that is verified now."""
    conversion: ConversionReport

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "unchanged": self.unchanged,
            "verified_manifest": self.manifest,
            "conversion": self.conversion.as_json(),
        }


def report_path(out_dir: str | Path) -> Path:
    """Where a job's report lies: beside the folder, in which only the conversion's files may be."""
    out_dir = Path(out_dir).absolute()
    return out_dir.with_name(f"{out_dir.name}.report.json")


def run_job(
    model_dir: str | Path | Store,
    out_dir: str | Path,
    *,
    max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES,
    **running: Unpack[Running],
) -> JobReport:
    """Convert and verify, unless that has been done; write the report beside the folder.

    Arguments and errors are those of `conversion.convert`. A folder that a report calls verified is
    looked at as `convert` looks at any finished folder: at names, sizes, headers, and all of the
    files beside the shards.
    """
    out_dir, report = Path(out_dir), report_path(out_dir)

    def run(*, verify: bool) -> ConversionReport:
        return convert(
            model_dir,
            out_dir,
            max_shard_nbytes=max_shard_nbytes,
            verify=verify,
            **running,
        )

    verified = _verified_before(out_dir, report)
    conversion = run(verify=verified is None)
    if verified and (conversion.bytes_written or _checksum(out_dir) != verified):
        # A shard had been lost, or another release has written the manifest again.
        verified, conversion = None, run(verify=True)
    job = JobReport(
        model=str(model_dir if isinstance(model_dir, (str, Path)) else model_dir.location),
        unchanged=verified is not None,
        manifest=_checksum(out_dir),
        conversion=conversion,
    )
    with naming(report, OutputError):
        make_folder(report.parent)
        # A job that was killed while it wrote its report has left this.
        partial_path(report).unlink(missing_ok=True)
    write_file(report, to_json(job.as_json()))
    return job


def _verified_before(out_dir: Path, report: Path) -> str | None:
    """Checksum of the folder's manifest, if it is the one that a job has verified."""
    try:
        recorded = decode_object(read_all(LocalReader(report), MAX_REPORT_NBYTES))
        found = _checksum(out_dir)
    except (CheckpointError, ValueError):  # one is not there, or it may be anything
        return None
    return found if recorded.get("verified_manifest") == found else None


def _checksum(out_dir: Path) -> str:
    return record_of(LocalReader(out_dir / MANIFEST_NAME)).checksum
