"""Reads a converted checkpoint back, every byte of it.

Alone, it holds the bytes against the manifest's checksums. With the source, it also undoes each
layout and compares what comes out with the source's bytes. Both find what a disk, a network or a
hand has changed since; that the layout itself is right is FlashInfer's word (`row_order`) and the
tests', because a wrong permutation has a matching wrong inverse.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import defaults
from .blockio import read_buffer
from .checkpoint import (
    FOREIGN_FILES,
    Checkpoint,
    FileRecord,
    Shard,
    files_below,
    open_checkpoint,
)
from .contract import JOURNAL_NAME, MANIFEST_NAME
from .crew import Checksum, Crew
from .errors import CheckpointError, ConvertError, VerifyError, naming
from .headers import read_header
from .layouts import Bytes, Layout, undo
from .manifest import (
    Manifest,
    ShardRecord,
    read_manifest,
    record_file,
    source_difference,
)
from .plan import MOVE_NBYTES, Move, source_moves
from .progress import OnMove, OnProgress, track
from .scatter import Opener, file_opener


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to be as it should."""

    files: int
    tensors: int
    nbytes: int
    """Of the output; as many again were read from the source if there was one."""
    source: Path | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "source": None if self.source is None else str(self.source),
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
    """
    started = time.perf_counter()
    out_dir, source = Path(out_dir), None if source is None else Path(source)
    manifest = read_manifest(out_dir)
    _check_names(out_dir, manifest)
    for name, record in manifest.files.items():
        _check_file(out_dir / name, name, record)
    checkpoint = None if source is None else _open_source(source, manifest)
    shards = [_check_shard(out_dir / name, record) for name, record in manifest.shards.items()]
    moves = _whole_tensors(shards) if checkpoint is None else source_moves(checkpoint)
    if checkpoint is not None:
        _check_covered(moves, shards)
    digests = _read_all(
        shards,
        moves,
        compare=checkpoint is not None,
        direct_io=direct_io,
        threads=threads,
        on_move=track("verifying", sum(move.nbytes for move in moves), on_progress),
    )
    for shard in shards:
        _check_checksums(shard.name, manifest.shards[shard.name], digests)
    return Verified(
        files=len(manifest.files) + len(shards) + 1,
        tensors=len(digests),
        nbytes=sum(shard.header.file_nbytes for shard in shards)
        + sum(record.nbytes for record in manifest.files.values()),
        source=source,
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
    """Read every byte of some shards and hold it against their records.

    Returns:
        What is wrong, by shard; nothing of those that are as they should be.
    """
    damaged: dict[str, str] = {}
    on_move = track("checking", sum(record.nbytes for record in records.values()), on_progress)
    for name, record in records.items():
        try:
            shard = _check_shard(out_dir / name, record)
            on_move(name, shard.header.nbytes)
            digests = _read_all(
                [shard],
                _whole_tensors([shard]),
                compare=False,
                direct_io=direct_io,
                threads=threads,
                on_move=on_move,
            )
            _check_checksums(name, record, digests)
        except ConvertError as error:
            damaged[name] = f"it is damaged ({error})"
    return damaged


def _read_all(
    shards: Sequence[Shard],
    moves: Sequence[Move],
    *,
    compare: bool,
    direct_io: bool,
    threads: int,
    on_move: OnMove,
) -> dict[str, str]:
    """Read all tensors of these shards.

    Args:
        shards: of the output.
        moves: cover their tensors.
        compare: with the sources of the moves, too.
        direct_io: bypass the page cache where the file systems allow.
        threads: number of readers.
        on_move: told of each move.

    Returns:
        XXH3-128 of each tensor's bytes.

    Raises:
        VerifyError: ``compare`` found a difference.
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
    open_file = file_opener(direct=direct_io)
    largest = max((move.nbytes for move in moves), default=0)

    def make_worker() -> Callable[[Move], None]:
        buffer = read_buffer(largest)
        comparison = _Comparison(largest, open_file) if compare else None

        def work(move: Move) -> None:
            shard = home[move.tensor]
            offset = starts[move.tensor] + move.offset
            data = open_file(shard.path).read(buffer, offset, move.nbytes)
            if comparison is not None:
                comparison.check(move, data, shard)
            checksums[move.tensor].update(move.offset, data)
            on_move(move.tensor, move.nbytes)

        return work

    crew.run(iter(moves), make_worker)
    return {name: checksum.hexdigest() for name, checksum in checksums.items()}


def _check_names(out_dir: Path, manifest: Manifest) -> None:
    expected = {MANIFEST_NAME, *manifest.files, *manifest.shards}
    # A run that is verifying still holds its journal.
    others = FOREIGN_FILES | {JOURNAL_NAME}
    found = set(files_below(out_dir, VerifyError)) - (others - expected)
    for name in sorted(expected - found):
        raise VerifyError(f"{name}: is missing, the manifest lists it")
    for name in sorted(found - expected):
        raise VerifyError(f"{name}: is not in the manifest")


def _check_file(path: Path, name: str, record: FileRecord) -> None:
    with naming(name, VerifyError):
        nbytes = path.stat().st_size
    if nbytes != record.nbytes:
        raise VerifyError(f"{name}: has {nbytes} bytes, expected {record.nbytes}")
    if (found := record_file(path)) != record:
        raise VerifyError(f"{name}: has checksum {found.checksum}, expected {record.checksum}")


def _check_shard(path: Path, record: ShardRecord) -> Shard:
    name = path.name
    with naming(name, VerifyError):
        status = path.stat()
    nbytes = status.st_size
    if nbytes != record.nbytes:
        raise VerifyError(f"{name}: has {nbytes} bytes, expected {record.nbytes}")
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
    if header.digest != record.header:
        raise VerifyError(
            f"{name}: its header has checksum {header.digest}, expected {record.header}"
        )
    if {tensor.name for tensor in header.tensors} != set(record.tensors):
        raise VerifyError(f"{name}: holds other tensors than the manifest lists")
    return Shard(name, path, header, status.st_mtime_ns)


def _check_checksums(file: str, record: ShardRecord, digests: Mapping[str, str]) -> None:
    for name, expected in record.tensors.items():
        if digests[name] != expected:
            raise VerifyError(f"{file}: {name!r} has checksum {digests[name]}, expected {expected}")


def _open_source(source: Path, manifest: Manifest) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    if (difference := source_difference(checkpoint, manifest)) is not None:
        raise VerifyError(
            f"{source}: is not the checkpoint that was converted: {difference} "
            f"(converted from {manifest.source['path']})"
        )
    return checkpoint


def _check_covered(moves: tuple[Move, ...], shards: list[Shard]) -> None:
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
    for name in planned:
        raise VerifyError(f"{name!r} is in no shard, the source has it")


def _whole_tensors(shards: list[Shard]) -> tuple[Move, ...]:
    """Reads that cover every tensor; nothing to compare them with but a checksum."""

    def pieces() -> Iterator[Move]:
        for shard in shards:
            for tensor in shard.header.tensors:
                for start in range(0, tensor.nbytes, MOVE_NBYTES):
                    nbytes = min(MOVE_NBYTES, tensor.nbytes - start)
                    yield Move(tensor.name, start, nbytes, (), None)

    return tuple(pieces())


class _Comparison:
    """One worker's memory for undoing layouts and reading sources."""

    def __init__(self, largest: int, open_file: Opener) -> None:
        self._buffer = read_buffer(largest)
        self._undone = np.empty(largest, np.uint8)
        self._open_file = open_file

    def check(self, move: Move, data: Bytes, shard: Shard) -> None:
        """Compare output bytes with the source bytes they came from."""
        if move.layout is None:
            ends = np.cumsum([source.nbytes for source in move.sources])
            parts = np.split(data, ends[:-1])
        else:
            parts = self._undo(move.layout, data, move.tensor, shard)
        for source, part in zip(move.sources, parts, strict=True):
            original = self._open_file(source.path).read(self._buffer, source.offset, source.nbytes)
            if not np.array_equal(original.reshape(part.shape), part):
                raise VerifyError(
                    f"{shard.name}: {move.tensor!r} differs from {source.tensor!r} "
                    f"in {source.path.name}"
                )

    def _undo(self, layout: Layout, data: Bytes, tensor: str, shard: Shard) -> list[Bytes]:
        matrices = list(self._undone[: data.size].reshape(-1, layout.rows, layout.row_nbytes))
        undo(data, matrices, layout)
        rows, row_nbytes = layout.source_rows, layout.source_row_nbytes
        for matrix in matrices:
            if matrix[rows:].any() or matrix[:, row_nbytes:].any():
                raise VerifyError(f"{shard.name}: {tensor!r} is padded with something but zeros")
        return [matrix[:rows, :row_nbytes] for matrix in matrices]
