"""SGLang: its tensor-parallel rule and its serve command; `hooks` has the plugin."""

from __future__ import annotations

from ..engine import Engine

# SGLang rounds I/T up to a multiple of 64, cuts there and fills with zeros, as the slices do.
SGLANG = Engine(
    name="sglang",
    can_cut=lambda _geometry, _size: True,
    serve_command=lambda folder: (
        f"python -m sglang.launch_server --model-path {folder} "
        "--moe-runner-backend flashinfer_trtllm"
    ),
)
