"""Any place that fsspec can read: s3://, gs://, az://, https://, memory:// and others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

import fsspec

from ..errors import CheckpointError, MissingFileError, one_line
from ..format.manifest import FileIdentity, Provenance
from .buffers import Bytes
from .http_answers import PASSING, Headers, asked_wait
from .reader import in_parallel
from .remote import FIRST_TRIES, Backoff, RemoteStore, TryAgainError, fill_from

_CHANGES = (
    "ETag",
    "etag",
    "md5Hash",
    "content_hash",
    "generation",
    "LastModified",
    "Last-Modified",
    "mtime",
)
"""What file systems call a value that changes when a file does; the best first."""
_FOR_GOOD = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, ValueError, TypeError, LookupError),
)

_NOT_FOUND = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)

T = TypeVar("T")


class UrlStore(RemoteStore):
    """A folder of a file system that fsspec knows."""

    def __init__(self, url: str, *, connections: int) -> None:
        """
        Args:
            url: of the folder.
            connections: as for `RemoteStore`.

        Raises:
            CheckpointError: there is no such folder or file system, or its package is missing.
            UnreachableError: it does not answer.
        """
        self.location = url
        self._fs, root = Backoff(url, tries=FIRST_TRIES).retry(self._connect)
        found = self._files_below(root.rstrip("/"))
        if not found:
            raise CheckpointError(f"{url}: has no files; expected a model folder")
        listed = {path.removeprefix(root).lstrip("/"): info for path, info in found.items()}
        self._paths = dict(zip(listed, found, strict=True))
        # A web server's list states no sizes.
        sizeless = [name for name, info in listed.items() if info.get("size") is None]
        files = {name: _identity(listed[name]) for name in listed.keys() - set(sizeless)}
        stated = in_parallel(self.identity, sizeless, width=connections)
        files.update(zip(sizeless, stated, strict=True))
        super().__init__(url, files, connections=connections)

    def _connect(self) -> tuple[Any, str]:
        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:  # they say which package to install
            raise CheckpointError(f"{self.location}: cannot be opened: {error}") from error
        except Exception as error:  # some file systems reach for their server at once
            raise self._meaning(error, self.location) from error
        return found

    def _files_below(self, root: str) -> dict[str, dict[str, Any]]:
        """What is listed below a folder, by path. The file system's own `find` leaves out folders
        that it cannot list."""
        found: dict[str, dict[str, Any]] = {}
        folders = [root]
        while folders:
            folder = folders.pop()
            what = folder.removeprefix(root).lstrip("/") or self.location
            question = partial(self._fs.ls, folder, detail=True)
            try:
                listed = self._ask(question, what, tries=FIRST_TRIES)
            except MissingFileError:
                if folder == root:
                    return {}
                raise
            for info in listed:
                path = info["name"].rstrip("/")
                # A store may have an object in the place of a folder.
                if path == folder or _sorts_a_list(path):
                    continue
                if info["type"] == "directory":
                    folders.append(path)
                else:
                    found[path] = info
        return found

    def provenance(self) -> Provenance:
        return Provenance(self.location)

    def identity(self, name: str, stopped: threading.Event | None = None) -> FileIdentity:
        return self._ask(lambda: _identity(self._fs.info(self._paths[name])), name, stopped)

    def _ask(
        self,
        question: Callable[[], T],
        what: str,
        stopped: threading.Event | None = None,
        *,
        tries: int | None = None,
    ) -> T:
        """Ask the file system, and not what it has kept of earlier answers.

        Raises:
            MissingFileError: ``what`` is not there.
            CheckpointError: it cannot be read.
            UnreachableError: there is no answer.
        """

        def ask() -> T:
            self._fs.invalidate_cache()
            try:
                return question()
            except Exception as error:
                raise self._meaning(error, what) from error

        place = what if what == self.location else f"{self.location}: {what}"
        return Backoff(place, tries=tries).retry(ask, stopped)

    def request(self, name: str, offset: int, into: Bytes) -> Iterator[int]:
        try:
            data = self._fs.cat_file(self._paths[name], start=offset, end=offset + into.size)
        except Exception as error:
            raise self._meaning(error, name) from error
        if len(data) > into.size:
            raise CheckpointError(f"{name}: the server sends no ranges")
        yield from fill_from([data], into)

    def _meaning(self, error: Exception, what: str) -> Exception:
        """`TryAgainError` if a failure may pass.

        Each file system raises its own. The HTTP answer decides, where there was one, and otherwise
        the cause: the file system of https:// says "not found" whatever has kept it from asking for
        a file's size.
        """
        cause = error.__cause__ or error
        status, headers = _answer(error) or _answer(cause) or (None, {})
        said_not_found = isinstance(error, FileNotFoundError)
        if status is None:
            may_pass = not isinstance(cause, _FOR_GOOD) and not _lacks_credentials(cause)
            not_found = said_not_found and not may_pass
        else:
            may_pass, not_found = status in PASSING, status in _NOT_FOUND
        if not_found:
            return MissingFileError(f"{what}: is not in {self.location} any more")
        told = cause if said_not_found else error
        reason = one_line(told) or type(told).__name__
        if may_pass:
            return TryAgainError(reason, after=asked_wait(headers))
        return CheckpointError(f"{what}: {reason}")


def _sorts_a_list(path: str) -> bool:
    """Whether a link on a web server's page leads to the same page in another order."""
    return path.startswith(("http://", "https://")) and "?" in path


def _identity(info: Mapping[str, Any]) -> FileIdentity:
    """
    Raises:
        ValueError: the size is not known.
    """
    if info.get("size") is None:
        raise ValueError("its size is not stated")
    value = next(filter(None, map(info.get, _CHANGES)), None)
    return FileIdentity(int(info["size"]), etag=None if value is None else str(value))


def _lacks_credentials(error: BaseException) -> bool:
    """As botocore, google-auth and azure-identity call it, which need not be installed."""
    return "Credential" in type(error).__name__


def _answer(error: BaseException) -> tuple[int, Headers] | None:
    """Status and headers of the HTTP answer that an exception is about: botocore keeps them in a
    dict, and aiohttp, azure-core, gcsfs and requests in attributes."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        about = response.get("ResponseMetadata", {})
        status, headers = about.get("HTTPStatusCode"), about.get("HTTPHeaders")
    else:
        values = (getattr(error, key, None) for key in ("status", "status_code", "code"))
        status = next((value for value in values if isinstance(value, int)), None)
        headers = getattr(error, "headers", None) or getattr(response, "headers", None)
    return None if status is None else (status, headers or {})
