"""Any place that fsspec can read: s3://, gs://, az://, https://, memory:// and others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import fsspec

from ..errors import CheckpointError, MissingFileError
from .buffers import Bytes
from .reader import Identity
from .remote import RemoteStore, TryAgainError, fill_from

_CHANGES = ("ETag", "etag", "md5Hash", "content_hash", "generation", "LastModified", "mtime")
"""What file systems call a value that changes when a file does; the best first."""
_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ValueError)


class UrlStore(RemoteStore):
    """A folder of a file system that fsspec knows."""

    def __init__(self, url: str, *, connections: int) -> None:
        """
        Args:
            url: of the folder.
            connections: as for `RemoteStore`.

        Raises:
            CheckpointError: there is no such folder or file system, or its package is missing.
        """
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:  # they say which package to install
            raise CheckpointError(f"{url}: cannot be opened: {error}") from error
        try:
            found = self._fs.find(self._root, detail=True)
        except Exception as error:
            raise CheckpointError(f"{url}: cannot be listed: {_reason(error)}") from error
        if not found:
            raise CheckpointError(f"{url}: has no files; expected a model folder")
        self._paths = {path.removeprefix(self._root).lstrip("/"): path for path in found}
        files = {name: _identity(found[path]) for name, path in self._paths.items()}
        super().__init__(url, files, connections=connections)

    def provenance(self) -> Mapping[str, str]:
        return {"path": self.location}

    def identity(self, name: str) -> Identity:
        try:
            self._fs.invalidate_cache()
            return _identity(self._fs.info(self._paths[name]))
        except FileNotFoundError:
            raise MissingFileError(f"{name}: is not in {self.location} any more") from None
        except Exception as error:
            raise CheckpointError(f"{name}: {_reason(error)}") from error

    def request(self, name: str, offset: int, into: Bytes) -> Iterator[int]:
        try:
            data = self._fs.cat_file(self._paths[name], start=offset, end=offset + into.size)
        except _FOR_GOOD as error:
            raise CheckpointError(f"{name}: {_reason(error)}") from error
        except Exception as error:  # each file system has its own
            raise TryAgainError(_reason(error)) from error
        yield from fill_from([data], into)


def _identity(info: Mapping[str, Any]) -> Identity:
    identity: dict[str, str | int] = {"bytes": int(info["size"])}
    if (value := next(filter(None, map(info.get, _CHANGES)), None)) is not None:
        identity["etag"] = str(value)
    return identity


def _reason(error: Exception) -> str:
    """In one line."""
    return " ".join(str(error).split()) or type(error).__name__
