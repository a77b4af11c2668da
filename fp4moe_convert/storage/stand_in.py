"""What lies in place of a file whose download went wrong."""

from __future__ import annotations

START_NBYTES = 256
"""As much of a file as it takes to tell."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGE_STARTS = (b"<!doctype html", b"<html")


def stand_in_for(start: bytes | memoryview) -> str | None:
    """Say what a file is and what to do, if its first `START_NBYTES` are a stand-in's."""
    start = bytes(start[:START_NBYTES]).lstrip().lower()
    if start.startswith(_LFS_POINTER):
        return "is a git-lfs pointer, not the file itself; run git lfs pull in the model folder"
    if start.startswith(_PAGE_STARTS):
        return "is a web page, not the file itself; download it again"
    return None
