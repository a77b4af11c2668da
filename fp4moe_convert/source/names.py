"""What the names of tensors say, whatever the model."""

from __future__ import annotations

import re

_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.([0-9]{1,18})\.")
_MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:_[a-z]+)?\.")
"""Multi-token prediction has layers of its own, counted from 0: ``mtp.layers.0``."""
_STACKED = frozenset(
    f"{matrix}_{leaf}"
    for matrix in ("w13", "w2")
    for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale")
)

_ALL_EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""What stacked tensors of Step-3.5 are called in ``moe``, beside its router ``gate``."""
_BATCHED = frozenset(
    f"{matrices}{leaf}"
    for matrices in ("gate_up_proj", "down_proj")
    for leaf in ("", "_weight_scale", "_weight_scale_2", "_input_scale")
)
"""What those of Llama 4 are called in ``experts``."""


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor, or a part of one, belongs to."""
    match = _LAYER_NUMBER.search(name)
    return int(match[1]) if match else None


def is_mtp_by_name(name: str) -> bool:
    """Whether a name says that it is of multi-token prediction. Families that count such layers
    after the decoder's do not say so."""
    return _MTP.search(name) is not None


def stacked_layer(name: str) -> str | None:
    """The expert layer of a tensor that is named as one that a layer becomes, up to and including
    ``.experts`` or ``.moe``. Others may use these names for an order of their own."""
    layer, _, leaf = name.rpartition(".")
    return layer if leaf in _STACKED and layer.endswith((".experts", ".moe")) else None


def original_layer(name: str) -> str | None:
    """The expert layer of a tensor that is named as an original's is, of one expert or of all, as
    the rows of `families.FAMILIES` have it. Engines ask of every tensor of every model, so it takes
    no regular expression."""
    layer, found, rest = name.rpartition(".experts.")
    if found and (rest.partition(".")[0].isdecimal() or rest in _BATCHED):
        return f"{layer}.experts"
    layer, found, rest = name.rpartition(".moe.")
    return f"{layer}.moe" if found and rest.partition(".")[0] in _ALL_EXPERTS else None
