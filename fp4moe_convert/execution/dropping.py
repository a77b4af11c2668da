"""Deletes a source's shards as they are converted, so that source and result need not both fit on a
disk.

A source shard may go once every output shard that reads from it is sealed: read back from the disk
and found to be as it was written, on record in the journal, and under its name, all of that
durable. Output shards are written one after the other, in the order of the plan, which reads the
source forwards. So what is there at each moment is known beforehand.

Whatever else of the source a later run, `verify` or `restore` needs lies in the output folder
before the first shard goes: the headers and configurations in `SOURCE_NAME`, the other files as
copies, names and identities in the journal. A later run opens the source from that.
"""

from __future__ import annotations

import os
import stat
import time
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from ..errors import CheckpointError, OutputError, naming
from ..format.files import SOURCE_NAME
from ..format.manifest import FileIdentity, ShardIdentity, ShardRecord, SourceRecord
from ..layouts.base import Move
from ..plan import PlannedShard, check_moves_cover
from ..source.checkpoint import open_checkpoint
from ..source.identity import describe_source
from ..source.recorded import DroppedSource, RecordedSource, encode_record
from ..source.spans import Shard
from ..storage.copying import record_of
from ..storage.durable import WriteFile, write_file
from ..storage.local import LocalFolder
from ..storage.reader import Store
from .forecast import steps
from .journal import Records
from .output_folder import Planned, Writing
from .scatter import OnFilled
from .surroundings import copy_files, find_manifest
from .work import Conversion


def remaining(store: Store, out_dir: Path) -> Store:
    """A source with the shards that have been deleted since ``out_dir`` was made from it.

    Returns:
        ``store`` itself, if none has been. Where they were of a snapshot in the Hub's cache,
        ``store`` may be the same commit on the Hub.

    Raises:
        CheckpointError: what is left of the source is not as it was.
        OutputError: the journal cannot be read.
    """
    if isinstance(store, DroppedSource):
        store = store.folder
    if (source := _recorded_in(out_dir)) is None:
        return store
    if not isinstance(store, LocalFolder):
        # A model on the Hub whose snapshot in the cache is no longer complete, because it is that.
        is_same = source.origin is not None and source.origin == store.provenance().origin
        if not is_same or not os.path.isdir(source.path):
            return store
        store = LocalFolder(Path(source.path))
    path = store.local_path
    gone = frozenset(name for name in source.shards if not os.path.lexists(path / name))
    if not gone:
        return store
    store.check_exists()
    if (name := _changed(store, source, gone)) is not None:
        if store.provenance().path != source.path:  # another model
            return store
        raise CheckpointError(
            f"{name}: is not as it was when --drop-source deleted {min(gone)}; put back the file"
        )
    record = RecordedSource(LocalFolder(out_dir), source, ())
    record.check_exists()
    return DroppedSource(store, record, gone)


def _recorded_in(out_dir: Path) -> SourceRecord | None:
    """What an output folder says of a source whose shards may have been deleted."""
    with naming(out_dir, OutputError):
        if not out_dir.is_dir():
            return None
    return Records.of(out_dir).source_dropped(find_manifest(out_dir))


def _changed(store: LocalFolder, source: SourceRecord, gone: Container[str]) -> str | None:
    """Name of a file that is not as it was."""
    for name, record in source.files.items():
        if not (store.local_path / name).is_file() or record_of(store.open(name)) != record:
            return name
    there = {
        name: ShardIdentity.of(store.open(name).identity, identity.header)
        for name, identity in source.shards.items()
        if name not in gone
    }
    for name in source.changed(store.provenance(), there):
        if name not in gone:
            return name
    return None


class Dropping:
    """Deletes shards of one source folder."""

    def __init__(self, work: Conversion) -> None:
        """Make sure that they can be deleted, and that this makes room.

        Raises:
            CheckpointError: why not.
            VerifyError: they could not be restored.
        """
        check_moves_cover(work.checkpoint, [m for shard in work.plan.shards for m in shard.moves])
        self._work = work
        self._shards = {s.name: s for s in work.sources if s.name not in work.gone}
        self.count = self.nbytes = 0
        """Shards that have been deleted, and their bytes."""
        store = work.store
        path = store.local_path
        if path is None:
            raise CheckpointError(
                f"{store.location}: is not on a disk of this machine, so there is nothing to drop; "
                "it is streamed without --drop-source"
            )
        self._path = path
        with naming(path):
            if not os.access(path, os.W_OK | os.X_OK):
                raise CheckpointError(f"{path}: --drop-source may delete nothing there")
            # By its descriptor, so that no other folder can take its place.
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._folder)
        for shard in self._shards.values():
            self._check(shard)

    @property
    def on_disk(self) -> dict[str, int]:
        """Bytes of disk that become free with each shard."""
        found = {}
        for name in self._shards:
            with naming(name):
                found[name] = 512 * os.stat(name, dir_fd=self._folder).st_blocks
        return found

    def concerned(self, records: Mapping[str, ShardRecord]) -> dict[str, ShardRecord]:
        """Of these output shards, those that are read from shards that are to be deleted."""
        gone = self._work.gone
        concerned = {s.name for s in self._work.shards if not gone.issuperset(s.source_files)}
        return {name: record for name, record in records.items() if name in concerned}

    @property
    def comparable(self) -> dict[str, Sequence[Move]]:
        """The moves of the output shards all of whose sources are there, by name."""
        gone = self._work.gone
        return {s.name: s.moves for s in self._work.plan.shards if gone.isdisjoint(s.source_files)}

    def frees_room_for(self, out_dir: Path) -> bool:
        """Whether source and result are on one disk."""
        with naming(out_dir):
            return os.fstat(self._folder).st_dev == os.stat(out_dir).st_dev

    def write_record(self, out_dir: Path) -> SourceRecord:
        """Write what later runs need of the source.

        Returns:
            What goes into the journal.

        Raises:
            CheckpointError: a file of the source cannot be read.
            OutputError: a file cannot be written.
        """
        checkpoint = self._work.checkpoint
        copy_files(checkpoint.store, checkpoint.other_files, out_dir)
        write_file(out_dir / SOURCE_NAME, encode_record(checkpoint))
        return self._description

    @property
    def _description(self) -> SourceRecord:
        return msgspec.structs.replace(describe_source(self._work.checkpoint), dropped=True)

    def rehearse(self, out_dir: Path) -> None:
        """Open the source as a later run would if all its shards were gone.

        Raises:
            CheckpointError: it is another one then.
            OutputError: the journal cannot be read.
        """
        source = Records.of(out_dir).dropped
        if source is not None:
            record = RecordedSource(LocalFolder(out_dir), source, ())
            store = DroppedSource(LocalFolder(self._path), record, frozenset(source.shards))
            source = describe_source(open_checkpoint(store))
        if source != self._description:
            raise CheckpointError(
                f"{self._path}: what {out_dir} has on record of it is not the same, so nothing is "
                "deleted"
            )

    def write_and_drop(
        self,
        planned: Planned,
        writing: Writing,
        write: Callable[[Sequence[PlannedShard], OnFilled], None],
        check: Callable[[Path, ShardRecord, Sequence[Move]], None],
    ) -> float:
        """Write output shards one after the other, read each back before it gets its name, and
        delete the shards that none after it needs.

        Args:
            planned: which shards are there.
            writing: takes the others.
            write: writes shards.
            check: reads one back, given its file, what it should be, and the moves that filled it.

        Returns:
            Wall time of the reading back, in seconds.

        Raises:
            CheckpointError: the source has changed, or a shard of it cannot be deleted.
            OutputError: writing failed.
            VerifyError: what has been read back is not what was written.
        """
        seconds = 0.0
        out_dir = planned.folder.path
        writing.allow_dropping(partial(self.write_record, out_dir))
        self.rehearse(out_dir)
        for shard, done_with in steps(self._work.plan):
            if shard.name not in planned.kept:
                filled: list[tuple[PlannedShard, WriteFile, dict[str, str]]] = []
                write([shard], lambda *done, filled=filled: filled.append(done))
                [(_, file, checksums)] = filled
                file.sync()
                file.leave_cache()
                started = time.perf_counter()
                check(file.path, ShardRecord.of(shard.header, shard.nbytes, checksums), shard.moves)
                seconds += time.perf_counter() - started
                writing.finish_shard(shard, file, checksums)
            for name in done_with:
                self.drop(name)
        return seconds

    def drop(self, name: str) -> None:
        """Delete a shard, unless an earlier run has.

        Raises:
            CheckpointError: it has changed since it was converted, or cannot be deleted.
        """
        if (shard := self._shards.get(name)) is None:
            return
        self._check(shard)
        with naming(name):
            os.unlink(name, dir_fd=self._folder)
        self.count += 1
        self.nbytes += shard.header.file_nbytes

    def _check(self, shard: Shard) -> None:
        """Make sure that a name stands for the file that was opened, and for the only name of it.

        Raises:
            CheckpointError: it does not.
        """
        with naming(shard.name):
            status = os.stat(shard.name, dir_fd=self._folder, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            raise CheckpointError(
                f"{shard.name}: is a link, as in a cache, so --drop-source would make no room; "
                "give a folder with the files themselves (hf download --local-dir), or stream the "
                "model from the Hub"
            )
        if status.st_nlink > 1:
            raise CheckpointError(
                f"{shard.name}: has {status.st_nlink} names (hard links), so --drop-source would "
                "make no room; delete the others first"
            )
        if not stat.S_ISREG(status.st_mode) or FileIdentity.of(status) != shard.file_identity:
            raise CheckpointError(f"{shard.name}: has changed since it was read, so it stays")
