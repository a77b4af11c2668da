"""What must hold before an engine may load a converted checkpoint, the same for every engine.

Mis-laid weights do not crash, they answer nonsense: whatever is not known to be right is refused,
in one message that names the reason and the way out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..contract import Conversion, read_quantization_section
from ..errors import ConvertError
from ..row_order import flashinfer_row_order

logger = logging.getLogger(__name__)

WAY_OUT = "serve the original checkpoint instead"


class ServingError(ConvertError, ValueError):
    """A converted checkpoint cannot be served like this."""


def check_section(section: Mapping[str, Any], *, engine: str) -> Conversion:
    """Read a checkpoint's section and hold its row order against the engine's own FlashInfer.

    Raises:
        ServingError: unknown format, or another row order.
    """
    conversion = read_section(section)
    check_row_order(conversion, engine=engine)
    return conversion


def read_section(section: Mapping[str, Any]) -> Conversion:
    """The first half of `check_section`, for a process that had better not import FlashInfer.

    Raises:
        ServingError: unknown format.
    """
    try:
        return read_quantization_section(section)
    except ConvertError as error:
        raise ServingError(f"fp4moe: {error}; {WAY_OUT}") from error


def check_row_order(conversion: Conversion, *, engine: str) -> None:
    """The second half, which imports FlashInfer, and that initializes CUDA.

    Raises:
        ServingError: another row order, or FlashInfer cannot be asked.
    """
    try:
        # FlashInfer mixes our device with the default one, which engines set while they build.
        with torch.device("cpu"):
            order = flashinfer_row_order()
    except ConvertError as error:
        raise ServingError(f"fp4moe: {error}; {WAY_OUT}") from error
    if order.fingerprint != conversion.row_order:
        raise ServingError(
            f"fp4moe: the checkpoint was laid out for the row order {conversion.row_order} of "
            f"flashinfer {conversion.flashinfer}, this {engine} has flashinfer "
            f"{order.flashinfer} with {order.fingerprint}; convert again with it, or {WAY_OUT}"
        )


def warn_if_untested(engine: str, version: str, tested: Sequence[str]) -> None:
    """Warn of an engine other than those the plugin was tested with; "0.33.*" is a range."""
    if not any(fnmatchcase(version.partition("+")[0], pattern) for pattern in tested):
        logger.warning(
            "fp4moe: tested with %s %s, this is %s; if it does not load, %s",
            engine,
            ", ".join(tested),
            version,
            WAY_OUT,
        )
