"""Whose an output folder is, and each file in it: ours, the user's, or somebody else's.

Ours is what conversions have left, as their journal or their manifest records. What no engine reads
and is not as a conversion left it is the user's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import CheckpointError, OutputError, VerifyError, naming
from ..format.files import (
    CONFIG_NAME,
    FOREIGN_FOLDERS,
    GENERATED,
    INDEX_NAME,
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    is_journal,
    is_shard,
    no_engine_reads,
)
from ..format.manifest import Manifest, ShardIdentity, SourceRecord, contents
from ..storage.copying import record_of
from ..storage.durable import remove_file
from ..storage.local import LocalReader, files_below
from .journal import Journal
from .surroundings import names_in_manifest, read_manifest
from .work import Work

_URL = re.compile(r"[a-z][a-z0-9+.-]*:/")
"""A path has one slash where the URL had two."""


def check_local(path: Path) -> None:
    """Raises OutputError: it is a URL, and would be taken for a folder that is not there yet, or
    a link that leads nowhere, and nothing can be made there."""
    if (scheme := _URL.match(os.fspath(path))) and not os.path.isdir(scheme[0]):
        raise OutputError(
            f"{path}: is a URL; name a path on this machine, and upload the result from there"
        )
    for each in (path, *path.parents):
        if os.path.islink(each) and not os.path.exists(each):
            raise OutputError(f"{each}: is a link that leads nowhere; remove it, or name another")


def check_place(path: Path, source: Path | None) -> None:
    """Raises OutputError: there can be no output folder, or it and the source are in each other."""
    check_local(path)
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


def check_known(path: Path, *, restoring: bool = False) -> None:
    """Raises OutputError: a folder is not empty, and no conversion has been there."""
    entries = list(path.iterdir())  # once: other parts may be making theirs
    known = any(is_journal(entry.name) or entry.name == MANIFEST_NAME for entry in entries)
    foreign = {
        entry.name for entry in entries if entry.is_dir() or not no_engine_reads(entry.name)
    } - FOREIGN_FOLDERS
    if foreign and not known:
        if not restoring and all(map(is_shard, foreign)):
            raise OutputError(without_journal(path, min(foreign)))
        lost = f" but no {MANIFEST_NAME}" if INDEX_NAME in foreign and not restoring else ""
        raise OutputError(
            f"{path}: is not empty: it holds {min(foreign)!r}{lost}; choose another folder"
        )


def without_journal(path: Path, shard: str) -> str:
    """A message on a shard that a part may have left, where nothing tells that."""
    return (
        f"{path}: holds {shard!r}, and no journal there tells of it; bring that too (a hidden file "
        "such as .fp4moe-journal-2-of-4.jsonl), or convert again in another folder"
    )


_ORIGINAL = "an original that is not fully restored"


class FolderFiles:
    """The files of an output folder whose lock is held."""

    def __init__(
        self, path: Path, journal: Journal, *, restoring: bool, can_overwrite: bool
    ) -> None:
        """
        Args:
            path: of the folder.
            journal: of the run that has the lock.
            restoring: whether the run restores an original.
            can_overwrite: whether the command at hand takes ``--overwrite``.
        """
        self.path = path
        self._journal = journal
        self._restoring = restoring
        self._afresh = f"{'' if can_overwrite else 'fp4moe-convert '}--overwrite starts afresh"
        self.ours: set[str] = set()
        """Names that a conversion has left, or is about to."""
        self.manifest: Manifest | None = None
        self._no_manifest = ""
        """Why there is none that can be relied on."""

    def read(self) -> None:
        """Find out which files are ours.

        Raises:
            OutputError: nothing tells, there are others, or an original would take the place of a
                conversion, or the other way round.
        """
        files = set(files_below(self.path, OutputError))
        self._journal.read()  # other parts record their names before they make their files
        listed = names_in_manifest(self.path)
        self.ours = self._journal.records.files | listed
        try:
            self.manifest = read_manifest(self.path)
        except VerifyError as error:
            if self.has_index and not self.ours:
                raise OutputError(
                    f"{self.path}: nothing tells what conversions have left there: {error}; "
                    "choose another folder"
                ) from None
            self._no_manifest = str(error)
        # Not with --overwrite either: a conversion may be all that there is of a model.
        restored = self._journal.records.restored
        if self._restoring and (False in restored or listed):
            raise OutputError(
                f"{self.path}: holds {self._conversion}, which fp4moe restore never deletes; "
                "choose another folder"
            )
        if not self._restoring and True in restored:
            raise OutputError(
                f"{self.path}: holds {_ORIGINAL}, which a conversion never deletes; go on with "
                "fp4moe restore, or choose another folder"
            )
        # Links are never ours: we make none, and would write through a planted one.
        self._refuse(
            name
            for name in files
            if not (no_engine_reads(name) or is_journal(name))
            and (
                name.removesuffix(PARTIAL_SUFFIX) not in self.ours
                or (self.path / name).is_symlink()
            )
        )

    def declare(self, names: set[str]) -> None:
        """Record names before the files are made, so that a run after a kill knows them as ours."""
        self.ours |= names
        self._journal.declare(names, restored=self._restoring)

    def claim(self, names: set[str]) -> None:
        """Record the names of files that are about to be written beside the shards.

        Raises:
            OutputError: somebody has put a file there.
        """
        users = {n for n in names if no_engine_reads(n) and os.path.lexists(self.path / n)}
        if new := names - self.ours - users:
            self._refuse(name for name in new if os.path.lexists(self.path / name))
            self.declare(new)

    def leave_to_user(self, names: set[str]) -> None:
        """Touch these files no more."""
        self.ours -= names

    def leave_to_other_parts(self, names: set[str]) -> None:
        """Touch no file but these: a part's own shards."""
        self.ours = names

    @property
    def has_index(self) -> bool:
        """Whether the folder looks finished."""
        return (self.path / INDEX_NAME).is_file()

    @property
    def dropped(self) -> SourceRecord | None:
        """The source that the folder was made from, where shards of it may have been deleted."""
        return self._journal.records.source_dropped(self.manifest)

    @property
    def _conversion(self) -> str:
        """The one that is there."""
        known = [self.manifest.source.address] if self.manifest else []
        known += [each.source for each in self._journal.records.divisions.values()]
        state = "a finished" if self.has_index else "an unfinished"
        return f"{state} conversion" + (f" of {known[0]}" if known else "")

    def or_afresh(self, advice: str, separator: str = ", or ") -> str:
        """Advice for the end of a message, and --overwrite where that is not refused."""
        return advice if self.dropped else f"{advice}{separator}{self._afresh}"

    def refuse_folders_named(self, names: set[str]) -> None:
        """A folder that has the name of a file of ours is not ours."""
        self._refuse(
            path.name
            for path in self.path.iterdir()
            if path.name.removesuffix(PARTIAL_SUFFIX) in names and path.is_dir()
        )

    def _refuse(self, foreign: Iterable[str]) -> None:
        if name := min(foreign, default=None):
            is_regular = not (self.path / name).is_symlink() and (self.path / name).is_file()
            if is_regular and is_shard(name) and not self._restoring:
                raise OutputError(without_journal(self.path, name))
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
            raise OutputError(f"{self.path}: {self._no_manifest}{self.or_afresh('', '; ')}")
        beside = self.manifest.files if self.manifest else {CONFIG_NAME, *work.other_files}
        for name in sorted(name for name in beside if not no_engine_reads(name)):
            if name in present and not self._is_as_left(name, work):
                what = "has been changed since" if self.manifest else "is not the source's"
            elif name not in present and self.has_index:
                what = "is missing"
            else:
                continue
            raise OutputError(f"{self.path}: {name!r} {what}; {self.or_afresh('put it right')}")

    def refuse_other_source(self, now: str | None, sources: Mapping[str, ShardIdentity]) -> None:
        """A run that goes on reads what the runs before it have read.

        Args:
            now: the model and the commit that this run reads, where they are known.
            sources: the shards that it reads.

        Raises:
            OutputError: a branch or a tag has moved since, or another model is read.
        """
        read = set(contents(self.manifest.source.shards)) if self.manifest else set()
        for name, finished in self._journal.records.finished.items():
            if os.path.isfile(self.path / name):  # somebody may have written the journal
                read |= contents(finished.sources)
        is_other = bool(read) and read.isdisjoint(contents(sources))
        if is_other and not self.has_index and not self.dropped:
            held = _ORIGINAL if self._restoring else self._conversion
            raise OutputError(
                f"{self.path}: holds {held}, and this is another; "
                f"{self.or_afresh('choose another folder')}"
            )
        begun = self._journal.records.origin
        if begun is not None and now is not None and begun != now:
            model, _, revision = begun.rpartition("@")
            same_model = now.startswith(f"{model}@")
            way = f"{f'--revision {revision}' if same_model else f'hf://{begun}'} goes on with that"
            raise OutputError(
                f"{self.path}: was begun from {begun}, and this is {now}; "
                f"{self.or_afresh(way, ', ')}"
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
