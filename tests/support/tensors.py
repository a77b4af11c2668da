"""Tensors of safetensors files as raw bytes, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the safetensors library reads it."""

    dtype: str  # safetensors spelling: "U8", "F8_E4M3", "F32"
    shape: tuple[int, ...]
    data: bytes

    def as_bytes(self) -> NDArray[np.uint8]:
        """The shape of the tensor, with its last axis in bytes; [nbytes] for a scalar."""
        array = np.frombuffer(self.data, np.uint8)
        return array.reshape(*self.shape[:-1], -1) if self.shape else array

    def as_floats(self) -> NDArray[np.float32]:
        """The values of an F32 tensor, in its shape."""
        assert self.dtype == "F32"
        return np.frombuffer(self.data, "<f4").reshape(self.shape)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a file, or of the safetensors files of a folder, by name."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {
        name: StoredTensor(info["dtype"], tuple(info["shape"]), bytes(info["data"]))
        for file in files
        for name, info in deserialize(file.read_bytes())
    }


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """A file of these tensors, in this order."""
    entries, position = {}, 0
    for name, tensor in tensors.items():
        stop = position + len(tensor.data)
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(entries).encode()
    data = b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON of a file's header, and where its data starts."""
    with path.open("rb") as file:
        nbytes = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(nbytes)), 8 + nbytes


def home_of(folder: Path, tensor: str) -> Path:
    """The file of a folder that holds a tensor."""
    return next(
        path for path in sorted(folder.glob("*.safetensors")) if tensor in read_header(path)[0]
    )


def range_of(path: Path, tensor: str) -> tuple[int, int]:
    """Where a tensor's data lies in a file: start and stop, from the file's first byte."""
    entries, data = read_header(path)
    start, stop = entries[tensor]["data_offsets"]
    return data + start, data + stop
