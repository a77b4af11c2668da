"""The model card of a converted checkpoint on the Hub, made from what its manifest records."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with huggingface_hub
from huggingface_hub import ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from .engines import ENGINES
from .format.contract import FORMAT_VERSION
from .format.files import SOURCE_CARD_NAME
from .format.manifest import Manifest
from .inspection import Inspection

PROJECT = "https://github.com/fp4moe/fp4moe-convert"

MAX_CARD_NBYTES = 2_000_000
MAX_TEXT = 500
"""Characters that one value of a card's front matter may have."""

CARRIED_OVER = ("license", "license_name", "license_link", "pipeline_tag")
"""What of the source's front matter holds for the converted checkpoint."""


def front_matter(card: Path | None) -> dict[str, str]:
    """What a model card says at its top of `CARRIED_OVER`; nothing where that cannot be read.

    Args:
        card: a file that somebody else wrote.
    """
    if card is None or card.stat().st_size > MAX_CARD_NBYTES:
        return {}
    try:
        found = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {
        key: value
        for key in CARRIED_OVER
        if isinstance(value := found.get(key), str) and len(value) <= MAX_TEXT
    }


def make_card(
    repo_id: str,
    manifest: Manifest,
    inspection: Inspection,
    carried: Mapping[str, str],
    *,
    keeps_source_card: bool,
) -> bytes:
    """A model card, front matter included.

    Args:
        repo_id: where it will stand.
        manifest: of the checkpoint.
        inspection: of the same.
        carried: from the source's card.
        keeps_source_card: whether that lies beside it.
    """
    source, can_serve = manifest.source, inspection.prospects.tensor_parallel
    engines = [engine for engine in ENGINES if engine.name in can_serve]
    base_model = source.hub_id if source.hub_id and _is_id(source.hub_id) else None
    metadata: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else None,
        "tags": ["fp4moe", "nvfp4", "moe", "flashinfer", *(engine.name for engine in engines)],
        **carried,
    }
    origin, original = "a checkpoint in a local folder", "ORIGINAL_DIR"
    if base_model:
        url = f"{constants.ENDPOINT}/{base_model}"
        origin, original = f"[{base_model}]({url})", base_model
        if source.revision:
            origin += f" at commit [`{source.revision[:12]}`]({url}/tree/{source.revision})"
            original += f" --revision {source.revision}"
    about = "\n"
    if keeps_source_card:
        about = (
            f"\n[Its model card]({SOURCE_CARD_NAME}) says what it is and how it may be used.\n\n"
        )
    releases = "".join(
        f"| {engine.title} {engine.models.release} | "
        f"tensor parallel {', '.join(map(str, can_serve[engine.name]))} |\n"
        for engine in engines
    )
    name = repo_id.partition("/")[2]
    folder = shlex.quote(name)
    serve = "\n".join(inspection.prospects.commands(name).values())
    versions = manifest.versions
    return f"""---
{ModelCardData(**metadata).to_yaml()}
---

# {name}

Converted from {origin}. The NVFP4 experts lie in the byte order of FlashInfer's TRT-LLM MoE
kernels, so that engines need not shuffle them at every start. Every weight has its original value.
{about}| | |
|---|---|
| format | fp4moe, version {FORMAT_VERSION} |
| written by | fp4moe-convert {versions["fp4moe-convert"]} |
| row order | `{manifest.row_order}` (FlashInfer {versions["flashinfer"]}) |
| converted | {len(inspection.layers):,} MoE layers |
| size | {inspection.nbytes:,} bytes in {inspection.shards:,} shards |
{releases}
## Serve

It takes NVIDIA Blackwell GPUs of the SM100 family, such as B200, and
[fp4moe-convert]({PROJECT}) installed beside the engine. Engines without it refuse this checkpoint.

```
hf download {repo_id} --local-dir {folder}
{serve}
```

## Verify

Compare every byte with the recorded checksums, or with the original:

```
fp4moe verify {folder}
fp4moe verify {folder} --source {original}
```

## Restore

Write the original again, byte for byte, from this checkpoint alone:

```
fp4moe restore {folder} {shlex.quote(name + "-original")}
```
""".encode()


def _is_id(hub_id: str) -> bool:
    """The name of a folder may look like one in the Hub's cache."""
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        return False
    return hub_id.count("/") == 1
