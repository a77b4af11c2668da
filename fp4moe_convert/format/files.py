"""Names of the files in a model folder, source or converted."""

from __future__ import annotations

import re

CONFIG_NAME = "config.json"
HF_QUANT_CONFIG_NAME = "hf_quant_config.json"
INDEX_NAME = "model.safetensors.index.json"
MANIFEST_NAME = "fp4moe_manifest.json"

SOURCE_NAME = "fp4moe_source.dat"
"""What of the source is in no tensor and no copied file (`source.recorded`)."""

GENERATED = (SOURCE_NAME, MANIFEST_NAME, CONFIG_NAME, INDEX_NAME)
"""What a conversion writes besides shards and copies, in the order in which it appears. The index
comes last: a folder without one is unfinished."""

CARD_NAME = "README.md"
SOURCE_CARD_NAME = "README.source.md"
"""The source's model card, where one that was made for the Hub has taken its name."""

JOURNAL_NAME = ".fp4moe-journal.jsonl"
"""Lies beside the shards while a conversion is unfinished."""
_JOURNAL = re.compile(r"\.fp4moe-journal(-\d+-of-\d+)?\.jsonl")
PARTIAL_SUFFIX = ".partial"
"""Ends a file's name until its last byte is on the disk."""

FOREIGN_FOLDERS = frozenset({".git", ".cache", "lost+found"})
"""Kept by version control, by the Hub's tools, and by file systems at their top."""

_FOR_PEOPLE = re.compile(
    r"(.*/)?(.*\.(md|png|jpe?g|gif|svg|webp|pdf)"
    r"|(readme|licen[cs]e|notice|copying)[\w-]*(\.txt)?|\.git(attributes|ignore))",
    re.DOTALL | re.IGNORECASE,
)


def no_engine_reads(name: str) -> bool:
    """Whether a file is a model card, a licence, a picture, or git's own. Such files are the
    user's, before and after a conversion. Any other file may be one that an engine reads."""
    return _FOR_PEOPLE.fullmatch(name) is not None


def part_journal_name(number: int, count: int) -> str:
    """Name of the journal of part ``number`` (from 1) of ``count``."""
    return f".fp4moe-journal-{number}-of-{count}.jsonl"


def is_journal(name: str) -> bool:
    """Whether a file is the journal of a conversion, or of a part of one."""
    return _JOURNAL.fullmatch(name) is not None


_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def is_shard(name: str) -> bool:
    """Whether a file is called as an output shard is. Shards of a source often are, too."""
    return _SHARD.fullmatch(name) is not None


def shard_name(number: int, count: int) -> str:
    """Name of output shard ``number`` (from 1) of ``count``, as the Hub spells it."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"
