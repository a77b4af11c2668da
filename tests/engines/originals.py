"""The originals that both engines load: the zoo's, and those that exporters have written."""

from __future__ import annotations

from pathlib import Path

from support import exporters, model_zoo
from support.batched import rewrite_each_by_itself

CONVERTED = (*model_zoo.FAMILIES, *exporters.CONVERTED)
REFUSED = ("modelopt-gpt_oss", "llmcompressor-minimax_m2")
"""Not converted. What engines make of the original is a part of the reason."""
NAMES = (*CONVERTED, *REFUSED)
BATCHED = (*model_zoo.BATCHED, "modelopt-llama4")
"""Those of which an engine loads the same weights otherwise, or only, with tensors of each expert:
`each_by_itself`. A converted one is compared with that."""


def make(folder: Path, name: str) -> None:
    """Write an original into ``folder``, which is created."""
    module = exporters if name in exporters.EXPORTS else model_zoo
    module.make(folder, name)


def make_each_by_itself(folder: Path, name: str) -> None:
    """Write one of `BATCHED` with tensors of each expert."""
    make(folder, name)
    rewrite_each_by_itself(folder, model_zoo.E)
