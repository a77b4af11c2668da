"""A model folder, opened: its configuration, the headers of its shards, its other files.

It reads JSON and headers only. Everything that the folder says of itself is checked here, so that
later modules can rely on it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from ..errors import CheckpointError, MissingFileError
from ..format.files import (
    CONFIG_NAME,
    GENERATED,
    HF_QUANT_CONFIG_NAME,
    INDEX_NAME,
    PARTIAL_SUFFIX,
    is_journal,
)
from ..format.manifest import FileRecord
from ..format.untrusted import decode_object
from ..storage.header import MAX_NAME_LENGTH, read_header
from ..storage.reader import Listing, Store, in_parallel, read_all, read_bytes
from ..storage.stand_in import START_NBYTES, stand_in_for
from .names import is_mtp_by_name, layer_number
from .spans import Shard
from .text_config import SECTION_KEYS, TextConfig, find_text_config

_COUNTED_NAME = re.compile(r"(.*-)([0-9]+)-of-([0-9]+)\.safetensors", re.DOTALL)
MAX_SHARDS = 100_000
"""How far names are counted; the largest models have a few hundred."""

_OF_A_WHOLE_FILE = re.compile(
    r"[.-](sha[0-9]+|md5|blake[23]b?|b3|crc32c?|xxh[0-9]+)(sums?)?(\.txt)?$"
    r"|\.(sig|asc|gpg|minisig|sigstore|pem|dvc|torrent|json|ya?ml|txt|md|bak|old|orig)$",
    re.IGNORECASE,
)
"""Endings of checksums, signatures, descriptions, and copies."""
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|gguf|pt|pth|ckpt|h5)|(.*/)?(pytorch_|adapter_|consolidated|model)[^/]*\.bin",
    re.DOTALL,
)
"""The same model in another form, or another model, beside the shards."""

_PAGE_SUFFIXES = (".html", ".htm", ".xml", ".svg")
"""Files with these endings may be web pages."""

MTP_NAME = "mtp.safetensors"
"""SGLang 0.5.23 adds a file of this name to those that the index of a GLM-4.5 or later names."""

MAX_INDEX_NBYTES = 50_000_000
"""DeepSeek-V3's has 17 MB."""
MAX_CONFIG_NBYTES = 10_000_000
"""DeepSeek-V3's has 6 kB."""

# Of all shards together, so that no folder costs more than 2 GiB to plan. DeepSeek-V3 has 180,000
# tensors, 21 MB of headers and 0.4 TB, and costs 0.2 GiB; a file with holes may claim any size.
MAX_TENSORS = 500_000
MAX_HEADERS_NBYTES = 100_000_000
MAX_CHECKPOINT_NBYTES = 8 * 2**40


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers are valid and agree with its index."""

    store: Store
    config: Mapping[str, Any]
    """config.json, parsed."""
    hf_quant_config: Mapping[str, Any] | None
    """hf_quant_config.json, parsed; older ModelOpt exports describe the quantization only there."""
    config_files: Mapping[str, FileRecord]
    """The files that these two were read from, and the index, as they were then. Only the first is
    always there."""
    shards: tuple[Shard, ...]
    """In order of name."""
    other_files: tuple[str, ...]
    """Everything else that belongs to the model, as paths relative to the store."""
    left_out: Mapping[str, str]
    """What lies in the folder and is not taken for part of the model, with the reason."""
    has_index: bool = False
    """Whether an index names the shards."""

    @property
    def location(self) -> str:
        """For messages."""
        return self.store.location

    @cached_property
    def text(self) -> TextConfig:
        """What config.json says of the text model.

        Raises:
            CheckpointError: it cannot be told which of its objects describes that.
        """
        return find_text_config(self.config)

    @cached_property
    def quantization(self) -> Mapping[str, Any] | None:
        """The source's own description, from the first place that has one: the top of config.json,
        hf_quant_config.json, an object nested in config.json. A nested one may be a leftover of the
        model that was quantized. vLLM looks in this order (transformers_utils/config.py:953 in
        0.33.0).
        """
        if self.is_described_in_file:
            return self.hf_quant_config
        for (path, key), section in self.text.sections.items():
            if not isinstance(section, dict):
                raise CheckpointError(f"{CONFIG_NAME}: {'.'.join((*path, key))} is not an object")
            return section
        return None

    @property
    def is_described_in_file(self) -> bool:
        """Whether hf_quant_config.json is that place."""
        at_top = ((), SECTION_KEYS[0]) in self.text.sections
        return self.hf_quant_config is not None and not at_top


def open_checkpoint(store: Store) -> Checkpoint:
    """Open a model folder, converted or not.

    Raises:
        CheckpointError: not a model folder, or one that contradicts itself.
        HeaderError: a shard breaks a rule of the safetensors format.
    """
    store.check_exists()
    try:  # before the listing: a folder that is no model's may hold millions of files
        config, config_record = _read_object(store, CONFIG_NAME, MAX_CONFIG_NBYTES)
    except MissingFileError:
        raise CheckpointError(
            f"{store.location}: not a model folder: it has no {CONFIG_NAME}"
        ) from None
    listing = store.listing()
    files = set(listing.files)
    for name in listing.folders:
        is_shard = name.endswith(".safetensors") and INDEX_NAME not in files
        if is_shard or name in (INDEX_NAME, HF_QUANT_CONFIG_NAME):
            raise CheckpointError(f"{name}: is not a regular file")
    config_files = {CONFIG_NAME: config_record}
    hf_quant_config = None
    if HF_QUANT_CONFIG_NAME in files:
        hf_quant_config, config_files[HF_QUANT_CONFIG_NAME] = _read_object(
            store, HF_QUANT_CONFIG_NAME, MAX_CONFIG_NBYTES
        )

    present = {n for n in files if n.endswith(".safetensors") and os.path.basename(n) == n}
    weight_map = None
    if INDEX_NAME in files:
        weight_map, config_files[INDEX_NAME] = _read_weight_map(store)
    if weight_map is None:
        named = present
        # Without an index, only names that count shards can tell of a missing one.
        for missing in missing_by_name(present):
            raise CheckpointError(
                f"{store.location}: {missing} is missing, and there is no {INDEX_NAME}"
            )
    else:
        named = set(weight_map.values())
    if not named:
        raise CheckpointError(
            f"{store.location}: not a model folder: it has no *.safetensors files"
        )
    _check_downloads(files, named)
    shards = _open_shards(store, sorted(named))
    if weight_map is not None:
        _check_weight_map(weight_map, shards)
    _check_unique(shards, weight_map)
    added, left_out = _unnamed_shards(store, present - named, shards, find_text_config(config))
    _check_downloads(files, {shard.name for shard in added})
    known = {*GENERATED, HF_QUANT_CONFIG_NAME, *present, *named}
    other_files, unfinished = _other_files(store, listing, known)
    return Checkpoint(
        store=store,
        config=config,
        hf_quant_config=hf_quant_config,
        config_files=config_files,
        shards=tuple(sorted((*shards, *added), key=lambda shard: shard.name)),
        other_files=other_files,
        left_out={**unfinished, **left_out},
        has_index=weight_map is not None,
    )


def _read_object(store: Store, name: str, max_nbytes: int) -> tuple[dict[str, Any], FileRecord]:
    text = read_all(store.open(name), max_nbytes)
    return _parse_object(text, name), FileRecord.of(text)


def _parse_object(text: bytes, file: str) -> dict[str, Any]:
    if what := stand_in_for(text):
        raise CheckpointError(f"{file}: {what}")
    try:
        return decode_object(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _read_weight_map(store: Store) -> tuple[dict[str, str], FileRecord]:
    content, record = _read_object(store, INDEX_NAME, MAX_INDEX_NBYTES)
    weight_map = content.get("weight_map")
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
    return weight_map, record


def missing_by_name(names: Set[str]) -> Iterator[str]:
    """Shards that are not among some, though these are counted in their names."""
    matches = filter(None, map(_COUNTED_NAME.fullmatch, sorted(names)))
    for stem, digits, count in sorted({(match[1], len(match[2]), match[3]) for match in matches}):
        for number in range(1, min(int(count[:18]), MAX_SHARDS) + 1):
            name = f"{stem}{number:0{digits}d}-of-{count}.safetensors"
            if name not in names:
                yield name


def _check_downloads(files: Set[str], shards: Set[str]) -> None:
    """A file whose name begins with a shard's and goes on is taken for a downloader's note that the
    shard is unfinished (``.aria2``, ``.part``, ``.incomplete`` and so on), unless it is known to be
    of a whole file. By then the shard may have its full length."""
    for name in sorted(files):
        stem, suffix, rest = name.partition(".safetensors")
        if rest and stem + suffix in shards and not _OF_A_WHOLE_FILE.search(rest):
            raise CheckpointError(
                f"{stem}{suffix}: its download may be unfinished: {name} lies beside it; "
                "finish the download, or move that file away if it is something else"
            )


def _open_shards(
    store: Store, names: Iterable[str], opened: Sequence[Shard] = ()
) -> tuple[Shard, ...]:
    """Open shards, which have to stay within the limits together with those that are open."""
    shards = []
    totals = {"tensors": 0, "bytes of headers": 0, "bytes": 0}
    limits = (MAX_TENSORS, MAX_HEADERS_NBYTES, MAX_CHECKPOINT_NBYTES)

    def count(shard: Shard) -> None:
        totals["tensors"] += len(shard.header.tensors)
        totals["bytes of headers"] += shard.header.nbytes
        totals["bytes"] += shard.header.file_nbytes
        for (what, total), limit in zip(totals.items(), limits, strict=True):
            if total > limit:
                raise CheckpointError(
                    f"{shard.name}: with it, the shards have {total} {what}, the limit is {limit}"
                )

    for shard in opened:
        count(shard)
    for shard in in_parallel(partial(_open_shard, store), names, width=store.connections):
        shards.append(shard)
        count(shard)
    return tuple(shards)


def _open_shard(store: Store, name: str) -> Shard:
    try:
        reader = store.open(name)
    except MissingFileError:
        raise CheckpointError(f"{INDEX_NAME}: names {name}, which is missing") from None
    return Shard(name, read_header(reader), reader.identity)


def _check_weight_map(weight_map: Mapping[str, str], shards: tuple[Shard, ...]) -> None:
    contents = {shard.name: {tensor.name for tensor in shard.header.tensors} for shard in shards}
    for tensor, file in weight_map.items():
        if tensor not in contents[file]:
            raise CheckpointError(f"{INDEX_NAME}: {tensor!r} is not in {file}")


def _check_unique(shards: tuple[Shard, ...], weight_map: Mapping[str, str] | None) -> None:
    home: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.header.tensors:
            if tensor.name in home:
                first, second = home[tensor.name], shard.name
                raise CheckpointError(
                    f"{second}: {tensor.name!r} is in {first} as well; "
                    + _which_of_two(first, second, (weight_map or {}).get(tensor.name))
                )
            home[tensor.name] = shard.name


def _which_of_two(first: str, second: str, meant: str | None) -> str:
    """What to do about a tensor that two shards hold. Engines ask the index for names of files
    only, and take every tensor in them."""
    loaded = "engines load both, in the order of the files' names"
    if meant is None:
        return f"{loaded}; delete the file that does not belong, or write it again without that"
    stale = second if meant == first else first
    return f"{INDEX_NAME} means that in {meant}, but {loaded}; write {stale} again without it"


def _unnamed_shards(
    store: Store, names: Set[str], shards: tuple[Shard, ...], text: TextConfig
) -> tuple[list[Shard], dict[str, str]]:
    """What lies beside the shards that an index names.

    A file of nothing but multi-token prediction goes along. Exports of GLM-4.7 have one that their
    index does not name; SGLang loads it all the same, and its draft model needs it.

    Returns:
        The shards that go along; why the others do not, by name.
    """
    home = {tensor.name: shard.name for shard in shards for tensor in shard.header.tensors}
    added: list[Shard] = []
    left_out: dict[str, str] = {}
    # Of two such files engines read the one that they know by its name.
    for name in sorted(names, key=lambda name: (name != MTP_NAME, name)):
        left_out[name] = f"is not named by {INDEX_NAME}"
        try:
            (shard,) = _open_shards(store, [name], opened=(*shards, *added))
        except CheckpointError as error:
            left_out[name] += f" and cannot be read ({str(error).removeprefix(f'{name}: ')})"
            continue
        tensors = [tensor.name for tensor in shard.header.tensors]
        if not tensors or not all(_is_mtp(tensor, text) for tensor in tensors):
            continue
        if twice := next((tensor for tensor in tensors if tensor in home), None):
            left_out[name] += f", and {home[twice]} holds {twice!r} as well"
            continue
        home |= dict.fromkeys(tensors, name)
        added.append(shard)
        del left_out[name]
    return added, left_out


def _is_mtp(tensor: str, text: TextConfig) -> bool:
    """Whether a tensor is of multi-token prediction. Engines pass over layers that are counted
    after the decoder's only where config.json speaks of them."""
    if is_mtp_by_name(tensor):
        return True
    number, count = layer_number(tensor), text.layer_count
    after_the_decoder = number is not None and count is not None and number >= count
    return after_the_decoder and text.announces_mtp


def _other_files(
    store: Store, listing: Listing, known: Set[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Files to copy as they are: tokenizer, code, licence, anything in sub-folders."""
    found = []
    left_out = dict(listing.left_out)
    # An unfinished conversion, here or in the output, has files of these names.
    unfinished = {n for n in listing.files if is_journal(n) or n.endswith(PARTIAL_SUFFIX)}
    left_out |= dict.fromkeys(sorted(unfinished - known), "is unfinished")
    names = [name for name in listing.files if name not in known | unfinished]

    def check(name: str) -> int:
        # One that cannot be read, or is not there in truth, is found now, not hours later.
        reader = store.open(name)
        what = stand_in_for(read_bytes(reader, 0, min(reader.nbytes, START_NBYTES)))
        if what and not name.endswith(_PAGE_SUFFIXES):
            raise CheckpointError(f"{name}: {what}")
        return reader.nbytes

    sizes = in_parallel(check, names, width=store.connections)
    for name, nbytes in zip(names, sizes, strict=True):
        if _OTHER_WEIGHTS.fullmatch(name):
            left_out[name] = f"holds {nbytes:,} bytes of other weights"
        else:
            found.append(name)
    return tuple(found), left_out
