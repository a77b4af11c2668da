"""What a run makes, and of what: shards of a folder, from those of another."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgspec
import xxhash

from ..format.contract import FORMAT_VERSION
from ..format.files import GENERATED
from ..format.manifest import FileRecord, Manifest, ShardIdentity, ShardRecord
from ..plan import Plan
from ..source.checkpoint import Checkpoint
from ..source.identity import source_difference
from ..source.recorded import DroppedSource
from ..source.spans import Shard
from ..storage.copying import record_of
from ..storage.reader import Store
from .journal import FinishedShard


class Target(Protocol):
    """A shard that a run makes."""

    @property
    def name(self) -> str: ...

    @property
    def header(self) -> bytes: ...

    @property
    def nbytes(self) -> int:
        """Of the file."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the shard's bytes may be others, or come from elsewhere."""

    @property
    def source_files(self) -> Collection[str]:
        """Names of the shards that it is read from."""


class Work(ABC):
    """What a run is about to make, and of what."""

    @property
    @abstractmethod
    def store(self) -> Store:
        """The folder that is read."""

    @property
    @abstractmethod
    def sources(self) -> Sequence[Shard]:
        """The shards in it."""

    @property
    def gone(self) -> frozenset[str]:
        """Names of those that have been deleted since they were read."""
        return frozenset()

    @property
    def is_there(self) -> bool:
        """Whether any of them has not been deleted."""
        return len(self.gone) < len(self.sources)

    @property
    @abstractmethod
    def shards(self) -> Sequence[Target]:
        """The shards that are made."""

    @property
    @abstractmethod
    def row_order(self) -> str:
        """Fingerprint of the row order that the converted side has."""

    @property
    @abstractmethod
    def other_files(self) -> Sequence[str]:
        """Names of the files that are copied as they are."""

    @property
    @abstractmethod
    def generated(self) -> Sequence[str]:
        """Names of the files that are written besides, in order."""

    @abstractmethod
    def left_by_us(self, name: str) -> FileRecord | None:
        """What an unfinished run has left under a name; None where that cannot be told.

        Raises:
            CheckpointError: a file cannot be read.
        """

    @abstractmethod
    def difference(self, manifest: Manifest) -> str | None:
        """How this work differs from that which left a manifest; None if it does not."""

    @cached_property
    def identities(self) -> dict[str, ShardIdentity]:
        """Of each shard that is read, for later runs."""
        found = {shard.name: shard.identity for shard in self.sources}
        return self.store.provenance().lasting(found)

    @cached_property
    def copied_nbytes(self) -> dict[str, int]:
        """Size in bytes of each file that is copied as it is, by name."""
        return {name: self.store.open(name).nbytes for name in self.other_files}

    def finished(self, shard: Target, record: ShardRecord) -> FinishedShard:
        """The journal's line on a shard that is made now."""
        return FinishedShard(
            name=shard.name,
            record=record,
            format_version=FORMAT_VERSION,
            row_order=self.row_order,
            plan=shard.fingerprint,
            sources={name: self.identities[name] for name in shard.source_files},
        )

    @cached_property
    def keys(self) -> dict[str, str]:
        """Of each shard that is made: equal keys mean that its moves write equal bytes."""
        keys = {}
        for shard in self.shards:
            sources = msgspec.to_builtins([self.identities[name] for name in shard.source_files])
            made_of = [FORMAT_VERSION, self.row_order, shard.fingerprint, sources]
            keys[shard.name] = xxhash.xxh3_128_hexdigest(json.dumps(made_of).encode())
        return keys

    @property
    def origin(self) -> str | None:
        """The model and the commit that are read, where they are known."""
        return self.store.provenance().origin

    def check_unchanged(self, sources: Container[str]) -> None:
        """Make sure that source files are still what they were when their headers were read.

        Raises:
            CheckpointError: one has changed, or has gone.
        """
        for shard in self.sources:
            if shard.name in sources:
                shard.check_unchanged(self.store)


@dataclass(frozen=True)
class Conversion(Work):
    """A source and the plan for it."""

    checkpoint: Checkpoint
    plan: Plan

    @property
    def store(self) -> Store:
        return self.checkpoint.store

    @property
    def sources(self) -> Sequence[Shard]:
        return self.checkpoint.shards

    @property
    def gone(self) -> frozenset[str]:
        return self.store.gone if isinstance(self.store, DroppedSource) else frozenset()

    @property
    def shards(self) -> Sequence[Target]:
        return self.plan.shards

    @property
    def row_order(self) -> str:
        return self.plan.layout.fingerprint

    @property
    def other_files(self) -> Sequence[str]:
        return self.checkpoint.other_files

    @property
    def generated(self) -> Sequence[str]:
        return GENERATED

    def left_by_us(self, name: str) -> FileRecord | None:
        return record_of(self.store.open(name)) if name in self.other_files else None

    def difference(self, manifest: Manifest) -> str | None:
        if manifest.row_order != self.row_order:
            return "it was written for another row order"
        difference = source_difference(self.checkpoint, manifest, same_files=True)
        if difference is not None:
            return f"in the source, {difference}"
        if manifest.max_shard_nbytes != self.plan.max_shard_nbytes:
            size = manifest.max_shard_nbytes
            return f"its files have at most {size:,} bytes (--max-shard-size {size})"
        names = {shard.name for shard in self.plan.shards}
        if manifest.plan != self.plan.fingerprint or manifest.shards.keys() != names:
            return "it was planned by another release"
        return None
