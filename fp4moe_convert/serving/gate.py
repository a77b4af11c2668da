"""What is loaded into a model: judged by name, before the model sees a tensor.

An engine has many ways to load weights: a start, a draft model, an update from a folder or from
another process, a call of ``model.load_weights``. All of them end in that method, with tensors
under the names that they have in a checkpoint. So a gate stands before it, in every model that an
engine with the plugin builds. It also takes the tensors of converted layers to their layers: the
names are ours, and no model's own loader need know them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..engines.engine import Engine
from ..errors import FormatError
from ..format.contract import FORMAT_VERSION, MARKER_NAME, ConvertedSection, Marker
from ..format.files import INDEX_NAME
from ..format.untrusted import decode
from ..source.names import converted_layer, original_layer
from .checks import CONVERT_AGAIN, refusal, refuse_format
from .converted_layer import LEAVES, check_none_missing, check_taken_over
from .fast_copy import COPIER

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Deliver = Callable[[str, "torch.Tensor"], str]
"""Loads a tensor into the parameter of a layer that has this leaf; returns the parameter's name in
the model."""


class Gate:
    """Stands before one model's ``load_weights``."""

    def __init__(self, converted: ConvertedSection | None, layers: Mapping[str, Deliver]) -> None:
        """
        Args:
            converted: the section of the checkpoint that the model was built for; None if that is
                not a converted one.
            layers: its converted layers that this model has, by their prefix in the checkpoint.
                Tensors of the others are passed over: they are another process's.
        """
        self.converted = converted
        self.layers = layers

    def judge(self, weights: Iterable[tuple[str, torch.Tensor]], *, hold: bool = True) -> Judged:
        """Make sure that tensors are for this model.

        A converted checkpoint begins with its marker, and has all tensors of each layer that is
        here. Those of any other come out as they come, in their order.

        Args:
            weights: names and tensors. A list is judged whole before this returns. An iterator is
                judged as it is read. This reads from it until the first tensor may come out.
            hold: let copies of what an iterator has before the marker wait for it, so that a
                refusal leaves a running model as it was. If not, all comes out at once, and a
                refusal may come last.

        Raises:
            ServingError: they are not. From an iterator, when the tensor comes that tells.
        """
        if isinstance(weights, Judged):
            return weights
        is_list = isinstance(weights, (list, tuple))
        if self.converted is None:
            judged = _unless_marked(weights)
        else:
            judged = _once_marked(weights, self.converted, self.layers, hold=hold and not is_list)
        return Judged(iter(list(judged)) if is_list else judged)

    def check_folder(self, folder: str) -> None:
        """Judge a local folder by the names of its tensors, before anything is changed for it. A
        name on the Hub, or a file of another format, is judged when its tensors come.

        Raises:
            ServingError: its tensors are not for this model, or a file cannot be read.
        """
        files = _files_of_tensors(Path(folder))
        for _ in self.judge(self._described(Path(folder), files), hold=False):
            pass

    def _described(self, folder: Path, files: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
        """The tensors of a folder, the marker first. Of the others only those are read that should
        be stop tensors."""
        is_converted = MARKER_NAME in files
        if is_converted:
            yield MARKER_NAME, _read_tensor(folder / files[MARKER_NAME], MARKER_NAME)
        layers = self.converted.layers if self.converted is not None and is_converted else {}
        for name, file in files.items():
            if name != MARKER_NAME:
                is_of_layer = original_layer(name) in layers
                yield name, _read_tensor(folder / file, name) if is_of_layer else None

    def distribute(self, judged: Judged, delivered: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Take the tensors of converted layers to their layers, and leave the others.

        Args:
            judged: by `judge`.
            delivered: is given the names, in the model, of the parameters that were loaded.
        """
        if self.converted is None:
            yield from judged
            return
        for name, tensor in judged:
            kind, layer = _kind(name, tensor)
            if kind is not _Kind.CONVERTED:
                yield name, tensor
            elif deliver := self.layers.get(layer):
                delivered.add(deliver(name.removeprefix(f"{layer}."), tensor))


class Judged(Iterator[tuple[str, "torch.Tensor"]]):
    """Tensors that a gate lets through. The first has been judged."""

    def __init__(self, stream: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._first = [tensor for tensor in [next(stream, None)] if tensor is not None]
        self._stream = stream

    def __next__(self) -> tuple[str, torch.Tensor]:
        return self._first.pop() if self._first else next(self._stream)


class GuardedLoader:
    """Stands in for the ``load_weights`` of a model."""

    def __init__(self, gate: Gate, stock: Callable[..., Any], unlisted: Callable[[], Any]) -> None:
        self.gate = gate
        self.stock = stock
        self.unlisted = unlisted
        self.called = False
        # SGLang asks the function behind the method what it supports.
        self.__func__ = getattr(stock, "__func__", stock)

    def __call__(self, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kw: Any) -> Any:
        delivered: set[str] = set()
        # The first load of a model has nothing to leave as it was. Of a loader that hands out
        # tensors as they come, nearly all of a checkpoint would wait for the marker in memory.
        hold, self.called = self.called, True
        ours = self.gate.distribute(self.gate.judge(weights, hold=hold), delivered)
        try:
            with self.unlisted():
                loaded = self.stock(ours, *args, **kw)
        finally:
            COPIER.give_back()
        return loaded | delivered if isinstance(loaded, set) else loaded


def guard(model: torch.nn.Module, gate: Gate, *, filled: Sequence[torch.nn.Module] = ()) -> None:
    """Put a gate before a model's ``load_weights``.

    Args:
        model: any.
        gate: what judges and distributes.
        filled: modules whose parameters come from the gate alone. The model's own loader does not
            see them: SGLang's Step-3.5 insists on having loaded all that it sees.
    """
    if load_weights := getattr(model, "load_weights", None):
        unlisted = partial(_unlisted, frozenset(filled), model)
        model.load_weights = GuardedLoader(gate, load_weights, unlisted)  # type: ignore[assignment]


@contextmanager
def _unlisted(filled: Collection[torch.nn.Module], model: torch.nn.Module) -> Iterator[None]:
    """Keep the parameters of some modules out of what the modules around them list for a while.
    What they list themselves stays: SGLang's Bailing notes it for EPLB while it loads."""
    hidden = {id(each) for module in filled for each in module.parameters(recurse=False)}
    around = [
        module
        for module in model.modules()
        if module not in filled and any(each in filled for each in module.modules())
    ]
    for module in around:
        module.named_parameters = _without(hidden, module.named_parameters)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in around:
            del module.named_parameters


def _without(hidden: Collection[int], named_parameters: Callable[..., Any]) -> Callable[..., Any]:
    def listed(*args: Any, **kw: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return (each for each in named_parameters(*args, **kw) if id(each[1]) not in hidden)

    return listed


def gate_for(
    model: torch.nn.Module,
    converted: ConvertedSection,
    layers: Mapping[str, Deliver],
    *,
    layer_count: int | None,
    engine: Engine,
) -> Gate:
    """The gate of a model that an engine has built for a converted checkpoint. Logs that the plugin
    is at work.

    Args:
        model: as the engine built it.
        converted: the checkpoint's section.
        layers: the converted layers that the plugin has taken over in this model.
        layer_count: the decoder's layers, wherever they are; None if the model is a draft with
            layers of its own, which are never converted.

    Raises:
        ServingError: a layer that is converted in the checkpoint is not so in the model.
    """
    if layer_count is not None:
        check_taken_over(model, converted.layers, layers, layer_count=layer_count, engine=engine)
    if layers:
        logger.info(
            "fp4moe: format version %d, %d MoE layers taken over, row order %s checked against "
            "this %s's FlashInfer",
            FORMAT_VERSION,
            len(layers),
            converted.layout.row_order,
            engine.title,
        )
    return Gate(converted, layers)


def gate_of(model: torch.nn.Module) -> Gate:
    """The gate before a model's ``load_weights``; one that is for no converted checkpoint, where
    the model was built by something that the plugin does not hook into."""
    load_weights = getattr(model, "load_weights", None)
    return load_weights.gate if isinstance(load_weights, GuardedLoader) else Gate(None, {})


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    """The file of each tensor."""


class _Kind(Enum):
    """What a tensor is in a checkpoint."""

    MARKER = auto()
    CONVERTED = auto()
    """Of a converted layer, by its name."""
    STOP = auto()
    """Empty: it stops engines without the plugin."""
    ORIGINAL = auto()
    """Of experts as an original has them."""
    OTHER = auto()


def _kind(name: str, tensor: torch.Tensor | None) -> tuple[_Kind, str]:
    """What a tensor is, and of which layer's experts."""
    if (converted := converted_layer(name)) is not None:
        return _Kind.CONVERTED, converted
    if (original := original_layer(name)) is not None:
        is_empty = tensor is not None and not tensor.numel()
        return _Kind.STOP if is_empty else _Kind.ORIGINAL, original
    # A loader may put the name of a part of the model before those of its tensors.
    if name.endswith(MARKER_NAME) and name.removesuffix(MARKER_NAME)[-1:] in ("", "."):
        return _Kind.MARKER, ""
    return _Kind.OTHER, ""


def _once_marked(
    weights: Iterable[tuple[str, Any]],
    converted: ConvertedSection,
    here: Collection[str],
    *,
    hold: bool,
) -> Iterator[tuple[str, Any]]:
    """For a converted model. Of the layers that are not ``here`` nothing is used. Where none is, as
    in a draft, an engine may pass over whole files, that of the marker too."""
    waiting: list[tuple[str, Any]] = []
    marked = False
    came: dict[str, None] = {}  # names of converted layers' tensors, in order
    for name, tensor in weights:
        match _kind(name, tensor):
            case _Kind.MARKER, _:
                _check_marker(tensor, converted)
                marked = True
                yield from waiting
                waiting.clear()
            case _Kind.CONVERTED | _Kind.STOP, layer if layer not in converted.layers:
                raise refusal(
                    f"{layer} is not among config.json's converted layers, but {name!r} is among "
                    "the weights",
                    CONVERT_AGAIN,
                )
            case _Kind.STOP, _:
                pass
            case _Kind.ORIGINAL, layer if layer in converted.layers and marked:
                raise refusal(
                    f"{layer} is converted, but the checkpoint also has {name!r}", CONVERT_AGAIN
                )
            case _Kind.ORIGINAL, layer if layer in converted.layers:
                raise refusal(
                    f"{name!r}: these weights are not converted, the model was built for a "
                    "checkpoint that is",
                    "convert them first with fp4moe-convert",
                )
            case kind, _:
                if kind is _Kind.CONVERTED:
                    came[name] = None
                if marked or not (hold and here):
                    yield name, tensor
                else:  # a copy: loaders use a tensor's memory again
                    waiting.append((name, tensor.clone()))
    if marked:
        wanted = (f"{layer}.{leaf}" for layer in here for leaf in LEAVES)
        check_none_missing(name for name in wanted if name not in came)
    elif came and here:
        raise refusal(
            f"{next(iter(came))!r} comes without {MARKER_NAME}, which tells how it is laid out",
            "load all of a converted folder in one call",
        )
    yield from waiting


def _unless_marked(weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """For any other model."""
    # These names are no proof: another exporter may give them to another layout. After an empty
    # tensor of an expert they are, and wait, so that this refuses them and not the model.
    waiting: list[tuple[str, Any]] = []
    for name, tensor in weights:
        match _kind(name, tensor):
            case _Kind.MARKER, _:
                raise refusal(
                    "these weights are converted, the model was built for a checkpoint that is not",
                    "start the engine from the converted folder, with its own config.json",
                )
            case kind, _ if kind is _Kind.STOP or (kind is _Kind.CONVERTED and waiting):
                waiting.append((name, tensor))
            case _:
                yield name, tensor
    yield from waiting


def _files_of_tensors(folder: Path) -> Mapping[str, str]:
    """The file of each tensor, as the index has them; without one, as the safetensors files."""
    try:
        return decode((folder / INDEX_NAME).read_bytes(), _Index).weight_map
    except (FileNotFoundError, NotADirectoryError):
        shards = sorted(folder.glob("*.safetensors"))
    except (OSError, ValueError) as error:
        raise refusal(f"{INDEX_NAME}: {error}") from error
    files: dict[str, str] = {}
    for shard in shards:
        with _opened(shard) as tensors:
            files |= dict.fromkeys(tensors.keys(), shard.name)
    return files


def _read_tensor(shard: Path, name: str) -> torch.Tensor:
    with _opened(shard) as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """A safetensors file, open."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise refusal(f"{shard.name}: {error}") from error


def _check_marker(tensor: torch.Tensor, converted: ConvertedSection) -> None:
    try:
        found = Marker.decode(tensor.cpu().numpy().tobytes())
    except FormatError as error:
        raise refuse_format(error) from error
    expected = converted.layout.marker
    if found.row_order != expected.row_order:
        raise refusal(
            f"the weights were laid out for the row order {found.row_order}, the model was built "
            f"for {expected.row_order}",
            CONVERT_AGAIN,
        )
    if found != expected:
        raise refusal(
            f"the weights have the layout {found.layout} {found.parameters}, the model was built "
            f"for {expected.layout} {expected.parameters}",
            CONVERT_AGAIN,
        )
