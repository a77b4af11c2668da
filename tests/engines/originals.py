"""The originals that both engines load: the zoo's, and those that exporters have written."""

from __future__ import annotations

from pathlib import Path

from support import exporters, model_zoo

CONVERTED = (*model_zoo.FAMILIES, *exporters.CONVERTED)
REFUSED = ("modelopt-gpt_oss", "modelopt-llama4", "llmcompressor-minimax_m2")
"""Not converted. What engines make of the original is a part of the reason."""
NAMES = (*CONVERTED, *REFUSED)


def make(folder: Path, name: str) -> None:
    """Write an original into ``folder``, which is created."""
    module = exporters if name in exporters.EXPORTS else model_zoo
    module.make(folder, name)
