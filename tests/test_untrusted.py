"""JSON that somebody else wrote, as typed values. What no memory can hold is in test_fuzz.py."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from fp4moe_convert.format.untrusted import MAX_DEPTH, MAX_DIGITS, decode, decode_object


class Sizes(msgspec.Struct):
    rows: int
    columns: int = 1


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("[1, 2]", list[int], [1, 2]),
        ('{"rows": 3}', Sizes, Sizes(3)),
        ('{"rows": 3, "columns": 2, "more": []}', Sizes, Sizes(3, 2)),
        ("null", object, None),
        ("1e400", float, math.inf),
    ],
)
def test_values_get_their_type(text: str, kind: type[Any], value: object) -> None:
    assert decode(text.encode(), kind) == value


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[1, null]", list[int]),
        ("[]", Sizes),
        ('{"columns": 2}', Sizes),
        ('{"rows": "3"}', Sizes),
        ("", object),
        ("{", object),
        ("[1,]", object),
        ("{'rows': 3}", object),
        ("[1] 2", object),
    ],
)
def test_what_is_of_another_type_or_not_json_is_refused(text: str, kind: type[Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode(text.encode(), kind)


@pytest.mark.parametrize(
    "raw", [b"\xff", b'"\xed\xa0\xbd"', b"\xef\xbb\xbf[]", "[]".encode("utf-16")]
)
def test_what_is_not_utf8_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode(raw, object)


def test_numbers_that_json_does_not_have_are_accepted() -> None:
    """Python writes them, so configurations hold them. msgspec's parser refuses them."""
    found = decode_object(b'{"eps": Infinity, "low": [-Infinity], "none": NaN}')
    assert found["eps"] == math.inf
    assert found["low"] == [-math.inf]
    assert math.isnan(found["none"])
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(b"Infinity")


def test_half_a_surrogate_pair_is_accepted() -> None:
    """A path that is not UTF-8 has such characters. msgspec's parser refuses them."""
    text = rb'{"path": "\udcff", "\ud83d": 1, "whole": "\ud83d\ude00"}'
    assert decode_object(text) == {"path": "\udcff", "\ud83d": 1, "whole": "\U0001f600"}
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(rb'"\ud83d"')


def test_of_a_key_that_appears_twice_the_last_counts() -> None:
    assert decode_object(b'{"a": 1, "b": 2, "a": 3}') == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a JSON object"),
        ('"{}"', "not a JSON object"),
        ("{", r"not JSON: Expecting .*"),
        ("9" * (MAX_DIGITS + 1), "not JSON: a number has more than 1,000 digits"),
        (
            "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
            f"not JSON: it nests deeper than {MAX_DEPTH} levels",
        ),
        ("[" * 100_000, f"not JSON: (it nests deeper than {MAX_DEPTH} levels|Expecting .*)"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_object_is_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        decode_object(text.encode())
