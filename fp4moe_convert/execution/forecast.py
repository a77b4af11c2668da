"""How much disk a conversion takes that deletes its source (`dropping`), before it begins."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from ..plan import Plan, PlannedShard
from .work import Conversion


@dataclass(frozen=True, slots=True)
class Forecast:
    """What dropping the source comes to."""

    shards: int
    """How many are deleted."""
    nbytes: int
    """Their size."""
    peak_nbytes: int
    """The most that source and result take together, at any moment."""
    more_nbytes: int
    """Of these: what is not taken at the start."""

    def __str__(self) -> str:
        go = "is deleted as it is" if self.shards == 1 else "are deleted as they are"
        return (
            f"{source_shards(self.shards)}, {self.nbytes:,} bytes, {go} converted; source and "
            f"result take {self.peak_nbytes:,} bytes at most, {self.more_nbytes:,} more than now"
        )

    def as_json(self) -> dict[str, int]:
        return {
            "shards": self.shards,
            "bytes": self.nbytes,
            "peak_bytes": self.peak_nbytes,
            "more_bytes": self.more_nbytes,
        }


def source_shards(count: int) -> str:
    """So many of them, in words."""
    return f"{count:,} shard{'' if count == 1 else 's'} of the source"


def forecast(work: Conversion, kept: Container[str] = ()) -> Forecast:
    """Foresee a conversion.

    Args:
        work: what it does.
        kept: names of output shards that are there already.
    """
    sizes = {
        shard.name: shard.header.file_nbytes
        for shard in work.sources
        if shard.name not in work.gone
    }
    nbytes = sum(sizes.values())
    beside = sum(work.copied_nbytes.values())
    # `SOURCE_NAME` holds these once more.
    headers = sum(shard.header.nbytes for shard in work.sources)
    configuration = sum(file.nbytes for file in work.checkpoint.config_files.values())
    more = beside + headers + configuration + growth(work.plan, sizes, kept)
    before = sum(shard.nbytes for shard in work.shards if shard.name in kept)
    there = nbytes + beside + configuration + before
    return Forecast(len(sizes), nbytes, peak_nbytes=there + more, more_nbytes=more)


def steps(plan: Plan) -> Iterator[tuple[PlannedShard, list[str]]]:
    """Output shards in order, each with the names of the source shards that nothing after it
    reads."""
    files = [shard.source_files for shard in plan.shards]
    last = {name: number for number, names in enumerate(files) for name in names}
    for number, shard in enumerate(plan.shards):
        yield shard, [name for name in files[number] if last[name] == number]


def growth(plan: Plan, sizes: Mapping[str, int], kept: Container[str] = ()) -> int:
    """How many bytes more than at the start a run takes at most.

    Args:
        plan: what it writes.
        sizes: bytes that become free with each source shard.
        kept: names of output shards that are there already.
    """
    now = most = 0
    for shard, done_with in steps(plan):
        now += 0 if shard.name in kept else shard.nbytes
        most = max(most, now)
        now -= sum(sizes.get(name, 0) for name in done_with)
    return most
