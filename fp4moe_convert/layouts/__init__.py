"""Kernel layouts: one module each, and the table of them.

A layout says which tensors a layer becomes, which moves fill them, how bytes are arranged and
undone, and who is the authority on it (`base.Layout`).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import FormatError
from ..format.contract import LayoutRecord
from ..format.files import CONFIG_NAME
from .base import Layout
from .trtllm_nvfp4 import TRTLLM_NVFP4

LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (TRTLLM_NVFP4,)}

DEFAULT: Layout = TRTLLM_NVFP4

_WORDS_LENGTH = 200
"""Of a layout in a message; config.json may hold anything."""


def layout_of(record: LayoutRecord) -> Layout:
    """The layout that a converted checkpoint has.

    Raises:
        FormatError: this release does not know it.
    """
    layout = LAYOUTS.get(record.name)
    if layout is None or dict(layout.parameters) != dict(record.parameters):
        known = ", ".join(_words(name, layout.parameters) for name, layout in LAYOUTS.items())
        raise FormatError(
            f"{CONFIG_NAME}: the layout is {_words(record.name, record.parameters)}, "
            f"this release of fp4moe-convert knows {known}"
        )
    return layout


def _words(name: str, parameters: Mapping[str, object]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in parameters.items())
    return (f"{name} ({settings})" if settings else name)[:_WORDS_LENGTH]
