"""Which store a user means: a folder, a model on the Hub, or any place that fsspec can read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .. import defaults
from ..errors import CheckpointError
from ..format.manifest import HUB_PREFIX
from .local import LocalFolder
from .reader import Store

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")

_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w-][\w.-]*/[\w.-]+)", re.A
)


def open_store(
    location: str | Path | Store,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    connections: int = defaults.CONNECTIONS,
) -> Store:
    """Find out what a location is, and reach for it.

    Args:
        location: a folder; ``OWNER/NAME`` on the Hub, where no such path exists, or
            ``hf://OWNER/NAME[@REVISION]``; a URL that fsspec knows; a store, which is returned.
            A `Path` is always a folder.
        revision: a branch, a tag or a commit of a model on the Hub.
        cache_dir: the Hub's cache, where it is not in its usual place.
        connections: requests that may be under way at a time.

    Raises:
        CheckpointError: there is no such place, or it may not be read.
        UnreachableError: it does not answer.
    """
    if not isinstance(location, (str, Path)):
        return location
    if isinstance(location, str) and _is_on_hub(location):
        from .hub import open_hub

        repo_id, _, given = location.removeprefix(HUB_PREFIX).partition("@")
        if given and revision not in (None, given):
            raise CheckpointError(f"{location}: --revision {revision} is another; give one of them")
        return open_hub(
            repo_id,
            revision=revision or given or None,
            cache_dir=cache_dir,
            connections=connections,
        )
    if revision is not None:
        raise CheckpointError(f"{location}: has no revisions: it is not a model on the Hub")
    if isinstance(location, str) and (page := _HUB_PAGE.match(location)):
        raise CheckpointError(f"{location}: is a web page of the Hub; give the model as {page[1]}")
    if isinstance(location, str) and _URL.match(location):
        from .urls import UrlStore

        return UrlStore(location, connections=connections)
    return LocalFolder(Path(location))


def _is_on_hub(location: str) -> bool:
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", location, re.ASCII) is not None
    return location.startswith(HUB_PREFIX) or (is_id and not os.path.exists(location))
