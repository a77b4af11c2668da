"""What the names of tensors say, whatever the model."""

from __future__ import annotations

import re

from .families import FAMILIES, LEAVES

IN_LAYER = re.compile(r"((?:.*?\.)?layers)\.([0-9]{1,18})\.(.+)", re.DOTALL)
"""A whole name: up to and including ``layers``, the number, and the rest."""
_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.([0-9]{1,18})\.")
_MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:_[a-z]+)?\.")
"""Multi-token prediction has layers of its own, counted from 0: ``mtp.layers.0``."""
_CONVERTED = frozenset(f"{matrix}_{leaf}" for matrix in ("w13", "w2") for leaf in LEAVES)


def _parts_in(module: str) -> frozenset[str]:
    """What the tensors of all experts are called in a module, whatever the family."""
    return frozenset(
        part
        for family in FAMILIES
        for part in family.parts
        if family.tensors.fullmatch(f".{module}.{part}")
    )


_IN_EXPERTS = _parts_in("experts")
"""Llama 4's: ``down_proj_weight_scale``."""
_IN_MOE = frozenset(part.partition(".")[0] for part in _parts_in("moe"))
"""Step-3.5's, without a leaf: ``down_proj``, but not the router, ``gate``."""


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor, or a part of one, belongs to."""
    match = _LAYER_NUMBER.search(name)
    return int(match[1]) if match else None


def is_mtp_by_name(name: str) -> bool:
    """Whether a name says that it is of multi-token prediction. It does not where a family counts
    such layers after those of the decoder."""
    return _MTP.search(name) is not None


def converted_layer(name: str) -> str | None:
    """The expert layer of a tensor that is named as one that a layer becomes, up to and including
    ``.experts`` or ``.moe``. Others may use these names for an order of their own."""
    layer, _, leaf = name.rpartition(".")
    return layer if leaf in _CONVERTED and layer.endswith((".experts", ".moe")) else None


def original_layer(name: str) -> str | None:
    """The expert layer of a tensor that is named as an original's is, of one expert or of all, in
    some row of `families.FAMILIES`. Engines ask of every tensor of every model, so it takes
    no regular expression."""
    layer, found, rest = name.rpartition(".experts.")
    if found and (rest.partition(".")[0].isdecimal() or rest in _IN_EXPERTS):
        return f"{layer}.experts"
    layer, found, rest = name.rpartition(".moe.")
    return f"{layer}.moe" if found and rest.partition(".")[0] in _IN_MOE else None
