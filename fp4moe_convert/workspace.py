"""The output folder of a conversion: whose it is, what in it is kept, what has to go.

A folder is ours if it is empty, or holds nothing but what conversions left there, by the word of
their journal or their manifest. Nothing else in it is ever deleted, or written beside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from .blockio import make_folder, remove_file, sync_folder
from .checkpoint import FOREIGN_FILES, Checkpoint, files_below
from .contract import (
    CONFIG_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
)
from .errors import OutputError, VerifyError, naming
from .journal import Journal, Made, why_redo
from .manifest import Manifest, ShardRecord, read_manifest, source_difference
from .plan import Plan, PlannedShard
from .row_order import fingerprint, our_rows


class Workspace:
    """An output folder, locked; a context manager.

    First it is only looked at: which shards are ``kept``, which are ``redone`` and why. `begin`
    deletes what is stale. From then on a failure takes away what the next run cannot use.
    """

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
            OutputError: the folder is unfit or not ours, another process holds it, or it holds a
                finished conversion of something else.
        """
        _check_place(checkpoint, out_dir)
        self._checkpoint = checkpoint
        self._out_dir = out_dir
        self._plan = plan
        self._row_order = fingerprint(our_rows)
        self._shards = {shard.name: shard for shard in checkpoint.shards}
        self._keep: set[str] | None = None
        """What a failure does not take away; None: nothing is taken away."""
        self._adding = threading.Lock()
        self.kept: dict[str, Made] = {}
        """Finished shards that are taken as they are."""
        self.redone: dict[str, str] = {}
        """Finished shards that are not, and why."""

        with naming(out_dir, OutputError):
            self._created = not out_dir.exists()
            make_folder(out_dir)
            known = (out_dir / JOURNAL_NAME).exists() or (out_dir / MANIFEST_NAME).exists()
            if not known and any(out_dir.iterdir()):
                raise OutputError(f"{out_dir}: is not empty")
        self._journal = Journal(out_dir)
        try:
            manifest = self._read_manifest()
            self._ours = self._journal.files | _files_of(manifest)
            self._refuse_foreign()
            if not overwrite:
                self._take_stock(manifest)
        except BaseException as failure:
            self.__exit__(type(failure), failure, None)
            raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: object, failure: object, trace: object) -> None:
        """After a failure only what the next run can use stays: finished shards and the journal.

        After Ctrl-C all stays for the next run to tidy up: deleting files of gigabytes has to wait
        for a disk that is busy with writing them, 3 to 5 s were seen, and who interrupts does not.
        """
        nothing_to_resume = False
        # Where tidying up fails, too, the failure that led here is the one to tell of.
        with contextlib.suppress(OSError, OutputError):
            if self._has_index():
                nothing_to_resume = True
            elif self._keep is None:
                nothing_to_resume = not self._journal.files
            elif not isinstance(failure, KeyboardInterrupt):
                self._clear(self._keep)
                finished = any((self._out_dir / name).exists() for name in self._journal.made)
                nothing_to_resume = not finished
        with contextlib.suppress(OSError):
            self._journal.close(remove=nothing_to_resume)
        if failure is not None and self._created:
            with contextlib.suppress(OSError):
                self._out_dir.rmdir()

    @property
    def shards_to_write(self) -> tuple[PlannedShard, ...]:
        return tuple(shard for shard in self._plan.shards if shard.name not in self.kept)

    @property
    def records(self) -> dict[str, ShardRecord]:
        """Of the shards that are kept."""
        return {name: made.record for name, made in self.kept.items()}

    def redo(self, reasons: Mapping[str, str]) -> None:
        """Keep these shards no longer."""
        for name in reasons:
            del self.kept[name]
        self.redone.update(reasons)

    def begin(self) -> None:
        """Make sure that there is room for what will come, and delete what is stale.

        Raises:
            OutputError: the disk is too small, or a file cannot be deleted.
        """
        whole = self._has_index() and bool(self.kept) and not self.shards_to_write
        keep = self._ours if whole else set(self.kept)
        # What is half written goes first: on a disk that it has filled there is no room for a line.
        self._clear(self._ours)
        self._check_space(keep)
        if not whole:
            # First the names, then the deeds: whatever a kill leaves is known to be ours.
            self._ours |= {shard.name for shard in self._plan.shards}
            self._journal.begin(self._ours)
            # What only the manifest vouched for; it goes.
            self._journal.add(
                {n: made for n, made in self.kept.items() if n not in self._journal.made}
            )
        self._keep = keep
        self._clear(keep)
        with naming(self._out_dir, OutputError):
            # Before the journal vouches for new files of these names, the old are gone for good.
            sync_folder(self._out_dir)

    def seal(self, shard: PlannedShard, checksums: Mapping[str, str]) -> ShardRecord:
        """Record a shard whose bytes are on the disk, before it gets its name.

        Raises:
            CheckpointError: a source has changed since its header was read.
        """
        assert self._keep is not None
        for name in _sources_of(shard):
            self._shards[name].check_unchanged()
        made = self._made(shard, ShardRecord.of(shard, checksums))
        with self._adding:
            self._journal.add({shard.name: made})
            self._keep.add(shard.name)
        return made.record

    def finish(self) -> None:
        """All shards are there; what stands around them is ours to write from now on.

        Raises:
            OutputError: somebody has put a file where one of them will be.
        """
        names = {CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, *self._checkpoint.other_files}
        if new := names - self._ours:
            self._refuse(name for name in new if os.path.lexists(self._out_dir / name))
            self._ours |= new
            self._journal.begin(new)

    def distrust(self) -> None:
        """The result, or the source, has proved wrong: it must not look finished, nor be built on.
        Its shards stay, for whoever wants to know what happened to them.

        Raises:
            OutputError: it still looks finished.
        """
        self._keep = None
        # Where there is no room for a line, the missing manifest has to do.
        with contextlib.suppress(OutputError):
            self._journal.begin(self._ours)
            self._journal.forget()
        for name in (INDEX_NAME, MANIFEST_NAME):
            with naming(name, OutputError):
                remove_file(self._out_dir / name)

    def _made(self, shard: PlannedShard, record: ShardRecord) -> Made:
        """A shard as it would be made now."""
        return Made(
            record=record,
            format_version=FORMAT_VERSION,
            row_order=self._row_order,
            plan=shard.fingerprint,
            sources={name: self._shards[name].identity for name in _sources_of(shard)},
        )

    def _has_index(self) -> bool:
        return (self._out_dir / INDEX_NAME).is_file()

    def _read_manifest(self) -> Manifest | None:
        try:
            return read_manifest(self._out_dir)
        except VerifyError as error:
            if self._has_index() and not self._journal.files:
                raise OutputError(
                    f"{self._out_dir}: nothing tells what conversions have left there: {error}; "
                    "choose another folder"
                ) from None
            return None

    def _refuse_foreign(self) -> None:
        """Links are never ours: we make none, and would write through a planted one. Folders are
        only where a file of ours lies in them."""
        files = set(files_below(self._out_dir, OutputError)) - FOREIGN_FILES - {JOURNAL_NAME}
        self._refuse(
            name
            for name in files
            if name.removesuffix(PARTIAL_SUFFIX) not in self._ours
            or (self._out_dir / name).is_symlink()
        )
        planned = {shard.name for shard in self._plan.shards} | self._ours
        self._refuse(
            path.name
            for path in self._out_dir.iterdir()
            if path.name.removesuffix(PARTIAL_SUFFIX) in planned and path.is_dir()
        )

    def _refuse(self, foreign: Iterable[str]) -> None:
        for name in sorted(foreign):
            raise OutputError(
                f"{self._out_dir}: holds {name!r}, which no conversion has left there"
            )

    def _take_stock(self, manifest: Manifest | None) -> None:
        """Which shards stay. A finished folder must be this very conversion."""
        vouched = dict(self._journal.made)
        if manifest is not None and not self._journal.forgotten:
            if (difference := self._difference(manifest)) is None:
                for shard in self._plan.shards:
                    vouched[shard.name] = self._made(shard, manifest.shards[shard.name])
            elif self._has_index():
                raise OutputError(
                    f"{self._out_dir}: holds a finished conversion of another checkpoint or with "
                    f"other options: {difference}; choose another folder, or --overwrite it"
                )
        sources = {name: shard.identity for name, shard in self._shards.items()}
        for shard in self._plan.shards:
            if not (self._out_dir / shard.name).exists():
                if self._has_index():
                    self.redone[shard.name] = "it is missing"
                continue
            made = vouched.get(shard.name)
            reason = why_redo(
                shard, made, self._out_dir, row_order=self._row_order, sources=sources
            )
            if reason is not None:
                self.redone[shard.name] = reason
            elif made is not None:
                self.kept[shard.name] = made
        for name in vouched.keys() - {shard.name for shard in self._plan.shards}:
            if (self._out_dir / name).exists():
                self.redone[name] = "the options or the layout of shards have changed since"

    def _difference(self, manifest: Manifest) -> str | None:
        """How this conversion differs from the one that left a manifest."""
        if manifest.row_order != self._row_order:
            return "it was written for another row order"
        difference = source_difference(self._checkpoint, manifest, same_files=True)
        if difference is not None:
            return f"in the source, {difference}"
        if manifest.max_shard_nbytes != self._plan.max_shard_nbytes:
            return f"its files have at most {manifest.max_shard_nbytes:,} bytes"
        names = {shard.name for shard in self._plan.shards}
        if manifest.plan != self._plan.fingerprint or manifest.shards.keys() != names:
            return "it was planned by another release"
        return None

    def _clear(self, keep: set[str]) -> None:
        """Delete files of ours, finished or not, but for ``keep``, and folders that get empty.

        Only what lies in the folder is gone through: no name that a journal or a manifest holds
        can lead to a file elsewhere.
        """
        stale = self._stale(keep)
        # The index first: without one the folder is unfinished, whatever else is still there.
        for name in sorted(stale, key=lambda name: name != INDEX_NAME):
            with naming(name, OutputError):
                if name == INDEX_NAME:
                    remove_file(self._out_dir / name)
                else:
                    (self._out_dir / name).unlink(missing_ok=True)
        folders = {str(parent) for name in self._ours for parent in Path(name).parents} - {"."}
        for folder, _, _ in os.walk(self._out_dir, topdown=False):
            if os.path.relpath(folder, self._out_dir) in folders and not os.listdir(folder):
                os.rmdir(folder)

    def _stale(self, keep: set[str]) -> set[str]:
        return {
            name
            for name in files_below(self._out_dir, OutputError)
            if name not in keep and name.removesuffix(PARTIAL_SUFFIX) in self._ours
        }

    def _check_space(self, keep: set[str]) -> None:
        needed = sum(shard.nbytes for shard in self.shards_to_write)
        stale = self._stale(keep)
        for name in self._checkpoint.other_files:
            if name in stale or not (self._out_dir / name).exists():
                with naming(name):
                    needed += (self._checkpoint.root / name).stat().st_size
        with naming(self._out_dir, OutputError):
            free = shutil.disk_usage(self._out_dir).free
            free += sum(512 * (self._out_dir / name).stat().st_blocks for name in stale)
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


def _files_of(manifest: Manifest | None) -> set[str]:
    return {MANIFEST_NAME, *manifest.files, *manifest.shards} if manifest else set()


def _sources_of(shard: PlannedShard) -> list[str]:
    """Names of the source files that a shard is read from."""
    return sorted({source.path.name for move in shard.moves for source in move.sources})
