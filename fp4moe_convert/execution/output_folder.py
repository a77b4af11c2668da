"""The output folder of a conversion: whose it is, what in it is kept, what has to go.

A folder is ours if it is empty, or holds nothing but what conversions left there (`folder_files`).
Nothing else in it is ever deleted, or written beside. What no engine reads is the user's: it may
lie there, and stays. Where a person has changed a file that engines do read, nothing is written at
all.

A run takes the folder through states, each a type that offers only what is allowed in it:

    Opened    locked, and found to be ours
    Planned   compared with a plan: which finished shards stay, which are written again
    Writing   stale files are gone; shards are written, and each gets its name when it is finished
    Done      everything is there, the index too
    Rejected  verification failed: nothing says any more that it is finished

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import xxhash

from ..errors import NoSpaceError, OutputError, VerifyError, naming
from ..format.files import CONFIG_NAME, INDEX_NAME, SOURCE_NAME
from ..format.manifest import ShardRecord, SourceRecord
from ..plan import Part
from ..storage.buffers import Bytes
from ..storage.durable import (
    WriteFile,
    make_folder,
    partial_path,
    publish,
    remove_file,
    sync_folder,
)
from .folder_files import FolderFiles, check_known, check_place
from .journal import Division, FilledMove, FinishedShard, Journal, check_same
from .resuming import recorded_shards, take_stock, take_up
from .work import Target, Work

SYNC_NBYTES = 256 * 2**20
"""What a power cut may cost of what has come over a network. A kill costs what is in memory."""


class OutputFolder:
    """An output folder, locked for as long as the ``with`` block lasts."""

    def __init__(
        self,
        path: Path,
        *,
        source: Path | None,
        part: Part | None = None,
        restoring: bool = False,
        can_overwrite: bool = True,
    ) -> None:
        """Make the folder if need be, and lock it.

        Args:
            path: of the folder.
            source: the source folder, where it is a local one; neither may lie in the other.
            part: lock this part only.
            restoring: an original will lie there, not a conversion.
            can_overwrite: whether the command at hand takes ``--overwrite``; that of a part does
                not.

        Raises:
            InUseError: another process holds the folder, or the part.
            OutputError: the folder is unfit, not ours, or holds the one where the other will lie.
        """
        check_place(path, source)
        self.path = path
        self.part = part
        with naming(path, OutputError):
            self._created = not path.exists()
            make_folder(path)
            check_known(path, restoring=restoring)
        self.journal = Journal(path, part)
        self.files = FolderFiles(
            path,
            self.journal,
            restoring=restoring,
            can_overwrite=can_overwrite and part is None,
        )
        self._state: Opened | Planned | Writing | Done | Rejected = Opened(self)
        with contextlib.ExitStack() as opened:
            opened.push(self)
            self.files.read()
            opened.pop_all()

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
                case _ if self.files.has_index and self.journal.records.dropped is None:
                    nothing_to_resume = True
                case Opened() | Planned():
                    nothing_to_resume = self.journal.is_new
                case Writing() as writing if not interrupted:
                    self.files.clear(writing.keep)
                    useful = {*writing.keep, *self.journal.records.finished}
                    nothing_to_resume = not any((self.path / name).exists() for name in useful)
        with contextlib.suppress(OSError):
            self.journal.close(remove=nothing_to_resume)

    def enter(
        self, before: Opened | Planned | Writing | Done, after: Planned | Writing | Done | Rejected
    ) -> None:
        """Go on to the next state, once."""
        assert self._state is before
        self._state = after

    def missing(self, work: Work) -> list[str]:
        """Names of shards that no run, of whichever part, has finished so far."""
        self.journal.read()
        finished = self.journal.records.finished
        return [
            shard.name
            for shard in work.shards
            if shard.name not in finished or not (self.path / shard.name).is_file()
        ]


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
        self.folder.files.refuse_other_source(division.origin, division.sources)
        check_same(division, journal.records.divisions, path)
        journal.join(division)
        journal.read()  # of two that start at once, the later sees the other here
        check_same(division, journal.records.divisions, path)

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
        folder, files, journal = self.folder, self.folder.files, self.folder.journal
        names = {shard.name for shard in work.shards}
        files.refuse_folders_named(names | files.ours)
        planned = Planned(folder, work, users=files.users_own(work))
        files.leave_to_user(planned.users)
        if folder.part is not None:
            # Nothing else may be deleted, or remarked upon: other parts are at work.
            files.leave_to_other_parts(names)
        if not overwrite:
            files.refuse_other_source(work.origin, work.identities)
            files.refuse_edited(work)
            recorded, difference = recorded_shards(work, journal.records, files.manifest)
            if difference and files.has_index:
                raise OutputError(
                    f"{files.path}: holds a finished conversion of another checkpoint or with "
                    f"other options: {difference}; {files.or_afresh('choose another folder')}"
                )
            if folder.part is not None:
                recorded = {name: line for name, line in recorded.items() if name in names}
            planned.kept, planned.to_redo = take_stock(
                work, recorded, folder.path, was_finished=files.has_index
            )
            planned.filled = take_up(work, journal.records.filled, folder.path)
        folder.enter(self, planned)
        return planned


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

    def notes(self) -> Iterator[str]:
        """What there is to say of what earlier runs left."""
        for name, why in self.to_redo.items():
            yield f"{name}: written again: {why}"
        for name in sorted(self.users):
            yield f"{name}: left as it is; no engine reads it"
        if self.work.gone:
            gone = f"{len(self.work.gone)} of {len(self.work.sources)}"
            yield f"{gone} shards of the source are gone, as --drop-source leaves it"
        if self.kept:
            is_whole = self.folder.files.has_index and not self.shards_to_write
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

    def require_all(self, max_shard_nbytes: int, *, verify: bool) -> None:
        """Make sure that there is no shard to be written.

        Args:
            max_shard_nbytes: with which they were planned.
            verify: whether kept shards were read. A run that does not read them keeps one whose
                damage only that shows.

        Raises:
            OutputError: there is one.
        """
        if missing := [shard.name for shard in self.shards_to_write]:
            why = self.to_redo.get(missing[0], "it is not there")
            kept = f"the other {len(self.kept)}" if self.kept else "none"
            advice = (
                f"convert with {'--verify, ' if verify else ''}--max-shard-size {max_shard_nbytes} "
                f"and without --part, which keeps {kept}"
            )
            if not self.folder.files.has_index:  # parts repair no finished folder
                read = " with --verify" if verify else ""
                advice = f"run the parts they belong to{read}, or {advice}"
            raise OutputError(
                f"{self.folder.path}: lacks {len(missing)} of {len(self.work.shards)} shards: "
                f"{missing[0]}: {why}; {advice}"
            )

    def refuse_loss(self) -> None:
        """Raises OutputError: what the folder has the only copy of would be deleted, or is needed
        and gone."""
        folder, files = self.folder, self.folder.files
        if (source := files.dropped) is None:
            return
        there = {shard.name: shard.identity for shard in self.work.sources}
        gone = {*self.work.gone, *source.changed(self.work.store.provenance(), there)}
        finished = folder.journal.records.finished
        holding = {name: set(line.sources) for name, line in finished.items()}
        if files.manifest:
            holding |= dict.fromkeys(files.manifest.shards.keys() - holding.keys(), gone)
        for name in sorted(holding.keys() & files.ours - self.kept.keys()):
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
        folder, files, journal = self.folder, self.folder.files, self.folder.journal
        self.refuse_loss()
        is_whole = files.has_index and bool(self.kept) and not self.shards_to_write
        begun = {partial_path(folder.path / name).name for name in self.filled}
        keep = (set(files.ours) if is_whole else set(self.kept)) | begun
        if files.dropped:
            keep |= {SOURCE_NAME, *self.work.other_files}
        # Half-written files go first: on a disk that they have filled there is no room for a line
        # in the journal.
        files.clear(files.ours | begun)
        self._check_space(keep, begun, needed)
        if not is_whole:
            files.declare(files.ours | {shard.name for shard in self.work.shards})
            if self.work.origin is not None:
                journal.begin(self.work.origin)
            if files.dropped:  # the manifest, which is about to go, may be alone in knowing
                journal.allow_dropping(files.dropped)
        # The manifest goes, unless everything is there, and so do the journals of parts. From here
        # on this journal has the records that only they had.
        journal.take_over([] if is_whole else self.kept.values())
        writing = Writing(folder, self.work, keep, self.records)
        folder.enter(self, writing)
        files.clear(keep)
        with naming(folder.path, OutputError):
            # Old files are gone for good before the journal records new ones of these names.
            sync_folder(folder.path)
        return writing

    def _check_space(self, keep: set[str], begun: set[str], needed: int | None) -> None:
        folder = self.folder
        if needed is None:
            needed = sum(shard.nbytes for shard in self.shards_to_write)
        stale = folder.files.stale(keep)
        for name, nbytes in self.work.copied_nbytes.items():
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
        folder.files.claim({*work.generated, *work.other_files})
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
        names = {SOURCE_NAME, *self.work.other_files}
        self.folder.files.claim(names)
        self.keep |= names
        source = write_record()
        path = Path(os.path.realpath(self.folder.path))
        for each in (path, *path.parents):
            # Whichever of them were made for this run, and could not be synced then.
            if os.access(each, os.W_OK):
                with naming(each, OutputError):
                    sync_folder(each)
        self.folder.journal.allow_dropping(source)


@dataclass
class Done:
    """The folder is finished."""

    folder: OutputFolder
    work: Work

    @contextlib.contextmanager
    def rejected_if_wrong(self) -> Iterator[None]:
        """Reject the result where a VerifyError leaves the ``with`` block."""
        try:
            yield
        except VerifyError:
            with contextlib.suppress(OutputError):  # the difference is what has to be reported
                self.reject()
            raise

    def reject(self) -> None:
        """The result, or the source, has proved wrong: the folder must not look finished, and no
        later run may build on it. Its shards stay, so that one can look at what happened to them.
        Where shards of the source are gone, later runs keep those that are as recorded.

        Raises:
            OutputError: it still looks finished.
        """
        folder = self.folder
        folder.enter(self, Rejected())
        names = list(self.work.generated)
        if folder.files.dropped:
            names = [CONFIG_NAME, INDEX_NAME]
        else:
            # On a full disk the journal takes no line. Then the missing manifest has to do.
            with contextlib.suppress(OutputError):
                folder.files.declare(folder.files.ours)
                folder.journal.forget()
        for name in reversed(names):
            with naming(name, OutputError):
                remove_file(folder.path / name)


class Rejected:
    """Verification failed: the index and config.json are gone. The manifest is gone too, and no
    later run keeps anything, unless shards of the source have been deleted."""
