"""The originals that both engines load: the zoo's, and those that exporters have written."""

from __future__ import annotations

from pathlib import Path

from support import exporters, model_zoo

NAMED_ANEW = "llmcompressor-minimax_m2"
"""Converted, but no engine loads the original: both look for w1, w3 and w2, and find gate_proj."""
CONVERTED = tuple(
    name for name in (*model_zoo.FAMILIES, *exporters.CONVERTED) if name != NAMED_ANEW
)
STACKED = "modelopt-gpt_oss"
"""Not converted, because no engine serves it with the backend."""
NAMES = (*CONVERTED, STACKED)


def make(folder: Path, name: str) -> None:
    """Write an original into ``folder``, which is created."""
    module = exporters if name in exporters.EXPORTS else model_zoo
    module.make(folder, name)
