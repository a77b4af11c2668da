"""A converted folder, compared with its manifest: names, sizes and headers, and the files beside
the shards. `readback` compares the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors

from .errors import CheckpointError, ConvertError, VerifyError, naming
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
from .layouts.base import Layout, Move
from .plan import source_moves
from .source.checkpoint import MAX_CONFIG_NBYTES, Checkpoint
from .source.identity import source_difference
from .source.recorded import keeps_source_card
from .source.spans import Shard
from .storage.copying import record_of
from .storage.header import read_header
from .storage.local import LocalReader, files_below
from .storage.reader import read_all


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
