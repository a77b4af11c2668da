"""Which shards of an earlier run are kept, and why the others are written again."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import CheckpointError, OutputError, naming
from ..format.contract import FORMAT_VERSION
from ..format.manifest import Identity, Manifest, ShardRecord
from ..plan import Plan, PlannedShard
from ..source.checkpoint import Checkpoint
from ..source.identity import source_difference
from ..storage.header import read_header
from ..storage.local import LocalReader
from .journal import FinishedShard

_OTHER_PLAN = "the options or the layout of shards have changed since"


@dataclass(frozen=True)
class Work:
    """A plan and the source it is for: what a run is about to make."""

    checkpoint: Checkpoint
    plan: Plan

    @cached_property
    def identities(self) -> dict[str, Identity]:
        """Of each source file."""
        return {shard.name: shard.identity for shard in self.checkpoint.shards}

    @cached_property
    def copied(self) -> dict[str, int]:
        """Size in bytes of each file that is copied as it is, by name."""
        store = self.checkpoint.store
        return {name: store.open(name).nbytes for name in self.checkpoint.other_files}

    def finished(self, shard: PlannedShard, record: ShardRecord) -> FinishedShard:
        """The journal's line on a shard that is made now."""
        return FinishedShard(
            name=shard.name,
            record=record,
            format_version=FORMAT_VERSION,
            row_order=self.plan.layout.fingerprint,
            plan=shard.fingerprint,
            sources={name: self.identities[name] for name in shard.source_files},
        )

    def check_unchanged(self, sources: Container[str]) -> None:
        """Make sure that source files are still what they were when their headers were read.

        Raises:
            CheckpointError: one has changed, or has gone.
        """
        for shard in self.checkpoint.shards:
            if shard.name in sources:
                shard.check_unchanged(self.checkpoint.store)

    def difference(self, manifest: Manifest) -> str | None:
        """How this work differs from that which left a manifest; None if it does not."""
        if manifest.row_order != self.plan.layout.fingerprint:
            return "it was written for another row order"
        difference = source_difference(self.checkpoint, manifest, same_files=True)
        if difference is not None:
            return f"in the source, {difference}"
        if manifest.max_shard_nbytes != self.plan.max_shard_nbytes:
            return f"its files have at most {manifest.max_shard_nbytes:,} bytes"
        names = {shard.name for shard in self.plan.shards}
        if manifest.plan != self.plan.fingerprint or manifest.shards.keys() != names:
            return "it was planned by another release"
        return None


def take_stock(
    work: Work, recorded: Mapping[str, FinishedShard], out_dir: Path, *, was_finished: bool
) -> tuple[dict[str, FinishedShard], dict[str, str]]:
    """Look at the shards in a folder, cheaply: at their sizes and headers, not at their data.

    Args:
        work: what should be there.
        recorded: shards that a journal or a manifest calls finished.
        out_dir: the folder.
        was_finished: it has an index, so a shard that is missing has been lost.

    Returns:
        The shards to keep, and the reasons why others are written again, by name.
    """
    kept: dict[str, FinishedShard] = {}
    to_redo: dict[str, str] = {}
    with naming(out_dir, OutputError):
        present = set(os.listdir(out_dir))
    for shard in work.plan.shards:
        if shard.name not in present:
            if was_finished:
                to_redo[shard.name] = "it is missing"
            continue
        finished = recorded.get(shard.name)
        if finished is None:
            to_redo[shard.name] = "no run has finished it"
        elif reason := _why_redo(work, shard, finished, out_dir):
            to_redo[shard.name] = reason
        else:
            kept[shard.name] = finished
    for name in recorded.keys() - {shard.name for shard in work.plan.shards}:
        if name in present:
            to_redo[name] = _OTHER_PLAN
    return kept, to_redo


def _why_redo(
    work: Work, shard: PlannedShard, finished: FinishedShard, out_dir: Path
) -> str | None:
    """Why a finished shard cannot stay; None if it can."""
    if finished.format_version != FORMAT_VERSION:
        return f"it has format version {finished.format_version}, not {FORMAT_VERSION}"
    if finished.row_order != work.plan.layout.fingerprint:
        return "it was written for another row order"
    for name, identity in finished.sources.items():
        if work.identities.get(name) != identity:
            return f"{name} has changed since"
    if finished.plan != shard.fingerprint:
        return _OTHER_PLAN
    try:
        header = read_header(LocalReader(out_dir / shard.name))
    except CheckpointError as error:
        return f"it is damaged ({error})"
    if header.digest != finished.record.header or header.file_nbytes != finished.record.nbytes:
        return "its header has been changed"
    return None
