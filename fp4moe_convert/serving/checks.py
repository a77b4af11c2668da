"""What must hold before an engine may load a converted checkpoint, the same for every engine.

Mis-laid weights do not crash, they answer nonsense: whatever is not known to be right is refused,
in one message that names the reason and the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..contract import Conversion, read_quantization_section
from ..errors import ConvertError
from ..row_order import flashinfer_row_order

WAY_OUT = "serve the original checkpoint instead"


class ServingError(ConvertError, ValueError):
    """A converted checkpoint cannot be served like this."""


def check_section(section: Mapping[str, Any], *, engine: str) -> Conversion:
    """Read a checkpoint's section and hold its row order against the engine's own FlashInfer.

    Raises:
        ServingError: unknown format, or another row order.
    """
    try:
        conversion = read_quantization_section(section)
        order = flashinfer_row_order()
    except ConvertError as error:
        raise ServingError(f"fp4moe: {error}; {WAY_OUT}") from error
    if order.fingerprint != conversion.row_order:
        raise ServingError(
            f"fp4moe: the checkpoint was laid out for the row order {conversion.row_order} of "
            f"flashinfer {conversion.flashinfer}, this {engine} has flashinfer "
            f"{order.flashinfer} with {order.fingerprint}; convert again with it, or {WAY_OUT}"
        )
    return conversion
