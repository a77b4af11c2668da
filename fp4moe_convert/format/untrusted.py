"""JSON that somebody else wrote, parsed in bounded time and memory into typed values."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

MAX_VALUES = 3_000_000
"""Keys included. A tensor takes about twelve; the largest models have 280,000 tensors."""
MAX_DEPTH = 64
MAX_DIGITS = 1000

T = TypeVar("T")


def decode(text: bytes, kind: type[T]) -> T:
    """Parse JSON as a value of type ``kind``.

    Python's parser is used rather than msgspec's, because configurations hold Infinity and paths
    may hold half a surrogate pair; msgspec accepts neither. Where a key appears twice the last one
    counts, as in the libraries that read these files.

    Args:
        text: UTF-8.
        kind: what msgspec can convert to.

    Raises:
        ValueError: not JSON, beyond one of the limits above, or not of that type.
    """
    check_count(text)
    try:
        value = json.loads(text.decode(), parse_int=_bounded_int)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    return msgspec.convert(value, kind)


def decode_object(text: bytes) -> dict[str, Any]:
    """Parse JSON that must be an object.

    Raises:
        ValueError: saying "not JSON: ..." or "not a JSON object".
    """
    try:
        value = decode(text, object)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def check_count(text: bytes) -> None:
    """Refuse JSON that would take gigabytes once parsed, such as 100 MB of empty lists.

    Raises:
        ValueError: more than `MAX_VALUES` keys and values.
    """
    # Each key and each value follows one of these. The few inside strings count as well.
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} keys and values")


_TOO_DEEP = f"it nests deeper than {MAX_DEPTH} levels"


def _bounded_int(digits: str) -> int:
    # Converting a million digits takes minutes in interpreters that do not limit it themselves.
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS:,} digits")
    return int(digits)


def _check_depth(value: Any) -> None:
    """Deep values would end the encoder's recursion when they are written again."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    if any(isinstance(value, (dict, list)) for value in level):
        raise ValueError(_TOO_DEEP)
