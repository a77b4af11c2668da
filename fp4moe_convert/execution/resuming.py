"""Which shards of an earlier run are kept, and why the others are written again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError, OutputError, naming
from ..format.contract import FORMAT_VERSION
from ..format.manifest import Manifest
from ..storage.durable import partial_path
from ..storage.header import read_header
from ..storage.local import LocalReader
from .journal import FinishedShard, Records
from .surroundings import find_manifest
from .work import Target, Work

_OTHER_PLAN = "the options or the layout of shards have changed since"


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
    for shard in work.shards:
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
    for name in recorded.keys() - {shard.name for shard in work.shards}:
        if name in present:
            to_redo[name] = _OTHER_PLAN
    return kept, to_redo


def recorded_shards(
    work: Work, records: Records, manifest: Manifest | None
) -> tuple[dict[str, FinishedShard], str | None]:
    """The shards that journals, or the manifest of this very work, call finished.

    Args:
        work: what should be there.
        records: the journals'.
        manifest: of the folder, if it has one.

    Returns:
        These shards, and how the work differs from that which left the manifest, if it does.

    Raises:
        CheckpointError: a file of the source cannot be read.
    """
    recorded = dict(records.finished)
    if manifest is None or records.forgotten:
        return recorded, None
    if (difference := work.difference(manifest)) is None:
        recorded |= {s.name: work.finished(s, manifest.shards[s.name]) for s in work.shards}
    return recorded, difference


def foresee(work: Work, out_dir: Path) -> tuple[set[str], Mapping[str, Mapping[int, str]]]:
    """What a run would keep, as far as that can be told without the lock.

    Returns:
        Names of finished shards; unfinished ones, as `take_up` has them.

    Raises:
        OutputError: the folder, or a journal, cannot be read.
    """
    with naming(out_dir, OutputError):
        if not out_dir.is_dir():
            return set(), {}
    records = Records.of(out_dir)
    recorded, _ = recorded_shards(work, records, find_manifest(out_dir))
    kept, _ = take_stock(work, recorded, out_dir, was_finished=False)
    return set(kept), take_up(work, records.filled, out_dir)


def take_up(
    work: Work, filled: Mapping[tuple[str, str], Mapping[int, str]], out_dir: Path
) -> dict[str, Mapping[int, str]]:
    """Find unfinished shards whose moves need not all be carried out again.

    Args:
        work: what should be there.
        filled: as `Records.filled` has it.
        out_dir: where they lie.

    Returns:
        Checksums of the moves that an earlier run has written, by number, by shard.
    """
    found: dict[str, Mapping[int, str]] = {}
    for shard in work.shards if filled else ():
        moves = filled.get((shard.name, work.keys[shard.name]))
        path = partial_path(out_dir / shard.name)
        if moves and path.is_file() and path.stat().st_size == shard.nbytes:
            found[shard.name] = moves
    return found


def _why_redo(work: Work, shard: Target, finished: FinishedShard, out_dir: Path) -> str | None:
    """Why a finished shard cannot stay; None if it can."""
    if finished.format_version != FORMAT_VERSION:
        return f"it has format version {finished.format_version}, not {FORMAT_VERSION}"
    if finished.row_order != work.row_order:
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
