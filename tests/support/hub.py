"""A Hub on this machine, for the real huggingface_hub to talk to through HF_ENDPOINT.

    python tests/support/hub.py OWNER/NAME=FOLDER ... [--port N] [--rate BYTES] [--latency SECONDS]

It answers what that library asks to read a model: model info, the tree, and ``resolve``, which
sends the bytes of a plain file and leads to a signed address of a large one, on another port as on
another host. It counts every request and every byte, and misbehaves as it is told. Another question
is one more row of `ROUTES`. Run as a program it prints its endpoint, and says at ``/served`` what
it has sent.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".dat")
"""Files with these endings lie in LFS, as in a real repository's .gitattributes."""
SIGNED_SECONDS = 3600


@dataclass(frozen=True)
class Stored:
    """A file of a repository."""

    path: Path
    nbytes: int
    etag: str
    is_large: bool

    @classmethod
    def of(cls, path: Path) -> Stored:
        nbytes, is_large = path.stat().st_size, path.name.endswith(LARGE)
        digest = hashlib.sha256() if is_large else hashlib.sha1(usedforsecurity=False)
        digest.update(f"{path.name} {nbytes} ".encode())
        with path.open("rb") as file:
            # Nobody checks more of it, and models have gigabytes.
            digest.update(file.read(2**20))
        return cls(path, nbytes, digest.hexdigest(), is_large)


@dataclass
class Repository:
    """A model."""

    files: dict[str, Stored]
    private: bool = False
    """Only for those who come with `Hub.token`."""
    gated: bool = False
    """Its files are."""
    refs: dict[str, str] = field(default_factory=dict)
    """Commits by branch and tag."""
    earlier: dict[str, Repository] = field(default_factory=dict)
    """What it was, by commit."""

    @classmethod
    def of(cls, folder: Path) -> Repository:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): Stored.of(path) for path in paths}
        repository = cls(files)
        repository.refs["main"] = repository.commit
        return repository

    @property
    def commit(self) -> str:
        content = repr([(name, file.etag) for name, file in self.files.items()])
        return hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Sent:
    """What one request for bytes was answered with."""

    name: str
    start: int
    stop: int
    """Of the bytes that were sent."""


@dataclass
class Fault:
    """How an answer goes wrong."""

    path: str
    """A pattern that is searched for in the request's path."""
    times: float
    """How many requests."""
    after: float = 0
    """Bytes that files have been sent of before."""
    status: int | None = None
    """Answered instead."""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """The connection ends after so many bytes of the body."""
    stall_after: int | None = None
    """Nothing comes after so many bytes of the body."""
    shift: int = 0
    """The range that is sent is another one by so much."""
    ignores_range: bool = False
    """The whole file is sent."""


class Hub:
    """The stand-in, while it is entered."""

    def __init__(
        self,
        *,
        rate: float | None = None,
        connection_rate: float | None = None,
        latency: float = 0.0,
        port: int = 0,
    ) -> None:
        """
        Args:
            rate: bytes a second that all answers together may have.
            connection_rate: bytes a second that one answer may have.
            latency: seconds until an answer begins.
            port: of the endpoint.
        """
        self.repositories: dict[str, Repository] = {}
        self.token = "hf_stand_in"
        self.requests: list[str] = []
        """Method and path of each, in the order in which they came."""
        self.sent: list[Sent] = []
        self.faults: list[Fault] = []
        self.epoch = 0
        """Signed addresses of earlier ones have expired."""
        self.routes: list[tuple[str, Callable[..., None]]] = []
        """Further ones (`hub_upload`)."""
        self.detour = False
        """Signed addresses lead on to others."""
        self.leads_away = True
        """Large files are sent from signed addresses; a mirror may send them itself."""
        self._sent_nbytes = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._rate = rate
        self._connection_rate = connection_rate
        self.latency = latency
        self._next_send = 0.0
        self._servers = [_Server(("127.0.0.1", number), self) for number in (port, 0)]

    def __enter__(self) -> Hub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage(self) -> str:
        """Where signed addresses lead."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Settings of huggingface_hub, for a process of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def add(self, repo_id: str, folder: Path) -> Repository:
        """A model, or a new commit of one."""
        new, old = Repository.of(folder), self.repositories.get(repo_id)
        if old is not None:
            new.earlier = {**old.earlier, old.commit: old}
        self.repositories[repo_id] = new
        return new

    def forget(self) -> None:
        """Start counting afresh."""
        with self._lock:
            self.requests.clear()
            self.sent.clear()
            self._sent_nbytes = 0

    def served(self) -> dict[str, list[tuple[int, int]]]:
        """The ranges that were sent, by file, sorted."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        with self._lock:
            for sent in self.sent:
                ranges.setdefault(sent.name, []).append((sent.start, sent.stop))
        return {name: sorted(own) for name, own in ranges.items()}

    @property
    def sent_nbytes(self) -> int:
        """Of all files."""
        with self._lock:
            return self._sent_nbytes

    # What requests do with it.

    def note(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                due = fault.times > 0 and self._sent_nbytes >= fault.after
                if due and re.search(fault.path, request):
                    fault.times -= 1
                    return fault
        return None

    def note_sent(self, sent: Sent) -> None:
        with self._lock:
            self.sent.append(sent)

    def count(self, nbytes: int) -> None:
        with self._lock:
            self._sent_nbytes += nbytes

    def pace(self, nbytes: int, started: float, sent: int) -> None:
        """Wait until so many bytes may be sent, of an answer that began at some time and has sent
        some."""
        now = time.monotonic()
        wait = 0.0
        if self._rate is not None:
            with self._lock:
                self._next_send = max(self._next_send, now) + nbytes / self._rate
                wait = self._next_send - now
        if self._connection_rate is not None:
            wait = max(wait, started + (sent + nbytes) / self._connection_rate - now)
        if wait > 0:
            self.stopping.wait(wait)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], hub: Hub) -> None:
        super().__init__(address, _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave."""


class _Refusal(Exception):  # noqa: N818 (an answer)
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer's headers and its body are two writes. The second would wait 40 ms for the client.
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (their name)
        """Nobody reads it."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.server.hub.stopping.wait(self.server.hub.latency)
        self.fault = self.server.hub.note(f"{self.command} {self.path}") or Fault("", 0)
        try:
            if self.fault.status is not None:
                raise _Refusal(self.fault.status)
            for pattern, answer in (*ROUTES, *self.server.hub.routes):
                if match := re.fullmatch(pattern, unquote(url.path)):
                    answer(self, **match.groupdict())
                    return
            raise _Refusal(404, "EntryNotFound")
        except _Refusal as refusal:
            # What came along has not been read.
            self.close_connection |= self.command not in ("GET", "HEAD")
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            self.head(refusal.status, 0, {k: v for k, v in headers.items() if v})

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (their names)

    def head(self, status: int, nbytes: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            **headers,
            "Content-Length": str(nbytes),
            **self.fault.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.head(200, len(data), {"Content-Type": "application/json"})
        self.wfile.write(data)

    def repository(self, repo_id: str, revision: str | None) -> tuple[Repository, str]:
        """A repository and the commit that is asked for."""
        hub = self.server.hub
        known = self.headers.get("Authorization") == f"Bearer {hub.token}"
        found = hub.repositories.get(repo_id)
        if found is None or (found.private and not known):
            raise _Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        commit = found.refs.get(revision or "main", revision)
        if commit in found.earlier:
            found = found.earlier[commit]
        if commit != found.commit:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if found.gated and not known and "/resolve/" in self.path:
            raise _Refusal(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        return found, commit

    def model_info(self, repo_id: str, revision: str | None = None) -> None:
        repository, commit = self.repository(repo_id, revision)
        siblings = []
        for name, file in repository.files.items():
            sibling: dict[str, Any] = {"rfilename": name}
            if "blobs" in self.query:
                sibling |= {"size": file.nbytes, "blobId": file.etag[:40]}
                if file.is_large:
                    sibling["lfs"] = {"size": file.nbytes, "sha256": file.etag, "pointerSize": 135}
            siblings.append(sibling)
        self.json(
            {
                "id": repo_id,
                "sha": commit,
                "siblings": siblings,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "tags": [],
            }
        )

    def tree(self, repo_id: str, revision: str) -> None:
        repository, _ = self.repository(repo_id, revision)
        entries = []
        for name, file in repository.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": file.nbytes}
            entry["oid"] = file.etag[:40]
            if file.is_large:
                entry["lfs"] = {"size": file.nbytes, "oid": file.etag, "pointerSize": 135}
            entries.append(entry)
        self.json(entries)

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository, commit = self.repository(repo_id, revision)
        if name not in repository.files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        file = repository.files[name]
        about = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        hub = self.server.hub
        if not (file.is_large and hub.leads_away):
            self.send_file(name, file, about)
            return
        until = int(time.time()) + SIGNED_SECONDS
        signed = "/signed/" + "/".join(quote(each, safe="") for each in (repo_id, commit, name))
        query = f"until={until}&signature={_signature(signed, until, hub.epoch)}"
        about["Location"] = f"{hub.storage}{signed}?{query}"
        about |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.nbytes)}
        self.head(302, 0, about)

    def signed(self, **_: str) -> None:
        path = urlsplit(self.path).path
        until = int(self.query["until"])
        if "Authorization" in self.headers:
            raise _Refusal(400, message="a token does not belong here")
        expected = _signature(path, until, self.server.hub.epoch)
        if until < time.time() or self.query["signature"] != expected:
            raise _Refusal(403, message="Request has expired")
        if self.server.hub.detour and "again" not in self.query:
            self.head(302, 0, {"Location": f"{self.path}&again=1"})
            return
        repo_id, commit, name = map(unquote, path.removeprefix("/signed/").split("/"))
        repository = self.server.hub.repositories[repo_id]
        file = repository.earlier.get(commit, repository).files[name]
        self.send_file(name, file, {"ETag": '"storage-has-its-own"'})

    def send_file(self, name: str, file: Stored, headers: Mapping[str, str]) -> None:
        start, stop, status = 0, file.nbytes, 200
        wanted = "" if self.fault.ignores_range else self.headers.get("Range", "")
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted):
            start, stop, status = int(match[1]), int(match[2] or stop - 1) + 1, 206
            if start >= file.nbytes:
                raise _Refusal(416)
            stop = min(stop, file.nbytes)
            start, stop = start + self.fault.shift, stop + self.fault.shift
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{file.nbytes}"}
        self.head(status, stop - start, headers)
        if self.command == "HEAD":
            return
        ends = (self.fault.cut_after, self.fault.stall_after)
        last = min([stop, *(start + end for end in ends if end is not None)])
        self.wfile.flush()
        position, started = start, time.monotonic()
        try:
            with file.path.open("rb") as data:
                while position < last:
                    count = min(last - position, 2**18)
                    self.server.hub.pace(count, started, position - start)
                    sent = os.sendfile(self.connection.fileno(), data.fileno(), position, count)
                    position += sent
                    self.server.hub.count(sent)
        finally:
            self.server.hub.note_sent(Sent(name, start, position))
        if self.fault.stall_after is not None:
            self.server.hub.stopping.wait()
        if last < stop:
            self.close_connection = True

    def say_served(self) -> None:
        hub = self.server.hub
        self.json({"requests": len(hub.requests), "sent": hub.served()})


def _signature(path: str, until: int, epoch: int) -> str:
    return hashlib.sha256(f"{path} {until} {epoch}".encode()).hexdigest()


_ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (rf"/api/models/{_ID}", _Handler.model_info),
    (rf"/api/models/{_ID}/revision/(?P<revision>.+)", _Handler.model_info),
    (rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    (r"/signed/.*", _Handler.signed),
    (r"/served", _Handler.say_served),
)
"""Patterns of paths, and what answers."""


@contextmanager
def running(models: Mapping[str, Path], **options: Any) -> Iterator[Hub]:
    """A Hub that has some models, by id."""
    with Hub(**options) as hub:
        for repo_id, folder in models.items():
            hub.add(repo_id, folder)
        yield hub


def snapshot_without_links(repo_id: str) -> Path:
    """A model in the cache, as HF_HUB_DISABLE_SYMLINKS leaves it, and copies that follow links."""
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(repo_id))
    copy = shutil.copytree(snapshot, snapshot.with_name("copy"))
    shutil.rmtree(snapshot)
    copy.rename(snapshot)
    shutil.rmtree(snapshot.parent.parent / "blobs")
    return snapshot


def main() -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="OWNER/NAME=FOLDER")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--connection-rate", type=float)
    parser.add_argument("--latency", type=float, default=0.0)
    arguments = parser.parse_args()
    pairs = (model.partition("=") for model in arguments.models)
    models = {repo_id: Path(folder) for repo_id, _, folder in pairs}
    options = {key: value for key, value in vars(arguments).items() if key != "models"}
    with running(models, **options) as hub:
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
