"""Whether a folder is converted, and whether all of it is: its shards and its config.json can come
from different folders."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import CheckpointError
from ..format.contract import MARKER_NAME, QUANT_METHOD
from ..format.files import CONFIG_NAME
from .checkpoint import Checkpoint
from .names import converted_layer, is_mtp_by_name, layer_number, original_layer


def is_converted(checkpoint: Checkpoint) -> bool:
    """Whether all of a folder is converted; False if all of it is as in an original.

    Raises:
        CheckpointError: config.json and the shards say different things, or the shards do.
    """
    description = checkpoint.quantization or {}
    section = description.get("quant_method") == QUANT_METHOD
    # Layers that config.json does not call converted have passed through as they were.
    layers = description.get("layers") if section else None
    layers = layers if isinstance(layers, dict) else None
    marker, converted, original = _telltales(checkpoint, layers)
    telltale = converted or marker
    if telltale and original:
        raise CheckpointError(
            f"{checkpoint.location}: holds shards of an original and of a converted checkpoint: "
            f"{original} is of the one, {telltale} of the other; take all of them from one"
        )
    if section and not telltale:
        what = f"{original} is as in an original" if original else f"no shard has {MARKER_NAME!r}"
        raise CheckpointError(
            f"{CONFIG_NAME}: is that of a converted checkpoint, but {what}; put back the "
            f"original's {CONFIG_NAME}"
        )
    if marker and not section:
        raise CheckpointError(
            f"{checkpoint.location}: is already converted, as {marker} says, but {CONFIG_NAME} is "
            "not its own; put back the one that the conversion wrote"
        )
    if converted and not section:
        raise CheckpointError(
            f"{converted} is named as in a converted checkpoint, but no {MARKER_NAME!r} tells the "
            "order of its rows; convert the original"
        )
    return section


def _telltales(
    checkpoint: Checkpoint, layers: Collection[str] | None
) -> tuple[str | None, str | None, str | None]:
    """The marker, the first weight that is named as a converted layer's, and the first NVFP4 weight
    of experts of the decoder as an original has them, in one of ``layers`` if that is given; each
    with its shard."""
    layer_count = checkpoint.text.layer_count
    marker = converted = original = None
    for shard in checkpoint.shards:
        for tensor in shard.header.tensors:
            where = f"{shard.name}: {tensor.name!r}"
            if tensor.name == MARKER_NAME:
                marker = where
            elif tensor.dtype != "U8" or not tensor.nbytes:
                continue
            elif converted_layer(tensor.name) is not None:
                converted = converted or where
            elif not original and (layer := original_layer(tensor.name)) is not None:
                number = layer_number(tensor.name)
                of_decoder = number is not None and number < (layer_count or 0)
                if of_decoder and not is_mtp_by_name(tensor.name):
                    original = where if layers is None or layer in layers else None
    return marker, converted, original
