"""Reads a converted checkpoint back, every byte of it.

Alone, it holds the bytes against the manifest's checksums. With the source, it also undoes each
layout and compares what comes out with the source's bytes. Both find what a disk, a network or a
hand has changed since; that the layout itself is right is FlashInfer's word (`row_order`) and the
tests', because a wrong permutation has a matching wrong inverse.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import defaults
from .blockio import read_buffer
from .checkpoint import FOREIGN_FOLDERS, Checkpoint, Shard, open_checkpoint
from .contract import CONFIG_NAME, MANIFEST_NAME
from .crew import Checksum, Crew
from .errors import CheckpointError, VerifyError, naming
from .headers import read_header
from .journal import JOURNAL_NAME
from .layouts import Bytes, Layout, undo
from .manifest import FileRecord, Manifest, describe_source, read_manifest, record_file
from .plan import MOVE_NBYTES, Move, source_moves
from .progress import OnProgress, track
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
    shards = [_check_shard(out_dir, name, manifest) for name in manifest.shards]
    moves = _whole_tensors(shards) if checkpoint is None else source_moves(checkpoint)
    home = {tensor.name: shard for shard in shards for tensor in shard.header.tensors}
    if checkpoint is not None:
        _check_covered(moves, shards)

    crew = Crew(threads)
    checksums = {name: Checksum(crew) for name in home}
    starts = {
        tensor.name: shard.header.nbytes + tensor.start
        for shard in shards
        for tensor in shard.header.tensors
    }
    open_file = file_opener(direct=direct_io)
    on_move = track("verifying", sum(move.nbytes for move in moves), on_progress)
    largest = max((move.nbytes for move in moves), default=0)

    def make_worker() -> Callable[[Move], None]:
        buffer = read_buffer(largest)
        comparison = _Comparison(largest, open_file) if checkpoint is not None else None

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
    for shard in shards:
        for name, expected in manifest.shards[shard.name].tensors.items():
            if checksums[name].hexdigest() != expected:
                raise VerifyError(
                    f"{shard.name}: {name!r} has checksum {checksums[name].hexdigest()}, "
                    f"the manifest says {expected}"
                )
    return Verified(
        files=len(manifest.files) + len(shards) + 1,
        tensors=len(home),
        nbytes=sum(shard.header.file_nbytes for shard in shards)
        + sum(record.nbytes for record in manifest.files.values()),
        source=source,
        seconds=time.perf_counter() - started,
    )


def _check_names(out_dir: Path, manifest: Manifest) -> None:
    expected = {MANIFEST_NAME, *manifest.files, *manifest.shards}
    found = set()
    for folder, folders, names in os.walk(out_dir):
        folders[:] = set(folders) - FOREIGN_FOLDERS
        found |= {os.path.relpath(os.path.join(folder, name), out_dir) for name in names}
    # What the Hub adds to every repository, and what a run that is verifying still holds.
    found -= {".gitattributes", JOURNAL_NAME}
    for name in sorted(expected - found):
        raise VerifyError(f"{name}: is missing, the manifest lists it")
    for name in sorted(found - expected):
        raise VerifyError(f"{name}: is not in the manifest")


def _check_file(path: Path, name: str, record: FileRecord) -> None:
    with naming(name, VerifyError):
        nbytes = path.stat().st_size
    if nbytes != record.nbytes:
        raise VerifyError(f"{name}: has {nbytes} bytes, the manifest says {record.nbytes}")
    if (found := record_file(path)) != record:
        raise VerifyError(
            f"{name}: has checksum {found.checksum}, the manifest says {record.checksum}"
        )


def _check_shard(out_dir: Path, name: str, manifest: Manifest) -> Shard:
    record = manifest.shards[name]
    path = out_dir / name
    with naming(name, VerifyError):
        nbytes = path.stat().st_size
    if nbytes != record.nbytes:
        raise VerifyError(f"{name}: has {nbytes} bytes, the manifest says {record.nbytes}")
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
    if header.digest != record.header:
        raise VerifyError(
            f"{name}: its header has checksum {header.digest}, the manifest says {record.header}"
        )
    if {tensor.name for tensor in header.tensors} != set(record.tensors):
        raise VerifyError(f"{name}: holds other tensors than the manifest lists")
    return Shard(name, path, header)


def _open_source(source: Path, manifest: Manifest) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    recorded = manifest.source["shards"]
    found = describe_source(checkpoint)["shards"]
    if checkpoint.is_converted or found != recorded:
        name = next(
            (n for n in sorted({*recorded, *found}) if recorded.get(n) != found.get(n)),
            CONFIG_NAME,
        )
        raise VerifyError(
            f"{source}: is not the checkpoint that was converted: {name} differs "
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
