"""What the Hub of `support.hub` needs to be written to.

Repositories are made, files are uploaded by LFS, and committed.
It checks what the real one checks: the token, the digest of what was uploaded, the parent of a
commit, and that what a commit names has been uploaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from support.hub import _ID, LARGE, Hub, Repository, Stored, _Handler, _Refusal

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
"""Of a new repository."""


@dataclass(frozen=True)
class Commit:
    """One that was made."""

    summary: str
    added: list[str]
    names: set[str]
    """All that the repository holds then."""


@dataclass
class Uploads:
    """What has been uploaded to a Hub, as long as it accepts uploads."""

    hub: Hub
    folder: Path
    """Objects by digest."""
    part_nbytes: int | None = None
    """Files are uploaded in parts of this size."""
    refusal: str = ""
    """Answered to each request to upload a large file."""
    received: list[str] = field(default_factory=list)
    """Digests of large files, whenever one has been received whole."""
    received_nbytes: int = 0
    """Of large files, whole or not."""
    commits: list[Commit] = field(default_factory=list)
    on_commit: Callable[[], None] | None = None
    """Called before one is made."""

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._lock = threading.Lock()
        self.hub.routes += [
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate_yaml),
            (rf"/api/models/{_ID}/preupload/(?P<revision>[^/]+)", self.preupload),
            (rf"/{_ID}\.git/info/lfs/objects/batch", self.batch),
            (r"/upload/(?P<digest>\w+)(/(?P<part>\d+))?", self.upload),
            (r"/complete/(?P<digest>\w+)", self.complete),
            (rf"/{_ID}/verify", self.verify),
            (rf"/api/models/{_ID}/commit/(?P<revision>[^/]+)", self.commit),
        ]

    def add(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        """A repository with these files."""
        stored = {name: self._store(name, content) for name, content in files.items()}
        repository = Repository(stored, private=private)
        repository.refs["main"] = repository.commit
        self.hub.repositories[repo_id] = repository
        return repository

    def _store(self, name: str, content: bytes) -> Stored:
        is_large = name.endswith(LARGE)
        # Git's own digest of what is small.
        blob = f"blob {len(content)}\0".encode() + content
        digest = (
            hashlib.sha256(content).hexdigest()
            if is_large
            else hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        )
        (self.folder / digest).write_bytes(content)
        return Stored(self.folder / digest, len(content), digest, is_large)

    def _require_token(self, handler: _Handler) -> None:
        given = handler.headers.get("Authorization")
        if given is None:
            raise _Refusal(401, message="Invalid username or password.")
        if given != f"Bearer {self.hub.token}":
            raise _Refusal(401, message="Invalid credentials in Authorization header")

    def create(self, handler: _Handler) -> None:
        self._require_token(handler)
        asked = _json(handler)
        repo_id = f"{asked['organization']}/{asked['name']}"
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        if repo_id not in self.hub.repositories:
            self.add(repo_id, {".gitattributes": ATTRIBUTES}, private=is_private)
        handler.json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def validate_yaml(self, handler: _Handler) -> None:
        content = _json(handler)["content"]
        _, top, _ = content.split("---\n", 2)
        assert isinstance(yaml.safe_load(top), dict)
        handler.json({"errors": [], "warnings": []})

    def preupload(self, handler: _Handler, repo_id: str, revision: str) -> None:
        self._require_token(handler)
        repository, _ = handler.repository(repo_id, revision)
        answer = []
        for file in _json(handler)["files"]:
            name = file["path"]
            mode = "lfs" if name.endswith(LARGE) else "regular"
            there = repository.files.get(name)
            ignored = ".gitignore" in repository.files and (
                name in repository.files[".gitignore"].path.read_text().split()
            )
            answer.append(
                {
                    "path": name,
                    "uploadMode": mode,
                    "shouldIgnore": ignored,
                    "oid": there.etag if there else None,
                }
            )
        handler.json({"files": answer})

    def batch(self, handler: _Handler, repo_id: str) -> None:
        self._require_token(handler)
        objects = []
        for item in _json(handler)["objects"]:
            digest, nbytes = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": digest, "size": nbytes}
            if self.refusal:
                answer["error"] = {"code": 403, "message": self.refusal}
            elif not (self.folder / digest).exists():
                href, header = f"{self.hub.storage}/upload/{digest}", {}
                if self.part_nbytes is not None:
                    parts = range(-(-nbytes // self.part_nbytes))
                    header = {"chunk_size": str(self.part_nbytes)}
                    header |= {str(part + 1): f"{href}/{part + 1}" for part in parts}
                    href = f"{self.hub.endpoint}/complete/{digest}"
                verify = {"href": f"{self.hub.endpoint}/{repo_id}/verify", "header": {}}
                answer["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(answer)
        handler.json({"transfer": "basic", "objects": objects})

    def upload(self, handler: _Handler, digest: str, part: str | None) -> None:
        if "Authorization" in handler.headers:
            raise _Refusal(400, message="a token does not belong here")
        content = self._body(handler)
        if content is None:
            handler.close_connection = True
            return
        if part is None:
            self._receive(digest, content)
        else:
            (self.folder / f"{digest}.{part}").write_bytes(content)
        handler.head(200, 0, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def complete(self, handler: _Handler, digest: str) -> None:
        asked = _json(handler)
        parts = [self.folder / f"{digest}.{part['partNumber']}" for part in asked["parts"]]
        self._receive(digest, b"".join(part.read_bytes() for part in parts))
        handler.json({})

    def _receive(self, digest: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != digest:
            raise _Refusal(400, message="the content is another")
        with self._lock:
            self.received.append(digest)
        (self.folder / digest).write_bytes(content)

    def verify(self, handler: _Handler, repo_id: str) -> None:
        asked = _json(handler)
        if (self.folder / asked["oid"]).stat().st_size != asked["size"]:
            raise _Refusal(400, message=f"{repo_id} lacks it")
        handler.json({})

    def commit(self, handler: _Handler, repo_id: str, revision: str) -> None:
        self._require_token(handler)
        lines = [json.loads(line) for line in _body(handler).splitlines()]
        if self.on_commit is not None:
            self.on_commit()
        with self._lock:
            repository, before = handler.repository(repo_id, revision)
            header, *operations = lines
            if header["value"].get("parentCommit", before) != before:
                raise _Refusal(412, message="A commit has happened since. Please refresh.")
            added = {}
            for operation in operations:
                value = operation["value"]
                name = value["path"]
                if operation["key"] == "file":
                    added[name] = self._store(name, base64.b64decode(value["content"]))
                    assert not added[name].is_large
                else:
                    path = self.folder / value["oid"]
                    if not path.exists() or path.stat().st_size != value["size"]:
                        raise _Refusal(400, message=f"{name} has not been uploaded")
                    added[name] = Stored(path, value["size"], value["oid"], True)
            repository.earlier[before] = replace(repository)
            repository.files = {**repository.files, **added}
            repository.refs["main"] = repository.commit
            summary = header["value"]["summary"]
            self.commits.append(Commit(summary, list(added), set(repository.files)))
        url = f"{self.hub.endpoint}/{repo_id}/commit/{repository.commit}"
        handler.json({"commitUrl": url, "commitOid": repository.commit})

    def _body(self, handler: _Handler) -> bytes | None:
        """What is uploaded, at the Hub's rate; None if the connection is to end within it."""
        content, started = bytearray(), time.monotonic()
        for piece in _pieces(handler):
            self.hub.pace(len(piece), started, len(content))
            content += piece
            with self._lock:
                self.received_nbytes += len(piece)
            if handler.fault.cut_after is not None and len(content) > handler.fault.cut_after:
                return None
        return bytes(content)


def _pieces(handler: _Handler) -> Any:
    if handler.headers.get("Transfer-Encoding") == "chunked":
        while nbytes := int(handler.rfile.readline(), 16):
            yield handler.rfile.read(nbytes)
            handler.rfile.readline()
        handler.rfile.readline()
        return
    left = int(handler.headers.get("Content-Length", 0))
    while left:
        piece = handler.rfile.read(min(left, 2**16))
        if not piece:
            raise ConnectionError
        left -= len(piece)
        yield piece


def _body(handler: _Handler) -> bytes:
    return b"".join(_pieces(handler))


def _json(handler: _Handler) -> Any:
    return json.loads(_body(handler))
