"""Lay NVFP4 mixture-of-experts checkpoints out for FlashInfer's TRT-LLM kernels once, offline."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    CheckpointError,
    ClusterError,
    ConvertError,
    FormatError,
    HeaderError,
    InUseError,
    MissingFileError,
    NoSpaceError,
    OutputError,
    PushError,
    RowOrderError,
    ServingError,
    StorageLimitError,
    UnreachableError,
    VerifyError,
)

if TYPE_CHECKING:
    from .cluster import convert_on_ray
    from .conversion import ConversionReport, convert
    from .inspection import Inspection, inspect
    from .parts import PartReport, convert_part, finish
    from .plan import Part
    from .preparation import Preview, preview
    from .progress import OnProgress, Progress
    from .publication import PushReport, push
    from .report import RunReport
    from .restoration import restore
    from .storage.opening import open_store
    from .verification import Verified, verify

__all__ = [
    "CheckpointError",
    "ClusterError",
    "ConversionReport",
    "ConvertError",
    "FormatError",
    "HeaderError",
    "InUseError",
    "Inspection",
    "MissingFileError",
    "NoSpaceError",
    "OnProgress",
    "OutputError",
    "Part",
    "PartReport",
    "Preview",
    "Progress",
    "PushError",
    "PushReport",
    "RowOrderError",
    "RunReport",
    "ServingError",
    "StorageLimitError",
    "UnreachableError",
    "Verified",
    "VerifyError",
    "convert",
    "convert_on_ray",
    "convert_part",
    "finish",
    "inspect",
    "open_store",
    "preview",
    "push",
    "restore",
    "verify",
]

_HOME = {
    "Inspection": "inspection",
    "OnProgress": "progress",
    "Progress": "progress",
    "ConversionReport": "conversion",
    "convert": "conversion",
    "inspect": "inspection",
    "Part": "plan",
    "PartReport": "parts",
    "Preview": "preparation",
    "convert_on_ray": "cluster",
    "convert_part": "parts",
    "finish": "parts",
    "preview": "preparation",
    "PushReport": "publication",
    "push": "publication",
    "RunReport": "report",
    "open_store": "storage.opening",
    "restore": "restoration",
    "Verified": "verification",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that `fp4moe --help` does not wait for numpy.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
