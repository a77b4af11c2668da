"""Where the scripts put the environments that tests need beside their own."""

from __future__ import annotations

import os
from pathlib import Path


def environments(name: str) -> Path:
    """The folder that scripts/setup_``name``.sh makes, as scripts/environment.sh names it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(f"FP4MOE_{name.upper()}") or home / f"fp4moe-{name}")
