"""What the names of tensors say, whatever the model."""

from __future__ import annotations

import re

_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.([0-9]{1,18})\.")
_MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:_[a-z]+)?\.")
"""Multi-token prediction has layers of its own, counted from 0: ``mtp.layers.0``."""


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor, or a part of one, belongs to."""
    match = _LAYER_NUMBER.search(name)
    return int(match[1]) if match else None


def is_mtp_by_name(name: str) -> bool:
    """Whether a name says that it is of multi-token prediction. Families that count such layers
    after the decoder's do not say so."""
    return _MTP.search(name) is not None
