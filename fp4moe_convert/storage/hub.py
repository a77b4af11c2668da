"""Models on the Hugging Face Hub.

huggingface_hub knows where the Hub is, who we are, and what its answers mean. A revision is
resolved to a commit once, and everything is read at that commit, whose files cannot change. Weights
are read from the signed addresses to which the Hub leads; asking the Hub each time would soon meet
its limit of requests.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from ..errors import CheckpointError, UnreachableError
from ..format.manifest import HUB_PREFIX, FileIdentity, Provenance
from .buffers import Bytes
from .connection_pool import ConnectionPool
from .http_answers import PASSING, Headers, asked_wait
from .hub_cache import complete_snapshot, latest_snapshot
from .hub_errors import HTTP_ERROR, LOG_IN, TRANSPORT_ERRORS, answer, passing, wrong_setting
from .reader import Store
from .remote import FIRST_TRIES, Backoff, RemoteStore, Traffic, TryAgainError, fill_from

MAX_SKIPPED_NBYTES = 16 * 2**20
"""Of an answer that has the whole file instead of a range, as servers may give of small files."""

_httpx = importlib.import_module(HTTP_ERROR.__module__.partition(".")[0])

PIECE_NBYTES = 2**20
"""Of an answer, until progress is noted. What a connection that stalls has brought of one is asked
for again."""

LIBRARY: Any = {
    "library_name": "fp4moe-convert",
    "library_version": importlib.metadata.version("fp4moe-convert"),
}
"""Who asks."""


def open_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    connections: int,
) -> Store:
    """Open a model on the Hub, or its snapshot in the cache where that is complete.

    Args:
        repo_id: ``OWNER/NAME``.
        revision: a branch, a tag or a commit; None for the default branch.
        cache_dir: of huggingface_hub; None for its own.
        connections: requests that may be under way at a time.

    Raises:
        CheckpointError: there is no such model or revision, or it may not be read.
        UnreachableError: the Hub does not answer, and the cache has no complete snapshot.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise CheckpointError(
            f"{repo_id}: is no folder and no id of a model on the Hub, such as OWNER/NAME"
        ) from None
    if constants.HF_HUB_OFFLINE:
        if (snapshot := latest_snapshot(repo_id, revision, cache_dir)) is not None:
            return snapshot
        raise CheckpointError(
            f"{repo_id}: HF_HUB_OFFLINE is set, and the cache "
            f"{cache_dir or constants.HF_HUB_CACHE} has no complete snapshot of it; unset that, or "
            "download the model first"
        )
    if (wrong := wrong_setting()) is not None:
        raise CheckpointError(f"{repo_id}: {wrong}")
    api, traffic = HfApi(**LIBRARY), Traffic()

    def ask() -> ModelInfo:
        with traffic, _explained(repo_id, revision):
            return api.model_info(
                repo_id,
                revision=revision,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )

    try:
        info = Backoff(repo_id, tries=FIRST_TRIES).retry(ask)
    except UnreachableError:
        # As huggingface_hub does.
        if (snapshot := latest_snapshot(repo_id, revision, cache_dir)) is not None:
            return snapshot
        raise
    commit = info.sha
    files, is_plain = listed_files(info)
    if commit is None or not files:
        raise CheckpointError(f"{repo_id}: has no files at that revision")
    if (snapshot := complete_snapshot(repo_id, commit, files, cache_dir)) is not None:
        return snapshot
    return HubStore(
        repo_id, commit, files, is_plain=is_plain, connections=connections, traffic=traffic
    )


def listed_files(info: ModelInfo) -> tuple[dict[str, FileIdentity], set[str]]:
    """Size and ETag of each file of a model, and the names of those that lie in git, not in LFS.

    Raises:
        CheckpointError: the Hub does not say.
    """
    files: dict[str, FileIdentity] = {}
    is_plain: set[str] = set()
    for file in info.siblings or ():
        etag = file.lfs.sha256 if file.lfs else file.blob_id
        if file.size is None or etag is None:
            raise CheckpointError(f"{info.id}: the Hub does not say the size of {file.rfilename}")
        files[file.rfilename] = FileIdentity(file.size, etag=etag)
        if file.lfs is None:
            is_plain.add(file.rfilename)
    return files, is_plain


class HubStore(RemoteStore):
    """The files of a model at one commit."""

    def __init__(
        self,
        repo_id: str,
        commit: str,
        files: Mapping[str, FileIdentity],
        *,
        is_plain: set[str],
        connections: int,
        traffic: Traffic,
    ) -> None:
        """
        Args:
            repo_id: ``OWNER/NAME``.
            commit: a full hash.
            files: size and ETag of each.
            is_plain: names of those that lie in git, and not in LFS.
            connections: as for `RemoteStore`.
            traffic: as for `RemoteStore`.
        """
        super().__init__(f"{HUB_PREFIX}{repo_id}", files, connections=connections, traffic=traffic)
        self._repo_id = repo_id
        self._commit = commit
        self._is_plain = is_plain
        self._addresses: dict[str, str] = {}
        self._resolving: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._is_direct = True
        self._pool = ConnectionPool(
            _httpx.create_ssl_context, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )

    def provenance(self) -> Provenance:
        return Provenance(self.location, self._repo_id, self._commit)

    def request(self, name: str, offset: int, into: Bytes) -> Iterator[int]:
        url = hf_hub_url(self._repo_id, name, revision=self._commit)
        headers = {
            "Accept-Encoding": "identity",
            "Range": f"bytes={offset}-{offset + into.size - 1}",
        }
        is_plain = name in self._is_plain
        with _explained(self._repo_id, self._commit, name):
            address = url if is_plain else self._address(name, url)
            if _is_hubs(address):
                headers |= build_hf_headers(**LIBRARY)
            try:
                if not is_plain and self._is_direct and self._pool.reach(address):
                    yield from self._directly(name, address, headers, offset, into)
                else:
                    yield from self._through_library(name, address, headers, offset, into)
            except _RefusedError as refusal:
                with self._resolving[name]:
                    if self._addresses.get(name) == address:
                        del self._addresses[name]
                raise TryAgainError(f"its address is refused ({refusal})", after=0) from None

    def _directly(
        self, name: str, address: str, headers: Mapping[str, str], offset: int, into: Bytes
    ) -> Iterator[int]:
        with self._pool.get(address, headers) as response:
            if response.getheader("Location"):
                self._is_direct = False  # the library knows how to follow
                raise TryAgainError("the storage leads elsewhere", after=0)
            _check_status(response.status, response.reason, response.headers)
            skip = self._check_answer(name, response.status, response.headers, offset, into.size)
            response.read(skip)
            got = 0
            # In pieces, so that a stalled connection is seen.
            while count := response.readinto(into[got : got + PIECE_NBYTES].data):
                got += count
                yield count

    def _through_library(
        self, name: str, address: str, headers: Mapping[str, str], offset: int, into: Bytes
    ) -> Iterator[int]:
        with get_session().stream(
            "GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            if name in self._is_plain:
                if response.status_code >= 400:
                    response.read()
                    hf_raise_for_status(response)
                if (stated := _stated_etag(response.headers)) is not None:
                    self._check_as_listed(name, self._files[name].nbytes, stated)
            _check_status(response.status_code, response.reason_phrase, response.headers)
            skip = self._check_answer(
                name, response.status_code, response.headers, offset, into.size
            )
            yield from fill_from(_without_first(response.iter_raw(), skip), into)

    def _address(self, name: str, url: str) -> str:
        """Where the Hub leads to from the ``url`` of a large file: a signed address, or its own
        where it sends such files itself, as mirrors may."""
        with self._resolving[name]:
            if name not in self._addresses:
                with self.traffic:
                    found = get_hf_file_metadata(
                        url, timeout=constants.HF_HUB_ETAG_TIMEOUT, **LIBRARY
                    )
                self._check_as_listed(name, found.size, found.etag)
                self._addresses[name] = found.location
            return self._addresses[name]

    def _check_as_listed(self, name: str, nbytes: int | None, etag: str | None) -> None:
        listed = self._files[name]
        if (nbytes, etag) != (listed.nbytes, listed.etag):
            raise CheckpointError(
                f"{name}: has {nbytes} bytes and the ETag {etag}, but the Hub lists it with "
                f"{listed.nbytes} and {listed.etag}"
            )

    def _check_answer(
        self, name: str, status: int, headers: Headers, offset: int, nbytes: int
    ) -> int:
        """Make sure that an answer has the bytes asked for; how many come before these."""
        if headers.get("Content-Encoding", "identity") != "identity":
            raise CheckpointError(f"{name}: comes compressed; is a proxy between?")
        expected = f"bytes {offset}-{offset + nbytes - 1}/{self._files[name].nbytes}"
        if status == HTTPStatus.PARTIAL_CONTENT:
            if (found := headers.get("Content-Range")) != expected:
                raise TryAgainError(f"the answer has {found}, expected {expected}")
            return 0
        if offset > MAX_SKIPPED_NBYTES:
            raise CheckpointError(f"{name}: the server sends no ranges; is a proxy between?")
        return offset


class _RefusedError(Exception):
    """An address leads nowhere any more."""


def _is_hubs(address: str) -> bool:
    """Whether it is the Hub that answers there: a token is for the Hub alone."""
    return _origin(address) == _origin(constants.ENDPOINT)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _stated_etag(headers: Headers) -> str | None:
    """As the Hub lists it."""
    etag = headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) or headers.get("ETag")
    return None if etag is None else etag.removeprefix("W/").strip('"')


def _check_status(status: int, reason: str, headers: Headers) -> None:
    """Judge the answer of a storage, which is not the Hub's own.

    Raises:
        TryAgainError: it is busy.
        _RefusedError: the address has expired, or is wrong. Where it leads is asked again then, and
            a Hub that refuses the file says so.
    """
    if status in PASSING:
        raise TryAgainError(f"the storage answers {status} {reason}", after=asked_wait(headers))
    if status >= 400:
        raise _RefusedError(status)


def _without_first(pieces: Iterable[bytes], skip: int) -> Iterator[bytes]:
    for piece in pieces:
        if len(piece) > skip:
            yield piece[skip:]
        skip = max(skip - len(piece), 0)


@contextmanager
def _explained(repo_id: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """Turn failures of a request, for a file or for the list, into what they mean, and what to do.

    Raises:
        TryAgainError: it may pass.
        CheckpointError: it will not.
    """
    try:
        yield
    except TRANSPORT_ERRORS as error:
        meaning = passing(error) or CheckpointError(
            f"{repo_id}: {_refusal(error, repo_id, revision, file)}"
        )
        raise meaning from error


def _refusal(error: Exception, repo_id: str, revision: str | None, file: str | None) -> str:
    match error:
        case GatedRepoError():
            return (
                f"access is restricted; ask for it at {constants.ENDPOINT}/{repo_id}, then {LOG_IN}"
            )
        case RepositoryNotFoundError():
            return (
                "no folder here has that name, and the Hub has no such model, or a private one; "
                f"check the name, and for a private one {LOG_IN}"
            )
        case RevisionNotFoundError():
            return f"has no revision {revision!r}; name a branch, a tag or a commit of it"
        case HfHubHTTPError():
            page = f"has it been deleted? look at {constants.ENDPOINT}/{repo_id}"
            advice = {401: LOG_IN, 403: LOG_IN, 404: page, 410: page}
            way = advice.get(error.response.status_code)
            said = f"{file}: {answer(error)}" if file else answer(error)
            return f"{said}; {way}" if way else said
    return "HF_HUB_OFFLINE is set"
