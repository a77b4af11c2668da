"""Whether a model is all there. A shard that never arrived may leave no other trace than a layer
that differs from its neighbours.

Engines do not notice: of a quantized model they leave uninitialised what no shard has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice

from ..errors import CheckpointError
from ..format.contract import Geometry
from ..format.files import CONFIG_NAME, INDEX_NAME
from ..storage.header import TensorInfo
from ..storage.local import UnlistedSnapshot
from .checkpoint import Checkpoint, missing_by_name
from .names import IN_LAYER, converted_layer, is_mtp_by_name, original_layer
from .text_config import TextConfig

_NUMBERED = re.compile(r"(?:^|\.)[0-9]+(?:\.|$)")
_DEEPEST = 8
"""How deep in a layer experts are looked for; mlp.experts is the rule."""
_KINDS = 8
"""Of layers, beyond which a model's layers have nothing in common."""
_SIZES = {
    "H": ("hidden_size", "moe_latent_size", "routed_expert_hidden_size"),
    "I": ("moe_intermediate_size",),
}
"""Keys that mean the experts' alone; the experts of Nemotron-H and of Kimi K3 may be narrower than
the model."""
_ATTENTION = re.compile(r"att|qkv|\b[qk]_proj|mamba|ssm|rwkv|conv|recurr|delta|A_log")
"""What is in the names of all that lets tokens see each other, and in those of some norms."""


def warnings_on(checkpoint: Checkpoint, layers: Mapping[str, Geometry]) -> list[str]:
    """What a person should know of a checkpoint before it is converted.

    Args:
        checkpoint: NVFP4.
        layers: its expert layers that can be converted, by prefix.

    Returns:
        A line for each file that is not taken for part of the model, for each part of a model that
        seems to be missing, and for each size that config.json has otherwise.

    Raises:
        CheckpointError: something is missing without which no model works.
    """
    lines = [f"{name}: {why}, left out" for name, why in checkpoint.left_out.items()]
    if isinstance(checkpoint.store, UnlistedSnapshot):
        lines.insert(
            0,
            f"{checkpoint.location}: the cache has no list of this snapshot's files, so a "
            "tokenizer or another file may be missing unnoticed; download the model to be certain",
        )
    decoder = _Decoder(checkpoint, layers)
    try:
        decoder.check()
    except CheckpointError as error:
        strays = (n for n in checkpoint.left_out if n.endswith(".safetensors") and "/" not in n)
        stray = next(strays, None)
        hint = "are all shards there?"
        if stray is not None:
            hint = f"is it in {stray}, which {INDEX_NAME} does not name?"
        raise CheckpointError(f"{checkpoint.location}: {error}; {hint}") from None
    return [
        *lines,
        *_counted(checkpoint),
        *decoder.differences(),
        *_around_the_layers(decoder.outside, checkpoint.text),
        *_other_sizes(layers, checkpoint.text),
    ]


class _Decoder:
    """What modules the layers of a decoder have."""

    def __init__(self, checkpoint: Checkpoint, prefixes: Iterable[str]) -> None:
        experts: dict[str, set[str]] = {}
        for prefix in prefixes:
            if match := IN_LAYER.fullmatch(prefix):
                experts.setdefault(match[1], set()).add(match[3])
        self.count = checkpoint.text.layer_count or 0
        self.layers: dict[str, dict[int, set[str]]] = {stack: {} for stack in experts}
        """By prefix and number; modules relative to the layer."""
        parents = {s: {_parent(path) for path in experts[s]} for s in experts}
        self.experts = experts
        """Where the experts are in a layer, by the same prefix."""
        self.outside: list[TensorInfo] = []
        """Tensors of no layer of anything."""
        self.has_attention = False
        for shard in checkpoint.shards:
            for tensor in shard.header.tensors:
                match = IN_LAYER.fullmatch(tensor.name)
                if match and match[1] in experts and int(match[2]) < self.count:
                    stack, number, rest = match.groups()
                    module = _module(rest, experts[stack], parents[stack])
                    self.layers[stack].setdefault(int(number), set()).add(module)
                    self.has_attention = self.has_attention or _is_attention(rest)
                elif not _NUMBERED.search(tensor.name) and not is_mtp_by_name(tensor.name):
                    self.outside.append(tensor)

    def check(self) -> None:
        """Raises CheckpointError: layers have no tensors, or experts alone, or nothing is around
        them."""
        present = set().union(*self.layers.values())
        missing = self.count - len(present)
        if self.layers and missing:
            absent = (number for number in range(self.count) if number not in present)
            raise CheckpointError(
                f"{CONFIG_NAME} counts {self.count} layers, but no shard has a tensor of "
                f"{_named(' or '.join(self.layers), absent, missing)}"
            )
        for stack, layers in self.layers.items():
            bare = sorted(number for number in layers if layers[number] <= self.experts[stack])
            if bare:
                raise CheckpointError(
                    f"no shard has anything but experts of {_named(stack, bare, len(bare))}"
                )
        if self.layers and not self.outside:
            raise CheckpointError("no shard has embeddings, a head, or anything outside the layers")

    def differences(self) -> Iterator[str]:
        """Layers that lack what most of the otherwise same layers have.

        Layers of different kinds (dense, linear attention, Mamba) each have something that the
        others have not, so none of them has less than another.
        """
        for stack, layers in self.layers.items():
            counts = Counter(map(frozenset, layers.values()))
            kinds = dict(counts.most_common(_KINDS))
            lacking: dict[frozenset[str], list[int]] = {}
            for number, modules in sorted(layers.items()):
                alike = counts[frozenset(modules)]
                fuller = [kind for kind in kinds if modules < kind and kinds[kind] >= alike]
                if fuller:
                    missing = frozenset(min(fuller, key=len) - modules)
                    lacking.setdefault(missing, []).append(number)
            for missing, numbers in lacking.items():
                names = ", ".join(sorted(missing))
                where = _named(stack, numbers, len(numbers))
                yield f"{where}: no {names} in any shard, unlike other layers"
        if self.layers and not self.has_attention:
            yield f"{', '.join(self.layers)}: no attention in any shard"


def _is_attention(tensor: str) -> bool:
    return _ATTENTION.search(tensor) is not None and "norm" not in tensor


def _counted(checkpoint: Checkpoint) -> Iterator[str]:
    """Shards that the names of others count. An index may have been made without them."""
    names = {shard.name for shard in checkpoint.shards}
    missing = [name for name in missing_by_name(names) if name not in checkpoint.left_out]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield (
            f"{missing[0]}: {INDEX_NAME} does not name it, nor is it there, though the names of "
            f"other shards count it{more}"
        )


def _parent(experts: str) -> str:
    """The module that experts lie in. Step-3.5's lie beside their router in ``moe`` itself."""
    return experts.rpartition(".")[0] if experts.endswith("experts") else experts


def _module(rest: str, experts: Set[str], parents: Set[str]) -> str:
    """The module of a layer that a tensor belongs to. What lies beside the experts is told apart:
    a router, shared experts."""
    name = f".{rest}"
    own = original_layer(name) or converted_layer(name)
    if own is not None and own[1:] in experts:
        return own[1:]
    parts = rest.split(".", _DEEPEST)
    module = parts[0]
    for depth in range(1, len(parts)):
        if ".".join(parts[:depth]) in parents:
            module = ".".join(parts[: depth + 1])
    return module


def _around_the_layers(outside: Sequence[TensorInfo], text: TextConfig) -> Iterator[str]:
    """Embeddings and head are known by their rows, whatever they are called."""
    rows = text.vocabulary
    if outside and rows is not None:
        found = sum(len(t.shape) == 2 and t.shape[0] >= rows for t in outside)
        if found == 0:
            yield f"no shard has embeddings: {CONFIG_NAME} counts {rows} tokens"
        elif found == 1 and not text.ties_embeddings:
            yield (
                f"no shard has both embeddings and a head, and {CONFIG_NAME} says that they are "
                "not the same"
            )
        if not any(len(t.shape) == 1 for t in outside):
            yield "no shard has a norm after the layers"


def _other_sizes(layers: Mapping[str, Geometry], text: TextConfig) -> Iterator[str]:
    """Engines make the experts by config.json, and the plugins refuse those of other sizes."""
    for letter, keys in _SIZES.items():
        said = {key: text.own[key] for key in keys if type(text.own.get(key)) is int}
        found = {
            prefix: sizes.hidden if letter == "H" else sizes.intermediate
            for prefix, sizes in layers.items()
        }
        others = {p: size for p, size in found.items() if said and size not in said.values()}
        for prefix, size in islice(others.items(), 1):
            more = f", and {len(others) - 1} more" if len(others) > 1 else ""
            words = " and ".join(f"{key} {value}" for key, value in said.items())
            yield f"{prefix}: has {letter} = {size}, {CONFIG_NAME} says {words}{more}"


def _named(stack: str, numbers: Iterable[int], count: int) -> str:
    """The names of ``count`` layers, of many the first: ``model.layers.3, 4, 5``."""
    more = f" and {count - 5} more" if count > 5 else ""
    return f"{stack}.{', '.join(map(str, islice(numbers, 5)))}{more}"
