"""vLLM: its tensor-parallel rule and its serve command; `hooks` has the plugin."""

from __future__ import annotations

from ...format.contract import Geometry
from ...layouts.trtllm_nvfp4 import INTERMEDIATE_MULTIPLE
from ..engine import Engine


def _can_cut(geometry: Geometry, size: int) -> bool:
    """vLLM cuts at I/T and pads after that, which gives a slice of the file only where I/T is whole
    blocks of 64, or where nothing is cut."""
    return size == 1 or geometry.intermediate % (size * INTERMEDIATE_MULTIPLE) == 0


VLLM = Engine(
    name="vllm",
    can_cut=_can_cut,
    serve_command=lambda folder: f"vllm serve {folder} --moe-backend flashinfer_trtllm",
)
