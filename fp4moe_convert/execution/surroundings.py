"""The files beside the shards: copies, the manifest, config.json and, last of all, the index."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputError, VerifyError, naming
from ..format.contract import ConvertedSection, LayoutRecord
from ..format.files import (
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    SOURCE_NAME,
    no_engine_reads,
)
from ..format.manifest import FileRecord, Manifest, ShardRecord, SourceRecord, to_json
from ..format.untrusted import decode_object
from ..layouts.base import RowOrder
from ..plan import Plan
from ..source.checkpoint import Checkpoint
from ..source.identity import describe_source
from ..source.recorded import encode_record
from ..source.text_config import without_sections
from ..storage.copying import copy_file, record_of
from ..storage.durable import holds, remove_file, write_file
from ..storage.local import LocalReader
from ..storage.reader import Store, read_all

VERSION = importlib.metadata.version("fp4moe-convert")

MAX_MANIFEST_NBYTES = 50_000_000


def read_manifest(out_dir: Path) -> Manifest:
    """Read a converted folder's manifest.

    Raises:
        VerifyError: missing, of another format version, or changed since it was written.
    """
    path = out_dir / MANIFEST_NAME
    with naming(out_dir, VerifyError):
        if not out_dir.is_dir():
            reason = "is not a folder" if out_dir.exists() else "does not exist"
            raise VerifyError(f"{out_dir}: {reason}; expected a converted checkpoint")
        if not path.is_file():
            raise VerifyError(
                f"{out_dir}: not a converted checkpoint, or unfinished: it has no {MANIFEST_NAME}"
            )
    try:
        text = read_all(LocalReader(path), MAX_MANIFEST_NBYTES)
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
    return Manifest.decode(text)


def find_manifest(out_dir: Path) -> Manifest | None:
    """A converted folder's manifest; None if there is none that `read_manifest` takes."""
    with contextlib.suppress(VerifyError):
        return read_manifest(out_dir)
    return None


def names_in_manifest(out_dir: Path) -> set[str]:
    """Names of all files that a manifest lists, and its own; none if there is none.

    It need not be of a format version that this release knows, nor match its own checksum.
    """
    try:
        text = read_all(LocalReader(out_dir / MANIFEST_NAME), MAX_MANIFEST_NBYTES)
        content = decode_object(text)
    except (CheckpointError, ValueError):
        return set()
    files, shards = content.get("files"), content.get("shards")
    if not isinstance(files, dict) or not isinstance(shards, dict):
        return set()
    return {MANIFEST_NAME, *files, *shards}


def write_surroundings(
    checkpoint: Checkpoint,
    plan: Plan,
    out_dir: Path,
    *,
    row_order: RowOrder,
    shards: Mapping[str, ShardRecord],
) -> None:
    """Write everything that stands beside the shards, the index last.

    Args:
        checkpoint: the source.
        plan: the plan whose shards lie in ``out_dir``.
        out_dir: an output folder.
        row_order: FlashInfer's, as the layout's authority gave it.
        shards: a record of each, in order.

    Raises:
        CheckpointError: a file cannot be read.
        OutputError: a file cannot be written.
    """
    files = copy_files(checkpoint.store, checkpoint.other_files, out_dir)
    config = to_json(_config(checkpoint, plan, row_order))
    index = to_json(
        {
            "metadata": {"total_size": plan.moved_nbytes},
            "weight_map": {
                name: shard.name for shard in plan.shards for name in sorted(shard.tensors)
            },
        }
    )
    source = encode_record(checkpoint)
    for name, content in ((SOURCE_NAME, source), (CONFIG_NAME, config), (INDEX_NAME, index)):
        files[name] = FileRecord.of(content)
    manifest = Manifest(
        source=_description(checkpoint, out_dir),
        versions={"fp4moe-convert": VERSION, "flashinfer": row_order.flashinfer},
        row_order=row_order.fingerprint,
        max_shard_nbytes=plan.max_shard_nbytes,
        plan=plan.fingerprint,
        shards=dict(shards),
        files=dict(sorted(files.items())),
    ).encode()
    if not holds(out_dir / MANIFEST_NAME, manifest):
        # The files of a finished folder are about to be rewritten one by one. After a kill in
        # between, the old ones beside the new manifest would look as if a person had edited them.
        for name in (INDEX_NAME, CONFIG_NAME):
            with naming(name, OutputError):
                remove_file(out_dir / name)
    write_file(out_dir / SOURCE_NAME, source)
    write_file(out_dir / MANIFEST_NAME, manifest)
    write_file(out_dir / CONFIG_NAME, config)
    write_file(out_dir / INDEX_NAME, index)


def _description(checkpoint: Checkpoint, out_dir: Path) -> SourceRecord:
    """The source, as the manifest of a finished folder has it where it is the same commit: that it
    lies elsewhere now is no reason to write another."""
    found = describe_source(checkpoint)
    if (manifest := find_manifest(out_dir)) is not None:
        recorded = manifest.source
        is_same = found.origin is not None and recorded.origin == found.origin
        if is_same and recorded.dropped == found.dropped:
            return recorded
    return found


def copy_files(store: Store, names: Iterable[str], out_dir: Path) -> dict[str, FileRecord]:
    """Copy files as they are. One that no engine reads and that is there already stays: it is the
    user's.

    Args:
        store: where they lie.
        names: of these files.
        out_dir: an output folder.

    Returns:
        A record of each, as it is in ``store``.

    Raises:
        CheckpointError: a file cannot be read.
        OutputError: a file cannot be written.
    """
    files = {}
    for name in names:
        reader, target = store.open(name), out_dir / name
        is_users = no_engine_reads(name) and os.path.lexists(target)
        files[name] = record_of(reader) if is_users else copy_file(reader, target)
    return files


def _config(checkpoint: Checkpoint, plan: Plan, row_order: RowOrder) -> dict[str, Any]:
    source, hf_quant_config = checkpoint.quantization, checkpoint.hf_quant_config
    assert source is not None
    section = ConvertedSection(
        layout=LayoutRecord(
            name=plan.layout.name,
            parameters=plan.layout.parameters,
            row_order=row_order.fingerprint,
            flashinfer=row_order.flashinfer,
        ),
        layers=plan.geometries,
        source=source,
        source_hf_quant_config=None if hf_quant_config == source else hf_quant_config,
    )
    return {**without_sections(checkpoint.text), "quantization_config": section.as_json()}
