"""Whether a checkpoint is the one that was converted, without a look at its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..format.files import no_engine_reads
from ..format.manifest import Manifest, SourceRecord
from ..storage.copying import record_of
from ..storage.reader import DIFFERS_IN_COPIES
from .checkpoint import Checkpoint
from .recorded import DroppedSource


def describe_source(checkpoint: Checkpoint) -> SourceRecord:
    """Where a checkpoint lies, the identity of each shard, and size and checksum of the
    configurations and the index."""
    return SourceRecord(
        **checkpoint.store.provenance(),
        dropped=isinstance(checkpoint.store, DroppedSource),
        shards={shard.name: shard.identity for shard in checkpoint.shards},
        files=dict(checkpoint.config_files),
    )


def source_difference(
    checkpoint: Checkpoint, manifest: Manifest, *, same_files: bool = False
) -> str | None:
    """How a checkpoint differs from the one that was converted.

    Args:
        checkpoint: may be that one.
        manifest: of the result.
        same_files: it must be the very files that were converted, not a copy: their times of
            change must agree, too, and so must files that no engine reads.

    Returns:
        None: there is no difference, unless it is in the tensors.

    Raises:
        CheckpointError: a file cannot be read.
    """
    recorded, found = manifest.source, describe_source(checkpoint)
    if found.revision and recorded.revision and found.revision != recorded.revision:
        advice = ""
        if found.hub_id == recorded.hub_id:
            advice = f" (--revision {recorded.revision} of {recorded.hub_id} is)"
        return f"revision {found.revision} is not {recorded.revision}{advice}"
    copied = manifest.copied_records
    there = {name: record_of(checkpoint.store.open(name)) for name in checkpoint.other_files}
    for before, now in (
        (recorded.shards, found.shards),
        (_as_json(recorded.files), _as_json(found.files)),
        (_as_json(copied), _as_json(there)),
    ):
        for name in sorted(before.keys() | now.keys()):
            if no_engine_reads(name) and not same_files:
                continue
            if name not in before or name not in now:
                return f"{name} is {'missing' if name in before else 'new'}"
            keys = before[name].keys() | now[name].keys()
            differing = {key for key in keys if before[name].get(key) != now[name].get(key)}
            if differing - DIFFERS_IN_COPIES:
                return f"{name} differs"
            if differing and same_files:
                return f"{name} has been written again since"
    return None


def _as_json(records: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: msgspec.to_builtins(record) for name, record in records.items()}
