"""What a run that writes shards did, in either direction."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a run wrote, and what that took."""

    out_dir: Path
    shards: int
    """Of the whole, or of the part that the run was asked for."""
    shards_kept: int
    """Of ``shards``: finished by an earlier run."""
    bytes_out: int
    """Size of these shards, headers included."""
    bytes_written: int
    """Of ``bytes_out``: the shards that were not there from an earlier run."""
    seconds: float
    """Wall time of the run, from the first header to the last file."""
    peak_rss: int
    """Bytes; of the whole process so far."""

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_written / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "out_dir": str(self.out_dir),
            "shards": self.shards,
            "shards_kept": self.shards_kept,
            "bytes_out": self.bytes_out,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "bytes_per_second": round(self.bytes_per_second),
            "peak_rss_bytes": self.peak_rss,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport(Written):
    """What a run did that wrote a whole folder."""

    layers: int
    """Expert layers that were converted, or restored."""
    tensors_in: int
    tensors_out: int
    bytes_in: int
    other_files: int
    """Copied as they are: tokenizer, code, whatever lies in sub-folders."""
    other_bytes: int
    """Of these."""
    warnings: list[str]
    verify_seconds: float | None
    """Wall time of reading the result back; None if that was not asked for."""

    def as_json(self) -> dict[str, Any]:
        return {
            **Written.as_json(self),
            "layers": self.layers,
            "tensors_in": self.tensors_in,
            "tensors_out": self.tensors_out,
            "bytes_in": self.bytes_in,
            "other_files": self.other_files,
            "other_bytes": self.other_bytes,
            "warnings": self.warnings,
            "verify_seconds": None
            if self.verify_seconds is None
            else round(self.verify_seconds, 3),
        }


def peak_rss() -> int:
    """The most memory this process has had resident, in bytes."""
    # getrusage would count what the parent had when it started us.
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024
