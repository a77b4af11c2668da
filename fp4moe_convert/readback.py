"""A converted checkpoint, read back: what `verify` and `restore` have in common.

The moves of the conversion are carried out the other way round, in the same order. Each reads a
range of a converted tensor, takes the range's checksum, undoes the arrangement and hands over the
bytes of each source span: to be compared, or to be written. So each byte is read once, forwards in
its tensor, and has been compared with the manifest when a tensor is done.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import safetensors

from .errors import CheckpointError, ConvertError, VerifyError, naming
from .execution.checksum import Checksum
from .execution.crew import Crew, crew_size
from .execution.surroundings import read_manifest
from .format.contract import ConvertedSection
from .format.files import (
    CARD_NAME,
    CONFIG_NAME,
    MANIFEST_NAME,
    SOURCE_CARD_NAME,
    is_journal,
    no_engine_reads,
)
from .format.manifest import FileRecord, Manifest, ShardRecord
from .format.untrusted import decode_object
from .layouts import layout_of
from .layouts.base import MOVE_NBYTES, Layout, Move
from .plan import source_moves
from .progress import OnBytes
from .source.checkpoint import MAX_CONFIG_NBYTES, Checkpoint
from .source.identity import source_difference
from .source.recorded import keeps_source_card
from .source.spans import Shard
from .storage.buffers import Bytes, block_buffer, view_at
from .storage.copying import record_of
from .storage.header import read_header
from .storage.local import LocalReader, files_below
from .storage.reader import Opener, keep_open, read_all

Take: TypeAlias = Callable[[Move, Sequence[Bytes], Bytes], None]
"""Given a move, the bytes of each of its sources, and memory that is free, such as `block_buffer`
makes for the whole move. Called by one thread."""


@dataclass(frozen=True)
class Converted:
    """A converted folder, found to be as its manifest says, but for the data of its tensors."""

    path: Path
    manifest: Manifest
    files: Sequence[FileRecord]
    """Of the files beside the shards that are as they should be."""
    documentation: Sequence[str]
    """What has happened to the others, which no engine reads, a line each."""

    @cached_property
    def section(self) -> ConvertedSection:
        """What config.json says of it.

        Raises:
            VerifyError: no section.
            FormatError: not what a converter writes.
        """
        text = read_all(LocalReader(self.path / CONFIG_NAME), MAX_CONFIG_NBYTES)
        try:
            section = decode_object(text).get("quantization_config")
        except ValueError as error:
            raise VerifyError(f"{CONFIG_NAME}: {error}") from None
        if not isinstance(section, dict):
            raise VerifyError(f"{CONFIG_NAME}: has no quantization_config")
        return ConvertedSection.from_json(section)

    @property
    def layout(self) -> Layout:
        """Raises FormatError: this release does not know it."""
        return layout_of(self.section.layout)

    def shards(self) -> list[Shard]:
        """All shards, found to have the size and the header on record.

        Raises:
            VerifyError: one differs.
        """
        shards = [check_shard(self.path / n, record) for n, record in self.manifest.shards.items()]
        home: dict[str, str] = {}
        for shard in shards:
            for tensor in shard.header.tensors:
                if (first := home.setdefault(tensor.name, shard.name)) != shard.name:
                    raise VerifyError(f"{shard.name}: {tensor.name!r} is in {first} as well")
        return shards

    def moves(self, checkpoint: Checkpoint, shards: Sequence[Shard]) -> tuple[Move, ...]:
        """The moves that filled these shards.

        Args:
            checkpoint: what was converted.
            shards: all of the folder.

        Raises:
            VerifyError: it was not, or to something else.
            CheckpointError: a file cannot be read.
        """
        if (difference := source_difference(checkpoint, self.manifest)) is not None:
            raise VerifyError(
                f"{checkpoint.location}: is not the checkpoint that was converted: {difference} "
                f"(converted from {self.manifest.source.path})"
            )
        moves = source_moves(checkpoint, self.layout)
        _check_covered(moves, shards)
        return moves


def open_converted(path: Path) -> Converted:
    """Compare a folder with its manifest: names, and the files beside the shards.

    Raises:
        VerifyError: missing, of another format version, or different.
        CheckpointError: a file cannot be read.
    """
    manifest = read_manifest(path)
    files, documentation = _check_files(path, manifest)
    return Converted(path, manifest, files, documentation)


def read_back(
    shards: Sequence[Shard],
    moves: Sequence[Move],
    records: Mapping[str, ShardRecord],
    open_shard: Opener,
    *,
    make_take: Callable[[], Take] | None = None,
    threads: int,
    on_bytes: OnBytes,
    on_tensor: Callable[[str], None] | None = None,
    on_stop: Callable[[], None] | None = None,
) -> int:
    """Read tensors of a converted checkpoint and compare them with their records.

    Args:
        shards: of the checkpoint.
        moves: cover the tensors that are to be read, each from its first byte to its last.
        records: of these shards.
        open_shard: opens one by name.
        make_take: called on each thread, for what takes the bytes of the moves' sources; None to
            undo nothing.
        threads: number of workers; each takes about 17 MB. Fewer work at moves that take more.
        on_bytes: told of each move, by tensor.
        on_tensor: told of each tensor that has been read, taken, and found to be as recorded; from
            any thread.
        on_stop: as for `Crew`.

    Returns:
        How many tensors that are; those without data are among them.

    Raises:
        VerifyError: a tensor is not as recorded.
        CheckpointError: a file cannot be read.
    """
    largest = max((move.nbytes for move in moves), default=0)
    crew = Crew(crew_size(threads, largest if make_take is None else 2 * largest), on_stop)
    counting = threading.Lock()
    home = {tensor.name: shard for shard in shards for tensor in shard.header.tensors}
    starts = {
        tensor.name: shard.header.nbytes + tensor.start
        for shard in shards
        for tensor in shard.header.tensors
    }
    moves_left = Counter(move.tensor for move in moves)
    empty = [
        tensor.name
        for shard in shards
        for tensor in shard.header.tensors
        if not tensor.nbytes and tensor.name not in moves_left
    ]
    checksums = {name: Checksum(crew) for name in (*moves_left, *empty)}

    def finish(tensor: str) -> None:
        shard, found = home[tensor].name, checksums.pop(tensor).hexdigest()
        expected = records[shard].tensors[tensor]
        if found != expected:
            raise VerifyError(f"{shard}: {tensor!r} has checksum {found}, expected {expected}")
        if on_tensor is not None:
            on_tensor(tensor)

    def make_worker() -> Callable[[Move], None]:
        buffer = block_buffer(largest)
        take = None if make_take is None else make_take()
        scratch = block_buffer(largest if take else 0)

        def work(move: Move) -> None:
            shard = home[move.tensor].name
            offset = starts[move.tensor] + move.offset
            data = open_shard(shard).read(buffer, offset, move.nbytes)
            checksums[move.tensor].update(move.offset, data)
            if take is not None:
                _hand_over(move, data, shard, take, buffer, scratch)
            on_bytes(move.tensor, move.nbytes)
            with counting:
                moves_left[move.tensor] -= 1
                last = moves_left[move.tensor] == 0
            if last:
                finish(move.tensor)

        return work

    count = len(checksums)
    for name in empty:
        finish(name)
    crew.run(iter(moves), make_worker)
    return count


def _hand_over(
    move: Move, data: Bytes, shard: str, take: Take, buffer: Bytes, scratch: Bytes
) -> None:
    """Undo a move and let ``take`` have its parts.

    Args:
        move: undone.
        data: its bytes, in ``buffer``.
        shard: for messages.
        take: as for `read_back`.
        buffer: free once the move is undone.
        scratch: where it is undone to.
    """
    if move.arrangement is None:
        ends = np.cumsum([source.nbytes for source in move.sources])
        take(move, np.split(data, ends[:-1]), scratch)
        return
    # Where the first source lies in its file, so that it can be written as it stands.
    place = view_at(scratch, move.nbytes, move.sources[0].offset if move.sources else 0)
    try:
        parts = move.arrangement.undo(data, place)
    except ValueError as error:
        raise VerifyError(f"{shard}: {move.tensor!r} {error}") from None
    take(move, parts, buffer)


def open_shards(path: Path, *, direct: bool) -> Opener:
    """An `Opener` of the shards in a folder."""
    return keep_open(lambda name: LocalReader(path / name, direct=direct))


def whole_tensors(shards: Sequence[Shard]) -> tuple[Move, ...]:
    """Moves that cover every tensor and come from nothing."""

    def pieces() -> Iterator[Move]:
        for shard in shards:
            for tensor in shard.header.tensors:
                for start in range(0, tensor.nbytes, MOVE_NBYTES):
                    nbytes = min(MOVE_NBYTES, tensor.nbytes - start)
                    yield Move(tensor.name, start, nbytes, (), None)

    return tuple(pieces())


def check_shard(path: Path, record: ShardRecord) -> Shard:
    """A shard of a converted folder, found to have the size and the header on record.

    Raises:
        VerifyError: it has not.
    """
    name = path.name
    with naming(name, VerifyError):
        nbytes = path.stat().st_size
    if nbytes != record.nbytes:
        raise VerifyError(f"{name}: has {nbytes} bytes, expected {record.nbytes}")
    try:
        reader = LocalReader(path)
        header = read_header(reader)
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
    if header.digest != record.header:
        raise VerifyError(
            f"{name}: its header has checksum {header.digest}, expected {record.header}"
        )
    if {tensor.name for tensor in header.tensors} != set(record.tensors):
        raise VerifyError(f"{name}: holds other tensors than the manifest lists")
    shard = Shard(name, header, reader.identity)
    _check_with_library(path, shard)
    return shard


def _check_with_library(path: Path, shard: Shard) -> None:
    """The safetensors library, which engines read with, must see the tensors that we see."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            theirs = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise VerifyError(f"{path.name}: the safetensors library refuses it: {error}") from None
    if theirs != {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.header.tensors}:
        raise VerifyError(f"{path.name}: the safetensors library sees other tensors in it")


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
    places = {name: out_dir / name for name in manifest.files}
    if keeps_source_card(out_dir, manifest):  # as `publication` leaves it on the Hub
        expected.add(SOURCE_CARD_NAME)
        places[CARD_NAME] = out_dir / SOURCE_CARD_NAME
    # A run that is verifying still holds its journal.
    found = {n for n in files_below(out_dir, VerifyError) if n in expected or not is_journal(n)}
    for name in sorted(expected - found):
        found_out(name, VerifyError(f"{name}: is missing, the manifest lists it"))
    for name in sorted(found - expected):
        found_out(name, VerifyError(f"{name}: is not in the manifest"))
    for name, record in manifest.files.items():
        if name in found:
            try:
                _check_file(places[name], name, record)
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


def _check_covered(moves: Sequence[Move], shards: Sequence[Shard]) -> None:
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
