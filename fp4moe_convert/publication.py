"""Uploads a finished conversion to a repository on the Hub.

The manifest is committed first and tells whose the repository is. Then come the files that are not
there yet, a commit every few shards. config.json, the index and the model card are the last commit,
so that no repository looks finished before it is.

A file that was changed between the reading of every byte and its upload is not committed. So what
lies in the repository under one of our names, beside our manifest, is right, and a run that goes on
need not read it again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from . import defaults
from .converted_folder import open_converted
from .errors import CheckpointError, PushError, VerifyError
from .execution.surroundings import MAX_MANIFEST_NBYTES
from .format.files import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    SOURCE_CARD_NAME,
    is_journal,
    no_engine_reads,
)
from .format.manifest import FileIdentity, Manifest, ShardIdentity
from .inspection import inspect
from .model_card import front_matter, make_card
from .progress import OnNote, OnProgress, tell, track
from .source.recorded import is_source_card, keeps_source_card
from .storage.copying import record_of
from .storage.hub_repository import Head, HubRepository
from .storage.local import LocalFolder, files_below
from .storage.reader import Store
from .storage.remote import FIRST_TRIES, Backoff, TryAgainError
from .verification import verify

LAST = (CARD_NAME, SOURCE_CARD_NAME, CONFIG_NAME, INDEX_NAME)
"""What is committed last, together."""

COMMIT_NBYTES = 20 * 10**9
"""A commit is made after this many bytes. A killed run has to commit at most these again."""
COMMIT_FILES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What a push did."""

    repo_id: str
    url: str
    commit: str
    """At which the repository is complete."""
    files: int
    nbytes: int
    """Of all files that belong there."""
    uploaded_files: int
    uploaded_nbytes: int
    """Of these: what was not there before."""
    seconds: float
    warnings: list[str]

    @property
    def bytes_per_second(self) -> float:
        return self.uploaded_nbytes / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "repo_id": self.repo_id,
            "url": self.url,
            "commit": self.commit,
            "files": self.files,
            "bytes": self.nbytes,
            "uploaded_files": self.uploaded_files,
            "uploaded_bytes": self.uploaded_nbytes,
            "seconds": round(self.seconds, 3),
            "bytes_per_second": round(self.bytes_per_second),
            "warnings": self.warnings,
        }


def check_repository(
    repo_id: str,
    source: Store,
    *,
    max_shard_nbytes: int | None = None,
    private: bool = False,
) -> None:
    """Make sure, before a conversion, that its result has a chance to be pushed.

    Args:
        repo_id: as for `push`.
        source: what will be converted.
        max_shard_nbytes: with which bound of a shard's size, where that is known.
        private: as for `push`.

    Raises:
        PushError: nobody is logged in, or the repository holds something else.
        CheckpointError: the source, or the repository's manifest, cannot be read.
        UnreachableError: the Hub does not answer.
    """
    head = _reach(HubRepository(repo_id))
    if head is None:
        return
    _check_private(repo_id, head, private)
    if MANIFEST_NAME not in head.files:
        _refuse_foreign(repo_id, head, known=())
        return
    theirs = _manifest_of(repo_id, head)
    if max_shard_nbytes not in (None, theirs.max_shard_nbytes):
        size = theirs.max_shard_nbytes
        difference = f"its files have at most {size:,} bytes (--max-shard-size {size})"
        raise _another_conversion(repo_id, theirs, difference)
    source.check_exists()
    # Not the commit, which may differ in what no engine reads. Shards may have been dropped.
    there = set(source.listing().files)
    files, shards = theirs.source.files, theirs.source.shards
    on_hub = bool(theirs.source.hub_id and source.provenance().hub_id)

    def differs(before: ShardIdentity, now: FileIdentity) -> bool:
        etags = (
            {before.etag, now.etag} - {None} if on_hub else ()
        )  # elsewhere copies have their own
        return before.nbytes != now.nbytes or len(etags) == 2

    changed = [n for n in files if n in there and files[n] != record_of(source.open(n))]
    changed += [n for n in shards if n in there and differs(shards[n], source.open(n).identity)]
    if changed:
        raise _another_conversion(repo_id, theirs, f"in the source, {changed[0]} differs")


def push(
    out_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    direct_io: bool = True,
    threads: int = defaults.THREADS,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
) -> PushReport:
    """Upload a finished conversion to the Hub, with a model card.

    Every byte is compared with the manifest first. After a failure, or a kill at any moment, the
    same call uploads what is missing. Files that no engine reads and that the repository has, such
    as a model card that somebody wrote there, stay as they are.

    Args:
        out_dir: a converted checkpoint.
        repo_id: ``OWNER/NAME``: not there yet, empty, or with this conversion, unfinished or
            finished.
        private: make the repository private. One that is there must be.
        direct_io: read past the page cache where the file system allows.
        threads: number of readers, to compare.
        on_progress: called now and then, from any thread, one call at a time.
        on_note: told, in words, what is kept and what is done.

    Raises:
        VerifyError: ``out_dir`` is unfinished or damaged.
        CheckpointError: a file there cannot be read, or changes.
        FormatError: ``out_dir`` has a format version or layout that this release does not know.
        PushError: the repository holds something else, or may not be written.
        UnreachableError: the Hub does not answer.
    """
    started = time.perf_counter()
    repository = HubRepository(repo_id)
    result = _Result.of(Path(out_dir), repo_id)
    head = _reach(repository)
    missing = result.missing_in(head, private=private)
    if missing:
        if head is not None:
            there = len(result.files) - len(missing)
            tell([f"{there} of {len(result.files)} files are in {repo_id} already"], on_note)
        verify(out_dir, direct_io=direct_io, threads=threads, on_progress=on_progress)
        head = _upload(
            result, repository, missing, private=private, on_progress=on_progress, on_note=on_note
        )
    assert head is not None
    return PushReport(
        repo_id=repo_id,
        url=repository.url,
        commit=head.commit,
        files=len(result.files),
        nbytes=sum(result.sizes.values()),
        uploaded_files=len(missing),
        uploaded_nbytes=sum(result.sizes[name] for name in missing),
        seconds=time.perf_counter() - started,
        warnings=result.warnings,
    )


def _reach(repository: HubRepository) -> Head | None:
    """What the repository holds, asked for the first time."""
    return Backoff(repository.repo_id, tries=FIRST_TRIES).retry(repository.head)


def _upload(
    result: _Result,
    repository: HubRepository,
    missing: Sequence[str],
    *,
    private: bool,
    on_progress: OnProgress | None,
    on_note: OnNote | None,
) -> Head:
    """Commit what is missing, and return what the repository holds then. Each step starts from what
    is there, so that one that fails can be repeated."""
    repo_id = repository.repo_id
    on_bytes = track("uploading", sum(result.sizes[name] for name in missing), on_progress)
    uncounted, committed = set(missing), set[str]()

    def on_uploaded(name: str) -> None:
        if name in uncounted:
            uncounted.remove(name)
            on_bytes(name, result.sizes[name])

    backoff = Backoff(repo_id)
    created, last_commit = False, ""
    while True:
        try:
            head = repository.head()
            missing = result.missing_in(head, private=private)
            if head is None:
                if created:
                    raise TryAgainError("the Hub does not show it, but says that it exists")
                repository.create(private=private)
                created = True
                continue
            if not missing:
                return head
            if again := committed.intersection(missing):
                if head.commit == last_commit:
                    raise PushError(
                        f"{repo_id}: does not take {min(again)}; does a .gitignore there name it?"
                    )
                raise TryAgainError(f"the Hub does not show {min(again)}, which was committed")
            names = next_commit(missing, result.sizes)
            if INDEX_NAME in names and CARD_NAME not in names:
                tell([f"{repo_id} has a {CARD_NAME}, which stays as it is"], on_note)
            last_commit = repository.commit(
                {name: result.files[name] for name in names},
                f"Upload {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""),
                after=head,
                check=result.check_unchanged,
                on_uploaded=on_uploaded,
            )
            committed.update(names)
            backoff.reset()
        except TryAgainError as error:
            backoff.wait_after(error)


def next_commit(missing: Sequence[str], sizes: Mapping[str, int]) -> list[str]:
    """The files of the next commit.

    Args:
        missing: names of all that are not there yet; not empty.
        sizes: of these, in bytes.
    """
    if MANIFEST_NAME in missing:
        return [MANIFEST_NAME]
    names: list[str] = []
    nbytes = 0
    for name in missing:
        if name not in LAST:
            nbytes += sizes[name]
            if names and (nbytes > COMMIT_NBYTES or len(names) == COMMIT_FILES):
                break
            names.append(name)
    return names or [name for name in LAST if name in missing]


@dataclass(frozen=True)
class _Result:
    """A finished conversion, as it will be on the Hub."""

    repo_id: str
    folder: LocalFolder
    manifest: Manifest
    files: Mapping[str, Path | bytes]
    """By path in the repository."""
    sizes: Mapping[str, int]
    """Bytes of each."""
    identities: Mapping[str, FileIdentity]
    """Of those that are files here."""
    warnings: list[str]

    @classmethod
    def of(cls, path: Path, repo_id: str) -> _Result:
        """
        Raises:
            VerifyError: it is unfinished, or has been changed.
            CheckpointError: a file cannot be read, or lies elsewhere.
        """
        converted = open_converted(path)
        manifest, folder = converted.manifest, LocalFolder(path)
        # The Hub leaves out what a .gitignore names.
        names = {
            name
            for name in files_below(path)
            if not is_journal(name) and PurePosixPath(name).name != ".gitignore"
        }
        files: dict[str, Path | bytes] = {name: path / name for name in sorted(names)}
        warnings: list[str] = []
        source_card: Path | None = None
        if keeps_source_card(path, manifest):
            source_card = path / SOURCE_CARD_NAME
        elif is_source_card(path / CARD_NAME, manifest):
            source_card = path / CARD_NAME
            files[SOURCE_CARD_NAME] = files.pop(CARD_NAME)
        if CARD_NAME not in files:
            carried = front_matter(source_card)
            if "license" not in carried:
                warnings.append(
                    f"the model card in {repo_id} names no licence: none is known of the source"
                )
            files[CARD_NAME] = make_card(
                repo_id,
                manifest,
                inspect(folder),
                carried,
                keeps_source_card=source_card is not None,
            )
        identities = {
            name: folder.open(os.path.relpath(file, path)).identity
            for name, file in files.items()
            if isinstance(file, Path)
        }
        sizes = {
            name: len(file) if isinstance(file, bytes) else identities[name].nbytes
            for name, file in files.items()
        }
        return cls(repo_id, folder, manifest, files, sizes, identities, warnings)

    def missing_in(self, head: Head | None, *, private: bool) -> list[str]:
        """Names of the files that a repository lacks.

        Args:
            head: what it holds; None if it is not there yet.
            private: whether it has to be private.

        Raises:
            PushError: it holds something else.
            CheckpointError: its manifest cannot be read.
        """
        if head is None:
            return list(self.files)
        _check_private(self.repo_id, head, private)
        if MANIFEST_NAME in head.files:
            self._check_same(head)
            for name in self.files.keys() & head.files.keys():
                ours, theirs = self.sizes[name], head.files[name]
                if ours != theirs and name != MANIFEST_NAME and not no_engine_reads(name):
                    raise PushError(
                        f"{self.repo_id}: has {theirs} bytes in {name}, expected {ours}: somebody "
                        "has changed it there; delete it there to have it uploaded again"
                    )
        known = self.files if MANIFEST_NAME in head.files else {}
        _refuse_foreign(self.repo_id, head, known)
        return [name for name in self.files if name not in head.files]

    def _check_same(self, head: Head) -> None:
        theirs, ours = _manifest_of(self.repo_id, head), self.manifest
        for before, now in ((theirs.files, ours.files), (theirs.shards, ours.shards)):
            for name in sorted(before.keys() | now.keys()):
                if before.get(name) != now.get(name) and not no_engine_reads(name):
                    raise _another_conversion(self.repo_id, theirs, f"{name} differs")

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raises CheckpointError: a file is not the one that was verified."""
        for name in names:
            file = self.files[name]
            if isinstance(file, Path):
                now = self.folder.open(os.path.relpath(file, self.folder.local_path)).identity
                if now != self.identities[name]:
                    raise CheckpointError(f"{file}: has changed while it was uploaded")


def _manifest_of(repo_id: str, head: Head) -> Manifest:
    """The manifest that a repository has.

    Raises:
        PushError: it is of another format version, or none.
        CheckpointError: it cannot be read.
    """
    try:
        return Manifest.decode(head.read(MANIFEST_NAME, MAX_MANIFEST_NBYTES))
    except VerifyError as error:
        raise PushError(
            f"{repo_id}: holds another conversion: {error}; choose another repository"
        ) from None


def _another_conversion(repo_id: str, theirs: Manifest, difference: str) -> PushError:
    return PushError(
        f"{repo_id}: holds another conversion, of {theirs.source.path}: {difference}; "
        "choose another repository"
    )


def _check_private(repo_id: str, head: Head, private: bool) -> None:
    if private and not head.is_private:
        raise PushError(
            f"{repo_id}: is there and public, but should be private; change that in its settings, "
            "or choose another repository"
        )


def _refuse_foreign(repo_id: str, head: Head, known: Collection[str]) -> None:
    """Refuse files that engines may read and that are not ours."""
    foreign = [name for name in head.files if name not in known and not no_engine_reads(name)]
    if foreign:
        named = ", ".join(sorted(foreign)[:2]) + (", ..." if foreign[2:] else "")
        raise PushError(f"{repo_id}: holds something else: {named}; choose another repository")
