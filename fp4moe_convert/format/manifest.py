"""fp4moe_manifest.json: a checksum for every byte of a converted folder, and what it was made from.

The manifest's last entry is a checksum of its other entries (docs/format.md, section 5).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import xxhash

from ..errors import FormatError, VerifyError
from .contract import FORMAT_VERSION, check_format_version
from .files import GENERATED, MANIFEST_NAME
from .untrusted import decode_object

CHECKSUM = "xxh3_128"

HUB_PREFIX = "hf://"
"""Begins the path of a model on the Hub."""


class FileIdentity(msgspec.Struct, frozen=True, omit_defaults=True, rename={"nbytes": "bytes"}):
    """The size of a file, and values that change when its bytes do."""

    nbytes: int
    modified_ns: int | None = None
    """Time of its last change, of a local file."""
    etag: str | None = None
    """Of a remote one, where the server tells."""

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """That of a local file."""
        return cls(status.st_size, modified_ns=status.st_mtime_ns)


class ShardIdentity(msgspec.Struct, frozen=True, omit_defaults=True, rename={"nbytes": "bytes"}):
    """A `FileIdentity` and the digest of the header: at least one value changes whenever the bytes
    of the shard do."""

    nbytes: Annotated[int, msgspec.Meta(ge=0)]
    header: str
    """XXH3-128 of the header, length word included."""
    modified_ns: int | None = None
    etag: str | None = None

    @classmethod
    def of(cls, file: FileIdentity, header: str) -> ShardIdentity:
        return cls(file.nbytes, header, file.modified_ns, file.etag)

    @property
    def file(self) -> FileIdentity:
        return FileIdentity(self.nbytes, self.modified_ns, self.etag)

    @property
    def content(self) -> tuple[int, str]:
        """What a copy has as well; its times and ETags are its own."""
        return self.nbytes, self.header


def contents(shards: Mapping[str, ShardIdentity]) -> set[tuple[str, tuple[int, str]]]:
    """What copies of these shards have as well, under the same names."""
    return {(name, identity.content) for name, identity in shards.items()}


class Provenance(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a checkpoint lies."""

    path: str
    hub_id: str | None = None
    revision: str | None = None
    """Hub id and commit, where the path tells."""

    @property
    def origin(self) -> str | None:
        """The model and the commit, where they are known."""
        return f"{self.hub_id}@{self.revision}" if self.revision else None

    def lasting(self, shards: Mapping[str, ShardIdentity]) -> dict[str, ShardIdentity]:
        """Identities by which later runs know shards that lie here.

        At one commit a file has the same bytes, streamed, in the cache and in a copy of that. So
        the commit stands there for times and ETags.
        """
        if self.origin is None:
            return dict(shards)
        return {
            name: ShardIdentity(shard.nbytes, shard.header, etag=self.origin)
            for name, shard in shards.items()
        }

    @property
    def address(self) -> str:
        """What `storage.opening.open_store` takes for it, wherever it can be seen."""
        on_hub = self.revision and self.path.startswith(HUB_PREFIX)
        return f"{self.path}@{self.revision}" if on_hub else self.path


class FileRecord(msgspec.Struct, frozen=True, rename={"nbytes": "bytes", "checksum": CHECKSUM}):
    """A file that is not a shard."""

    nbytes: Annotated[int, msgspec.Meta(ge=0)]
    checksum: str
    """XXH3-128 of its bytes."""

    @classmethod
    def of(cls, content: bytes) -> FileRecord:
        """The record of a file that holds ``content``."""
        return cls(len(content), xxhash.xxh3_128_hexdigest(content))


class ShardRecord(msgspec.Struct, frozen=True, rename={"nbytes": "bytes"}):
    """An output shard; header and tensors cover all its bytes."""

    nbytes: int
    header: str
    """XXH3-128 of the header, length word included."""
    tensors: dict[str, str]
    """XXH3-128 of each tensor's bytes."""

    @classmethod
    def of(cls, header: bytes, nbytes: int, tensors: Mapping[str, str]) -> ShardRecord:
        """The record of a shard of ``nbytes`` with this header and these checksums."""
        return cls(nbytes, xxhash.xxh3_128_hexdigest(header), dict(tensors))


class SourceRecord(Provenance, frozen=True, kw_only=True, omit_defaults=True):
    """Which checkpoint was converted."""

    dropped: bool = False
    """Whether shards of it were deleted once they had been converted (`execution.dropping`)."""
    shards: dict[str, ShardIdentity]
    files: dict[str, FileRecord]
    """config.json, hf_quant_config.json and the index, where there is one."""

    def changed(self, now: Provenance, shards: Mapping[str, ShardIdentity]) -> list[str]:
        """Names of the shards that are not the same among those that lie at ``now``, sorted.

        A commit may have moved into the cache since, or out of it, or been copied, which changes
        the times of all files. Where one is as it was, it has not, and other times mean edits.
        """
        before = self.shards
        if not any(shards.get(name) == identity for name, identity in before.items()):
            before, shards = self.lasting(before), now.lasting(shards)
        return sorted(name for name, identity in before.items() if shards.get(name) != identity)


class Manifest(msgspec.Struct, frozen=True, rename={"max_shard_nbytes": "max_shard_bytes"}):
    """What a converted folder holds, and what it was made from; in the order of the file."""

    versions: dict[str, str]
    """Of fp4moe-convert, and of the FlashInfer that the row order is of."""
    row_order: str
    max_shard_nbytes: int
    plan: str
    """The plan's fingerprint."""
    source: SourceRecord
    files: dict[str, FileRecord]
    """All but the shards and the manifest: what a conversion writes, and the copied files."""
    shards: dict[str, ShardRecord]

    @property
    def copied_records(self) -> dict[str, FileRecord]:
        """The files that were copied from the source."""
        return {name: record for name, record in self.files.items() if name not in GENERATED}

    def encode(self) -> bytes:
        fields = msgspec.to_builtins(self)
        return sign({"format_version": FORMAT_VERSION, "checksum": CHECKSUM, **fields})

    @classmethod
    def decode(cls, text: bytes) -> Manifest:
        """The inverse of `encode`.

        Raises:
            VerifyError: of another format version, or changed since it was written.
        """
        try:
            content = decode_object(text)
        except ValueError as error:
            raise VerifyError(f"{MANIFEST_NAME}: {error}") from None
        try:
            check_format_version(MANIFEST_NAME, content)
        except FormatError as error:
            raise VerifyError(str(error)) from None
        content.pop("manifest", None)
        # The text is compared as well as the content: "\u00e9" may become "\u00E9".
        if text != sign(content):
            raise VerifyError(
                f"{MANIFEST_NAME}: has been changed: it does not match its own checksum"
            )
        try:  # anybody can write a checksum that matches
            return msgspec.convert(content, cls)
        except ValueError as error:  # as msgspec's are
            raise VerifyError(f"{MANIFEST_NAME}: is malformed: {error}") from None


def sign(content: Mapping[str, Any]) -> bytes:
    """JSON whose last entry is a checksum of the others."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return to_json({**content, "manifest": xxhash.xxh3_128_hexdigest(canonical.encode())})


def to_json(content: Mapping[str, Any]) -> bytes:
    """JSON as this package writes it into files."""
    return (json.dumps(content, indent=2) + "\n").encode()
