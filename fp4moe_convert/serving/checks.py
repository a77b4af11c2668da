"""What must hold before an engine may load a converted checkpoint, the same for every engine.

Weights that are laid out wrongly do not crash, they answer nonsense. So a checkpoint that is not
known to be right is refused, in one message with the reason and with what to do instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..engines.engine import Engine
from ..errors import ConvertError, ServingError
from ..format.contract import ConvertedSection, Geometry
from ..layouts import fingerprints, layout_of

logger = logging.getLogger(__name__)

WAY_OUT = "serve the original checkpoint instead"

CONVERT_AGAIN = "convert the checkpoint again"

CONVERTED_KEY = "fp4moe"
"""Where a plugin keeps the converted section inside the source's, which its engine gets to see."""


def refusal(reason: str, remedy: str | None = None) -> ServingError:
    """The error that stops an engine.

    Args:
        reason: what is wrong.
        remedy: what to do, where there is more than serving the original.
    """
    return ServingError(f"fp4moe: {reason}; {f'{remedy}, or ' if remedy else ''}{WAY_OUT}")


def refuse_format(error: ConvertError) -> ServingError:
    """The error that stops an engine at a checkpoint whose format, layout or row order this release
    does not know; says as much as ``error`` and its remedy."""
    reason, _, remedy = str(error).partition("; ")
    return refusal(reason, remedy or None)


def read_section(section: Mapping[str, Any]) -> ConvertedSection:
    """Read a checkpoint's section. Does not import FlashInfer, as some processes must not.

    Raises:
        ServingError: unknown format or layout.
    """
    try:
        converted = ConvertedSection.from_json(section)
        layout_of(converted.layout)
    except ConvertError as error:
        raise refuse_format(error) from error
    return converted


def check_row_order(converted: ConvertedSection, engine: Engine) -> None:
    """Compare a checkpoint's row order with FlashInfer's. Imports FlashInfer, which initializes
    CUDA.

    Raises:
        ServingError: another row order, or FlashInfer cannot be asked.
    """
    try:
        # FlashInfer mixes our device with the default one, which engines set while they build.
        with torch.device("cpu"):
            order = fingerprints.ask()
    except ConvertError as error:
        raise refusal(str(error)) from error
    layout = converted.layout
    if order.fingerprint != layout.row_order:
        raise refusal(
            f"the checkpoint was laid out for the row order {layout.row_order} of "
            f"flashinfer {layout.flashinfer}, this {engine.title} has flashinfer "
            f"{order.flashinfer} with {order.fingerprint}",
            "convert again with it",
        )


def check_share(
    engine: Engine, prefix: str, geometry: Geometry, ranks: int, *, options: str
) -> None:
    """Make sure that the engine can cut a layer for so many ranks.

    Args:
        prefix: the layer's name in the file.
        ranks: that share an expert.
        options: those of the engine's that set this number.

    Raises:
        ServingError: it cannot.
    """
    sizes = engine.tensor_parallel_sizes(geometry)
    if ranks not in sizes:
        raise refusal(
            f"{prefix}: {ranks} ranks cannot share an intermediate size of {geometry.intermediate}",
            f"use {options} for one of {', '.join(map(str, sizes))} ranks to an expert",
        )


def warn_if_untested(engine: Engine, version: str, tested: Sequence[str]) -> None:
    """Warn of an engine other than those the plugin was tested with; "0.33.*" is a range."""
    if not any(fnmatchcase(version.partition("+")[0], pattern) for pattern in tested):
        logger.warning(
            "fp4moe: tested with %s %s, this is %s; if it does not load, %s",
            engine.title,
            ", ".join(tested),
            version,
            WAY_OUT,
        )
