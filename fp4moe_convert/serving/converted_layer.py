"""One rank's parameters of one converted layer: which tensor fills which, and what is missing.

The same for every engine. An engine says which parameter it holds, which experts its slots are for,
and when loading has ended.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..engines.engine import Engine
from ..format.contract import Geometry, TensorSpec
from ..layouts.trtllm_nvfp4 import TRTLLM_NVFP4, LayerTensors
from ..source.families import COMPRESSED_TENSORS_LEAVES
from ..source.names import is_mtp_by_name, layer_number
from .checks import CONVERT_AGAIN, refusal
from .slices import copy_share

LEAVES = LayerTensors._fields
"""Names of the parameters in the file."""

MODELOPT_NAMES: Mapping[str, str] = {}
COMPRESSED_TENSORS_NAMES: Mapping[str, str] = {
    f"{matrix}_{leaf}": f"{matrix}_{name}"
    for matrix in ("w13", "w2")
    for leaf, name in COMPRESSED_TENSORS_LEAVES.items()
    if name != leaf
}
"""What engines call the parameters of compressed-tensors until they are loaded. From the global
scales, which are divisors, they make those that have the file's names."""


def converted_layer_of(module: str, converted: Collection[str]) -> str | None:
    """Which converted layer a module with experts is, whatever an engine calls it: models leave out
    the first parts of a name, put others before it, and rename what lies between. The number of the
    layer stays, and a decoder has one set of experts for each.

    Args:
        module: its name in the engine.
        converted: prefixes of the checkpoint's converted layers.

    Returns:
        One of them; None if it is none of them, or the name does not tell.
    """
    number = layer_number(module)
    if number is None or is_mtp_by_name(module):
        return None
    same = [prefix for prefix in converted if layer_number(prefix) == number]
    if len(same) > 1:  # two decoders in one model
        same = [p for p in same if f".{p}".endswith(f".{module}") or module.endswith(f".{p}")]
    return same[0] if len(same) == 1 else None


class ConvertedLayer:
    """Fills parameters from the file's tensors; may be loaded again after `check_loaded`.

    It refers to no module, so that engines may keep it wherever they keep a weight loader.
    """

    def __init__(
        self, prefix: str, geometry: Geometry, names: Mapping[str, str] = MODELOPT_NAMES
    ) -> None:
        """
        Args:
            prefix: the layer's name in the file, up to and including ``.experts`` or ``.moe``.
            geometry: its sizes, as config.json has them.
            names: what the engine calls the parameters that it does not call as the file does.
        """
        self.prefix = prefix
        self.geometry = geometry
        self.names = names
        specs = TRTLLM_NVFP4.tensors(prefix, geometry)
        self.specs: dict[str, TensorSpec] = specs._asdict()
        self._loaded: set[str] = set()
        self.is_complete = False
        """Whether the last `check_loaded` found all."""

    def check_geometry(self, model: Geometry) -> None:
        """Compare the layer's sizes with those that the engine's model wants.

        Raises:
            ServingError: they differ.
        """
        if model != self.geometry:
            raise refusal(f"{self.prefix} is {self.geometry} in config.json, {model} in the model")

    def parameter_of(self, holder: Any, leaf: str) -> torch.nn.Parameter:
        """The parameter of the module ``holder`` that one of `LEAVES` fills."""
        name = self.names.get(leaf, leaf)
        # What an engine renames once it is loaded may be loaded again.
        parameter: torch.nn.Parameter = getattr(holder, name if hasattr(holder, name) else leaf)
        return parameter

    def leaf_of(self, holder: Any, parameter: torch.Tensor) -> str:
        """Which of `LEAVES` a parameter of the module ``holder`` is."""
        for leaf in LEAVES:
            if self.parameter_of(holder, leaf) is parameter:
                return leaf
        raise LookupError(f"{self.prefix} has no such parameter")

    def load(
        self,
        leaf: str,
        target: torch.Tensor,
        tensor: torch.Tensor,
        *,
        experts: Sequence[int],
        part: range,
    ) -> None:
        """Fill a parameter with its share of the file's tensor.

        Args:
            leaf: one of `LEAVES`.
            target: the parameter's slots for these experts.
            tensor: from the file.
            experts: for each slot, the expert it holds. The slots of ``*_input_scale`` may be those
                of all ranks: engines serve ModelOpt's with the maximum over all experts.
            part: the values of I that the rank holds; it may go past I.

        Raises:
            ServingError: the tensor is not what config.json describes, or does not fit.
        """
        spec = self.specs[leaf]
        if tuple(tensor.shape) != spec.shape:
            raise refusal(
                f"{spec.name} is {list(tensor.shape)}, config.json says {list(spec.shape)}, "
                "which it should have",
                CONVERT_AGAIN,
            )
        try:
            copy_share(leaf, tensor, target, experts=experts, part=part, gated=self.geometry.gated)
        except ValueError as error:
            raise refusal(f"{self.prefix}.{error}") from error
        self.note(leaf)

    def note(self, what: str) -> None:
        """Remember that something has been loaded."""
        self._loaded.add(what)

    @property
    def has_begun(self) -> bool:
        """Whether something has been loaded since the last `check_loaded`."""
        return bool(self._loaded)

    def check_loaded(self, also: Iterable[str] = ()) -> None:
        """Loading has ended: check that all of `LEAVES` came, and start a new count.

        Args:
            also: what else must have been noted.

        Raises:
            ServingError: something was not loaded.
        """
        missing = [what for what in (*LEAVES, *also) if what not in self._loaded]
        self._loaded.clear()
        self.is_complete = not missing
        check_none_missing(f"{self.prefix}.{what}" for what in missing)


def check_none_missing(names: Iterable[str]) -> None:
    """
    Args:
        names: tensors that should have been loaded, but were not.

    Raises:
        ServingError: there are any.
    """
    if missing := list(names):
        raise refusal(
            f"{', '.join(missing)} {'was' if len(missing) == 1 else 'were'} not loaded: missing "
            "from the checkpoint, or passed over by the load format",
            "verify the checkpoint with fp4moe verify",
        )


def check_taken_over(
    model: torch.nn.Module,
    converted: Iterable[str],
    taken_over: Collection[str],
    *,
    layer_count: int,
    engine: Engine,
) -> None:
    """A model is built: check that no decoder layer that is here keeps experts of the engine's own
    where the checkpoint has converted ones. A layer that is not here is not missed: another
    pipeline stage may have it, or a user wants fewer layers.

    Args:
        model: as the engine built it.
        converted: prefixes of the checkpoint's converted layers.
        taken_over: those that have a `ConvertedLayer` in this model.
        layer_count: the decoder's layers, wherever they are.

    Raises:
        ServingError: there is such a layer.
    """
    here = {
        number
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == layer_count
        for number, layer in enumerate(module)
        if type(layer).__name__ != "PPMissingLayer"  # both engines call it so
    }
    for prefix in converted:
        if prefix not in taken_over and layer_number(prefix) in here:
            raise refusal(
                f"{engine.title}'s {type(model).__name__} has no fused MoE layer with NVFP4 "
                f"experts for {prefix}; the plugin does not know this model"
            )
