"""The output folder of a conversion: whose it is, what in it is kept, what has to go.

A folder is ours if it is empty, or holds nothing but what conversions left there, as their journal
or their manifest records. Nothing else in it is ever deleted, or written beside. What no engine
reads is the user's: it may lie there, and stays. Where a person has changed a file that engines do
read, nothing is written at all.

A run takes the folder through states, each a type that offers only what is allowed in it:

    Opened    locked, and found to be ours
    Planned   compared with a plan: which finished shards stay, which are written again
    Writing   stale files are gone; shards are written, and each gets its name when it is finished
    Done      everything is there, the index too
    Rejected  verification failed: the index, config.json and the manifest are gone

Where shards of the source have been deleted (`dropping`), the folder has the only copy of them.
Then no run deletes a shard that holds any of that, whatever its options.

Runs of parts share a folder. Such a run touches no file but its own shards, goes no further than
Writing, and leaves its journal for the run that finishes the whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import xxhash

from ..errors import CheckpointError, NoSpaceError, OutputError, VerifyError, naming
from ..format.files import (
    CONFIG_NAME,
    FOREIGN_FOLDERS,
    GENERATED,
    INDEX_NAME,
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    SOURCE_NAME,
    is_journal,
    no_engine_reads,
)
from ..format.manifest import Manifest, ShardRecord, SourceRecord
from ..plan import Part
from ..storage.buffers import Bytes
from ..storage.copying import record_of
from ..storage.durable import (
    WriteFile,
    make_folder,
    partial_path,
    publish,
    remove_file,
    sync_folder,
)
from ..storage.local import LocalReader, files_below
from .journal import Division, FilledMove, FinishedShard, Journal, check_same
from .stock import Target, Work, take_stock, take_up
from .surroundings import names_in_manifest, read_manifest

AFRESH = "--overwrite starts afresh"

SYNC_NBYTES = 256 * 2**20
"""What a power cut may cost of what has come over a network. A kill costs what is in memory."""


class OutputFolder:
    """An output folder, locked for as long as the ``with`` block lasts."""

    def __init__(self, path: Path, *, source: Path | None, part: Part | None = None) -> None:
        """Make the folder if need be, and lock it.

        Args:
            path: of the folder.
            source: the source folder, where it is a local one; neither may lie in the other.
            part: lock this part only.

        Raises:
            InUseError: another process holds the folder, or the part.
            OutputError: the folder is unfit or not ours.
        """
        _check_place(path, source)
        self.path = path
        self.part = part
        with naming(path, OutputError):
            self._created = not path.exists()
            make_folder(path)
            entries = list(path.iterdir())  # once: other parts may be making theirs
            known = any(is_journal(entry.name) or entry.name == MANIFEST_NAME for entry in entries)
            foreign = {
                entry.name for entry in entries if entry.is_dir() or not no_engine_reads(entry.name)
            } - FOREIGN_FOLDERS
            if foreign and not known:
                lost = f" but no {MANIFEST_NAME}" if INDEX_NAME in foreign else ""
                raise OutputError(f"{path}: is not empty: it holds {min(foreign)!r}{lost}")
        self.journal = Journal(path, part)
        self._state: Opened | Planned | Writing | Done | Rejected = Opened(self)
        try:
            files = set(files_below(path, OutputError))
            self.journal.read()  # other parts record their names before they make their files
            self.ours = self.journal.files | names_in_manifest(path)
            """Names that a conversion has left, or is about to."""
            self.manifest: Manifest | None = None
            self.no_manifest = ""
            """Why there is none that can be relied on."""
            self._read_manifest()
            self._refuse_foreign(files)
        except BaseException as failure:
            self.__exit__(type(failure), failure, None)
            raise

    def __enter__(self) -> Opened:
        assert isinstance(self._state, Opened)
        return self._state

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave(interrupted=isinstance(failure, KeyboardInterrupt))
        if failure is not None and self._created:
            with contextlib.suppress(OSError):  # something is left in it
                self.path.rmdir()

    def _leave(self, *, interrupted: bool) -> None:
        """Unlock. After a failure only what the next run can use stays: finished shards and the
        journal.

        After a KeyboardInterrupt everything stays for the next run to tidy up: deleting gigabytes
        has to wait for a disk that is busy writing them (3 to 5 s were seen).
        """
        nothing_to_resume = False
        # Where tidying up fails as well, the failure that came first is reported.
        with contextlib.suppress(OSError, OutputError):
            match self._state:
                case Done():
                    nothing_to_resume = True
                case _ if self.has_index and self.journal.dropped is None:
                    nothing_to_resume = True
                case Opened() | Planned():
                    nothing_to_resume = self.journal.is_new
                case Writing() as writing if not interrupted:
                    self.clear(writing.keep)
                    useful = {*writing.keep, *self.journal.finished}
                    nothing_to_resume = not any((self.path / name).exists() for name in useful)
        with contextlib.suppress(OSError):
            self.journal.close(remove=nothing_to_resume)

    def enter(
        self, before: Opened | Planned | Writing | Done, after: Planned | Writing | Done | Rejected
    ) -> None:
        """Go on to the next state, once."""
        assert self._state is before
        self._state = after

    @property
    def has_index(self) -> bool:
        """Whether the folder looks finished."""
        return (self.path / INDEX_NAME).is_file()

    @property
    def dropped(self) -> SourceRecord | None:
        """The source that the folder was made from, where shards of it may have been deleted."""
        if self.journal.dropped is not None:
            return self.journal.dropped
        source = self.manifest.source if self.manifest else None
        return source if source is not None and source.dropped else None

    def missing(self, work: Work) -> list[str]:
        """Names of shards that no run, of whichever part, has finished so far."""
        self.journal.read()
        finished = self.journal.finished
        return [
            shard.name
            for shard in work.shards
            if shard.name not in finished or not (self.path / shard.name).is_file()
        ]

    def _read_manifest(self) -> None:
        try:
            self.manifest = read_manifest(self.path)
        except VerifyError as error:
            if self.has_index and not self.ours:
                raise OutputError(
                    f"{self.path}: nothing tells what conversions have left there: {error}; "
                    "choose another folder"
                ) from None
            self.no_manifest = str(error)

    def _refuse_foreign(self, files: Iterable[str]) -> None:
        """Links are never ours: we make none, and would write through a planted one."""
        self.refuse(
            name
            for name in files
            if not (no_engine_reads(name) or is_journal(name))
            and (
                name.removesuffix(PARTIAL_SUFFIX) not in self.ours
                or (self.path / name).is_symlink()
            )
        )

    def refuse_folders_named(self, names: set[str]) -> None:
        """A folder that has the name of a file of ours is not ours."""
        self.refuse(
            path.name
            for path in self.path.iterdir()
            if path.name.removesuffix(PARTIAL_SUFFIX) in names and path.is_dir()
        )

    def refuse(self, foreign: Iterable[str]) -> None:
        if name := min(foreign, default=None):
            what = "a link, " if (self.path / name).is_symlink() else ""
            raise OutputError(
                f"{self.path}: holds {name!r}, {what}which no conversion has left there; "
                "remove it, or choose another folder"
            )

    def refuse_edited(self, work: Work) -> None:
        """Where a person has changed what engines read, nothing is written.

        Raises:
            OutputError: a file beside the shards is not as a conversion left it.
            CheckpointError: a file cannot be read.
        """
        present = set(files_below(self.path, OutputError))
        looks_finished = MANIFEST_NAME in work.generated and self.has_index
        if self.manifest is None and (looks_finished or MANIFEST_NAME in present):
            raise OutputError(f"{self.path}: {self.no_manifest}; {AFRESH}")
        beside = self.manifest.files if self.manifest else {CONFIG_NAME, *work.copied}
        for name in sorted(name for name in beside if not no_engine_reads(name)):
            if name in present and not self._is_as_left(name, work):
                what = "has been changed since" if self.manifest else "is not the source's"
            elif name not in present and self.has_index:
                what = "is missing"
            else:
                continue
            raise OutputError(f"{self.path}: {name!r} {what}; put it right, or {AFRESH}")

    def refuse_other_origin(self, work: Work) -> None:
        """A run that goes on reads what the runs before it have read.

        Raises:
            OutputError: a branch or a tag has moved since, or another model is read.
        """
        begun, now = self.journal.origin, work.origin
        if begun is not None and now is not None and begun != now:
            raise OutputError(
                f"{self.path}: was begun from {begun}, and this is {now}; "
                f"--revision {begun.rpartition('@')[2]} goes on with that, {AFRESH}"
            )

    def users_own(self, work: Work) -> set[str]:
        """Names of the files that no engine reads and that are not as a conversion left them."""

        def is_as_left(name: str) -> bool:
            try:
                return self._is_as_left(name, work)
            except CheckpointError:  # it may be anything
                return False

        present = files_below(self.path, OutputError)
        return {name for name in present if no_engine_reads(name) and not is_as_left(name)}

    def _is_as_left(self, name: str, work: Work) -> bool:
        """Whether a file is what the manifest says or, until there is one, what the source has."""
        path = self.path / name
        left = self.manifest.files.get(name) if self.manifest else work.left_by_us(name)
        return not path.is_symlink() and left == record_of(LocalReader(path, name=os.fspath(path)))

    def stale(self, keep: set[str]) -> set[str]:
        """Files of ours, finished or not, but for ``keep``.

        Only what lies in the folder is listed, so no name in a journal or a manifest can lead to a
        file elsewhere.
        """
        return {
            name
            for name in files_below(self.path, OutputError)
            if name not in keep and name.removesuffix(PARTIAL_SUFFIX) in self.ours
        }

    def clear(self, keep: set[str]) -> None:
        """Delete `stale` files, and folders of ours that are then empty."""
        # In the reverse of the order in which they appear. Without an index the folder is
        # unfinished, and without a manifest config.json could not be told from somebody's own.
        stale = self.stale(keep)
        for name in (*reversed(GENERATED), *stale.difference(GENERATED)):
            if name in stale:
                with naming(name, OutputError):
                    if name in GENERATED:
                        remove_file(self.path / name)
                    else:
                        (self.path / name).unlink(missing_ok=True)
        folders = {str(parent) for name in self.ours for parent in Path(name).parents} - {"."}
        for folder, _, _ in os.walk(self.path, topdown=False):
            if os.path.relpath(folder, self.path) in folders and not os.listdir(folder):
                os.rmdir(folder)


@dataclass
class Opened:
    """Locked, and found to be ours. Nothing has been written but the journal."""

    folder: OutputFolder

    def join(self, division: Division) -> None:
        """Record what this part is a part of.

        Raises:
            OutputError: another part, or an earlier run of this one, is a part of something else.
        """
        journal, path = self.folder.journal, self.folder.path
        check_same(division, journal.divisions, path)
        journal.join(division)
        journal.read()  # of two that start at once, the later sees the other here
        check_same(division, journal.divisions, path)

    def plan(self, work: Work, *, overwrite: bool) -> Planned:
        """Decide which finished shards are kept.

        Args:
            work: what is to be there.
            overwrite: keep nothing of what earlier runs left.

        Raises:
            OutputError: the folder holds a finished conversion of something else, or a person has
                changed it.
            CheckpointError: a file cannot be read.
        """
        folder = self.folder
        folder.refuse_folders_named({shard.name for shard in work.shards} | folder.ours)
        planned = Planned(folder, work, users=folder.users_own(work))
        folder.ours -= planned.users
        recorded = dict(folder.journal.finished)
        if folder.part is not None:
            # Nothing else may be deleted, or remarked upon: other parts are at work.
            folder.ours = {shard.name for shard in work.shards}
            recorded = {name: line for name, line in recorded.items() if name in folder.ours}
        if not overwrite:
            folder.refuse_edited(work)
            folder.refuse_other_origin(work)
            if folder.manifest is not None and not folder.journal.forgotten:
                recorded |= _recorded_by(folder.manifest, work, folder)
            planned.kept, planned.to_redo = take_stock(
                work, recorded, folder.path, was_finished=folder.has_index
            )
            planned.filled = take_up(work, folder.journal.filled, folder.path)
        folder.enter(self, planned)
        return planned


def _recorded_by(manifest: Manifest, work: Work, folder: OutputFolder) -> dict[str, FinishedShard]:
    """The shards of a manifest, if it is of this very conversion."""
    if (difference := work.difference(manifest)) is None:
        return {s.name: work.finished(s, manifest.shards[s.name]) for s in work.shards}
    if folder.has_index:
        raise OutputError(
            f"{folder.path}: holds a finished conversion of another checkpoint or with "
            f"other options: {difference}; choose another folder, or --overwrite it"
        )
    return {}


@dataclass
class Planned:
    """Compared with a plan. Still nothing has been written or deleted."""

    folder: OutputFolder
    work: Work
    users: set[str]
    """Names of files that stay because they are the user's."""
    kept: dict[str, FinishedShard] = field(default_factory=dict)
    """Finished shards that stay."""
    to_redo: dict[str, str] = field(default_factory=dict)
    """Finished shards that do not, and why."""
    filled: dict[str, Mapping[int, str]] = field(default_factory=dict)
    """Unfinished shards that stay, and the checksums of the moves that have filled them so far."""

    @property
    def records(self) -> dict[str, ShardRecord]:
        """Of the shards that are kept."""
        return {name: finished.record for name, finished in self.kept.items()}

    @property
    def shards_to_write(self) -> tuple[Target, ...]:
        return tuple(shard for shard in self.work.shards if shard.name not in self.kept)

    def remarks(self) -> Iterator[str]:
        """What there is to say of what earlier runs left."""
        for name, why in self.to_redo.items():
            yield f"{name}: written again: {why}"
        for name in sorted(self.users):
            yield f"{name}: left as it is; no engine reads it"
        if self.work.gone:
            gone = f"{len(self.work.gone)} of {len(self.work.sources)}"
            yield f"{gone} shards of the source are gone, as --drop-source leaves it"
        if self.kept:
            is_whole = self.folder.has_index and not self.shards_to_write
            what = "already finished" if is_whole else "resuming"
            kept, count = len(self.kept), len(self.work.shards)
            yield f"{what}: {kept} of {count} shards were finished before and are kept"
        for name in self.filled:
            yield f"{name}: resuming: what an earlier run has fetched for it is kept"

    def redo(self, reasons: Mapping[str, str]) -> None:
        """Keep these shards no longer."""
        for name in reasons:
            del self.kept[name]
        self.to_redo.update(reasons)

    def require_all(self) -> None:
        """Raises OutputError: a shard would have to be written."""
        if missing := [shard.name for shard in self.shards_to_write]:
            why = self.to_redo.get(missing[0], "it is not there")
            raise OutputError(
                f"{self.folder.path}: lacks {len(missing)} of {len(self.work.shards)} shards: "
                f"{missing[0]}: {why}; run the parts they belong to, or convert without --part"
            )

    def refuse_loss(self) -> None:
        """Raises OutputError: what the folder has the only copy of would be deleted, or is needed
        and gone."""
        folder = self.folder
        if (source := folder.dropped) is None:
            return
        gone = {
            name
            for name, identity in source.shards.items()
            if name in self.work.gone or self.work.identities.get(name) != identity
        }
        holding = {name: set(line.sources) for name, line in folder.journal.finished.items()}
        if folder.manifest:
            holding |= dict.fromkeys(folder.manifest.shards.keys() - holding.keys(), gone)
        for name in sorted(holding.keys() & folder.ours - self.kept.keys()):
            if (lost := holding[name] & gone) and (folder.path / name).is_file():
                why = self.to_redo.get(name, "this run would delete it")
                raise OutputError(
                    f"{folder.path}: {name} may be all that --drop-source has left of {min(lost)} "
                    f"from {source.path}, and {why}, so nothing is written; go on as it was begun, "
                    "or convert another copy into another folder"
                )
        for shard in self.shards_to_write:
            if needed := self.work.gone.intersection(shard.source_files):
                why = self.to_redo.get(shard.name, "it is not there")
                raise OutputError(
                    f"{folder.path}: {shard.name} cannot be written ({why}): {min(needed)} is gone "
                    f"from {source.path}; put back the one or the other, or convert another copy "
                    "into another folder"
                )

    def start(self, *, needed: int | None = None) -> Writing:
        """Make sure that there is room for what will come, and delete what is stale.

        Args:
            needed: bytes of disk that shards will take at most, where that is not the sum of all.

        Raises:
            NoSpaceError: the disk is too small.
            OutputError: a file cannot be deleted, or must not be.
        """
        folder = self.folder
        self.refuse_loss()
        is_whole = folder.has_index and bool(self.kept) and not self.shards_to_write
        begun = {partial_path(folder.path / name).name for name in self.filled}
        keep = (set(folder.ours) if is_whole else set(self.kept)) | begun
        if folder.dropped:
            keep |= {SOURCE_NAME, *self.work.copied}
        # Half-written files go first: on a disk that they have filled there is no room for a line
        # in the journal.
        folder.clear(folder.ours | begun)
        self._check_space(keep, begun, needed)
        if not is_whole:
            # Names are recorded before the files are created, so that a run after a kill
            # recognises them as ours.
            folder.ours |= {shard.name for shard in self.work.shards}
            folder.journal.declare(folder.ours)
            if self.work.origin is not None:
                folder.journal.begin(self.work.origin)
            if folder.dropped:  # the manifest, which is about to go, may be alone in knowing
                folder.journal.allow_dropping(folder.dropped)
        # The manifest goes, unless everything is there, and so do the journals of parts. From here
        # on this journal has the records that only they had.
        folder.journal.take_over([] if is_whole else self.kept.values())
        writing = Writing(folder, self.work, keep, self.records)
        folder.enter(self, writing)
        folder.clear(keep)
        with naming(folder.path, OutputError):
            # Old files are gone for good before the journal records new ones of these names.
            sync_folder(folder.path)
        return writing

    def _check_space(self, keep: set[str], begun: set[str], needed: int | None) -> None:
        folder = self.folder
        if needed is None:
            needed = sum(shard.nbytes for shard in self.shards_to_write)
        stale = folder.stale(keep)
        for name, nbytes in self.work.copied.items():
            if name in stale or not (folder.path / name).exists():
                needed += nbytes
        with naming(folder.path, OutputError):
            free = shutil.disk_usage(folder.path).free
            free += sum(512 * (folder.path / name).stat().st_blocks for name in stale | begun)
        if free < needed:
            raise NoSpaceError(
                f"{folder.path}: needs {needed:,} bytes of free disk, there are {free:,}"
            )


@dataclass
class Writing:
    """Shards are written. A failure deletes all but what a later run can use."""

    folder: OutputFolder
    work: Work
    keep: set[str]
    """What a failure does not delete."""
    records: dict[str, ShardRecord]
    """Of the finished shards."""
    _unsynced_nbytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def finish_shard(self, shard: Target, file: WriteFile, checksums: Mapping[str, str]) -> None:
        """Take a shard whose last byte has been written; called from any thread.

        A crash between any two of these steps leaves either a temporary file, or a shard that the
        journal has on record.

        Args:
            shard: the shard.
            file: its temporary file.
            checksums: XXH3-128 of its tensors.

        Raises:
            CheckpointError: a source has changed since its header was read.
            OutputError: naming the file and the system's reason.
        """
        record = ShardRecord.of(shard.header, shard.nbytes, checksums)
        finished = self.work.finished(shard, record)

        file.sync()
        self.work.check_unchanged(finished.sources)
        with self._lock:
            self.folder.journal.add([finished])
            self.keep.add(shard.name)
            self.records[shard.name] = record
        publish(file.path, self.folder.path / shard.name)

    def note_move(self, shard: Target, file: WriteFile, number: int, data: Bytes) -> None:
        """Record a move whose bytes are in the file of its shard, so that a later run need not
        fetch them again; called from any thread.

        Args:
            shard: the shard.
            file: its temporary file.
            number: of the move, among the shard's.
            data: its bytes.

        Raises:
            OutputError: naming the file and the system's reason.
        """
        checksum = xxhash.xxh3_64_hexdigest(data.data)
        journal = self.folder.journal
        journal.note(FilledMove(shard.name, self.work.keys[shard.name], number, checksum))
        with self._lock:
            self.keep.add(file.path.name)
            self._unsynced_nbytes += data.size
            is_due = self._unsynced_nbytes >= SYNC_NBYTES
            if is_due:
                self._unsynced_nbytes = 0
        if is_due:
            file.sync()
            journal.sync()

    def finish(self, write_beside: Callable[[Mapping[str, ShardRecord]], None]) -> Done:
        """Write what stands beside the shards, the index last.

        Args:
            write_beside: does it, given the records of all shards in order.

        Raises:
            OutputError: somebody has put a file where one of ours will be, or writing failed.
            CheckpointError: a file of the source cannot be read.
        """
        folder, work = self.folder, self.work
        self._claim({*work.generated, *work.copied})
        write_beside({shard.name: self.records[shard.name] for shard in work.shards})
        done = Done(folder, work)
        folder.enter(self, done)
        return done

    def allow_dropping(self, write_record: Callable[[], SourceRecord]) -> None:
        """Put on the disk all that later runs need of a source whose shards are deleted.

        Args:
            write_record: writes `SOURCE_NAME` and the copied files, and tells what to record.

        Raises:
            OutputError: somebody has put a file where one of ours will be, or writing failed.
            CheckpointError: a file of the source cannot be read.
        """
        names = {SOURCE_NAME, *self.work.copied}
        self._claim(names)
        self.keep |= names
        source = write_record()
        path = Path(os.path.realpath(self.folder.path))
        for each in (path, *path.parents):
            # Whichever of them were made for this run, and could not be synced then.
            if os.access(each, os.W_OK):
                with naming(each, OutputError):
                    sync_folder(each)
        self.folder.journal.allow_dropping(source)

    def _claim(self, names: set[str]) -> None:
        """Record the names of files that are about to be written beside the shards."""
        folder = self.folder
        users = {n for n in names if no_engine_reads(n) and os.path.lexists(folder.path / n)}
        if new := names - folder.ours - users:
            folder.refuse(name for name in new if os.path.lexists(folder.path / name))
            folder.ours |= new
            folder.journal.declare(new)


@dataclass
class Done:
    """The folder is finished."""

    folder: OutputFolder
    work: Work

    def reject(self) -> Rejected:
        """The result, or the source, has proved wrong: the folder must not look finished, and no
        later run may build on it. Its shards stay, so that one can look at what happened to them.
        Where shards of the source are gone, later runs keep those that are as recorded.

        Raises:
            OutputError: it still looks finished.
        """
        folder = self.folder
        rejected = Rejected(folder)
        folder.enter(self, rejected)
        names = list(self.work.generated)
        if folder.dropped:
            names = [CONFIG_NAME, INDEX_NAME]
        else:
            # On a full disk the journal takes no line. Then the missing manifest has to do.
            with contextlib.suppress(OutputError):
                folder.journal.declare(folder.ours)
                folder.journal.forget()
        for name in reversed(names):
            with naming(name, OutputError):
                remove_file(folder.path / name)
        return rejected


@dataclass
class Rejected:
    """Verification failed. Nothing here is kept by a later run."""

    folder: OutputFolder


def _check_place(path: Path, source: Path | None) -> None:
    if source is not None:
        # realpath, because Path.resolve raises RuntimeError for a link to itself.
        origin, target = Path(os.path.realpath(source)), Path(os.path.realpath(path))
        if target == origin or origin in target.parents or target in origin.parents:
            relation = (
                "is" if target == origin else "is inside" if origin in target.parents else "holds"
            )
            raise OutputError(f"{path}: {relation} the source folder {source}")
    with naming(path, OutputError):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: is not a folder")
