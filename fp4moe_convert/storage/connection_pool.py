"""Connections to storage, kept open, whose answers are read straight into memory.

For the bulk of the bytes, which come from signed addresses and need no more of a client than GET.
Through httpx, which huggingface_hub uses, a gigabyte took 1.2 s of one core, in pieces of 64 KiB
and with Python's lock held; through http.client it took 0.24 s. Where a proxy is between, the
library's client is the one that knows how.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import urllib.request
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import urlsplit

_STALE = (ConnectionError, http.client.BadStatusLine)
"""What a connection that the other side has closed in the meantime answers with."""


class ConnectionPool:
    """A pool of connections, for any number of threads."""

    def __init__(self, make_context: Callable[[], ssl.SSLContext], *, timeout: float) -> None:
        """
        Args:
            make_context: says whom to trust; called for the first connection that needs it.
            timeout: seconds until a connection that gives nothing is given up.
        """
        self._context = lru_cache(make_context)
        self._timeout = timeout
        self._idle: defaultdict[str, list[http.client.HTTPConnection]] = defaultdict(list)
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._idle)

    def reach(self, url: str) -> bool:
        """Whether no proxy is between."""
        parts = urlsplit(url)
        proxies = urllib.request.getproxies()
        through = parts.scheme in proxies or "all" in proxies
        return not through or bool(urllib.request.proxy_bypass(parts.netloc))

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """Ask for a URL. The connection is used again if the answer has been read to its end.

        Raises:
            OSError, http.client.HTTPException: there is no answer.
        """
        parts = urlsplit(url)
        place = f"{parts.scheme}://{parts.netloc}"
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        with self._lock:
            connection = self._idle[place].pop() if self._idle[place] else None
        try:
            response = None
            if connection is not None:
                try:
                    connection.request("GET", target, headers=dict(headers))
                    response = connection.getresponse()
                except _STALE:
                    connection.close()
            if response is None:
                connection = self._connect(parts.scheme, parts.netloc)
                connection.request("GET", target, headers=dict(headers))
                response = connection.getresponse()
            yield response
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        assert connection is not None
        if response.isclosed() and not response.will_close:
            with self._lock:
                self._idle[place].append(connection)
        else:
            response.close()
            connection.close()

    def _connect(self, scheme: str, netloc: str) -> http.client.HTTPConnection:
        if scheme == "https":
            return http.client.HTTPSConnection(
                netloc, timeout=self._timeout, context=self._context()
            )
        return http.client.HTTPConnection(netloc, timeout=self._timeout)


def _close(idle: Mapping[str, list[http.client.HTTPConnection]]) -> None:
    for connections in idle.values():
        for connection in connections:
            connection.close()
