"""What a CPU needs besides `vllm_golden` so that vLLM loads whole models of many families.

Everything else is vLLM's own code. Replaced here:

- model classes are inspected in this process: another one would import vLLM anew for each of them;
- torchvision is importable but inert: image processors import it, and no image is processed.
"""

from __future__ import annotations

import sys
from functools import cache
from unittest.mock import MagicMock


@cache
def bootstrap() -> None:
    """To be called after `vllm_golden.bootstrap`, before a model is configured."""
    from transformers.utils import import_utils
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()
    # transformers caches the answer: ask before an inert torchvision looks installed.
    if not import_utils.is_torchvision_available():
        for name in ("", ".transforms", ".transforms.functional", ".transforms.v2"):
            sys.modules[f"torchvision{name}"] = MagicMock()
