"""The source of a converted checkpoint, as the checkpoint itself records it.

That is how a source is restored, and how one is read whose shards are deleted as they are
converted.

What no tensor and no copied file holds of the source lies in one file, `SOURCE_NAME`: config.json,
hf_quant_config.json and the index, those that there are, and then the header of each shard, one
after the other and as they were. The manifest has names, sizes and checksums of all of them, in
this order, and a header tells its own length.

It is not compressed. DeepSeek-V3 needs 38 MB beside 424 GB; what zlib makes of them would depend on
the machine, and reading it back would need a limit.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..errors import CheckpointError, MissingFileError
from ..format.files import (
    CARD_NAME,
    CONFIG_NAME,
    HF_QUANT_CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    SOURCE_CARD_NAME,
    SOURCE_NAME,
)
from ..format.manifest import FileIdentity, FileRecord, Manifest, Provenance, SourceRecord
from ..storage.buffers import Bytes
from ..storage.copying import record_of
from ..storage.header import LENGTH_NBYTES, MAX_HEADER_NBYTES, header_nbytes
from ..storage.local import LocalFolder, LocalReader, files_below
from ..storage.reader import Listing, Reader, read_all, read_bytes
from .checkpoint import Checkpoint

MAX_NBYTES = 200_000_000
"""All that a source may have: headers of 100 MB, an index of 50 MB, and the configurations."""


def encode_record(checkpoint: Checkpoint) -> bytes:
    """What `SOURCE_NAME` holds of a checkpoint, read from it again.

    Raises:
        CheckpointError: a file cannot be read, or is not what it was.
    """
    parts = []
    for name, record in checkpoint.config_files.items():
        parts.append(read_all(checkpoint.store.open(name), MAX_NBYTES))
        if FileRecord.of(parts[-1]) != record:
            raise CheckpointError(f"{name}: has changed while it was read")
    parts += [shard.raw_header(checkpoint.store) for shard in checkpoint.shards]
    return b"".join(parts)


def is_source_card(card: Path, manifest: Manifest) -> bool:
    """Whether a file is the source's model card, as it was copied."""
    recorded = manifest.files.get(CARD_NAME)
    return recorded is not None and card.is_file() and record_of(LocalReader(card)) == recorded


def keeps_source_card(converted: Path, manifest: Manifest) -> bool:
    """Whether the source's model card lies beside one that was made for the Hub."""
    return is_source_card(converted / SOURCE_CARD_NAME, manifest)


class ConvertedFolder(LocalFolder):
    """A converted folder that may come from the Hub; the source's model card is read as such."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(path)
        self._keeps_source_card = keeps_source_card(path, manifest)

    def open(self, name: str, *, direct: bool = False) -> LocalReader:
        if name == CARD_NAME and self._keeps_source_card:
            name = SOURCE_CARD_NAME
        return super().open(name, direct=direct)


@dataclass(frozen=True)
class RecordedSource:
    """A `Store`: the folder that was converted, as far as its headers tell.

    Nothing in it is taken on trust. It is opened by `open_checkpoint`, as any source is, and
    compared by `source_difference` with what the manifest says. The data of its shards cannot be
    read.
    """

    converted: LocalFolder
    source: SourceRecord
    copied_names: Collection[str]
    """Names of the files that were copied."""

    @property
    def location(self) -> str:
        return f"{self.converted.location}: {SOURCE_NAME}"

    @property
    def local_path(self) -> Path | None:
        return None

    @property
    def connections(self) -> int:
        return 1

    def check_exists(self) -> None:
        """Raises CheckpointError: the checkpoint has no record of its source."""
        self._places  # noqa: B018 (reads it)

    def listing(self) -> Listing:
        # What is there, not what a manifest says: a model card may have been deleted since, and
        # names of files become paths of the restored folder.
        copied = set(files_below(self.converted.local_path)).intersection(self.copied_names)
        return Listing(files=tuple(sorted({*self._places, *copied})), folders=(), left_out={})

    def open(self, name: str, *, direct: bool = False) -> Reader:
        if name in self._places:
            return self._places[name]
        if name in self.copied_names:
            return self.converted.open(name, direct=direct)
        raise MissingFileError(f"{name}: is not on record")

    def provenance(self) -> Provenance:
        return Provenance(self.source.path, self.source.hub_id, self.source.revision)

    @cached_property
    def _places(self) -> dict[str, RecordedFile]:
        """The files that are on record, by name."""
        try:
            record = self.converted.open(SOURCE_NAME)
        except MissingFileError:
            raise MissingFileError(
                f"{self.converted.location}: lacks {SOURCE_NAME}, the record of its source; copy "
                "it from where the checkpoint comes from, or download the original"
            ) from None
        if record.nbytes > MAX_NBYTES:
            raise CheckpointError(
                f"{SOURCE_NAME}: has {record.nbytes} bytes, the limit is {MAX_NBYTES}"
            )
        source = self.source
        places: dict[str, RecordedFile] = {}
        position = 0

        def take(name: str, nbytes: int, identity: FileIdentity) -> None:
            nonlocal position
            if position + nbytes > record.nbytes:
                raise CheckpointError(f"{SOURCE_NAME}: ends inside {name!r}")
            places[name] = RecordedFile(name, record, position, nbytes, identity)
            position += nbytes

        for name, file in source.files.items():
            if name not in (CONFIG_NAME, HF_QUANT_CONFIG_NAME, INDEX_NAME):
                raise CheckpointError(f"{MANIFEST_NAME}: {name!r} is no file that is on record")
            take(name, file.nbytes, FileIdentity(file.nbytes))
        for name, identity in source.shards.items():
            if name != os.path.basename(name):
                raise CheckpointError(f"{MANIFEST_NAME}: {name!r} is no name of a shard")
            length = min(LENGTH_NBYTES, record.nbytes - position)
            claimed = header_nbytes(read_bytes(record, position, length))
            take(name, min(claimed, LENGTH_NBYTES + MAX_HEADER_NBYTES), identity.file)
        if position != record.nbytes:
            raise CheckpointError(
                f"{SOURCE_NAME}: has {record.nbytes} bytes, what the manifest lists has {position}"
            )
        return places


@dataclass(frozen=True)
class RecordedFile:
    """A `Reader` of a file whose first bytes are on record, and no others."""

    name: str
    record: LocalReader
    start: int
    """Of its first byte in the record."""
    kept: int
    """How many of its bytes are on record."""
    identity: FileIdentity

    @property
    def nbytes(self) -> int:
        return self.identity.nbytes

    def read(self, buffer: Bytes, offset: int, nbytes: int) -> Bytes:
        if offset + nbytes > self.kept:
            raise CheckpointError(f"{self.name}: only its first {self.kept} bytes are on record")
        return self.record.read(buffer, self.start + offset, nbytes)


@dataclass(frozen=True)
class DroppedSource:
    """A `Store`: a source folder some of whose shards have been deleted. These have their headers,
    on record, and no data."""

    folder: LocalFolder
    record: RecordedSource
    gone: frozenset[str]
    """Names of the deleted shards."""

    @property
    def location(self) -> str:
        return self.folder.location

    @property
    def local_path(self) -> Path:
        return self.folder.local_path

    @property
    def connections(self) -> int:
        return self.folder.connections

    def check_exists(self) -> None:
        """Raises CheckpointError: there is no such folder."""
        self.folder.check_exists()

    def listing(self) -> Listing:
        found = self.folder.listing()
        return replace(found, files=tuple(sorted({*found.files, *self.gone})))

    def open(self, name: str, *, direct: bool = False) -> Reader:
        if name in self.gone:
            return self.record.open(name)
        return self.folder.open(name, direct=direct)

    def provenance(self) -> Provenance:
        return self.folder.provenance()
