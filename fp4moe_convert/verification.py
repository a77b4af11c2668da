"""Reads a converted checkpoint back, every byte of it.

Alone, it compares the bytes with the manifest's checksums. With the source, it also undoes each
arrangement and compares what comes out with the source's bytes. Both find what a disk, a network
or a person has changed since. That the layout itself is right is FlashInfer's word
(`layouts.fingerprints`) and the tests', because a wrong permutation has a matching wrong inverse.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from . import defaults
from .errors import CheckpointError, ConvertError, VerifyError, naming
from .execution.checksum import Checksum
from .execution.crew import Crew
from .execution.surroundings import read_manifest
from .format.contract import ConvertedSection
from .format.files import CONFIG_NAME, JOURNAL_NAME, MANIFEST_NAME, no_engine_reads
from .format.manifest import FileRecord, Manifest, ShardRecord
from .format.untrusted import decode_object
from .layouts import layout_of
from .layouts.base import MOVE_NBYTES, Layout, Move
from .plan import source_moves
from .progress import OnBytes, OnProgress, track
from .source.checkpoint import MAX_CONFIG_NBYTES, Checkpoint, open_checkpoint
from .source.identity import source_difference
from .storage.buffers import Bytes, block_buffer
from .storage.copying import record_of
from .storage.header import Header, read_header
from .storage.local import LocalFolder, LocalReader, files_below
from .storage.reader import Opener, keep_open, read_all


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to be as it should."""

    files: int
    tensors: int
    nbytes: int
    """Of the output; as many again were read from the source if there was one."""
    source: Path | None
    documentation: list[str]
    """What has happened since to files that no engine reads, a line each."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "source": None if self.source is None else str(self.source),
            "documentation": self.documentation,
            "seconds": round(self.seconds, 3),
        }


def verify(
    out_dir: str | Path,
    source: str | Path | None = None,
    *,
    direct_io: bool = True,
    threads: int = defaults.THREADS,
    on_progress: OnProgress | None = None,
) -> Verified:
    """Read every byte of ``out_dir`` and compare it.

    Args:
        out_dir: a converted checkpoint.
        source: the checkpoint it was converted from; None to trust the manifest.
        direct_io: bypass the page cache where the file systems allow.
        threads: number of readers.
        on_progress: called after each few MiB, from any thread, one call at a time.

    Raises:
        VerifyError: the first difference, naming file and tensor.
        CheckpointError: ``source`` is not a valid checkpoint.
        FormatError: ``out_dir`` has a format version or layout that this release does not know.
    """
    started = time.perf_counter()
    out_dir, source = Path(out_dir), None if source is None else Path(source)
    manifest = read_manifest(out_dir)
    files, documentation = _check_files(out_dir, manifest)
    checkpoint = None if source is None else _open_source(source, manifest)
    shards = [_check_shard(out_dir / name, record) for name, record in manifest.shards.items()]
    moves = _whole_tensors(shards)
    open_source = None
    if checkpoint is not None:
        moves = source_moves(checkpoint, _layout_in(out_dir))
        _check_covered(moves, shards)
        open_source = keep_open(partial(checkpoint.store.open, direct=direct_io))
    digests = _read_all(
        shards,
        moves,
        out_dir,
        open_source=open_source,
        direct_io=direct_io,
        threads=threads,
        on_bytes=track("verifying", sum(move.nbytes for move in moves), on_progress),
    )
    for shard in shards:
        _check_checksums(shard.name, manifest.shards[shard.name], digests)
    return Verified(
        files=len(files) + len(shards) + 1,
        tensors=len(digests),
        nbytes=sum(shard.header.file_nbytes for shard in shards)
        + sum(record.nbytes for record in files),
        source=source,
        documentation=documentation,
        seconds=time.perf_counter() - started,
    )


def damaged_shards(
    out_dir: Path,
    records: Mapping[str, ShardRecord],
    *,
    direct_io: bool = True,
    threads: int = defaults.THREADS,
    on_progress: OnProgress | None = None,
) -> dict[str, str]:
    """Read every byte of some shards and compare it with their records.

    Args:
        out_dir: where they lie.
        records: of these shards.
        direct_io: bypass the page cache where the file systems allow.
        threads: number of readers.
        on_progress: as for `verify`.

    Returns:
        What is wrong, by shard; shards that are as they should be are absent.
    """
    damaged: dict[str, str] = {}
    on_bytes = track("checking", sum(record.nbytes for record in records.values()), on_progress)
    for name, record in records.items():
        try:
            shard = _check_shard(out_dir / name, record)
            on_bytes(name, shard.header.nbytes)
            digests = _read_all(
                [shard],
                _whole_tensors([shard]),
                out_dir,
                open_source=None,
                direct_io=direct_io,
                threads=threads,
                on_bytes=on_bytes,
            )
            _check_checksums(name, record, digests)
        except ConvertError as error:
            damaged[name] = f"it is damaged ({error})"
    return damaged


@dataclass(frozen=True, slots=True)
class _OutputShard:
    """A shard of the output, found to have the size and the header on record."""

    name: str
    header: Header


def _read_all(
    shards: Sequence[_OutputShard],
    moves: Sequence[Move],
    out_dir: Path,
    *,
    open_source: Opener | None,
    direct_io: bool,
    threads: int,
    on_bytes: OnBytes,
) -> dict[str, str]:
    """Read all tensors of these shards.

    Args:
        shards: of the output.
        moves: cover their tensors.
        out_dir: where they lie.
        open_source: opens a source file by name, to compare with the sources of the moves; None
            to compare nothing.
        direct_io: bypass the page cache where the file systems allow.
        threads: number of readers.
        on_bytes: told of each move, by tensor.

    Returns:
        XXH3-128 of each tensor's bytes.

    Raises:
        VerifyError: a tensor differs from its source.
        CheckpointError: a file cannot be read.
    """
    crew = Crew(threads)
    home = {tensor.name: shard for shard in shards for tensor in shard.header.tensors}
    starts = {
        tensor.name: shard.header.nbytes + tensor.start
        for shard in shards
        for tensor in shard.header.tensors
    }
    checksums = {name: Checksum(crew) for name in home}
    open_output = keep_open(lambda name: LocalReader(out_dir / name, direct=direct_io))
    largest = max((move.nbytes for move in moves), default=0)

    def make_worker() -> Callable[[Move], None]:
        buffer = block_buffer(largest)
        comparison = None if open_source is None else _Comparison(largest, open_source)

        def work(move: Move) -> None:
            shard = home[move.tensor]
            offset = starts[move.tensor] + move.offset
            data = open_output(shard.name).read(buffer, offset, move.nbytes)
            if comparison is not None:
                comparison.check(move, data, shard.name)
            checksums[move.tensor].update(move.offset, data)
            on_bytes(move.tensor, move.nbytes)

        return work

    crew.run(iter(moves), make_worker)
    return {name: checksum.hexdigest() for name, checksum in checksums.items()}


def _layout_in(out_dir: Path) -> Layout:
    """The layout of a converted folder whose config.json is as the manifest records it."""
    text = read_all(LocalReader(out_dir / CONFIG_NAME), MAX_CONFIG_NBYTES)
    try:
        section = decode_object(text).get("quantization_config")
    except ValueError as error:
        raise VerifyError(f"{CONFIG_NAME}: {error}") from None
    if not isinstance(section, dict):
        raise VerifyError(f"{CONFIG_NAME}: has no quantization_config")
    return layout_of(ConvertedSection.from_json(section).layout)


def _check_files(out_dir: Path, manifest: Manifest) -> tuple[list[FileRecord], list[str]]:
    """Compare names with the manifest, and then the files beside the shards.

    Returns:
        Records of the files that are as they should be, and what has happened to others, which no
        engine reads.
    """
    same: list[FileRecord] = []
    documentation: list[str] = []

    def found_out(name: str, difference: ConvertError) -> None:
        if not no_engine_reads(name):
            raise difference
        documentation.append(str(difference))

    expected = {MANIFEST_NAME, *manifest.files, *manifest.shards}
    # A run that is verifying still holds its journal.
    found = set(files_below(out_dir, VerifyError)) - ({JOURNAL_NAME} - expected)
    for name in sorted(expected - found):
        found_out(name, VerifyError(f"{name}: is missing, the manifest lists it"))
    for name in sorted(found - expected):
        found_out(name, VerifyError(f"{name}: is not in the manifest"))
    for name, record in manifest.files.items():
        if name in found:
            try:
                _check_file(out_dir / name, name, record)
            except ConvertError as error:
                found_out(name, error)
            else:
                same.append(record)
    return same, documentation


def _check_file(path: Path, name: str, record: FileRecord) -> None:
    with naming(name, VerifyError):
        nbytes = path.stat().st_size
    if nbytes != record.nbytes:
        raise VerifyError(f"{name}: has {nbytes} bytes, expected {record.nbytes}")
    if (found := record_of(LocalReader(path))) != record:
        raise VerifyError(f"{name}: has checksum {found.checksum}, expected {record.checksum}")


def _check_shard(path: Path, record: ShardRecord) -> _OutputShard:
    name = path.name
    with naming(name, VerifyError):
        nbytes = path.stat().st_size
    if nbytes != record.nbytes:
        raise VerifyError(f"{name}: has {nbytes} bytes, expected {record.nbytes}")
    try:
        header = read_header(LocalReader(path))
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
    if header.digest != record.header:
        raise VerifyError(
            f"{name}: its header has checksum {header.digest}, expected {record.header}"
        )
    if {tensor.name for tensor in header.tensors} != set(record.tensors):
        raise VerifyError(f"{name}: holds other tensors than the manifest lists")
    _check_with_library(path, header)
    return _OutputShard(name, header)


def _check_with_library(path: Path, header: Header) -> None:
    """The safetensors library, which engines read with, must see the tensors that we see."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            theirs = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise VerifyError(f"{path.name}: the safetensors library refuses it: {error}") from None
    if theirs != {tensor.name: (tensor.dtype, tensor.shape) for tensor in header.tensors}:
        raise VerifyError(f"{path.name}: the safetensors library sees other tensors in it")


def _check_checksums(file: str, record: ShardRecord, digests: Mapping[str, str]) -> None:
    for name, expected in record.tensors.items():
        if digests[name] != expected:
            raise VerifyError(f"{file}: {name!r} has checksum {digests[name]}, expected {expected}")


def _open_source(source: Path, manifest: Manifest) -> Checkpoint:
    checkpoint = open_checkpoint(LocalFolder(source))
    if (difference := source_difference(checkpoint, manifest)) is not None:
        raise VerifyError(
            f"{source}: is not the checkpoint that was converted: {difference} "
            f"(converted from {manifest.source.path})"
        )
    return checkpoint


def _check_covered(moves: Sequence[Move], shards: Sequence[_OutputShard]) -> None:
    """The source's moves must fill exactly the tensors of the output."""
    planned: dict[str, int] = {}
    for move in moves:
        planned[move.tensor] = planned.get(move.tensor, 0) + move.nbytes
    for shard in shards:
        for tensor in shard.header.tensors:
            if planned.pop(tensor.name, 0) != tensor.nbytes:
                raise VerifyError(
                    f"{shard.name}: {tensor.name!r} is not what the source is converted to"
                )
    if missing := min(planned, default=None):
        raise VerifyError(f"{missing!r} is in no shard, the source has it")


def _whole_tensors(shards: Sequence[_OutputShard]) -> tuple[Move, ...]:
    """Reads that cover every tensor; nothing to compare them with but a checksum."""

    def pieces() -> Iterator[Move]:
        for shard in shards:
            for tensor in shard.header.tensors:
                for start in range(0, tensor.nbytes, MOVE_NBYTES):
                    nbytes = min(MOVE_NBYTES, tensor.nbytes - start)
                    yield Move(tensor.name, start, nbytes, (), None)

    return tuple(pieces())


class _Comparison:
    """One worker's memory for undoing arrangements and reading sources."""

    def __init__(self, largest: int, open_source: Opener) -> None:
        self._buffer = block_buffer(largest)
        self._undone = np.empty(largest, np.uint8)
        self._open_source = open_source

    def check(self, move: Move, data: Bytes, shard: str) -> None:
        """Compare output bytes with the source bytes they came from."""
        if move.arrangement is None:
            ends = np.cumsum([source.nbytes for source in move.sources])
            parts = np.split(data, ends[:-1])
        else:
            try:
                parts = move.arrangement.undo(data, self._undone)
            except ValueError as error:
                raise VerifyError(f"{shard}: {move.tensor!r} {error}") from None
        for source, part in zip(move.sources, parts, strict=True):
            reader = self._open_source(source.file)
            original = reader.read(self._buffer, source.offset, source.nbytes)
            if not np.array_equal(original.reshape(part.shape), part):
                raise VerifyError(
                    f"{shard}: {move.tensor!r} differs from {source.tensor!r} in {source.file}"
                )
