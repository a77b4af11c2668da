"""A model's repository on the Hub that is written to.

Files are uploaded first and committed then, so that whoever commits can make sure of something in
between. What has been uploaded is not uploaded again, committed or not: huggingface_hub asks the
Hub first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from ..errors import PushError, StorageLimitError, one_line
from .hub import LIBRARY, HubStore, listed_files
from .hub_errors import LOG_IN, answer, connection_failed, passing, wrong_setting
from .reader import read_all
from .remote import Traffic, TryAgainError

UPLOADS = 4
"""Files that are uploaded at a time. Each is uploaded by several requests where Xet does it."""


@dataclass(frozen=True)
class Head:
    """What a repository holds at its last commit."""

    commit: str
    is_private: bool
    files: Mapping[str, int]
    """Size of each."""
    store: HubStore

    def read(self, name: str, max_nbytes: int) -> bytes:
        """Raises CheckpointError: it is larger, or cannot be read."""
        return read_all(self.store.open(name), max_nbytes)


class HubRepository:
    """A repository that is there, or can be made."""

    def __init__(self, repo_id: str) -> None:
        """
        Args:
            repo_id: ``OWNER/NAME``.

        Raises:
            PushError: that is no id, nobody is logged in, or a setting is wrong.
        """
        try:
            validate_repo_id(repo_id)
            is_id = repo_id.count("/") == 1
        except HFValidationError:
            is_id = False
        if not is_id:
            raise PushError(f"{repo_id}: is no id of a model on the Hub, such as OWNER/NAME")
        if get_token() is None:
            raise PushError(f"{repo_id}: nobody is logged in; {LOG_IN}")
        if (wrong := wrong_setting()) is not None:
            raise PushError(f"{repo_id}: {wrong}")
        self.repo_id = repo_id
        self.url = f"{constants.ENDPOINT}/{repo_id}"
        self._api = HfApi(**LIBRARY)

    def head(self) -> Head | None:
        """What is there now; None without a repository.

        Raises:
            PushError: it may not be read.
            TryAgainError: the Hub does not answer.
        """
        with _explained(self.repo_id):
            try:
                info = self._api.model_info(self.repo_id, files_metadata=True)
            except RepositoryNotFoundError:
                return None
        files, is_plain = listed_files(info)
        assert info.sha is not None
        return Head(
            info.sha,
            bool(info.private),
            {name: identity.nbytes for name, identity in files.items()},
            HubStore(
                self.repo_id,
                info.sha,
                files,
                is_plain=is_plain,
                connections=1,
                traffic=Traffic(),
            ),
        )

    def create(self, *, private: bool) -> None:
        """Make the repository.

        Args:
            private: only its owner sees it; otherwise it is as the owner's settings say.

        Raises:
            PushError: that is not allowed.
            TryAgainError: the Hub does not answer.
        """
        with _explained(self.repo_id):
            self._api.create_repo(self.repo_id, private=private or None, exist_ok=True)

    def commit(
        self,
        contents: Mapping[str, Path | bytes],
        message: str,
        *,
        after: Head,
        check: Callable[[Sequence[str]], None],
        on_uploaded: Callable[[str], None],
    ) -> str:
        """Upload files, and add them to the repository by one commit.

        Args:
            contents: by path in the repository; a local file, or its bytes.
            message: of the commit.
            after: the commit before it. If there has been another, nothing is added.
            check: called with all paths once the files have been read and uploaded; may raise.
            on_uploaded: told each path, from any thread.

        Returns:
            The hash of the commit.

        Raises:
            PushError: that is not allowed.
            TryAgainError: the Hub does not answer, or there has been another commit.
        """
        with _explained(self.repo_id), _without_bars():
            files = [CommitOperationAdd(name, content) for name, content in contents.items()]

            def upload(file: CommitOperationAdd) -> None:
                self._api.preupload_lfs_files(self.repo_id, [file], free_memory=False)
                on_uploaded(file.path_in_repo)

            with ThreadPoolExecutor(UPLOADS) as pool:
                list(pool.map(upload, files))
        check(list(contents))
        with _explained(self.repo_id), _without_bars():
            return self._api.create_commit(
                self.repo_id, files, commit_message=message, parent_commit=after.commit
            ).oid


@contextmanager
def _without_bars() -> Iterator[None]:
    """huggingface_hub shows no progress: the caller's is shown."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn failures of a request into what they mean, and what to do.

    Raises:
        TryAgainError: it may pass.
        PushError: it will not.
    """
    try:
        yield
    except Exception as error:
        raise _meaning(repo_id, error) from error


def _meaning(repo_id: str, error: BaseException) -> Exception:
    match error:
        case OfflineModeIsEnabled():
            return PushError(f"{repo_id}: HF_HUB_OFFLINE is set")
        case HfHubHTTPError():
            return passing(error) or _meaning_of_answer(repo_id, error)
        case OSError() if error.filename is not None:
            return PushError(f"{error.filename}: {error.strerror}")
        case ValueError() | RuntimeError() if error.__cause__ is not None:
            # huggingface_hub says of which file it is, and raises that from what happened.
            return _meaning(repo_id, error.__cause__)
        case RuntimeError() | JSONDecodeError():  # the first is Xet's
            return connection_failed(error)
        case ValueError():  # what the Hub answers to a file's upload, or says of the card
            return _meaning_of_text(repo_id, one_line(error))
    if (again := passing(error)) is not None:
        return again
    raise error


def _meaning_of_answer(repo_id: str, error: HfHubHTTPError) -> Exception:
    status, what = error.response.status_code, answer(error)
    if status in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT):
        return TryAgainError(what)  # somebody else has committed something
    if "storage" in what.lower():
        return _meaning_of_text(repo_id, what)
    if status == HTTPStatus.UNAUTHORIZED:
        return PushError(f"{repo_id}: {what}; {LOG_IN}")
    if status == HTTPStatus.FORBIDDEN:
        return PushError(f"{repo_id}: {what}; use a token that may write there, or another name")
    return PushError(f"{repo_id}: {what}")


def _meaning_of_text(repo_id: str, what: str) -> PushError:
    if "storage" in what.lower():
        return StorageLimitError(
            f"{repo_id}: {what}; make room there, and run the same command again: what has been "
            "uploaded is kept"
        )
    return PushError(f"{repo_id}: {what}")
