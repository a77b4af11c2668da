"""Headers: exact bytes out, one malformed file per error in; the safetensors library judges."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.numpy import save
from support.strategies import json_values

from fp4moe_convert.errors import CheckpointError, HeaderError
from fp4moe_convert.format.contract import TensorSpec
from fp4moe_convert.storage.header import (
    DTYPE_BITS,
    MAX_HEADER_NBYTES,
    Header,
    TensorInfo,
    encode_header,
    parse_header,
    read_header,
)
from fp4moe_convert.storage.local import LocalReader

ReadBytes = Callable[[bytes], Header]


def entry(start: object, stop: object, dtype: object = "U8", shape: object = None) -> Any:
    """A header entry; bytes by default, as many as lie between start and stop."""
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def encode(header: object, data: bytes = b"") -> bytes:
    """A file of ``header``, as JSON or given raw, and ``data``."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def parse(content: bytes) -> Header:
    nbytes = 8 + int.from_bytes(content[:8], "little")
    return parse_header(content[:nbytes], len(content), "x.safetensors")


@pytest.fixture
def read(tmp_path: Path) -> ReadBytes:
    """Reads the header of a file with the given bytes."""

    def read_bytes(content: bytes) -> Header:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        return read_header(LocalReader(path))

    return read_bytes


# --- what we write --------------------------------------------------------------------------------


def test_exact_bytes_of_a_small_header() -> None:
    specs = [
        TensorSpec("b", "F32", (2, 1)),
        TensorSpec("ä", "U8", (3,)),
        TensorSpec("s", "F32", ()),
    ]
    raw, offsets = encode_header(specs, {"format": "pt"}, alignment=256)
    expected = (
        b"\xf8\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        b'"\xc3\xa4":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},'
        b'"s":{"dtype":"F32","shape":[],"data_offsets":[11,15]}}'
    )
    assert raw == expected.ljust(256, b" ")
    assert offsets == (256, 264, 267)


@pytest.mark.parametrize("alignment", [8, 4096])
def test_data_starts_aligned(alignment: int) -> None:
    for length in range(1, 20):
        raw, offsets = encode_header(
            [TensorSpec("n" * length, "U8", (1,))], {}, alignment=alignment
        )
        assert len(raw) % alignment == 0
        assert offsets == (len(raw),)


def test_what_we_write_reads_back_the_same(read: ReadBytes) -> None:
    specs = [TensorSpec("a", "BF16", (2, 3)), TensorSpec("empty", "F8_E4M3", (0, 4))]
    raw, _ = encode_header(specs, {"key": "value"}, alignment=64)
    header = read(raw + bytes(12))
    assert header.tensors == (
        TensorInfo("a", "BF16", (2, 3), 0, 12),
        TensorInfo("empty", "F8_E4M3", (0, 4), 12, 12),
    )
    assert json.loads(raw[8:])["__metadata__"] == {"key": "value"}
    assert header.nbytes == len(raw)
    assert header.file_nbytes == len(raw) + 12


@pytest.mark.parametrize("framework", ["np", pytest.param("pt", marks=pytest.mark.flashinfer)])
def test_the_safetensors_library_reads_what_we_write(tmp_path: Path, framework: str) -> None:
    data = np.arange(24, dtype=np.float32).tobytes() + bytes(range(6))
    specs = [
        TensorSpec("model.experts.w13", "F32", (4, 6)),
        TensorSpec("scalar", "U8", ()),
        TensorSpec("tail", "U8", (5,)),
    ]
    raw, _ = encode_header(specs, {"format": "pt"}, alignment=4096)
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw + data)
    with safe_open(path, framework=framework) as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == ["model.experts.w13", "scalar", "tail"]
        assert file.get_tensor("model.experts.w13").reshape(-1).tolist() == list(range(24))
        assert file.get_tensor("scalar").item() == 0
        assert file.get_tensor("tail").tolist() == [1, 2, 3, 4, 5]


# --- one malformed file per rule ------------------------------------------------------------------


def rejects(read: ReadBytes, content: bytes, rule: str) -> None:
    """The file is refused in one line that names it and the rule."""
    with pytest.raises(HeaderError) as caught:
        read(content)
    message = str(caught.value)
    assert message.startswith("x.safetensors: ")
    assert rule in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [0, 1, 7])
def test_too_short_for_a_length(read: ReadBytes, size: int) -> None:
    rejects(read, bytes(size), f"{size} bytes is too short for a header length")


def test_length_beyond_the_file(read: ReadBytes) -> None:
    rule = "header claims 3 bytes, the file has 2 after the length"
    rejects(read, (3).to_bytes(8, "little") + b"{}", rule)


@pytest.mark.parametrize("length", [MAX_HEADER_NBYTES + 1, 2**64 - 1])
def test_length_over_the_limit(read: ReadBytes, length: int) -> None:
    rejects(read, length.to_bytes(8, "little") + b"{}", f"{length} bytes, the limit is 100000000")


def test_length_over_the_limit_in_a_file_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((MAX_HEADER_NBYTES + 1).to_bytes(8, "little"))
    os.truncate(path, 2 * MAX_HEADER_NBYTES)  # a hole
    with pytest.raises(HeaderError, match="claims 100000001 bytes, the limit is 100000000"):
        read_header(LocalReader(path))


@pytest.mark.parametrize(
    "raw",
    [b"", b" " * 16, b'{"a":', b"{}x", b"{}\0\0", b"{'a': 1}", b'{"a":' * 100_000],
    ids=["empty", "blank", "cut", "rest", "nul padding", "quotes", "deep"],
)
def test_not_json(read: ReadBytes, raw: bytes) -> None:
    rejects(read, encode(raw), "header is not JSON")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"\xff": 1}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":"\xff"}}',
    ],
    ids=["name", "UTF-16", "a field that nobody reads"],
)
def test_not_utf8(read: ReadBytes, raw: bytes) -> None:
    rejects(read, encode(raw), "header is not JSON")


@pytest.mark.parametrize("raw", [b"[]", b"null", b"1", b'"a"'])
def test_not_an_object(read: ReadBytes, raw: bytes) -> None:
    rejects(read, encode(raw), "header is not a JSON object")


def test_of_a_duplicate_key_the_last_counts_as_in_the_library(read: ReadBytes) -> None:
    first, last = json.dumps(entry(0, 1)), json.dumps(entry(0, 1, "I8"))
    content = encode(f'{{"a":{first},"a":{last}}}'.encode(), b"x")
    assert read(content).tensors == (TensorInfo("a", "I8", (1,), 0, 1),)
    [(name, tensor)] = deserialize(content)
    assert (name, tensor["dtype"]) == ("a", "I8")


def test_a_duplicate_key_hides_no_bytes(read: ReadBytes) -> None:
    first, last = json.dumps(entry(0, 1)), json.dumps(entry(1, 2))
    rejects(read, encode(f'{{"a":{first},"a":{last}}}'.encode(), b"xy"), "leaves a hole")


@pytest.mark.parametrize("metadata", [None, [], "pt", {"format": 1}, {"format": None}])
def test_bad_metadata(read: ReadBytes, metadata: object) -> None:
    rule = "__metadata__ is not a map of strings to strings"
    rejects(read, encode({"__metadata__": metadata}), rule)


@pytest.mark.parametrize("dtype", ["u8", "F8", "INT8", ""])
def test_unknown_dtype(read: ReadBytes, dtype: str) -> None:
    rejects(read, encode({"a": entry(0, 1, dtype)}, b"x"), f"'a' has unknown dtype {dtype!r}")


@pytest.mark.parametrize(
    "shape",
    [[-1], [True], [1.0], [2**63], ["1"], [None], [[1]], "1", 1, None, {}],
    ids=repr,
)
def test_bad_shape(read: ReadBytes, shape: object) -> None:
    header = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}
    rejects(read, encode(header, b"x"), "'a' has no valid dtype, shape and data_offsets")


@pytest.mark.parametrize("shape", [[2**62, 2], [2**40, 2**40], [2**62, 4, 0]], ids=repr)
def test_shape_whose_product_overflows(read: ReadBytes, shape: list[int]) -> None:
    # 2**62 * 4 is 0 in 64 bits, so a careless product would agree with an empty range.
    rejects(read, encode({"a": entry(0, 0, shape=shape)}), "'a' has more elements than 63 bits")


@pytest.mark.parametrize(
    "offsets",
    [[0], [0, 1, 2], [-1, 0], [0, True], [0.0, 1], [0, 2**63], "01", None, {"start": 0}],
    ids=repr,
)
def test_bad_offsets(read: ReadBytes, offsets: object) -> None:
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": offsets}}
    rejects(read, encode(header, b"x"), "'a' has no valid dtype, shape and data_offsets")


@pytest.mark.parametrize("value", [None, [], "U8", {}, {"dtype": "U8"}, {"dtype": 8}], ids=repr)
def test_entry_without_its_three_fields(read: ReadBytes, value: object) -> None:
    rejects(read, encode({"a": value}), "'a' has no valid dtype, shape and data_offsets")


def test_offsets_reversed(read: ReadBytes) -> None:
    content = encode({"a": entry(1, 0, shape=[1])}, b"x")
    rejects(read, content, "'a' spans -1 bytes, U8 [1] takes 1")


@pytest.mark.parametrize(("dtype", "takes"), [("U8", 3), ("BF16", 6), ("F32", 12), ("F64", 24)])
def test_size_unlike_dtype_times_shape(read: ReadBytes, dtype: str, takes: int) -> None:
    content = encode({"a": entry(0, 4, dtype, [3, 1])}, bytes(4))
    rejects(read, content, f"'a' spans 4 bytes, {dtype} [3, 1] takes {takes}")


def test_dtype_that_ends_inside_a_byte(read: ReadBytes) -> None:
    rejects(read, encode({"a": entry(0, 2, "F4", [3])}, bytes(2)), "'a' ends inside a byte")


def test_hole_between_tensors(read: ReadBytes) -> None:
    content = encode({"a": entry(0, 2), "b": entry(3, 4)}, bytes(4))
    rejects(read, content, "'b' leaves a hole: starts at byte 3, expected 2")


def test_hole_before_the_first_tensor(read: ReadBytes) -> None:
    rejects(read, encode({"a": entry(1, 2)}, bytes(2)), "'a' leaves a hole")


def test_overlap(read: ReadBytes) -> None:
    content = encode({"a": entry(0, 3), "b": entry(2, 4)}, bytes(4))
    rejects(read, content, "'b' overlaps the tensor before it: starts at byte 2, expected 3")


def test_two_tensors_in_one_place(read: ReadBytes) -> None:
    rejects(read, encode({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "overlaps")


def test_truncated(read: ReadBytes) -> None:
    content = encode({"a": entry(0, 4)}, bytes(4))
    rule = f"is truncated: {len(content) - 1} bytes, its header describes {len(content)}"
    rejects(read, content[:-1], rule)


def test_bytes_after_the_data(read: ReadBytes) -> None:
    content = encode({"a": entry(0, 4)}, bytes(4))
    rule = (
        f"has bytes after its data: {len(content) + 1} bytes, its header describes {len(content)}"
    )
    rejects(read, content + b"x", rule)


def test_bytes_after_no_data_at_all(read: ReadBytes) -> None:
    rejects(read, encode({}, b"x"), "has bytes after its data")


@pytest.mark.parametrize("where", ["name", "metadata key", "metadata value"])
def test_half_of_a_surrogate_pair(read: ReadBytes, where: str) -> None:
    # JSON can spell text that UTF-8 cannot; nobody could write such a name into another header.
    half = "\ud800"
    header = {
        "name": {half: entry(0, 1)},
        "metadata key": {"__metadata__": {half: ""}, "a": entry(0, 1)},
        "metadata value": {"__metadata__": {"": half}, "a": entry(0, 1)},
    }[where]
    rejects(read, encode(header, b"x"), "header is not JSON")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^gone\.safetensors: No such file or directory$"):
        read_header(LocalReader(tmp_path / "gone.safetensors"))


# --- what is allowed ------------------------------------------------------------------------------


def test_names_in_any_order_come_out_in_order_of_data(read: ReadBytes) -> None:
    header = read(encode({"z": entry(0, 1), "a": entry(3, 4), "m": entry(1, 3)}, bytes(4)))
    assert [tensor.name for tensor in header.tensors] == ["z", "m", "a"]


def test_empty_tensors_may_share_a_place(read: ReadBytes) -> None:
    header = read(encode({"a": entry(0, 2), "b": entry(0, 0), "c": entry(2, 2)}, bytes(2)))
    assert [tensor.nbytes for tensor in header.tensors] == [0, 2, 0]


def test_no_tensors(read: ReadBytes) -> None:
    header = read(encode(b"{}      "))
    assert header.tensors == ()
    assert header.file_nbytes == 16


def test_digest_tells_headers_apart(read: ReadBytes) -> None:
    digests = {read(encode(b"{}" + b" " * pad)).digest for pad in range(3)}
    assert len(digests) == 3


# --- properties -----------------------------------------------------------------------------------

SAFETENSORS_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "F16": np.float16,
    "U32": np.uint32,
    "F32": np.float32,
    "I64": np.int64,
    "F64": np.float64,
}
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)
arrays = st.dictionaries(
    names,
    st.tuples(st.sampled_from(sorted(SAFETENSORS_DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)


@given(arrays)
def test_whatever_safetensors_saves_we_parse_to_the_same(
    wanted: dict[str, tuple[str, list[int]]],
) -> None:
    content = save({n: np.zeros(shape, SAFETENSORS_DTYPES[d]) for n, (d, shape) in wanted.items()})
    header = parse(content)
    assert {t.name: (t.dtype, list(t.shape)) for t in header.tensors} == wanted
    raw = json.loads(content[8 : header.nbytes])
    for tensor in header.tensors:
        assert [tensor.start, tensor.stop] == raw[tensor.name]["data_offsets"]
    assert header.file_nbytes == len(content)


@given(
    st.dictionaries(
        names,
        st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    st.dictionaries(names, names, max_size=3),
    st.sampled_from([1, 8, 64, 4096]),
)
def test_whatever_we_encode_we_parse_to_the_same(
    wanted: dict[str, tuple[str, list[int]]], metadata: dict[str, str], alignment: int
) -> None:
    # Eight values of a sub-byte dtype are whole bytes.
    specs = [TensorSpec(name, dtype, (8, *shape)) for name, (dtype, shape) in wanted.items()]
    raw, offsets = encode_header(specs, metadata, alignment=alignment)
    end = parse_end(raw)
    header = parse_header(raw, end, "x.safetensors")
    by_name = {tensor.name: tensor for tensor in header.tensors}
    for spec, offset in zip(specs, offsets, strict=True):
        found = by_name[spec.name]
        assert (found.dtype, found.shape) == (spec.dtype, spec.shape)
        assert header.nbytes + found.start == offset
    assert json.loads(raw[8:])["__metadata__"] == metadata


def parse_end(raw: bytes) -> int:
    """The size of the file that a valid header describes."""
    entries = json.loads(raw[8:])
    entries.pop("__metadata__", None)
    return len(raw) + max((e["data_offsets"][1] for e in entries.values()), default=0)


def parse_or_refuse(content: bytes) -> None:
    """Anything but a `HeaderError` fails the test. To be accepted is allowed if the header accounts
    for every byte of the file, as random input may be valid. What must be refused is tested above;
    in test_fuzz.py the safetensors library judges what is accepted."""
    with suppress(HeaderError):
        assert parse(content).file_nbytes == len(content)


@given(st.binary(max_size=200))
def test_arbitrary_json_never_raises_anything_else(text: bytes) -> None:
    parse_or_refuse(encode(text))


almost_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BITS)) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | json_values,
    }
)


@pytest.mark.slow
@given(
    st.dictionaries(st.text(max_size=4), almost_entries | json_values, max_size=4),
    st.binary(max_size=20),
)
def test_almost_valid_headers_never_raise_anything_else(
    header: dict[str, object], data: bytes
) -> None:
    parse_or_refuse(encode(header, data))


VALID = encode(
    {"__metadata__": {"format": "pt"}, "a": entry(0, 8, "F32", [2]), "b": entry(8, 11)}, bytes(11)
)


@given(st.lists(st.tuples(st.integers(8, len(VALID) - 1), st.integers(0, 255)), max_size=4))
def test_flipped_bytes_never_raise_anything_else(flips: list[tuple[int, int]]) -> None:
    content = bytearray(VALID)
    for position, value in flips:
        content[position] = value
    parse_or_refuse(bytes(content))


@given(content=st.binary(max_size=64) | st.integers(0, len(VALID)).map(lambda n: VALID[:n]))
def test_files_of_anything_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """As above, through the file system."""
    path = tmp_path_factory.getbasetemp() / "anything.safetensors"
    path.write_bytes(content)
    with suppress(HeaderError):
        assert read_header(LocalReader(path)).file_nbytes == len(content)
