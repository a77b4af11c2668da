"""What a gate lets into a model, whatever the order in which it comes."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fp4moe_convert.engines.sglang import SGLANG
from fp4moe_convert.errors import ServingError
from fp4moe_convert.format.contract import (
    FORMAT_VERSION,
    ConvertedSection,
    Geometry,
    LayoutRecord,
    Marker,
)
from fp4moe_convert.layouts.trtllm_nvfp4 import TRTLLM_NVFP4
from fp4moe_convert.serving.converted_layer import LEAVES
from fp4moe_convert.serving.gate import Gate, Judged, gate_for, gate_of, guard

pytestmark = pytest.mark.flashinfer  # needs torch

LAYER = "model.layers.1.mlp.experts"
CONVERTED = ConvertedSection(
    layout=LayoutRecord(
        TRTLLM_NVFP4.name, TRTLLM_NVFP4.parameters, TRTLLM_NVFP4.fingerprint, "0.7.2.post1"
    ),
    layers={LAYER: Geometry(4, 256, 128), "model.layers.2.mlp.experts": Geometry(4, 256, 128)},
    source={"quant_method": "modelopt", "quant_algo": "NVFP4"},
)

Weights = list[tuple[str, torch.Tensor]]
WEIGHT = torch.zeros(1)


def marker(format_version: int = FORMAT_VERSION, **changes: Any) -> tuple[str, torch.Tensor]:
    data = replace(CONVERTED.layout.marker, **changes).encode()
    if format_version != FORMAT_VERSION:
        data = json.dumps({**json.loads(data), "format_version": format_version}).encode()
    return "fp4moe.layout", torch.frombuffer(bytearray(data), dtype=torch.uint8)


EMBED = ("model.embed_tokens.weight", WEIGHT)
HEAD = ("lm_head.weight", WEIGHT)
W13 = (f"{LAYER}.w13_weight", WEIGHT)
OTHER_W2 = ("model.layers.2.mlp.experts.w2_weight", WEIGHT)
SINGLE = (f"{LAYER}.0.gate_proj.weight", WEIGHT)

STOP = (f"{LAYER}.0.down_proj.weight", torch.zeros(0, dtype=torch.uint8))

CONVERTED_WEIGHTS = [EMBED, W13, OTHER_W2, STOP, HEAD]
REST = [(f"{LAYER}.{leaf}", WEIGHT) for leaf in LEAVES if leaf != "w13_weight"]
WHOLE = [*CONVERTED_WEIGHTS, *REST]
ORIGINAL_WEIGHTS = [EMBED, SINGLE, HEAD]


class Model(torch.nn.Module):
    """Takes note of what it is given."""

    def __init__(self, converted: ConvertedSection | None, layer: str | None = LAYER) -> None:
        super().__init__()
        self.given: list[str] = []
        self.delivered: list[str] = []
        guard(self, Gate(converted, {layer: self._deliver} if converted and layer else {}))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, _ in weights:
            self.given.append(name)
        return set(self.given)

    def _deliver(self, leaf: str, _tensor: torch.Tensor) -> str:
        self.delivered.append(leaf)
        return f"{LAYER}.parameters.{leaf}"

    @property
    def untouched(self) -> bool:
        return not self.given and not self.delivered


def running(converted: ConvertedSection | None, layer: str | None = LAYER) -> Model:
    """A model that has been loaded before."""
    model = Model(converted, layer)
    model.load_weights([])
    return model


def as_iterator(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    yield from weights


def test_tensors_of_converted_layers_go_to_their_layers_and_others_to_the_model() -> None:
    model = Model(CONVERTED)
    loaded = model.load_weights([marker(), *WHOLE])
    assert model.given == [EMBED[0], HEAD[0]]
    assert model.delivered == [*LEAVES]  # layer 2 is another process's
    assert loaded == {EMBED[0], HEAD[0], *(f"{LAYER}.parameters.{leaf}" for leaf in LEAVES)}


@pytest.mark.parametrize("order", list(permutations([marker(), *CONVERTED_WEIGHTS]))[::7])
@pytest.mark.parametrize("form", [list, tuple, as_iterator])
def test_any_order_will_do(order: tuple[Any, ...], form: Any) -> None:
    model = Model(CONVERTED)
    model.load_weights(form([*REST, *order]))
    assert sorted(model.given) == sorted([EMBED[0], HEAD[0]])
    assert sorted(model.delivered) == sorted(LEAVES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "fp4moe.layout: format version is 1, .* knows 2; convert again"),
        ({"format_version": 3}, "fp4moe.layout: format version is 3, .*; install a newer"),
        ({"row_order": "xxh3_128:00"}, "row order xxh3_128:00, the model was built for xxh3_128:2"),
        ({"layout": "cutlass"}, "have the layout cutlass .*, the model was built for trtllm_nvfp4"),
        ({"parameters": {"epilogue_tile_m": 64}}, "layout trtllm_nvfp4 .*64.* built for .*128"),
    ],
)
@pytest.mark.parametrize("place", range(len(CONVERTED_WEIGHTS) + 1))
@pytest.mark.parametrize("form", [list, as_iterator])
def test_another_marker_is_refused_before_anything_changes(
    changes: dict[str, Any], message: str, place: int, form: Any
) -> None:
    weights = list(CONVERTED_WEIGHTS)
    weights.insert(place, marker(**changes))
    model = running(CONVERTED)
    with pytest.raises(ServingError, match=rf"^fp4moe: .*{message}.*, or serve the original"):
        model.load_weights(form(weights))
    assert model.untouched


@pytest.mark.parametrize("order", list(permutations(CONVERTED_WEIGHTS)))
@pytest.mark.parametrize("form", [list, as_iterator])
def test_converted_layers_without_a_marker_are_refused(order: tuple[Any, ...], form: Any) -> None:
    model = running(CONVERTED)
    with pytest.raises(ServingError, match=r"comes without fp4moe\.layout"):
        model.load_weights(form(order))
    assert model.untouched


@pytest.mark.parametrize("order", list(permutations(ORIGINAL_WEIGHTS)))
@pytest.mark.parametrize("form", [list, as_iterator])
def test_a_converted_model_refuses_an_original(order: tuple[Any, ...], form: Any) -> None:
    model = running(CONVERTED)
    with pytest.raises(ServingError, match=r"not converted, .*; convert them first with fp4moe-"):
        model.load_weights(form(order))
    assert model.untouched


@pytest.mark.parametrize("form", [list, as_iterator])
def test_a_converted_model_takes_what_is_not_of_its_experts(form: Any) -> None:
    """As of an update of single weights."""
    model = Model(CONVERTED)
    model.load_weights(
        form([EMBED, HEAD, ("model.layers.61.mlp.experts.0.up_proj.weight", WEIGHT)])
    )
    assert len(model.given) == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (SINGLE, f"{LAYER} is converted, but the checkpoint also has '{SINGLE[0]}'; convert "),
        (
            ("model.layers.5.mlp.experts.w2_weight", WEIGHT),
            "layers.5.mlp.experts is not among config.json's converted layers, but 'model.layers.5",
        ),
    ],
)
def test_a_checkpoint_that_is_two_is_refused(extra: Any, message: str) -> None:
    model = Model(CONVERTED)
    with pytest.raises(ServingError, match=message):
        model.load_weights([marker(), *CONVERTED_WEIGHTS, extra])
    assert model.untouched


@pytest.mark.parametrize("order", list(permutations([marker(), *CONVERTED_WEIGHTS]))[::7])
@pytest.mark.parametrize("form", [list, as_iterator])
def test_any_other_model_refuses_converted_weights(order: tuple[Any, ...], form: Any) -> None:
    model = Model(None)
    with pytest.raises(ServingError, match="weights are converted, the model was built for a chec"):
        model.load_weights(form(order))
    assert form is as_iterator or model.untouched


def test_after_a_stop_tensor_no_other_model_sees_what_is_converted() -> None:
    """By name a layer's stop tensor comes first in its file, and the marker may come last."""
    model = Model(None)
    with pytest.raises(ServingError, match="weights are converted"):
        model.load_weights(as_iterator([EMBED, STOP, W13, HEAD, OTHER_W2, marker()]))
    assert model.given == [EMBED[0], HEAD[0]]


@pytest.mark.parametrize("form", [list, as_iterator])
@pytest.mark.parametrize("model", [Model(None), running(None)])
def test_any_other_model_takes_everything_else_in_its_order(model: Model, form: Any) -> None:
    """Converted layers' names, too: an ordinary Inkling has experts of these names."""
    model.given.clear()
    weights = [EMBED, SINGLE, W13, HEAD, OTHER_W2]
    model.load_weights(form(weights))
    assert model.given == [name for name, _ in weights]


class Ring:
    """A streamer that hands out views of the same few pieces of memory, as Run:ai's does, and
    knows how many tensors are alive."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.most = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        pieces = torch.zeros(3, 1)
        handed_out: list[weakref.ref[torch.Tensor]] = []
        for number, (name, _) in enumerate(self.weights):
            tensor = pieces[number % len(pieces)]
            tensor.fill_(number)
            handed_out.append(weakref.ref(tensor))
            self.most = max(self.most, sum(each() is not None for each in handed_out))
            yield name, tensor
            del tensor


class Copying(torch.nn.Module):
    """Keeps a copy of each tensor that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.values[name] = float(tensor)


def test_an_ordinary_checkpoint_loads_from_the_memory_that_stock_needs() -> None:
    """Experts under names of ours, in a first load and in a later one."""
    weights = [
        (f"model.llm.layers.{number}.mlp.experts.{leaf}", WEIGHT)
        for number in range(12)
        for leaf in ("w13_weight", "w2_weight")
    ]
    stock, model = Ring(weights), Copying()
    Copying.load_weights(model, stock)
    expected = model.values.copy()
    assert list(expected.values()) == [float(number) for number in range(24)]
    guard(model, Gate(None, {}))
    for _ in range(2):
        model.values.clear()
        ring = Ring(weights)
        model.load_weights(iter(ring))
        assert model.values == expected
        assert ring.most == stock.most


def test_what_waits_for_the_marker_in_a_running_model_is_a_copy() -> None:
    """Its loader may use the memory again."""
    weights = [EMBED, HEAD, ("model.norm.weight", WEIGHT), ("model.bias", WEIGHT), EMBED]
    model = Copying()
    guard(model, Gate(CONVERTED, {LAYER: lambda _leaf, _tensor: ""}))
    model.load_weights([])
    stream = iter(Ring(weights))
    ours = [(f"{LAYER}.{leaf}", WEIGHT) for leaf in LEAVES]

    def marked_last() -> Iterator[tuple[str, torch.Tensor]]:
        yield from stream
        yield from [*ours, marker()]

    model.load_weights(marked_last())
    names = [name for name, _ in weights]
    assert model.values == {name: float(number) for number, name in enumerate(names)}


STEP = "model.language_model.layers.1.moe"
STEP_CONVERTED = replace(CONVERTED, layers={STEP: Geometry(4, 256, 128)})
STEP_WEIGHTS = [
    EMBED,
    (f"{STEP}.w2_weight", WEIGHT),
    (f"{STEP}.down_proj.weight", torch.zeros(0, dtype=torch.uint8)),
    (f"{STEP}.gate.weight", WEIGHT),
]


@pytest.mark.parametrize("order", list(permutations([marker(), *STEP_WEIGHTS])))
def test_experts_that_an_original_has_in_one_tensor(order: tuple[Any, ...]) -> None:
    model = Model(STEP_CONVERTED, STEP)
    others = [(f"{STEP}.{leaf}", WEIGHT) for leaf in LEAVES if leaf != "w2_weight"]
    model.load_weights(iter([*order, *others]))
    assert sorted(model.given) == sorted([EMBED[0], f"{STEP}.gate.weight"])
    assert sorted(model.delivered) == sorted(LEAVES)
    other = Model(None)
    with pytest.raises(ServingError, match="weights are converted, the model was built for a chec"):
        other.load_weights(list(order))
    assert other.untouched


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "weight_scale_2", "input_scale"])
def test_a_converted_model_refuses_such_an_original(projection: str, leaf: str) -> None:
    original = (f"{STEP}.{projection}.{leaf}", WEIGHT)
    model = Model(STEP_CONVERTED, STEP)
    with pytest.raises(ServingError, match=r"not converted, .*; convert them first with fp4moe-"):
        model.load_weights([EMBED, original])
    with pytest.raises(ServingError, match=f"is converted, but the checkpoint also has '{STEP}"):
        model.load_weights([marker(), *STEP_WEIGHTS, original])
    assert model.untouched
    others = Model(None)
    others.load_weights([EMBED, original])
    assert others.given == [EMBED[0], original[0]]


class Strict(torch.nn.Module):
    """Its loader takes down what parameters there are, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.Linear(2, 3)
        self.head = torch.nn.Linear(3, 2)
        self.seen: list[str] = []
        self.of_experts: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.seen = [name for name, _ in self.named_parameters()]
        self.of_experts = [name for name, _ in self.experts.named_parameters()]
        assert list(weights)
        assert self.experts.weight.shape == (3, 2)


@pytest.mark.parametrize("fails", [False, True])
def test_a_loader_does_not_see_what_the_gate_fills(fails: bool) -> None:
    """While it loads, and not after, whether it has loaded or not."""
    model = Strict()
    before = dict(model.named_parameters())
    guard(model, Gate(None, {}), filled=[model.experts])
    for _ in range(2):
        if fails:
            with pytest.raises(AssertionError):
                model.load_weights([])
        else:
            model.load_weights([EMBED])
        assert model.seen == ["head.weight", "head.bias"]
        assert model.of_experts == ["weight", "bias"]
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)


def test_the_gate_of_a_model_that_an_engine_has_built(caplog: pytest.LogCaptureFixture) -> None:
    """One line tells that the plugin is at work, where it has a layer to take over."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))

    def gate(layers: dict[str, Any], layer_count: int | None) -> Gate:
        return gate_for(model, CONVERTED, layers, layer_count=layer_count, engine=SGLANG)

    with caplog.at_level(logging.INFO):
        assert gate({}, None).layers == {}
        assert caplog.messages == []
        assert gate({LAYER: print}, 2).layers == {LAYER: print}
    (line,) = caplog.messages
    assert line.startswith("fp4moe: format version 2, 1 MoE layers taken over, row order xxh3_128:")
    assert line.endswith(" checked against this SGLang's FlashInfer")
    with pytest.raises(ServingError, match=f"no fused MoE layer with NVFP4 experts for {LAYER}; "):
        gate({}, 2)


def test_a_marker_may_have_a_prefix() -> None:
    name, tensor = marker()
    model = Model(CONVERTED)
    model.load_weights([(f"language_model.{name}", tensor), W13, *REST])
    assert model.delivered == [*LEAVES]


def test_the_first_load_keeps_no_tensor() -> None:
    """A loader may hand tensors out as they come."""
    model = Model(CONVERTED)
    handed_out: list[weakref.ref[torch.Tensor]] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in [*WHOLE, *WHOLE, marker()]:
            # Three loops, the gate's and the model's, still name what they have seen last.
            assert sum(each() is not None for each in handed_out) <= 3
            own = tensor.clone()
            handed_out.append(weakref.ref(own))
            yield name, own
            del own
            if name == HEAD[0]:
                assert model.given[-1] == HEAD[0]

    model.load_weights(stream())
    assert model.given == 2 * [EMBED[0], HEAD[0]]
    assert model.delivered == [*LEAVES, *LEAVES]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([EMBED, W13, marker(row_order="xxh3_128:00")], "row order xxh3_128:00"),
        ([EMBED, W13, HEAD], "w13_weight' comes without fp4moe.layout"),
        ([EMBED, SINGLE], "these weights are not converted"),
    ],
)
def test_the_first_load_is_refused_in_the_end(weights: Weights, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        Model(CONVERTED).load_weights(as_iterator(weights))


def test_a_later_load_is_refused_before_anything_changes() -> None:
    model = Model(CONVERTED)
    model.load_weights(as_iterator([*WHOLE, marker()]))
    model.given.clear()
    model.delivered.clear()
    with pytest.raises(ServingError, match="row order"):
        model.load_weights(as_iterator([*CONVERTED_WEIGHTS, marker(row_order="xxh3_128:00")]))
    assert model.untouched


@pytest.mark.parametrize("form", [list, as_iterator])
@pytest.mark.parametrize("start", [Model, running])
def test_a_model_without_converted_layers_needs_no_marker(start: Any, form: Any) -> None:
    """For a draft vLLM passes over files that have nothing for it: the marker's, but not each that
    also has tensors of converted layers."""
    model = start(CONVERTED, None)
    model.load_weights(form([EMBED, W13, HEAD, OTHER_W2, STOP]))
    assert model.given == [EMBED[0], HEAD[0]]
    with pytest.raises(ServingError, match="these weights are not converted"):
        model.load_weights(form([EMBED, SINGLE]))
    with pytest.raises(ServingError, match="row order xxh3_128:00"):
        model.load_weights(form([W13, marker(row_order="xxh3_128:00")]))


def test_nothing_waits_for_a_marker_that_is_not_needed() -> None:
    model = running(CONVERTED, None)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield EMBED
        yield W13
        assert model.given == [EMBED[0]]
        yield HEAD

    model.load_weights(stream())
    assert model.given == [EMBED[0], HEAD[0]]


def test_a_stream_is_judged_once_and_by_its_first_tensor() -> None:
    gate = gate_of(Model(CONVERTED))
    judged = gate.judge(as_iterator([marker(), W13]))
    assert gate.judge(judged) is judged
    with pytest.raises(ServingError):
        gate.judge(as_iterator([EMBED, marker(row_order="xxh3_128:00")]))
    assert list(gate.judge(iter(()))) == []
    ((_, given),) = gate.judge([EMBED])
    assert given is EMBED[1]  # a list stays where it is


INCOMPLETE = [
    ([*CONVERTED_WEIGHTS, *REST[1:]], rf"^fp4moe: {REST[0][0]} was not loaded: missing from"),
    ([EMBED, OTHER_W2, STOP, HEAD], rf"^fp4moe: {W13[0]}, .* were not loaded: missing"),
]
"""A tensor of a layer that is here is missing, or all of them."""


@pytest.mark.parametrize(("weights", "message"), INCOMPLETE)
def test_an_incomplete_checkpoint_is_refused(weights: Weights, message: str) -> None:
    model = Model(CONVERTED)
    with pytest.raises(ServingError, match=message):
        model.load_weights([marker(), *weights])
    assert model.untouched
    with pytest.raises(ServingError, match=message):
        model.load_weights(as_iterator([*weights, marker()]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [*INCOMPLETE, ([*WHOLE, SINGLE], f"{LAYER} is converted, but the checkpoint also has ")],
)
def test_a_folder_that_is_not_a_whole_converted_checkpoint_is_refused(
    tmp_path: Path, weights: Weights, message: str
) -> None:
    write_folder(tmp_path, [marker(), *weights])
    with pytest.raises(ServingError, match=message):
        gate_of(Model(CONVERTED)).check_folder(str(tmp_path))


def write_folder(folder: Path, weights: Weights, *, index: bool = True) -> None:
    save_file({name: tensor.clone() for name, tensor in weights}, folder / "a.safetensors")
    if index:
        names = {"weight_map": {name: "a.safetensors" for name, _ in weights}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(names))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    ("converted", "weights", "refused"),
    [
        (CONVERTED, [marker(), *WHOLE], False),
        (CONVERTED, [marker(row_order="xxh3_128:00"), *CONVERTED_WEIGHTS], True),
        (CONVERTED, CONVERTED_WEIGHTS, True),
        (CONVERTED, ORIGINAL_WEIGHTS, True),
        (None, [marker(), *CONVERTED_WEIGHTS], True),
        (None, ORIGINAL_WEIGHTS, False),
    ],
)
def test_a_folder_is_judged_by_its_names(
    tmp_path: Path,
    converted: ConvertedSection | None,
    weights: Weights,
    refused: bool,
    index: bool,
) -> None:
    model = Model(converted)
    write_folder(tmp_path, weights, index=index)
    if refused:
        with pytest.raises(ServingError):
            gate_of(model).check_folder(str(tmp_path))
    else:
        gate_of(model).check_folder(str(tmp_path))
    assert model.untouched


@pytest.mark.parametrize("converted", [CONVERTED, None])
@pytest.mark.parametrize(
    "index", [b"", b"[]", b"{}", b'{"weight_map": 1}', b'{"weight_map": {"a": 1}}', b"\xff"]
)
def test_a_folder_with_a_malformed_index_is_refused(
    tmp_path: Path, converted: ConvertedSection | None, index: bytes
) -> None:
    """An update that has begun cannot go back."""
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ServingError, match=r"^fp4moe: model\.safetensors\.index\.json: .*; serve "):
        gate_of(Model(converted)).check_folder(str(tmp_path))


def test_a_folder_whose_index_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(ServingError, match=r"^fp4moe: model\.safetensors\.index\.json: .*direct"):
        gate_of(Model(CONVERTED)).check_folder(str(tmp_path))


def test_what_is_no_folder_of_safetensors_is_judged_later(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for folder in (tmp_path, tmp_path / "model.gguf", "an/id-of-the-hub"):
        gate_of(Model(CONVERTED)).check_folder(str(folder))


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_a_marker_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.safetensors").write_bytes(content)
    index = {"weight_map": {"fp4moe.layout": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ServingError, match=r"^fp4moe: a\.safetensors: "):
        gate_of(Model(None)).check_folder(str(tmp_path))


def test_a_model_that_nothing_guards_has_a_gate_of_its_own() -> None:
    gate = gate_of(torch.nn.Linear(1, 1))
    assert (gate.converted, gate.layers) == (None, {})


def test_sglang_finds_the_function_behind_the_method() -> None:
    assert Model(None).load_weights.__func__ is Model.load_weights  # type: ignore[attr-defined]


def test_the_marker_of_a_section_says_what_the_section_says() -> None:
    _, tensor = marker()
    assert Marker.decode(tensor.numpy().tobytes()) == CONVERTED.layout.marker
    assert isinstance(gate_of(Model(None)).judge([]), Judged)
