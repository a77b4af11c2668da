"""What a conversion will do: headers and config.json to a plan, and what there is to say of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from . import defaults, layouts
from .errors import CheckpointError, OutputError, naming
from .execution.dropping import Dropping, remaining
from .execution.folder_files import check_known, check_local, check_place
from .execution.forecast import Forecast, forecast
from .execution.resuming import foresee
from .execution.work import Conversion
from .format.files import GENERATED, JOURNAL_NAME, PARTIAL_SUFFIX
from .plan import Part, Plan, make_plan
from .prospects import Prospects, prospects
from .source.checkpoint import Checkpoint, open_checkpoint
from .source.completeness import warnings_on
from .source.experts import require_layers
from .source.quantization import require_nvfp4
from .storage.local import files_below
from .storage.opening import open_store
from .storage.reader import Store
from .storage.remote import Fetched, fetched_from


@dataclass(frozen=True)
class Preview:
    """What a conversion will do, from headers and config.json. Nothing has been written."""

    work: Conversion
    prospects: Prospects
    warnings: list[str]
    """Those that need no tensor."""
    part: Part | None = None
    """The shards are those of this part only."""
    dropping: Forecast | None = None
    """What becomes of the source, if it is deleted and has not been."""
    out_dir: Path | None = None
    """Where earlier runs may have left something."""
    overwrite: bool = False
    """Nothing of that is kept."""

    def only(self, part: Part) -> Preview:
        """As much of it as one part does."""
        plan = self.work.plan.only(part)
        return replace(self, work=replace(self.work, plan=plan), part=part)

    @property
    def fetched(self) -> Fetched | None:
        """What the preview has taken, where the source is on the network."""
        return fetched_from(self.work.store)

    @cached_property
    def _there(self) -> tuple[set[str], Mapping[str, Mapping[int, str]]]:
        """As `foresee` has it."""
        if self.out_dir is None or self.overwrite:
            return set(), {}
        return foresee(self.work, self.out_dir)

    @property
    def kept(self) -> set[str]:
        """Names of the shards that are there and stay."""
        return self._there[0]

    @property
    def to_fetch_nbytes(self) -> int | None:
        """What a conversion has to fetch, where the source is on the network."""
        if self.fetched is None:
            return None
        filled = self._there[1]
        weights = sum(
            source.nbytes
            for shard in self.work.plan.shards
            if shard.name not in self.kept
            for number, move in enumerate(shard.moves)
            if number not in filled.get(shard.name, {})
            for source in move.sources
        )
        return weights + sum(self.work.copied_nbytes.values())

    @property
    def to_write_nbytes(self) -> int:
        """What shards and copies will take that are not there yet."""
        copied = self.work.copied_nbytes
        if self.out_dir is not None and not self.overwrite:
            copied = {n: size for n, size in copied.items() if not (self.out_dir / n).exists()}
        shards = sum(shard.nbytes for shard in self.work.shards if shard.name not in self.kept)
        return shards + sum(copied.values())

    @property
    def shortage(self) -> list[str]:
        """That the disk is too small now, if it is."""
        if self.out_dir is None:
            return []
        needed = self.dropping.more_nbytes if self.dropping else self.to_write_nbytes
        folder = self.out_dir.absolute()
        with naming(self.out_dir, OutputError):
            free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
            for name in files_below(folder, OutputError) if folder.exists() else ():
                if name not in self.kept:  # a run may delete it
                    free += 512 * os.lstat(folder / name).st_blocks
        if free >= needed:
            return []
        return [f"{self.out_dir}: needs {needed:,} bytes of free disk, there are {free:,}"]

    def as_json(self, out_dir: Path) -> dict[str, Any]:
        """The plan and what else there is to say, if the result lies in ``out_dir``."""
        part = {"part": self.part.number, "parts": self.part.count} if self.part else {}
        return {
            "source": msgspec.to_builtins(self.work.store.provenance()),
            **part,
            **self.work.plan.as_json(),
            "to_fetch_bytes": self.to_fetch_nbytes,
            "fetched": None if self.fetched is None else self.fetched.as_json(),
            "other_files": len(self.work.other_files),
            "other_bytes": sum(self.work.copied_nbytes.values()),
            **self.prospects.as_json(),
            "serve": self.prospects.commands(str(out_dir)),
            "drop_source": None if self.dropping is None else self.dropping.as_json(),
            "warnings": [*self.warnings, *self.shortage],
        }


def preview(
    model_dir: str | Path | Store,
    out_dir: str | Path | None = None,
    *,
    max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES,
    drop_source: bool = False,
    overwrite: bool = False,
) -> Preview:
    """Open a checkpoint and plan its conversion; reads headers, writes nothing.

    Args:
        model_dir: as for `convert`.
        out_dir: where earlier runs may have left finished shards, and put on record what they have
            deleted of the source.
        max_shard_nbytes: as for `convert`.
        drop_source: as for `convert`.
        overwrite: as for `convert`.

    Raises:
        CheckpointError: it cannot be converted, or not be deleted, and why.
        OutputError: ``out_dir`` cannot be used.
        VerifyError: it could not be restored, once it is deleted.
    """
    store = open_store(model_dir)
    out_dir = None if out_dir is None else Path(out_dir)
    if out_dir is not None:
        check_local(out_dir)
    checkpoint = open_checkpoint(store if out_dir is None else remaining(store, out_dir))
    plan = plan_of(checkpoint, max_shard_nbytes=max_shard_nbytes)
    require_layers(checkpoint, plan.layers, plan.passed)
    warnings = warnings_on(checkpoint, plan.geometries)
    section = checkpoint.quantization or {}
    outlook = prospects(checkpoint, section, plan.geometries, plan.passed)
    outlook.require_one(checkpoint.location)
    if out_dir is not None:
        check_place(out_dir, store.local_path)
        with naming(out_dir, OutputError):
            if out_dir.exists():
                check_known(out_dir)
    work = Conversion(checkpoint, plan)
    foreseen = Preview(work, outlook, warnings, out_dir=out_dir, overwrite=overwrite)
    if drop_source and work.is_there:
        Dropping(work)  # makes sure that it can be
        foreseen = replace(foreseen, dropping=forecast(work, foreseen.kept))
    return foreseen


def plan_of(checkpoint: Checkpoint, *, max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES) -> Plan:
    """The plan for a checkpoint that can be converted, if it has any layer for it.

    Raises:
        CheckpointError: it is not NVFP4; as `make_plan`; or a file of the output and a folder of
            the source want the same name.
    """
    require_nvfp4(checkpoint)
    plan = make_plan(checkpoint, layouts.DEFAULT, max_shard_nbytes=max_shard_nbytes)
    files = {shard.name for shard in plan.shards}
    files |= {*GENERATED, JOURNAL_NAME, *checkpoint.other_files}
    for name in checkpoint.other_files:
        folder = Path(name).parts[0]
        if folder != name and folder.removesuffix(PARTIAL_SUFFIX) in files:
            raise CheckpointError(f"{name}: its folder has the name of a file of the output")
    return plan
