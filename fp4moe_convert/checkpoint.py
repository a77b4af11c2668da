"""A model folder, opened: its config, its quantization, the headers of its shards, its other files.

Reads JSON and headers only. Whatever the folder claims about itself (an index, a quantization) is
checked here, so that later rooms need not doubt it.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import stat
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from .blockio import open_regular
from .contract import (
    CONFIG_NAME,
    GROUP_SIZE,
    HF_QUANT_CONFIG_NAME,
    INDEX_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    QUANT_METHOD,
    shard_name,
)
from .errors import CheckpointError, ConvertError, naming
from .headers import MAX_NAME_LENGTH, Header, TensorInfo, parse_json, read_header

_GENERATED = frozenset({CONFIG_NAME, INDEX_NAME, MANIFEST_NAME})
"""What a converted checkpoint has of its own."""

_COUNTED_NAME = re.compile(r"model-[0-9]{5}-of-([0-9]{5})\.safetensors")

MAX_JSON_NBYTES = 100_000_000
"""Of an index or a manifest; DeepSeek-V3's index has 17 MB."""
MAX_CONFIG_NBYTES = 10_000_000
"""Of a configuration; DeepSeek-V3's has 6 kB."""

# Of all shards together, so that no folder costs more than 2 GiB to plan. DeepSeek-V3 has 180,000
# tensors, 21 MB of headers and 0.4 TB, and costs 0.2 GiB; a file with holes may claim any size.
MAX_TENSORS = 500_000
MAX_HEADERS_NBYTES = 100_000_000
MAX_CHECKPOINT_NBYTES = 8 * 2**40

CHECKSUM = "xxh3_128"

FOREIGN_FOLDERS = frozenset({".git", ".cache"})
"""What version control and the Hub's tools keep for themselves."""
FOREIGN_FILES = frozenset({".gitattributes"})
"""What the Hub adds to every repository."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of the checkpoint."""

    name: str
    path: Path
    header: Header
    modified_ns: int
    """When the file was last changed, as of just before its header was read."""

    @property
    def identity(self) -> dict[str, str | int]:
        """What the file's bytes do not change without, whoever changes them; JSON values."""
        return {
            "bytes": self.header.file_nbytes,
            "header": self.header.digest,
            "modified_ns": self.modified_ns,
        }

    def check_unchanged(self) -> None:
        """Make sure that what has been read since is what the header describes.

        Raises:
            CheckpointError: the file is not what it was, or has gone.
        """
        with naming(self.name):
            status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.header.file_nbytes, self.modified_ns):
            raise CheckpointError(f"{self.name}: has changed while it was read")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that is not a shard."""

    nbytes: int
    checksum: str
    """XXH3-128 of its bytes."""

    def as_json(self) -> dict[str, str | int]:
        return {"bytes": self.nbytes, CHECKSUM: self.checksum}


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers are valid and agree with its index."""

    root: Path
    config: Mapping[str, Any]
    """config.json, parsed."""
    hf_quant_config: Mapping[str, Any] | None
    """hf_quant_config.json, parsed; older ModelOpt exports describe the quantization only there."""
    config_files: Mapping[str, FileRecord]
    """The two files that these were read from, as they were then; the second need not exist."""
    shards: tuple[Shard, ...]
    """In order of name."""
    other_files: tuple[str, ...]
    """Everything else that belongs to the model, as paths relative to ``root``."""
    left_out: Mapping[str, str]
    """What lies in the folder and is not taken for part of the model, with the reason."""

    @cached_property
    def quantization(self) -> Mapping[str, Any] | None:
        """The source's own description; config.json's section wins, as it does in the engines."""
        section = self.config.get("quantization_config")
        if section is not None and not isinstance(section, dict):
            raise CheckpointError(f"{CONFIG_NAME}: quantization_config is not an object")
        return section if section is not None else self.hf_quant_config

    @property
    def is_converted(self) -> bool:
        return (self.quantization or {}).get("quant_method") == QUANT_METHOD

    def text_config_value(self, *keys: str) -> int | None:
        """The first of ``keys`` that config.json holds, multimodal models' text part included.

        Raises:
            CheckpointError: the value is not a positive integer.
        """
        text_config = self.config.get("text_config")
        for section in (self.config, text_config if isinstance(text_config, dict) else {}):
            for key in keys:
                value = section.get(key)
                if value is None:
                    continue
                if type(value) is not int or value < 1:
                    raise CheckpointError(
                        f"{CONFIG_NAME}: {key} is {value!r}, expected a positive integer"
                    )
                return value
        return None


@contextmanager
def bulk_allocation() -> Iterator[None]:
    """Keep the garbage collector out while many small objects are made.

    There are no cycles among them, and looking for some took half of the 4.2 s in which
    DeepSeek-V3, 180,000 tensors, is planned.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@bulk_allocation()
def open_checkpoint(root: Path) -> Checkpoint:
    """Open a model folder, converted or not.

    Raises:
        CheckpointError: not a model folder, or one that contradicts itself.
        HeaderError: a shard breaks a rule of the safetensors format.
    """
    with naming(root):
        if not root.is_dir():
            reason = "is not a folder" if root.exists() else "does not exist"
            raise CheckpointError(f"{root}: {reason}; expected a model folder")
        names = sorted(os.listdir(root))  # links that lead nowhere, too
    if CONFIG_NAME not in names:
        raise CheckpointError(f"{root}: not a model folder: it has no {CONFIG_NAME}")
    configs, config_files = {}, {}
    for name in (CONFIG_NAME, HF_QUANT_CONFIG_NAME):
        if name in names:
            configs[name], config_files[name] = _read_config(root, name)

    present = [name for name in names if name.endswith(".safetensors")]
    weight_map = _read_weight_map(root) if INDEX_NAME in names else None
    named = present if weight_map is None else sorted(set(weight_map.values()))
    if weight_map is None:
        _check_numbering(root, set(named))
    if not named:
        raise CheckpointError(f"{root}: not a model folder: it has no *.safetensors files")
    shards = _open_shards(root, named)
    if weight_map is not None:
        _check_weight_map(weight_map, shards)
    _check_unique(shards)
    other_files, left_out = _other_files(
        root, {*_GENERATED, HF_QUANT_CONFIG_NAME, *present, *named}
    )
    left_out |= {
        name: f"is not named by {INDEX_NAME}" for name in present if name not in set(named)
    }
    return Checkpoint(
        root=root,
        config=configs[CONFIG_NAME],
        hf_quant_config=configs.get(HF_QUANT_CONFIG_NAME),
        config_files=config_files,
        shards=shards,
        other_files=other_files,
        left_out=left_out,
    )


def require_nvfp4(checkpoint: Checkpoint) -> None:
    """Refuse what is not a ModelOpt NVFP4 checkpoint with blocks of 16, and say what it is.

    Raises:
        CheckpointError: already converted, another quantization, or none.
    """
    described = checkpoint.quantization
    if checkpoint.is_converted:
        raise CheckpointError(f"{checkpoint.root}: is already converted")
    if described is None:
        dtype = checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype"))
        raise CheckpointError(
            f"{checkpoint.root}: not NVFP4: it is not quantized"
            + (f" ({CONFIG_NAME} says {dtype})" if dtype else "")
        )
    in_config = checkpoint.config.get("quantization_config") is not None
    file = CONFIG_NAME if in_config else HF_QUANT_CONFIG_NAME
    # hf_quant_config.json nests what config.json has at the top; it names its maker, not a method.
    nested = described.get("quantization")
    settings: Mapping[str, Any] = nested if isinstance(nested, dict) else described
    producer = described.get("producer")
    maker = producer.get("name") if isinstance(producer, dict) else None
    method = described.get("quant_method", maker or "modelopt")
    algorithm = settings.get("quant_algo")
    # transformers' reader of ModelOpt's section also knows the method as "modelopt_fp4".
    if not str(method).startswith("modelopt") or algorithm != "NVFP4":
        kind = " ".join(str(word) for word in (method, algorithm, described.get("format")) if word)
        raise CheckpointError(f"{file}: not ModelOpt NVFP4: the quantization is {kind}")
    for group_size in _group_sizes(settings):
        if group_size != GROUP_SIZE:
            raise CheckpointError(f"{file}: group size is {group_size}, NVFP4 has {GROUP_SIZE}")


def _group_sizes(settings: Mapping[str, Any]) -> list[Any]:
    sizes = [settings["group_size"]] if settings.get("group_size") is not None else []
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("group_size") is not None:
            sizes.append(weights["group_size"])
    return sizes


def _read_config(root: Path, name: str) -> tuple[dict[str, Any], FileRecord]:
    with naming(name):
        _require_file(root, name)
    text = read_bounded(root / name, MAX_CONFIG_NBYTES)
    record = FileRecord(len(text), xxhash.xxh3_128_hexdigest(text))
    return parse_json_object(text, name, printable=True), record


def read_bounded(path: Path, max_nbytes: int = MAX_JSON_NBYTES) -> bytes:
    """All bytes of a regular file that has at most ``max_nbytes``.

    Raises:
        CheckpointError: unreadable, too large, or no regular file.
    """
    with naming(path.name), open(path, "rb", opener=open_regular) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > max_nbytes:
            raise CheckpointError(f"{path.name}: has {nbytes} bytes, the limit is {max_nbytes}")
        return file.read(max_nbytes)


def parse_json_object(text: bytes, file: str, *, printable: bool = False) -> dict[str, Any]:
    """Parse JSON that must be an object.

    Args:
        text: encoded in UTF-8.
        file: where it is from, for messages.
        printable: as for `parse_json`.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    try:
        content = parse_json(text, printable=printable)
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def _require_file(root: Path, name: str) -> os.stat_result:
    """Only a regular file is one of the folder's own, or a link to a regular file that does not
    lead out of it: what is copied, or published, must not come from elsewhere. The Hub's cache
    keeps its files beside its snapshots of them, and links there.

    Raises:
        OSError, ValueError: there is no such file, or it may not be read.
        CheckpointError: it is none of the folder's own.
    """
    path = root / name
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name}: is not a regular file")
    if not os.access(path, os.R_OK):  # a file that is only copied would be opened hours later
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    own, target = os.path.realpath(root), os.path.realpath(path)
    homes = [own]
    snapshots = os.path.dirname(own)
    if os.path.basename(snapshots) == "snapshots":
        # Not where a link of this name leads: that may be anywhere.
        homes.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    if not any(os.path.commonpath([home, target]) == home for home in homes):
        raise CheckpointError(
            f"{name}: is a link to {target}, outside the model folder; "
            "put the file itself, or a hard link, in its place"
        )
    return status


def _read_weight_map(root: Path) -> dict[str, str]:
    with naming(INDEX_NAME):
        _require_file(root, INDEX_NAME)
    weight_map = parse_json_object(read_bounded(root / INDEX_NAME), INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME}: has no weight_map")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(
            f"{INDEX_NAME}: has {len(weight_map)} tensors, the limit is {MAX_TENSORS}"
        )
    for tensor, file in weight_map.items():
        if len(tensor) > MAX_NAME_LENGTH:
            raise CheckpointError(
                f"{INDEX_NAME}: a tensor's name has {len(tensor)} characters, "
                f"the limit is {MAX_NAME_LENGTH}"
            )
        # A shard is a file of this folder: no separators, so no way out of it.
        if not isinstance(file, str) or file != os.path.basename(file) or file in ("", ".", ".."):
            raise CheckpointError(
                f"{INDEX_NAME}: {tensor!r} is said to be in {file!r}, "
                "which is not a file name inside the folder"
            )
    return weight_map


def _check_numbering(root: Path, names: Set[str]) -> None:
    """Without an index, names that count shards are all that can tell of a missing one."""
    for count in {match[1] for name in names if (match := _COUNTED_NAME.fullmatch(name))}:
        for number in range(1, int(count) + 1):
            name = shard_name(number, int(count))
            if name not in names:
                raise CheckpointError(f"{root}: {name} is missing, and there is no {INDEX_NAME}")


def _open_shards(root: Path, names: list[str]) -> tuple[Shard, ...]:
    shards = []
    totals = {"tensors": 0, "bytes of headers": 0, "bytes": 0}
    limits = (MAX_TENSORS, MAX_HEADERS_NBYTES, MAX_CHECKPOINT_NBYTES)
    for name in names:
        shard = _open_shard(root, name)
        shards.append(shard)
        totals["tensors"] += len(shard.header.tensors)
        totals["bytes of headers"] += shard.header.nbytes
        totals["bytes"] += shard.header.file_nbytes
        for (what, total), limit in zip(totals.items(), limits, strict=True):
            if total > limit:
                raise CheckpointError(
                    f"{name}: with it, the shards have {total} {what}, the limit is {limit}"
                )
    return tuple(shards)


def _open_shard(root: Path, name: str) -> Shard:
    path = root / name
    with naming(name):
        try:
            status = _require_file(root, name)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            if getattr(error, "errno", None) not in (None, errno.ENOENT, errno.ENAMETOOLONG):
                raise
            raise CheckpointError(f"{INDEX_NAME}: names {name}, which is missing") from None
    return Shard(name, path, read_header(path), status.st_mtime_ns)


def _check_weight_map(weight_map: Mapping[str, str], shards: tuple[Shard, ...]) -> None:
    contents = {shard.name: {tensor.name for tensor in shard.header.tensors} for shard in shards}
    for tensor, file in weight_map.items():
        if tensor not in contents[file]:
            raise CheckpointError(f"{INDEX_NAME}: {tensor!r} is not in {file}")


def _check_unique(shards: tuple[Shard, ...]) -> None:
    home: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.header.tensors:
            if tensor.name in home:
                raise CheckpointError(
                    f"{shard.name}: {tensor.name!r} is in {home[tensor.name]} as well"
                )
            home[tensor.name] = shard.name


def _other_files(root: Path, known: set[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Files to copy as they are: tokenizer, code, licence, whatever lies in sub-folders. Links to
    folders are left out: they may lead anywhere, and round in circles."""
    found = []
    left_out = {}
    for name in sorted(set(files_below(root)) - known):
        if (root / name).is_dir():
            left_out[name] = "is a link to a folder"
        elif name == JOURNAL_NAME or name.endswith(PARTIAL_SUFFIX):
            # So are files called that a conversion has not finished, here or in the output.
            left_out[name] = "is unfinished"
        else:
            with naming(name):
                _require_file(root, name)
            found.append(name)
    return tuple(found), left_out


def files_below(root: Path, kind: type[ConvertError] = CheckpointError) -> Iterator[str]:
    """All that is not a folder in a folder and its sub-folders, links to folders included, as paths
    relative to it. Without `FOREIGN_FOLDERS`.

    Raises:
        ConvertError: of this ``kind``: a sub-folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        relative = os.path.relpath(error.filename, root)
        with naming(root if relative == "." else relative, kind):
            raise error

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = set(folders) - FOREIGN_FOLDERS
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(folder, name), root)


@dataclass(frozen=True, slots=True)
class Located:
    """A source tensor and the shard that holds it."""

    shard: Shard
    info: TensorInfo

    @property
    def offset(self) -> int:
        """From the start of the file."""
        return self.shard.header.nbytes + self.info.start
