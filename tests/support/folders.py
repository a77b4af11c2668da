"""Model folders: what is in them, and damage to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

INDEX = "model.safetensors.index.json"
MANIFEST = "fp4moe_manifest.json"
SOURCE = "fp4moe_source.dat"


def every_file(folder: Path) -> dict[str, bytes]:
    """All bytes of every file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name; of a manifest only what does not name the source's path."""
    found = every_file(folder)
    if MANIFEST in found:
        manifest = json.loads(found[MANIFEST])
        del manifest["source"]["path"], manifest["manifest"]
        found[MANIFEST] = json.dumps(manifest).encode()
    return found


def without_source(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same, without what a manifest says of where the source lay."""
    manifest = json.loads(files[MANIFEST])
    del manifest["source"]
    manifest.pop("manifest", None)
    return {**files, MANIFEST: json.dumps(manifest).encode()}


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a manifest says, and let its checksum vouch for it."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    del content["manifest"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["manifest"] = xxhash.xxh3_128_hexdigest(canonical.encode())
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def change_byte(path: Path, position: int, change: Callable[[int], int]) -> int:
    """Change one byte of a file and return what it was; negative positions count from its end."""
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        old = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([change(old)]))
    return old


def write_byte(path: Path, position: int, value: int) -> int:
    """Overwrite one byte of a file and return what it was; negative positions as above."""
    return change_byte(path, position, lambda _: value)


def flip_bit(path: Path, position: int = -1, bit: int = 0) -> None:
    """Flip one bit of a file, in its last byte if no position is given."""
    change_byte(path, position, lambda byte: byte ^ 1 << bit)
