"""The way back: a converted checkpoint to the original that it was made from, byte for byte."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import defaults
from .converted_folder import Converted, open_converted
from .errors import CheckpointError, FormatError
from .execution.filling import Filling
from .execution.output_folder import OutputFolder
from .execution.surroundings import copy_files
from .execution.work import Target, Work
from .format.files import (
    CONFIG_NAME,
    HF_QUANT_CONFIG_NAME,
    INDEX_NAME,
    SOURCE_NAME,
    no_engine_reads,
)
from .format.manifest import FileRecord, Manifest
from .layouts.base import Move
from .plan import check_moves_cover
from .progress import OnNote, OnProgress, tell, track
from .readback import open_shards, read_back
from .report import RunReport, peak_rss
from .source.checkpoint import MAX_INDEX_NBYTES, Checkpoint, open_checkpoint
from .source.recorded import ConvertedFolder, RecordedSource
from .source.spans import Shard
from .storage.copying import record_of
from .storage.durable import write_file
from .storage.header import read_header
from .storage.local import LocalReader, files_below
from .storage.reader import Store, read_all
from .verification import verify as verify_folder


@dataclass(frozen=True)
class OriginalShard:
    """A `Target`: a shard of the original, as it is on record."""

    shard: Shard
    record: Store
    source_files: frozenset[str]

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def header(self) -> bytes:
        # Read when it is needed: those of DeepSeek-V3 have 21 MB.
        return self.shard.raw_header(self.record)

    @property
    def nbytes(self) -> int:
        return self.shard.header.file_nbytes

    @property
    def fingerprint(self) -> str:
        return self.shard.header.digest


@dataclass(frozen=True)
class Restoration(Work):
    """A converted checkpoint, the record of its source, and the moves between them."""

    converted: Converted
    converted_shards: Sequence[Shard]
    original: Checkpoint
    moves: Sequence[Move]

    @cached_property
    def store(self) -> Store:
        return ConvertedFolder(self.converted.path, self.converted.manifest)

    @property
    def sources(self) -> Sequence[Shard]:
        return self.converted_shards

    @property
    def row_order(self) -> str:
        return self.converted.manifest.row_order

    @property
    def other_files(self) -> Sequence[str]:
        return self.original.other_files

    @property
    def generated(self) -> Sequence[str]:
        names = (HF_QUANT_CONFIG_NAME, CONFIG_NAME, INDEX_NAME)
        return [name for name in names if name in self.original.config_files]

    @cached_property
    def fills(self) -> Mapping[str, set[str]]:
        """Names of the original's shards that hold parts of a converted tensor, by tensor."""
        fills: dict[str, set[str]] = {t.name: set() for s in self.sources for t in s.header.tensors}
        for move in self.moves:
            fills[move.tensor].update(source.file for source in move.sources)
        return fills

    @cached_property
    def shards(self) -> Sequence[Target]:
        sources: dict[str, set[str]] = {shard.name: set() for shard in self.original.shards}
        for shard in self.sources:
            for tensor in shard.header.tensors:
                for name in self.fills[tensor.name]:
                    sources[name].add(shard.name)
        return [
            OriginalShard(shard, self.original.store, frozenset(sources[shard.name]))
            for shard in self.original.shards
        ]

    def left_by_us(self, name: str) -> FileRecord | None:
        if name in self.other_files:
            return record_of(self.store.open(name))
        return self.original.config_files.get(name)

    def difference(self, manifest: Manifest) -> str | None:  # noqa: ARG002
        return "an original has no manifest"


def prepare_restoration(converted_dir: Path) -> Restoration:
    """Open a converted checkpoint for its restoration; reads headers and small files only.

    Raises:
        VerifyError: the folder is not as its manifest says, or its record of the source is not.
        CheckpointError: it has no record of its source, or that breaks a rule.
        FormatError: it has a format version, layout or row order that this release does not know.
    """
    converted = open_converted(converted_dir)
    folder = ConvertedFolder(converted_dir, converted.manifest)
    original = open_checkpoint(
        RecordedSource(folder, converted.manifest.source, converted.manifest.copied_records)
    )
    sources = converted.shards()
    moves = converted.moves(original, sources)
    known, found = converted.layout.fingerprint, converted.manifest.row_order
    if found != known:
        raise FormatError(
            f"{converted_dir}: has the row order {found}, this release of fp4moe-convert knows "
            f"{known}; restore it with the release that converted it"
        )
    check_moves_cover(original, moves)
    return Restoration(converted, sources, original, moves)


def restore(
    converted_dir: str | Path,
    out_dir: str | Path,
    *,
    direct_io: bool = True,
    threads: int = defaults.THREADS,
    verify: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
) -> RunReport:
    """Write the original that a checkpoint was converted from, byte for byte.

    Every byte that is read is compared with the manifest's checksums, and no shard gets its name
    before that. After a failure, or a kill at any moment, the same call keeps the shards that are
    finished and ends with the same bytes.

    Args:
        converted_dir: a converted checkpoint.
        out_dir: empty, not there yet, or left by an earlier run.
        direct_io: bypass the page cache where the file systems allow.
        threads: workers that read, undo and write.
        verify: read the result back and compare every byte with the converted checkpoint.
        overwrite: start afresh and delete what unfinished restorations left in ``out_dir``.
        on_progress: called after each few MiB, from any thread, one call at a time.
        on_note: told, in words, what of an earlier run is kept and what is written again.

    Raises:
        VerifyError: ``converted_dir`` is not as its manifest says, or ``verify`` found a
            difference.
        CheckpointError: the record of the source is missing or breaks a rule, or a file has changed
            during the run.
        FormatError: ``converted_dir`` has a format version, layout or row order that this release
            does not know.
        OutputError: ``out_dir`` cannot be used, or writing failed.
    """
    started = time.perf_counter()
    converted_dir, out_dir = Path(converted_dir), Path(out_dir)
    work = prepare_restoration(converted_dir)

    def read_again() -> float | None:
        if not verify:
            return None
        return verify_folder(
            converted_dir, out_dir, direct_io=direct_io, threads=threads, on_progress=on_progress
        ).seconds

    to_write: list[Target] = []
    if not overwrite and is_restored(work, out_dir):
        seconds = time.perf_counter() - started
        tell([f"already finished: {out_dir} is the original"], on_note)
        verify_seconds = read_again()
    else:
        with OutputFolder(out_dir, source=converted_dir, restoring=True) as opened:
            planned = opened.plan(work, overwrite=overwrite)
            writing = planned.start()
            tell(planned.notes(), on_note)
            to_write += planned.shards_to_write
            filling = Filling(
                to_write, work.fills, out_dir, direct=direct_io, on_filled=writing.finish_shard
            )
            moves = _moves_to_fill(work, {shard.name for shard in to_write})
            read_back(
                work.sources,
                moves,
                work.converted.manifest.shards,
                open_shards(converted_dir, direct=direct_io),
                make_take=lambda: filling.take,
                threads=threads,
                on_bytes=track("restoring", sum(move.nbytes for move in moves), on_progress),
                on_tensor=filling.tensor_done,
            )
            done = writing.finish(lambda _: _write_beside(work, out_dir))
            seconds = time.perf_counter() - started
            with done.rejected_if_wrong():
                verify_seconds = read_again()
    shards = work.original.shards
    return RunReport(
        out_dir=out_dir,
        layers=len(work.converted.section.layers),
        tensors_in=sum(len(shard.header.tensors) for shard in work.sources),
        tensors_out=sum(len(shard.header.tensors) for shard in shards),
        bytes_in=sum(shard.header.file_nbytes for shard in work.sources),
        bytes_out=sum(shard.header.file_nbytes for shard in shards),
        bytes_written=sum(shard.nbytes for shard in to_write),
        shards=len(shards),
        shards_kept=len(shards) - len(to_write),
        other_files=len(work.other_files),
        other_bytes=sum(work.copied_nbytes.values()),
        seconds=seconds,
        peak_rss=peak_rss(),
        warnings=list(work.converted.documentation),
        verify_seconds=verify_seconds,
    )


def is_restored(work: Restoration, out_dir: Path) -> bool:
    """Whether a folder is the original already, as far as names, sizes, headers and the files
    beside the shards tell. Nothing in an original says who made it, so it is compared, and never
    changed."""
    try:
        found = {name for name in files_below(out_dir) if not no_engine_reads(name)}
        expected = {*work.generated, *work.other_files, *(shard.name for shard in work.shards)}
        if found != {name for name in expected if not no_engine_reads(name)}:
            return False  # the journal of an unfinished run, too, is no file of an original
        for shard in work.original.shards:
            if read_header(LocalReader(out_dir / shard.name)).digest != shard.header.digest:
                return False
        beside = [
            name for name in (*work.generated, *work.other_files) if not no_engine_reads(name)
        ]
        return all(record_of(LocalReader(out_dir / n)) == work.left_by_us(n) for n in beside)
    except CheckpointError:
        return False


def _moves_to_fill(work: Restoration, shards: set[str]) -> list[Move]:
    """The moves of all tensors that have parts of these shards: a tensor is read whole, so that its
    checksum can be compared, or not at all."""
    if not shards:
        return []
    # What has parts of none, such as the marker, is compared at least.
    wanted = {tensor for tensor, names in work.fills.items() if names & shards or not names}
    return [move for move in work.moves if move.tensor in wanted]


def _write_beside(work: Restoration, out_dir: Path) -> None:
    """Write what lies beside the shards, the index last.

    Raises:
        CheckpointError: a file cannot be read, or has changed.
        OutputError: a file cannot be written.
    """
    copied = work.converted.manifest.copied_records
    for name, record in copy_files(work.store, work.other_files, out_dir).items():
        if record != copied[name] and not no_engine_reads(name):
            raise CheckpointError(f"{name}: has changed while it was read")
    for name in work.generated:
        content = read_all(work.original.store.open(name), MAX_INDEX_NBYTES)
        if FileRecord.of(content) != work.original.config_files[name]:
            raise CheckpointError(f"{SOURCE_NAME}: has changed while it was read")
        write_file(out_dir / name, content)
