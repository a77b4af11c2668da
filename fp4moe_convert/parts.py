"""A conversion shared by several machines: each writes a part of the shards, the last one the rest.

All write into one folder that they share, or into folders of their own whose files are brought
together later. Each keeps a journal of its part; the run that finishes relies on these.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import defaults
from .conversion import ConversionReport, convert_with, fill
from .errors import CheckpointError, InUseError, OutputError
from .execution.folder_files import without_journal
from .execution.journal import Division, Records, check_same
from .execution.output_folder import OutputFolder
from .execution.surroundings import read_manifest
from .format.files import CONFIG_NAME, MANIFEST_NAME, is_shard
from .plan import Part
from .preparation import preview
from .progress import Running, RunOptions
from .report import Written, peak_rss
from .storage.reader import Store

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport(Written):
    """What the run of a part did."""

    part: Part
    shards_missing: int
    """Shards that other parts have still to write."""
    whole: ConversionReport | None
    """How the folder was finished, if this run did it."""

    def as_json(self) -> dict[str, Any]:
        return {
            **Written.as_json(self),
            "part": self.part.number,
            "parts": self.part.count,
            "shards_missing": self.shards_missing,
            "whole": None if self.whole is None else self.whole.as_json(),
        }


def convert_part(
    model_dir: str | Path | Store,
    out_dir: str | Path,
    part: Part,
    *,
    max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES,
    verify: bool = False,
    **running: Unpack[Running],
) -> PartReport:
    """Write one part's shards; if no other is missing then, finish the folder.

    Args:
        part: which part; all parts of a conversion have the same count, options and source.
        verify: read every byte of finished shards before they are kept. The run that finishes
            compares the whole result with the source.

    The other arguments, and the errors, are those of `conversion.convert`.
    """
    started = time.perf_counter()
    out_dir = Path(out_dir)
    options = RunOptions(**running)
    whole = preview(model_dir, out_dir, max_shard_nbytes=max_shard_nbytes)
    work = whole.only(part).work
    division = Division(
        parts=part.count,
        plan=whole.work.plan.fingerprint,
        max_shard_nbytes=max_shard_nbytes,
        source=work.store.provenance().address,
        sources=work.identities,
        origin=work.origin,
    )
    nbytes, kept = 0, len(work.shards)
    with OutputFolder(out_dir, source=work.store.local_path, part=part) as opened:
        missing = []
        if not opened.folder.files.has_index:
            if gone := whole.work.gone:
                raise OutputError(
                    f"{out_dir}: --drop-source has deleted {min(gone)}, and no part goes on with "
                    "that; convert without --part"
                )
            opened.join(division)
            written = fill(opened, work, options, verify=verify)
            nbytes, kept = written.nbytes, written.kept
            missing = opened.folder.missing(whole.work)
    seconds = time.perf_counter() - started
    report = None
    if not missing:
        # Two parts that end at once both come here. The later one to let go of its part finishes.
        with suppress(InUseError):
            report = convert_with(
                options,
                work.store,
                out_dir,
                max_shard_nbytes=max_shard_nbytes,
                verify=verify,
                must_be_complete=True,
            )
    return PartReport(
        out_dir=out_dir,
        part=part,
        shards=len(work.shards),
        shards_kept=kept,
        bytes_out=work.plan.bytes_out,
        bytes_written=nbytes,
        seconds=seconds,
        peak_rss=peak_rss(),
        shards_missing=len(missing),
        whole=report,
    )


def source_of(out_dir: str | Path) -> str:
    """Where the source of a folder's parts, or of a finished folder, was when it was converted.

    Raises:
        OutputError: nothing there tells.
        CheckpointError: it was a folder that is not there.
    """
    source, _ = _recorded(Path(out_dir))
    _require_there(source, out_dir)
    return source


def _require_there(source: str, out_dir: str | Path) -> None:
    """Raises CheckpointError: a recorded source was a folder, and that is not there."""
    if os.path.isabs(source) and not os.path.exists(source):  # neither a URL nor on the Hub
        raise CheckpointError(
            f"{source}: does not exist, and {out_dir} was made from it; --source says where it "
            "lies now"
        )


def finish(
    out_dir: str | Path,
    source: str | Path | Store | None = None,
    *,
    verify: bool = False,
    **running: Unpack[Running],
) -> ConversionReport:
    """Finish a folder in which all parts have been brought together.

    Args:
        out_dir: holds the shards and the journals of all parts.
        source: what was converted, where it lies elsewhere than for the first part.

    The other arguments, and the errors, are those of `conversion.convert`. In particular:

    Raises:
        OutputError: a shard is missing, differs from its journal, or is of another source.
    """
    out_dir = Path(out_dir)
    recorded, max_shard_nbytes = _recorded(out_dir)
    if source is None:
        _require_there(recorded, out_dir)
    return convert_with(
        RunOptions(**running),
        recorded if source is None else source,
        out_dir,
        max_shard_nbytes=max_shard_nbytes,
        verify=verify,
        must_be_complete=True,
    )


def _recorded(out_dir: Path) -> tuple[str, int]:
    """Where the source was, and the bound of a shard's size.

    Raises:
        OutputError: nothing there tells.
        VerifyError: the manifest cannot be read, or has been changed.
    """
    records = Records.of(out_dir)
    if divisions := records.divisions:
        division = next(iter(divisions.values()))
        check_same(division, divisions, out_dir)
        return division.source, division.max_shard_nbytes
    if not (out_dir / MANIFEST_NAME).is_file():
        if records.files:
            raise OutputError(
                f"{out_dir}: holds no part, but what another command has not finished; run that "
                "again"
            )
        names = os.listdir(out_dir)
        shard = min(filter(is_shard, names), default=None)
        if shard is not None and CONFIG_NAME not in names:
            raise OutputError(without_journal(out_dir, shard))
        raise OutputError(f"{out_dir}: holds no part of a conversion; name a folder that does")
    manifest = read_manifest(out_dir)
    return manifest.source.address, manifest.max_shard_nbytes
