"""Models that huggingface_hub has downloaded into its cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from ..format.files import CONFIG_NAME
from ..format.manifest import FileIdentity
from .local import LocalFolder, UnlistedSnapshot

_NO_LIST = getattr(huggingface_hub.errors, "CachedRepoTreeNotFoundError", AttributeError)
"""The cache has no list of a snapshot's files; older releases know of no such list."""


def latest_snapshot(
    repo_id: str, revision: str | None, cache_dir: str | Path | None
) -> LocalFolder | None:
    """What the cache has of a revision, without asking the Hub what that is now.

    Args:
        repo_id: ``OWNER/NAME``.
        revision: a branch, a tag or a commit; None for the default branch.
        cache_dir: of huggingface_hub; None for its own.

    Returns:
        The snapshot, if it is complete or cannot be told to be incomplete.
    """
    try:
        folder = snapshot_download(
            repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    snapshot = Path(folder)
    if listed := _cached_list(repo_id, snapshot.name, cache_dir):
        return complete_snapshot(repo_id, snapshot.name, listed, cache_dir)
    if not (snapshot / CONFIG_NAME).is_file() or not any(snapshot.glob("*.safetensors")):
        return None  # as what has asked for the configuration alone leaves it
    return UnlistedSnapshot(snapshot)


def complete_snapshot(
    repo_id: str, commit: str, files: Mapping[str, FileIdentity], cache_dir: str | Path | None
) -> LocalFolder | None:
    """What the cache has of a commit, if that is all of it.

    Args:
        repo_id: ``OWNER/NAME``.
        commit: a full hash.
        files: size of each, as the Hub lists it.
        cache_dir: of huggingface_hub; None for its own.
    """
    folder = ""
    for name, identity in files.items():
        found = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=commit)
        if not isinstance(found, str) or os.path.getsize(found) != identity.nbytes:
            return None
        folder = found.removesuffix(name)
    return LocalFolder(Path(folder))


def _cached_list(
    repo_id: str, commit: str, cache_dir: str | Path | None
) -> dict[str, FileIdentity] | None:
    """Size and blob of each file of a model, if `snapshot_download` has left a list of them. That
    of older releases does not."""
    try:
        entries = huggingface_hub.get_cached_repo_tree(
            repo_id, revision=commit, cache_dir=cache_dir
        )
    except (AttributeError, _NO_LIST):
        return None
    return {file.path: FileIdentity(file.size, etag=file.blob_id) for file in entries}
