"""The output folder of a conversion: whose it is, what in it is kept, what has to go.

A folder is ours if it is empty, or holds nothing but what conversions left there, by the word of
their journal or their manifest. Nothing else in it is ever deleted, or written beside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from .blockio import partial_path
from .checkpoint import Checkpoint
from .contract import CONFIG_NAME, FORMAT_VERSION, INDEX_NAME, MANIFEST_NAME
from .errors import OutputError, VerifyError, naming
from .journal import JOURNAL_NAME, Journal, Made, source_identity, why_redo
from .manifest import Manifest, ShardRecord, describe_source, read_manifest
from .plan import Plan, PlannedShard
from .row_order import fingerprint, our_rows


class Workspace:
    """An output folder, locked, with all stale files gone; a context manager."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, out_dir: Path, *, overwrite: bool
    ) -> None:
        """Claim the folder, and decide which finished shards are kept.

        Args:
            checkpoint: the source.
            plan: what is to be there.
            out_dir: where; made if need be.
            overwrite: keep nothing of what earlier runs left.

        Raises:
            OutputError: the folder is unfit or not ours, another process holds it, it holds a
                finished conversion of something else, or the disk is too small.
        """
        _check_place(checkpoint, out_dir)
        self._out_dir = out_dir
        self._plan = plan
        self._row_order = fingerprint(our_rows)
        self._sources = {shard.path.name: source_identity(shard) for shard in checkpoint.shards}
        self._names = {
            CONFIG_NAME,
            INDEX_NAME,
            MANIFEST_NAME,
            *(shard.name for shard in plan.shards),
            *checkpoint.other_files,
        }
        self._adding = threading.Lock()
        self.kept: dict[str, ShardRecord] = {}
        """Finished shards that are taken as they are."""
        self.redone: dict[str, str] = {}
        """Finished shards that are not, and why."""

        with naming(out_dir, OutputError):
            self._created = not out_dir.exists()
            out_dir.mkdir(parents=True, exist_ok=True)
            known = (out_dir / JOURNAL_NAME).exists() or (out_dir / MANIFEST_NAME).exists()
            if not known and any(out_dir.iterdir()):
                raise OutputError(f"{out_dir}: is not empty")
        self._journal = Journal(out_dir)
        self._leave_alone = True
        """Whether a failure from now on takes nothing away."""
        try:
            manifest = _finished(out_dir)
            ours = self._journal.files | _files_of(manifest)
            _refuse_foreign(out_dir, ours)
            ours |= self._names
            if not overwrite:
                self._take_stock(checkpoint, manifest)
            # A finished folder stays so: its small files are replaced by the same, one by one.
            self._leave_alone = manifest is not None and not overwrite
            # First the names, then the deeds: whatever a kill leaves is known to be ours.
            self._journal.begin(ours)
            with naming(out_dir, OutputError):
                self._clear(ours, ours if self._leave_alone else set(self.kept))
                self._check_space(checkpoint)
        except BaseException as failure:
            self.__exit__(type(failure), failure, None)
            raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: object, failure: object, trace: object) -> None:
        """After a failure only what the next run can use stays: finished shards and the journal."""
        finished = {name for name in self._journal.made if (self._out_dir / name).exists()}
        nothing_to_resume = failure is None or not (finished or self._journal.files)
        # Where tidying up fails, too, the failure that led here is the one to tell of.
        if failure is not None and not self._leave_alone:
            nothing_to_resume = not finished
            with contextlib.suppress(OSError):
                self._clear(self._journal.files, finished)
        with contextlib.suppress(OSError):
            self._journal.close(remove=nothing_to_resume)
        if failure is not None and self._created:
            with contextlib.suppress(OSError):
                self._out_dir.rmdir()

    @property
    def shards_to_write(self) -> tuple[PlannedShard, ...]:
        return tuple(shard for shard in self._plan.shards if shard.name not in self.kept)

    def seal(self, shard: PlannedShard, checksums: Mapping[str, str]) -> ShardRecord:
        """Record a shard whose bytes are on the disk, before it gets its name."""
        files = {source.path.name for move in shard.moves for source in move.sources}
        made = Made(
            record=ShardRecord.of(shard, checksums),
            format_version=FORMAT_VERSION,
            row_order=self._row_order,
            plan=shard.fingerprint,
            sources={name: self._sources[name] for name in sorted(files)},
        )
        with self._adding:
            self._journal.add(shard.name, made)
        return made.record

    def distrust(self) -> None:
        """The result, or the source, has proved wrong: it must not look finished, nor be built on.
        Its shards stay, for whoever wants to know what happened to them."""
        with naming(self._out_dir, OutputError):
            (self._out_dir / INDEX_NAME).unlink(missing_ok=True)
        self._leave_alone = True
        self._journal.begin(self._names)
        self._journal.forget()

    def _take_stock(self, checkpoint: Checkpoint, manifest: Manifest | None) -> None:
        """Which shards stay. A finished folder must be this very conversion: then all do."""
        if manifest is not None:
            if (
                manifest.plan != self._plan.fingerprint
                or manifest.row_order != self._row_order
                or manifest.source["shards"] != describe_source(checkpoint)["shards"]
            ):
                raise OutputError(
                    f"{self._out_dir}: holds a finished conversion of another checkpoint or with "
                    "other options; choose another folder, or --overwrite it"
                )
            self.kept = dict(manifest.shards)
            return
        for shard in self._plan.shards:
            if not (self._out_dir / shard.name).exists():
                continue
            made = self._journal.made.get(shard.name)
            reason = why_redo(
                shard, made, self._out_dir, row_order=self._row_order, sources=self._sources
            )
            if reason is not None:
                self.redone[shard.name] = reason
            elif made is not None:
                self.kept[shard.name] = made.record
        for name in self._journal.made.keys() - {shard.name for shard in self._plan.shards}:
            if (self._out_dir / name).exists():
                self.redone[name] = "the options or the layout of shards have changed since"

    def _clear(self, names: set[str], keep: set[str]) -> None:
        """Delete files of ours, finished or not, but for ``keep``, and folders that get empty."""
        folders = set()
        # The index first: without one the folder is unfinished, whatever else is still there.
        for name in sorted(names, key=lambda name: name != INDEX_NAME):
            path = self._out_dir / name
            partial_path(path).unlink(missing_ok=True)
            if name not in keep:
                path.unlink(missing_ok=True)
            folders |= {parent for parent in path.parents if self._out_dir in parent.parents}
        for folder in sorted(folders, reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _check_space(self, checkpoint: Checkpoint) -> None:
        needed = sum(shard.nbytes for shard in self.shards_to_write)
        needed += sum((checkpoint.root / name).stat().st_size for name in checkpoint.other_files)
        free = shutil.disk_usage(self._out_dir).free
        if free < needed:
            raise OutputError(
                f"{self._out_dir}: needs {needed:,} bytes of free disk, there are {free:,}"
            )


def _check_place(checkpoint: Checkpoint, out_dir: Path) -> None:
    # realpath, because Path.resolve raises RuntimeError for a link to itself.
    source, target = Path(os.path.realpath(checkpoint.root)), Path(os.path.realpath(out_dir))
    if target == source or source in target.parents or target in source.parents:
        relation = (
            "is" if target == source else "is inside" if source in target.parents else "holds"
        )
        raise OutputError(f"{out_dir}: {relation} the source folder {checkpoint.root}")
    with naming(out_dir, OutputError):
        if out_dir.exists() and not out_dir.is_dir():
            raise OutputError(f"{out_dir}: is not a folder")


def _finished(out_dir: Path) -> Manifest | None:
    """The manifest of a finished folder; None where there is no index, or none that vouches."""
    if not (out_dir / INDEX_NAME).is_file():
        return None
    try:
        return read_manifest(out_dir)
    except VerifyError:
        return None


def _files_of(manifest: Manifest | None) -> set[str]:
    return {MANIFEST_NAME, *manifest.files, *manifest.shards} if manifest else set()


def _refuse_foreign(out_dir: Path, ours: set[str]) -> None:
    """Links are never ours: we make none, and would write through a planted one."""
    known = {JOURNAL_NAME, *ours, *(partial_path(Path(name)).as_posix() for name in ours)}
    for name, path in _contents(out_dir):
        if name not in known or path.is_symlink():
            raise OutputError(f"{out_dir}: holds {name!r}, which no conversion has left there")


def _contents(out_dir: Path) -> Iterator[tuple[str, Path]]:
    """Files and links, with their names relative to the folder."""
    for folder, folders, files in os.walk(out_dir):
        for name in (*files, *(n for n in folders if Path(folder, n).is_symlink())):
            path = Path(folder, name)
            yield path.relative_to(out_dir).as_posix(), path
