"""Whether a checkpoint is the one that was converted, without a look at its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..format.files import no_engine_reads
from ..format.manifest import Manifest, SourceRecord
from ..storage.copying import record_of
from .checkpoint import Checkpoint
from .recorded import DroppedSource


def describe_source(checkpoint: Checkpoint) -> SourceRecord:
    """Where a checkpoint lies, the identity of each shard, and size and checksum of the
    configurations and the index."""
    return SourceRecord(
        **msgspec.structs.asdict(checkpoint.store.provenance()),
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
        same_files: it must be the very files that were converted, or the same commit on the Hub,
            not another copy: their times of change must agree, too, and so must files that no
            engine reads.

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
    there = {name: record_of(checkpoint.store.open(name)) for name in checkpoint.other_files}
    for before, now in (
        (_contents(recorded), _contents(found)),
        (recorded.files, found.files),
        (manifest.copied_records, there),
    ):
        for name in sorted(before.keys() | now.keys()):
            if no_engine_reads(name) and not same_files:
                continue
            if name not in before or name not in now:
                return f"{name} is {'missing' if name in before else 'new'}"
            if before[name] != now[name]:
                return f"{name} differs"
    if same_files and (changed := recorded.changed(found, found.shards)):
        return f"{changed[0]} has been written again since"
    return None


def _contents(source: SourceRecord) -> Mapping[str, object]:
    return {name: identity.content for name, identity in source.shards.items()}
