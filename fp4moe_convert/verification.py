"""Reads a converted checkpoint back, every byte of it.

Alone, it compares the bytes with the manifest's checksums. With the source, it also undoes each
arrangement and compares what comes out with the source's bytes. Both find what a disk, a network
or a person has changed since. That the layout itself is right is FlashInfer's word
(`layouts.fingerprints`) and the tests', because a wrong permutation has a matching wrong inverse.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import defaults
from .converted_folder import check_shard, open_converted
from .errors import ConvertError, VerifyError
from .execution.dropping import remaining
from .format.manifest import ShardRecord
from .layouts.base import Move, source_ranges
from .progress import OnBytes, OnProgress, RunOptions, track
from .readback import Take, open_shards, read_back, whole_tensors
from .source.checkpoint import open_checkpoint
from .source.recorded import DroppedSource
from .source.spans import Shard
from .storage.buffers import Bytes
from .storage.opening import open_store
from .storage.prefetch import open_prefetching
from .storage.reader import Opener, Store


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to be as it should."""

    files: int
    tensors: int
    nbytes: int
    """Of the output; as many again were read from the source if there was one."""
    source: str | None
    """Its location, if there was one."""
    documentation: list[str]
    """What has happened since to files that no engine reads, a line each."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "source": self.source,
            "documentation": self.documentation,
            "seconds": round(self.seconds, 3),
        }


def verify(
    out_dir: str | Path,
    source: str | Path | Store | None = None,
    *,
    direct_io: bool = True,
    threads: int = defaults.THREADS,
    on_progress: OnProgress | None = None,
) -> Verified:
    """Read every byte of ``out_dir`` and compare it.

    Args:
        out_dir: a converted checkpoint.
        source: the checkpoint it was converted from, as for `convert`; None to trust the manifest.
        direct_io: bypass the page cache where the file systems allow.
        threads: number of readers.
        on_progress: called after each few MiB, from any thread, one call at a time.

    Raises:
        VerifyError: the first difference, naming file and tensor.
        CheckpointError: ``source`` is not a valid checkpoint.
        FormatError: ``out_dir`` has a format version or layout that this release does not know.
    """
    started = time.perf_counter()
    out_dir = Path(out_dir)
    converted = open_converted(out_dir)
    checkpoint = None if source is None else open_checkpoint(_whole_source(source, out_dir))
    shards = converted.shards()
    with ExitStack() as stack:
        make_take = on_stop = None
        if checkpoint is None:
            moves = whole_tensors(shards)
        else:
            moves = converted.moves(checkpoint, shards)
            sources = stack.enter_context(
                open_prefetching(checkpoint.store, source_ranges(moves), direct=direct_io)
            )
            make_take, on_stop = partial(_comparison, shards, sources.open), sources.stop
        tensors = read_back(
            shards,
            moves,
            converted.manifest.shards,
            open_shards(out_dir, direct=direct_io),
            make_take=make_take,
            threads=threads,
            on_bytes=track("verifying", sum(move.nbytes for move in moves), on_progress),
            on_stop=on_stop,
        )
    return Verified(
        files=len(converted.files) + len(shards) + 1,
        tensors=tensors,
        nbytes=sum(shard.header.file_nbytes for shard in shards)
        + sum(record.nbytes for record in converted.files),
        source=None if checkpoint is None else checkpoint.location,
        documentation=list(converted.documentation),
        seconds=time.perf_counter() - started,
    )


def _whole_source(source: str | Path | Store, out_dir: Path) -> Store:
    store = remaining(open_store(source), out_dir)
    if isinstance(store, DroppedSource):
        raise VerifyError(
            f"{store.location}: has nothing to compare with: --drop-source has deleted "
            f"{len(store.gone)} of its shards; without --source each byte is compared with its "
            "recorded checksum, and fp4moe restore writes the shards again"
        )
    return store


def _comparison(shards: Sequence[Shard], open_source: Opener) -> Take:
    """Compares the bytes of moves with those of the source that they came from."""
    home = {tensor.name: shard.name for shard in shards for tensor in shard.header.tensors}

    def take(move: Move, parts: Sequence[Bytes], spare: Bytes) -> None:
        for source, part in zip(move.sources, parts, strict=True):
            original = open_source(source.file).read(spare, source.offset, source.nbytes)
            if not np.array_equal(original.reshape(part.shape), part):
                raise VerifyError(
                    f"{home[move.tensor]}: {move.tensor!r} differs from {source.tensor!r} "
                    f"in {source.file}"
                )

    return take


class Origin(NamedTuple):
    """What a shard is compared with, besides its record."""

    moves: Sequence[Move]
    """Those that filled it."""
    open: Opener
    """Opens their sources by name."""


def damaged_shards(
    out_dir: Path,
    records: Mapping[str, ShardRecord],
    *,
    origins: Mapping[str, Origin],
    options: RunOptions,
) -> dict[str, str]:
    """Read every byte of some shards and compare it with their records.

    Args:
        out_dir: where they lie.
        records: of these shards.
        origins: of those that are to be compared with their sources as well.
        options: of the run.

    Returns:
        What is wrong, by shard; shards that are as they should be are absent.
    """
    damaged: dict[str, str] = {}
    total = sum(record.nbytes for record in records.values())
    on_bytes = track("checking", total, options.on_progress)
    for name, record in records.items():
        try:
            check_data(out_dir / name, record, origins.get(name), options, on_bytes=on_bytes)
        except ConvertError as error:
            damaged[name] = f"it is damaged ({error})"
    return damaged


def check_data(
    path: Path,
    record: ShardRecord,
    origin: Origin | None,
    options: RunOptions,
    *,
    on_bytes: OnBytes,
) -> None:
    """Read every byte of a shard and compare it with its record.

    Args:
        path: of the shard.
        record: what it should be.
        origin: None to leave its sources alone.
        options: of the run.
        on_bytes: told of all bytes of the file.

    Raises:
        VerifyError: a difference.
        CheckpointError: a file cannot be read.
    """
    shard = check_shard(path, record)
    on_bytes(shard.name, shard.header.nbytes)
    read_back(
        [shard],
        origin.moves if origin else whole_tensors([shard]),
        {shard.name: record},
        open_shards(path.parent, direct=options.direct_io),
        make_take=partial(_comparison, [shard], origin.open) if origin else None,
        threads=options.threads,
        on_bytes=on_bytes,
    )
