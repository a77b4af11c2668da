"""The files around the shards: copies, config.json, the manifest and, last of all, the index.

A folder with an index is a finished folder. The manifest says what every byte of it should be: a
checksum for each tensor, each shard's header and each other file, and one over itself.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from .blockio import (
    ReadFile,
    WriteFile,
    holds,
    make_folder,
    partial_path,
    publish,
    read_buffer,
    remove_file,
    write_file,
)
from .checkpoint import (
    CHECKSUM,
    Checkpoint,
    FileRecord,
    parse_json_object,
    read_bounded,
)
from .contract import (
    CONFIG_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    quantization_section,
)
from .errors import CheckpointError, OutputError, VerifyError, naming
from .plan import MOVE_NBYTES, Plan, PlannedShard
from .row_order import RowOrder

VERSION = importlib.metadata.version("fp4moe-convert")


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """An output shard; header and tensors cover all its bytes."""

    nbytes: int
    header: str
    """XXH3-128 of the header, length word included."""
    tensors: Mapping[str, str]
    """XXH3-128 of each tensor's bytes."""

    @classmethod
    def of(cls, shard: PlannedShard, checksums: Mapping[str, str]) -> ShardRecord:
        """The record of a shard, with the checksums of (at least) its tensors."""
        return cls(
            nbytes=shard.nbytes,
            header=xxhash.xxh3_128_hexdigest(shard.header),
            tensors={name: checksums[name] for name in shard.tensors},
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a converted folder holds, and what it was made from."""

    source: Mapping[str, Any]
    """What `describe_source` said of the checkpoint."""
    versions: Mapping[str, str]
    row_order: str
    max_shard_nbytes: int
    plan: str
    """The plan's fingerprint."""
    shards: Mapping[str, ShardRecord]
    files: Mapping[str, FileRecord]
    """config.json, the index and the copied files; everything but the shards and the manifest."""

    def encode(self) -> bytes:
        content = {
            "format_version": FORMAT_VERSION,
            "checksum": CHECKSUM,
            "versions": dict(self.versions),
            "row_order": self.row_order,
            "max_shard_bytes": self.max_shard_nbytes,
            "plan": self.plan,
            "source": dict(self.source),
            "files": {name: record.as_json() for name, record in self.files.items()},
            "shards": {
                name: {
                    "bytes": record.nbytes,
                    "header": record.header,
                    "tensors": dict(record.tensors),
                }
                for name, record in self.shards.items()
            },
        }
        return encode_signed(content)


def read_manifest(out_dir: Path) -> Manifest:
    """Read a converted folder's manifest.

    Raises:
        VerifyError: missing, of another format version, or changed since it was written.
    """
    path = out_dir / MANIFEST_NAME
    with naming(out_dir, VerifyError):
        if not path.is_file():
            raise VerifyError(
                f"{out_dir}: not a converted checkpoint, or unfinished: it has no {MANIFEST_NAME}"
            )
    try:
        text = read_bounded(path)
        content = parse_json_object(text, path.name)
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
    if content.get("format_version") != FORMAT_VERSION:
        raise VerifyError(
            f"{MANIFEST_NAME}: format version {content.get('format_version')}, "
            f"this release knows {FORMAT_VERSION}"
        )
    content.pop("manifest", None)
    # Of the text, too, which may change where the content does not: "\u00e9" is "\u00E9".
    if text != encode_signed(content):
        raise VerifyError(f"{MANIFEST_NAME}: has been changed: it does not match its own checksum")
    # Anybody can write a checksum that matches.
    match content:
        case {
            "source": {"path": str(), "shards": dict(), "files": dict()} as source,
            "versions": dict(versions),
            "row_order": str(row_order),
            "max_shard_bytes": int(max_shard_nbytes),
            "plan": str(plan),
            "shards": dict(shards),
            "files": dict(files),
        } if all(isinstance(record, dict) for record in _records(source)):
            return Manifest(
                source=source,
                versions=versions,
                row_order=row_order,
                max_shard_nbytes=max_shard_nbytes,
                plan=plan,
                shards={name: _shard_record(name, record) for name, record in shards.items()},
                files={name: _file_record(name, record) for name, record in files.items()},
            )
    raise VerifyError(f"{MANIFEST_NAME}: lacks a part, or has one of the wrong kind")


def _records(source: Mapping[str, Any]) -> Iterable[object]:
    return (*source["shards"].values(), *source["files"].values())


def _shard_record(name: str, record: object) -> ShardRecord:
    match record:
        case {"bytes": int(nbytes), "header": str(header), "tensors": dict(tensors)} if all(
            isinstance(checksum, str) for checksum in tensors.values()
        ):
            return ShardRecord(nbytes, header, tensors)
    raise VerifyError(f"{MANIFEST_NAME}: {name!r} has no valid bytes, header and tensors")


def _file_record(name: str, record: object) -> FileRecord:
    match record:
        case {"bytes": int(nbytes), "xxh3_128": str(checksum)}:
            return FileRecord(nbytes, checksum)
    raise VerifyError(f"{MANIFEST_NAME}: {name!r} has no valid bytes and {CHECKSUM}")


def describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which checkpoint this is: where it lies, the identity of each shard, and size and checksum of
    the files that the output's config.json is made from. JSON values."""
    root = checkpoint.root.resolve()
    identity: dict[str, Any] = {"path": str(root)}
    # A Hub cache keeps revisions as models--ORG--NAME/snapshots/REVISION.
    repo = root.parent.parent.name
    if root.parent.name == "snapshots" and repo.startswith("models--"):
        identity["hub_id"] = repo.removeprefix("models--").replace("--", "/")
        identity["revision"] = root.name
    identity["shards"] = {shard.name: shard.identity for shard in checkpoint.shards}
    identity["files"] = {n: record.as_json() for n, record in checkpoint.config_files.items()}
    return identity


def source_difference(
    checkpoint: Checkpoint, manifest: Manifest, *, same_files: bool = False
) -> str | None:
    """How a checkpoint differs from the one that was converted, without a look at its tensors.

    Args:
        checkpoint: may be that one.
        manifest: of the result.
        same_files: it is to be the very files that were converted, not a copy: their times of
            change must agree, too.

    Returns:
        None: there is no difference, unless it is in the tensors.

    Raises:
        CheckpointError: a file cannot be read.
    """
    recorded, found = dict(manifest.source), describe_source(checkpoint)
    if "revision" in found and found["revision"] != recorded.get("revision", found["revision"]):
        return f"revision {found['revision']} is not {recorded['revision']}"
    copied = {
        name: record.as_json()
        for name, record in manifest.files.items()
        if name not in (CONFIG_NAME, INDEX_NAME)
    }
    there = {name: record_file(checkpoint.root / name).as_json() for name in checkpoint.other_files}
    for before, now in (
        (recorded["shards"], found["shards"]),
        (recorded["files"], found["files"]),
        (copied, there),
    ):
        for name in sorted(before.keys() | now.keys()):
            if name not in before or name not in now:
                return f"{name} is {'missing' if name in before else 'new'}"
            keys = before[name].keys() | now[name].keys()
            if any(before[name].get(key) != now[name].get(key) for key in keys - {"modified_ns"}):
                return f"{name} differs"
            if same_files and before[name].get("modified_ns") != now[name].get("modified_ns"):
                return f"{name} has been written again since"
    return None


def finish(
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
        out_dir: where.
        row_order: what FlashInfer answered.
        shards: a record of each, in order.

    Raises:
        CheckpointError: a file cannot be read.
        OutputError: a file cannot be written.
    """
    files = {name: _copy(checkpoint.root / name, out_dir / name) for name in checkpoint.other_files}
    config = _json(_config(checkpoint, plan, row_order))
    index = _json(
        {
            "metadata": {"total_size": plan.moved_nbytes},
            "weight_map": {
                name: shard.name for shard in plan.shards for name in sorted(shard.tensors)
            },
        }
    )
    for name, content in ((CONFIG_NAME, config), (INDEX_NAME, index)):
        files[name] = FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))
    manifest = Manifest(
        source=describe_source(checkpoint),
        versions={"fp4moe-convert": VERSION, "flashinfer": row_order.flashinfer},
        row_order=row_order.fingerprint,
        max_shard_nbytes=plan.max_shard_nbytes,
        plan=plan.fingerprint,
        shards=shards,
        files=dict(sorted(files.items())),
    ).encode()
    if not holds(out_dir / MANIFEST_NAME, manifest):
        # What a finished folder has around the shards is about to change, one file by one.
        with naming(INDEX_NAME, OutputError):
            remove_file(out_dir / INDEX_NAME)
    write_file(out_dir / MANIFEST_NAME, manifest)
    write_file(out_dir / CONFIG_NAME, config)
    write_file(out_dir / INDEX_NAME, index)


def _config(checkpoint: Checkpoint, plan: Plan, row_order: RowOrder) -> dict[str, Any]:
    assert checkpoint.quantization is not None
    section = quantization_section(
        {layer.prefix: layer.geometry for layer in plan.layers},
        row_order=row_order.fingerprint,
        flashinfer=row_order.flashinfer,
        source=checkpoint.quantization,
    )
    # Where config.json has a section of its own, that one is the source; the file beside it says
    # the same in other words, and goes on saying it here.
    if checkpoint.hf_quant_config not in (None, checkpoint.quantization):
        section["source_hf_quant_config"] = checkpoint.hf_quant_config
    return {**checkpoint.config, "quantization_config": section}


def _copy(source: Path, target: Path) -> FileRecord:
    if target.is_file() and (record := record_file(source)) == record_file(target):
        return record  # from an earlier run
    with naming(target.name, OutputError):
        make_folder(target.parent)
    reader = ReadFile(source, direct=False)
    writer = WriteFile(partial_path(target), reader.nbytes, direct=False)
    record = _read_through(reader, writer)
    writer.sync()
    publish(writer.path, target)
    return record


def record_file(path: Path) -> FileRecord:
    """Size and checksum of a file, read in pieces.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _read_through(ReadFile(path, direct=False))


def _read_through(reader: ReadFile, copy: WriteFile | None = None) -> FileRecord:
    digest = xxhash.xxh3_128()
    buffer = read_buffer(min(reader.nbytes, MOVE_NBYTES))
    for offset in range(0, reader.nbytes, MOVE_NBYTES):
        data = reader.read(buffer, offset, min(MOVE_NBYTES, reader.nbytes - offset))
        digest.update(data.data)
        if copy is not None:
            copy.write(data, offset)
    return FileRecord(reader.nbytes, digest.hexdigest())


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def encode_signed(content: Mapping[str, Any]) -> bytes:
    """JSON whose last entry is a checksum of the others (docs/format.md, 5)."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return _json({**content, "manifest": xxhash.xxh3_128_hexdigest(canonical.encode())})
