"""safetensors headers to dataclasses and back.

The format (https://github.com/huggingface/safetensors#format): eight bytes, the length N of the
header as a little-endian integer; N bytes of JSON; then the data, which the tensors tile without
holes or overlaps. Later code trusts a `Header`, so everything doubtful is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec
import xxhash

from ..errors import HeaderError
from ..format.contract import TensorSpec
from ..format.sizes import round_up
from ..format.untrusted import check_count
from .reader import Reader, read_bytes
from .stand_in import START_NBYTES, stand_in_for

MAX_HEADER_NBYTES = 100_000_000
"""The safetensors library has the same limit."""

MAX_DIMENSIONS = 64
"""As in NumPy and PyTorch."""

MAX_NAME_LENGTH = 4096
"""Of a tensor; errors repeat it."""

LENGTH_NBYTES = 8
"""Of the length word that a file starts with."""

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


_NOT_JSON = (ValueError, RecursionError)  # msgspec's errors are ValueErrors


class TensorInfo(NamedTuple):
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

    @property
    def file_nbytes(self) -> int:
        """Size of the file: the tensors tile the data to its end."""
        return self.nbytes + (self.tensors[-1].stop if self.tensors else 0)


def spec_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor of ``dtype`` and ``shape`` takes.

    Raises:
        ValueError: an element count beyond 63 bits, or a sub-byte dtype that ends inside a byte.
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


def header_nbytes(start: bytes | memoryview) -> int:
    """Size of a header, length word included, as the first bytes of a file claim it."""
    return LENGTH_NBYTES + int.from_bytes(start[:LENGTH_NBYTES], "little")


def read_header(reader: Reader) -> Header:
    """Read and validate the header of one file.

    Raises:
        HeaderError: the file breaks a rule of the format.
        CheckpointError: the file cannot be read.
    """
    if reader.nbytes < LENGTH_NBYTES:
        raise HeaderError(f"{reader.name}: {reader.nbytes} bytes is too short for a header length")
    # No more than the length first: what follows a header is weights, which a dry run of a model on
    # the Hub is not to fetch.
    nbytes = header_nbytes(read_bytes(reader, 0, LENGTH_NBYTES))
    json_nbytes = nbytes - LENGTH_NBYTES
    if json_nbytes > MAX_HEADER_NBYTES or nbytes > reader.nbytes:
        # Text claims a huge length.
        if what := stand_in_for(read_bytes(reader, 0, min(reader.nbytes, START_NBYTES))):
            raise HeaderError(f"{reader.name}: {what}")
        if json_nbytes > MAX_HEADER_NBYTES:
            reason = f"the limit is {MAX_HEADER_NBYTES}"
        else:
            reason = f"the file has {reader.nbytes - LENGTH_NBYTES} after the length"
        raise HeaderError(f"{reader.name}: header claims {json_nbytes} bytes, {reason}")
    return parse_header(bytes(read_bytes(reader, 0, nbytes)), reader.nbytes, reader.name)


def parse_header(raw: bytes, file_nbytes: int, file: str) -> Header:
    """Validate a header's bytes.

    Args:
        raw: length word and JSON.
        file_nbytes: size of the whole file.
        file: its name, for messages.

    Raises:
        HeaderError: on the first broken rule.
    """
    text = raw[LENGTH_NBYTES:]
    try:
        check_count(text)
        if not text.isascii():
            text.decode()  # msgspec does not look at strings in fields that it passes over
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise HeaderError(f"{file}: header is not a JSON object") from None
    except _NOT_JSON as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise HeaderError(f"{file}: header is not JSON: {reason}") from None
    _check_metadata(entries.pop("__metadata__", None), file)
    tensors = [_tensor_info(name, entry, file) for name, entry in entries.items()]
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
    return Header(len(raw), tuple(tensors), xxhash.xxh3_128_hexdigest(raw))


_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


_decode_entry = msgspec.json.Decoder(_Entry).decode
_decode_metadata = msgspec.json.Decoder(dict[str, str]).decode


def _check_metadata(entry: msgspec.Raw | None, file: str) -> None:
    try:
        if entry is not None:
            _decode_metadata(entry)
    except _NOT_JSON:
        raise HeaderError(f"{file}: __metadata__ is not a map of strings to strings") from None


def _tensor_info(name: str, entry: msgspec.Raw, file: str) -> TensorInfo:
    if len(name) > MAX_NAME_LENGTH:
        raise HeaderError(
            f"{file}: a tensor's name has {len(name)} characters, the limit is {MAX_NAME_LENGTH}"
        )
    try:
        fields = _decode_entry(entry)
    except _NOT_JSON:
        raise HeaderError(f"{file}: {name!r} has no valid dtype, shape and data_offsets") from None
    dtype, shape, (start, stop) = fields.dtype, fields.shape, fields.data_offsets
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
            f"{file}: {name!r} spans {stop - start} bytes, {dtype} {list(shape)} takes {nbytes}"
        )
    return TensorInfo(name, dtype, shape, start, stop)


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
    nbytes = round_up(LENGTH_NBYTES + len(text), alignment)
    json_nbytes = nbytes - LENGTH_NBYTES
    raw = json_nbytes.to_bytes(LENGTH_NBYTES, "little") + text.ljust(json_nbytes)
    return raw, tuple(nbytes + start for start in starts)
