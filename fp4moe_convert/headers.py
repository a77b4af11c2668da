"""safetensors headers to dataclasses and back: bytes and JSON only, never tensor data.

The format (https://github.com/huggingface/safetensors#format): eight bytes, the length N of the
header as a little-endian integer; N bytes of JSON; then the data, which the tensors tile without
holes or overlaps. Everything later trusts a `Header`, so all doubt about a file ends here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from .blockio import open_regular
from .contract import TensorSpec, round_up
from .errors import HeaderError, naming

MAX_HEADER_NBYTES = 100_000_000
"""The bound the safetensors library sets itself."""

MAX_DIMENSIONS = 64
"""As in NumPy and PyTorch."""

MAX_NAME_LENGTH = 4096
"""Of a tensor; errors repeat it."""

MAX_JSON_VALUES = 3_000_000
"""Keys included. A matrix takes twelve; the largest models have 280,000 tensors in all."""

MAX_JSON_DEPTH = 64
MAX_JSON_DIGITS = 1000

_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS_NOR_QUOTES = bytes(set(range(256)) - set(b'{}[]"'))
_HALF_A_PAIR = re.compile(
    rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]", re.DOTALL
)
"""The first half of a surrogate pair without the second, or the other way round."""
_DIGITS_TO_ZEROS = bytes.maketrans(b"123456789", b"000000000")

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One header entry; offsets count from the first data byte, half-open."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header, validated."""

    nbytes: int
    """Length word included: the file offset of the first data byte."""
    tensors: tuple[TensorInfo, ...]
    """In order of their data."""
    digest: str
    """XXH3-128 of the header's bytes, length word included."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_nbytes(self) -> int:
        """Size of the file: the tensors tile the data to its end."""
        return self.nbytes + (self.tensors[-1].stop if self.tensors else 0)


def spec_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor of ``dtype`` and ``shape`` takes.

    Raises:
        ValueError: an element count beyond 64 bits, or a sub-byte dtype that ends inside a byte.
    """
    count = 1
    for extent in shape:
        count *= extent
        if count >= 1 << 63:
            raise ValueError("has more elements than 63 bits can count")
    nbytes, remainder = divmod(count * DTYPE_BITS[dtype], 8)
    if remainder:
        raise ValueError("ends inside a byte")
    return nbytes


def read_header(path: Path) -> Header:
    """Read and validate the header of one file.

    Raises:
        HeaderError: the file cannot be read, or breaks a rule of the format.
    """
    with naming(path.name, HeaderError), open(path, "rb", opener=open_regular) as file:
        file_nbytes = os.fstat(file.fileno()).st_size
        if file_nbytes < 8:
            raise HeaderError(f"{path.name}: {file_nbytes} bytes is too short for a header length")
        json_nbytes = int.from_bytes(file.read(8), "little")
        if json_nbytes > MAX_HEADER_NBYTES:
            raise HeaderError(
                f"{path.name}: header claims {json_nbytes} bytes, the limit is {MAX_HEADER_NBYTES}"
            )
        if 8 + json_nbytes > file_nbytes:
            raise HeaderError(
                f"{path.name}: header claims {json_nbytes} bytes, "
                f"the file has {file_nbytes - 8} after the length"
            )
        file.seek(0)
        raw = file.read(8 + json_nbytes)
    return parse_header(raw, file_nbytes, path.name)


def parse_header(raw: bytes, file_nbytes: int, file: str) -> Header:
    """Validate a header's bytes.

    Args:
        raw: length word and JSON.
        file_nbytes: size of the whole file.
        file: its name, for messages.

    Raises:
        HeaderError: on the first broken rule.
    """
    try:
        content = parse_json(raw[8:], printable=True)
    except ValueError as error:
        raise HeaderError(f"{file}: header is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise HeaderError(f"{file}: header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HeaderError(f"{file}: __metadata__ is not a map of strings to strings")
    tensors = [_tensor_info(name, entry, file) for name, entry in content.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))

    position = 0
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a hole"
            raise HeaderError(
                f"{file}: {tensor.name!r} {kind}: "
                f"starts at byte {tensor.start}, expected {position}"
            )
        position = tensor.stop
    if len(raw) + position != file_nbytes:
        kind = "is truncated" if len(raw) + position > file_nbytes else "has bytes after its data"
        raise HeaderError(
            f"{file}: {kind}: {file_nbytes} bytes, its header describes {len(raw) + position}"
        )
    digest = xxhash.xxh3_128_hexdigest(raw)
    return Header(len(raw), tuple(tensors), digest, metadata)


def parse_json(text: bytes, *, printable: bool) -> Any:
    """Parse JSON that somebody else wrote, in bounded time and memory.

    Python's own parser would take gigabytes for 100 MB of empty lists, minutes for a number of a
    million digits where the interpreter does not forbid it, and the last of two equal keys.

    Args:
        text: encoded in UTF-8.
        printable: refuse half a surrogate pair, which JSON can spell and UTF-8 cannot; a path may
            hold one.

    Raises:
        ValueError: not JSON, a key twice in one object, or beyond one of the bounds above.
    """
    # Each key and each value follows one of these. The few inside strings count as well.
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ValueError(f"it has more than {MAX_JSON_VALUES:,} keys and values")
    if b"0" * (MAX_JSON_DIGITS + 1) in text.translate(_DIGITS_TO_ZEROS):
        raise ValueError(f"a number has more than {MAX_JSON_DIGITS:,} digits")
    if _nests_deeper_than(MAX_JSON_DEPTH, text):
        raise ValueError(f"it nests deeper than {MAX_JSON_DEPTH} levels")
    if printable and b"\\u" in text and _HALF_A_PAIR.search(text.replace(b"\\\\", b"  ")):
        raise ValueError("half of a surrogate pair")
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _nests_deeper_than(levels: int, text: bytes) -> bool:
    """Answered from the brackets alone, by taking out the innermost pairs level by level: a tenth
    of the time that parsing takes, and no recursion."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = text.translate(_BRACKETS, _NO_BRACKETS_NOR_QUOTES).replace(b'""', b"")
    if len(brackets) > 4 * MAX_JSON_VALUES:  # they cannot match; no need to go through them all
        return True
    if b'"' in brackets:
        brackets = re.sub(b'"[^"]*"', b"", brackets)
    for _ in range(levels):
        brackets = brackets.replace(b"[]", b"")
    # What is left over has no match, and the parser will say where; unless it is more of the same.
    return b"[]" in brackets or brackets.count(b"[") > levels


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:MAX_NAME_LENGTH]!r} appears twice")
            seen.add(key)
    return result


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor_info(name: str, entry: object, file: str) -> TensorInfo:
    if len(name) > MAX_NAME_LENGTH:
        raise HeaderError(
            f"{file}: a tensor's name has {len(name)} characters, the limit is {MAX_NAME_LENGTH}"
        )
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]} if (
            all(map(_is_size, shape)) and _is_size(start) and _is_size(stop)
        ):
            pass
        case _:
            raise HeaderError(f"{file}: {name!r} has no valid dtype, shape and data_offsets")
    if len(shape) > MAX_DIMENSIONS:
        raise HeaderError(
            f"{file}: {name!r} has {len(shape)} dimensions, the limit is {MAX_DIMENSIONS}"
        )
    if dtype not in DTYPE_BITS:
        raise HeaderError(f"{file}: {name!r} has unknown dtype {dtype[:MAX_NAME_LENGTH]!r}")
    try:
        nbytes = spec_nbytes(dtype, shape)
    except ValueError as error:
        raise HeaderError(f"{file}: {name!r} {error}") from None
    if stop - start != nbytes:
        raise HeaderError(
            f"{file}: {name!r} spans {stop - start} bytes, {dtype} {shape} takes {nbytes}"
        )
    return TensorInfo(name, dtype, tuple(shape), start, stop)


def encode_header(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str], *, alignment: int
) -> tuple[bytes, tuple[int, ...]]:
    """Lay tensors out one after the other and describe them.

    Args:
        tensors: in the order of their data.
        metadata: goes into ``__metadata__``.
        alignment: the data starts at a multiple of this; JSON allows spaces at the end.

    Returns:
        The header with its length word, and each tensor's offset from the start of the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts = []
    position = 0
    for tensor in tensors:
        stop = position + spec_nbytes(tensor.dtype, tensor.shape)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        starts.append(position)
        position = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    nbytes = round_up(8 + len(text), alignment)
    raw = (nbytes - 8).to_bytes(8, "little") + text.ljust(nbytes - 8)
    return raw, tuple(nbytes + start for start in starts)
