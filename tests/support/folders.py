"""Model folders: what is in them, and damage to it."""

from __future__ import annotations

import json
from pathlib import Path

INDEX = "model.safetensors.index.json"
MANIFEST = "fp4moe_manifest.json"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name; of a manifest only what does not name the source's path."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    if MANIFEST in found:
        manifest = json.loads(found[MANIFEST])
        del manifest["source"]["path"], manifest["manifest"]
        found[MANIFEST] = json.dumps(manifest).encode()
    return found
