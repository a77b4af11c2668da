"""One layer's parameters on one rank, as the plugins fill them: the shipped code, and no engine.

``data/golden`` says what each engine's own loader ends with. Parameters of the recorded shapes are
created here as an engine creates them, with whatever is in memory, and must hold the same bytes
once `ConvertedLayer` has filled them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from support.golden import CASES, ENGINES, PREFIX, runs_of
from support.slow_bus import SlowBus

from fp4moe_convert.engines import tensor_parallel_sizes
from fp4moe_convert.engines.engine import Model
from fp4moe_convert.engines.vllm import VLLM
from fp4moe_convert.errors import ServingError
from fp4moe_convert.format.contract import Geometry
from fp4moe_convert.layouts.trtllm_nvfp4 import padded_intermediate
from fp4moe_convert.serving import fast_copy, slices
from fp4moe_convert.serving.converted_layer import (
    COMPRESSED_TENSORS_NAMES,
    LEAVES,
    ConvertedLayer,
    check_taken_over,
    converted_layer_of,
)
from fp4moe_convert.serving.fast_copy import Copier
from fp4moe_convert.serving.slices import copy_share, runs

pytestmark = pytest.mark.flashinfer

DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
GARBAGE = 0xA5
GEOMETRY = Geometry(experts=4, hidden=256, intermediate=128)
ALL = range(128)


def garbage(dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A new parameter, with what somebody left in its memory."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    tensor.view(torch.uint8).fill_(GARBAGE)
    return tensor


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A NaN never equals itself, its bytes do."""
    return torch.atleast_1d(tensor).contiguous().view(torch.uint8)


def digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(as_bytes(tensor).numpy().tobytes())


def read_layer(folder: Path) -> dict[str, torch.Tensor]:
    """The eight tensors of a converted folder, as an engine reads them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return {leaf: found[f"{PREFIX}.{leaf}"] for leaf in LEAVES}


@pytest.fixture(scope="module")
def layer_of(
    golden_folder: Callable[[str], Path],
) -> Callable[[str], tuple[Geometry, dict[str, torch.Tensor]]]:
    """Sizes and tensors of a case in data/golden."""
    latest: dict[str, Any] = {}

    def read(case: str) -> Any:
        if case not in latest:
            latest.clear()
            spec = CASES[case]
            gated = not spec.ungated
            geometry = Geometry(spec.experts, spec.hidden, spec.intermediate, gated)
            latest[case] = geometry, read_layer(golden_folder(case))
        return latest[case]

    return read


@pytest.fixture
def through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares get to where they belong as on a GPU."""
    monkeypatch.setattr(fast_copy, "CHUNK_NBYTES", 10_000)
    monkeypatch.setattr(fast_copy, "MIN_NBYTES", 1)
    monkeypatch.setattr(slices, "COPIER", Copier(lambda _: BUS))


BUS = SlowBus()
NARROW = [case for case, spec in CASES.items() if spec.hidden < 1000]


@pytest.fixture(scope="module")
def file(golden_folder: Callable[[str], Path]) -> dict[str, torch.Tensor]:
    """The tensors of a layer of `GEOMETRY`; no two experts of it are alike."""
    return read_layer(golden_folder("E4-H256-I128"))


@pytest.fixture
def layer() -> ConvertedLayer:
    return ConvertedLayer(PREFIX, GEOMETRY)


def refuses(reason: str, remedy: str | None = None) -> Any:
    """One message: what is wrong, and what to do."""
    way_out = f"{f'{remedy}, or ' if remedy else ''}serve the original checkpoint instead"
    return pytest.raises(ServingError, match=rf"^fp4moe: {reason}; {way_out}$")


AGAIN = "convert the checkpoint again"


def test_an_engine_may_have_names_of_its_own() -> None:
    """Those of compressed-tensors, of which two are the file's once the engine has renamed them."""
    layer = ConvertedLayer(PREFIX, GEOMETRY, COMPRESSED_TENSORS_NAMES)
    leaves = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    names = [f"{matrix}_{leaf}" for matrix in ("w13", "w2") for leaf in leaves]
    holder = SimpleNamespace(**{name: torch.nn.Parameter(torch.ones(1)) for name in names})
    assert layer.parameter_of(holder, "w2_weight_scale_2") is holder.w2_weight_global_scale
    assert [layer.leaf_of(holder, getattr(holder, name)) for name in names] == [
        f"{matrix}_{leaf}"
        for matrix in ("w13", "w2")
        for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale")
    ]
    packed = holder.w13_weight = vars(holder).pop("w13_weight_packed")
    holder.w2_weight_scale_2 = 1 / holder.w2_weight_global_scale
    assert layer.leaf_of(holder, packed) == "w13_weight"
    assert layer.parameter_of(holder, "w2_weight_scale_2") is holder.w2_weight_global_scale
    with pytest.raises(LookupError, match="has no such parameter"):
        layer.leaf_of(holder, torch.ones(1))


def test_sizes_that_the_model_does_not_have_are_refused(layer: ConvertedLayer) -> None:
    layer.check_geometry(Geometry(4, 256, 128))
    for model in (Geometry(5, 256, 128), Geometry(4, 256, 128, gated=False)):
        both = f"{re.escape(str(GEOMETRY))} in config.json, {re.escape(str(model))} in the model"
        with refuses(f"{PREFIX} is {both}"):
            layer.check_geometry(model)


def part_of(run: Mapping[str, Any], geometry: Geometry) -> range:
    """The values of I that a rank holds: SGLang pads them before it cuts, vLLM after."""
    sglang = run["engine"] == "sglang"
    width = run["intermediate"] if sglang else geometry.intermediate // run["tp_size"]
    start, is_last = width * run["tp_rank"], run["tp_rank"] == run["tp_size"] - 1
    return range(start, start + (run["intermediate"] if is_last else width))


# --- every rank that was recorded -----------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_each_rank_ends_with_the_bytes_of_its_engine(
    layer_of: Callable[[str], Any], case: str, engine: str
) -> None:
    geometry, tensors = layer_of(case)
    served = tensor_parallel_sizes(Model((), {}, {}), [geometry])[engine]
    checked = 0
    for run in runs_of(case, engine):
        if run["tp_size"] not in served:
            continue  # refused by the engine, or by the plugin: vLLM cuts elsewhere
        layer = ConvertedLayer(PREFIX, geometry)
        each = geometry.experts // run["ep_size"]
        local = range(run["ep_rank"] * each, (run["ep_rank"] + 1) * each)
        for leaf, tensor in tensors.items():
            # Both engines keep every expert's activation scale on every rank.
            experts = range(geometry.experts) if leaf.endswith("_input_scale") else local
            recorded = run["tensors"].get(leaf)
            if recorded is None:
                # Which of two scales SGLang keeps is a matter of chance.
                assert (leaf, engine) == ("w13_input_scale", "sglang")
                target = garbage(tensor.dtype, tensor.shape)
            else:
                target = garbage(DTYPES[recorded["dtype"]], recorded["shape"])
                if leaf == "w13_weight_scale_2":  # without a gate, [E] in SGLang
                    target = target.view(len(target), -1)
            layer.load(leaf, target, tensor, experts=experts, part=part_of(run, geometry))
            if recorded is not None:
                assert digest(target) == recorded["xxh3_128"], (leaf, run)
                checked += 1
        layer.check_loaded()
    assert checked, "no run of this engine on record"


@pytest.mark.usefixtures("through_pinned_memory")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", NARROW)
def test_each_rank_through_pinned_memory(
    layer_of: Callable[[str], Any], case: str, engine: str
) -> None:
    sent = BUS.sent
    test_each_rank_ends_with_the_bytes_of_its_engine(layer_of, case, engine)
    assert BUS.sent > sent


# --- experts in any order, and shares that run past the end ---------------------------------------


SCATTERED = [2, 0, 1, 1, 3, 0, 2, 3]
"""With redundant experts, as an expert-parallel load balancer places them."""


def test_runs_are_experts_that_follow_one_another() -> None:
    assert list(runs(SCATTERED)) == [
        (0, 2, 1),
        (1, 0, 2),
        (3, 1, 1),
        (4, 3, 1),
        (5, 0, 1),
        (6, 2, 2),
    ]
    assert list(runs([])) == []
    assert list(runs([5])) == [(0, 5, 1)]
    assert list(runs(range(256))) == [(0, 0, 256)]


@pytest.mark.usefixtures("through_pinned_memory")
@pytest.mark.parametrize("leaf", LEAVES)
def test_each_slot_gets_its_expert(file: dict[str, torch.Tensor], leaf: str) -> None:
    tensor = file[leaf]
    assert len({digest(expert) for expert in tensor}) == 4
    target = garbage(tensor.dtype, (len(SCATTERED), *tensor.shape[1:]))
    copies = copy_share(leaf, tensor, target, experts=SCATTERED, part=ALL, gated=True)
    assert [digest(slot) for slot in target] == [digest(tensor[e]) for e in SCATTERED]
    assert copies == 6


@pytest.mark.parametrize("rank", [0, 1])
def test_each_slot_gets_its_rank_of_its_expert(file: dict[str, torch.Tensor], rank: int) -> None:
    w13, w2 = file["w13_weight"], file["w2_weight"]
    rows, columns = w13.shape[1] // 2, w2.shape[2] // 2
    for leaf, expected in (
        ("w13_weight", w13[SCATTERED][:, rank * rows : (rank + 1) * rows]),
        ("w2_weight", w2[SCATTERED][:, :, rank * columns : (rank + 1) * columns]),
    ):
        target = garbage(expected.dtype, expected.shape)
        part = range(64 * rank, 64 * (rank + 1))
        copy_share(leaf, file[leaf], target, experts=SCATTERED, part=part, gated=True)
        assert torch.equal(target, expected), leaf


CUT = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")
"""What tensor parallelism cuts."""


@pytest.mark.parametrize("leaf", CUT)
def test_a_share_past_the_end_is_zero(file: dict[str, torch.Tensor], leaf: str) -> None:
    """I was padded for more ranks than have something to hold."""
    target = garbage(file[leaf].dtype, file[leaf].shape)
    for start in (128, 256):
        part = range(start, start + 128)
        assert copy_share(leaf, file[leaf], target, experts=range(4), part=part, gated=True) == 0
        assert not as_bytes(target).any()
        as_bytes(target).fill_(GARBAGE)


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf not in CUT])
def test_every_rank_holds_all_of_what_is_not_cut(file: dict[str, torch.Tensor], leaf: str) -> None:
    for start in (0, 16, 7 * 128):
        target = garbage(file[leaf].dtype, file[leaf].shape)
        part = range(start, start + 128)
        copy_share(leaf, file[leaf], target, experts=range(4), part=part, gated=True)
        assert torch.equal(target, file[leaf])


def test_a_share_that_runs_past_the_end_is_filled_up_with_zeros(
    file: dict[str, torch.Tensor],
) -> None:
    """Along rows and columns at once: I and H are both padded."""
    w13 = file["w13_weight"]
    target = garbage(w13.dtype, (4, 192, w13.shape[2] + 64))
    part = range(96, 192)
    copy_share("w13_weight", w13, target, experts=range(4), part=part, gated=True)
    assert torch.equal(target[:, :64, : w13.shape[2]], w13[:, 192:])
    assert not target[:, 64:].any()
    assert not target[:, :, w13.shape[2] :].any()


@pytest.mark.parametrize("leaf", CUT)
def test_a_cut_within_a_block_of_16_is_refused(file: dict[str, torch.Tensor], leaf: str) -> None:
    target = garbage(file[leaf].dtype, file[leaf].shape)
    for part in range(8, 64), range(56):
        with pytest.raises(ValueError, match=rf"{leaf} cannot be cut at .* whole blocks of 16"):
            copy_share(leaf, file[leaf], target, experts=range(4), part=part, gated=True)
    assert (as_bytes(target) == GARBAGE).all()


@pytest.mark.parametrize("case", ["E8-H512-I320", "E4-H384-I448-ungated"])
@pytest.mark.parametrize("leaf", CUT)
def test_experts_in_any_order_of_a_share_that_cuts_tiles(
    layer_of: Callable[[str], Any], case: str, leaf: str
) -> None:
    """The same as one expert at a time."""
    geometry, tensors = layer_of(case)
    tensor, part = tensors[leaf], range(48, 160)
    shape = list(tensor.shape)
    cut = 1 if leaf.startswith("w13") else 2
    shape[cut] = shape[cut] * 128 // padded_intermediate(geometry)
    experts = [2, 0, 1, 1, 3]
    target = garbage(tensor.dtype, [5, *shape[1:]])
    options = {"part": part, "gated": geometry.gated}
    copy_share(leaf, tensor, target, experts=experts, **options)
    for slot, expert in enumerate(experts):
        one = garbage(tensor.dtype, [1, *shape[1:]])
        copy_share(leaf, tensor, one, experts=[expert], **options)
        assert digest(one[0]) == digest(target[slot])
    assert len({digest(slot) for slot in target}) == 4


def test_a_parameter_of_no_experts_is_left_alone(file: dict[str, torch.Tensor]) -> None:
    target = garbage(torch.uint8, (0, 256, 128))
    assert (
        copy_share("w13_weight", file["w13_weight"], target, experts=[], part=ALL, gated=True) == 0
    )


# --- what is refused ------------------------------------------------------------------------------


def load(layer: ConvertedLayer, leaf: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    layer.load(leaf, target, tensor, experts=range(target.shape[0]), part=ALL)


def test_a_tensor_of_another_shape_is_refused(
    layer: ConvertedLayer, file: dict[str, torch.Tensor]
) -> None:
    tensor = file["w2_weight"][:, :-1]
    with refuses(
        rf"{PREFIX}\.w2_weight is \[4, 255, 64\], config\.json says \[4, 256, 64\], "
        "which it should have",
        AGAIN,
    ):
        load(layer, "w2_weight", tensor, garbage(tensor.dtype, tensor.shape))


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_parameter_of_another_dtype_is_refused(
    layer: ConvertedLayer, file: dict[str, torch.Tensor], leaf: str
) -> None:
    """A copy would convert the values."""
    tensor = file[leaf]
    with refuses(
        rf"{PREFIX}\.{leaf} is {tensor.dtype} in the file, the engine wants torch\.float16"
    ):
        load(layer, leaf, tensor, garbage(torch.float16, tensor.shape))


@pytest.mark.parametrize(
    ("leaf", "shape", "experts", "message"),
    [
        ("w13_weight", (3, 256, 128), range(4), r"w13_weight has 3 slots for 4 experts"),
        ("w13_weight", (2, 256, 128), [3, 4], r"w13_weight has no expert 4, it has 4 experts"),
        ("w13_weight", (2, 256, 128), [-1, 0], r"w13_weight: -1 is not an expert"),
        ("w2_input_scale", (4, 1), range(4), r"w2_input_scale is \[4\], the engine wants \[4, 1\]"),
        ("w13_weight_scale", (4, 64, 16), range(4), ".*64 x 16 scales are not whole tiles of 128"),
        ("w2_weight_scale", (4, 256, 6), range(4), ".*256 x 6 scales are not whole tiles of 128"),
        ("w13_input_scale", (4, 1), range(4), r"w13_input_scale is \[4, 2\], expected \[4, 1\]"),
        ("w13_weight", (4, 128, 128), range(4), r"w13_weight has room for 64 values of I, .*"),
        ("w2_weight_scale", (4, 256, 4), range(4), r"w2_weight_scale has room for 64 values .*"),
    ],
)
def test_a_parameter_that_the_file_does_not_fit_is_refused(
    layer: ConvertedLayer,
    file: dict[str, torch.Tensor],
    leaf: str,
    shape: tuple[int, ...],
    experts: Sequence[int],
    message: str,
) -> None:
    target = garbage(file[leaf].dtype, shape)
    with refuses(rf"{PREFIX}\.{message}.*"):
        layer.load(leaf, target, file[leaf], experts=experts, part=ALL)
    assert (as_bytes(target) == GARBAGE).all()


# --- what was loaded ------------------------------------------------------------------------------


def not_loaded(*names: str) -> Any:
    listed = ", ".join(rf"{PREFIX}\.{name}" for name in names)
    were = "was" if len(names) == 1 else "were"
    return refuses(
        f"{listed} {were} not loaded: missing from the checkpoint, or passed over by the load "
        "format",
        "verify the checkpoint with fp4moe verify",
    )


def load_all(layer: ConvertedLayer, file: dict[str, torch.Tensor], *without: str) -> None:
    for leaf in file.keys() - set(without):
        load(layer, leaf, file[leaf], garbage(file[leaf].dtype, file[leaf].shape))


def test_all_that_is_missing_is_named(layer: ConvertedLayer, file: dict[str, torch.Tensor]) -> None:
    with not_loaded(*LEAVES):
        layer.check_loaded()
    load_all(layer, file, "w2_weight")
    with not_loaded("w2_weight"):
        layer.check_loaded()
    load_all(layer, file, "w13_input_scale", "w2_weight")
    with not_loaded("w2_weight", "w13_input_scale"):
        layer.check_loaded()


def test_what_was_refused_was_not_loaded(
    layer: ConvertedLayer, file: dict[str, torch.Tensor]
) -> None:
    load_all(layer, file, "w2_weight")
    with pytest.raises(ServingError):
        load(layer, "w2_weight", file["w2_weight"], garbage(torch.int8, (4, 256, 64)))
    with not_loaded("w2_weight"):
        layer.check_loaded()


def test_a_layer_may_be_loaded_again(layer: ConvertedLayer, file: dict[str, torch.Tensor]) -> None:
    """Each time from the start: what came the last time does not count."""
    for _ in range(2):
        load_all(layer, file)
        layer.check_loaded()
    load_all(layer, file, "w2_weight")
    with not_loaded("w2_weight"):
        layer.check_loaded()
    with not_loaded(*LEAVES):
        layer.check_loaded()


def test_what_is_known_of_a_load(layer: ConvertedLayer, file: dict[str, torch.Tensor]) -> None:
    assert (layer.has_begun, layer.is_complete) == (False, False)
    load_all(layer, file)
    assert (layer.has_begun, layer.is_complete) == (True, False)
    layer.check_loaded()
    assert (layer.has_begun, layer.is_complete) == (False, True)
    load_all(layer, file, "w2_weight")
    with not_loaded("w2_weight"):
        layer.check_loaded()
    assert (layer.has_begun, layer.is_complete) == (False, False)


def test_an_engine_may_wait_for_more(layer: ConvertedLayer, file: dict[str, torch.Tensor]) -> None:
    load_all(layer, file)
    layer.note("the shared expert")
    layer.check_loaded(also=["the shared expert"])
    load_all(layer, file)
    with not_loaded("the shared expert"):
        layer.check_loaded(also=["the shared expert"])


def test_a_parameter_is_known_by_being_the_same_object(layer: ConvertedLayer) -> None:
    """Two may well be equal."""
    holder = SimpleNamespace(**{leaf: torch.zeros(2) for leaf in LEAVES})
    for leaf in LEAVES:
        assert layer.leaf_of(holder, getattr(holder, leaf)) == leaf


# --- which layer a module is ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "converted", "expected"),
    [
        # As SGLang and vLLM call the modules of DeepSeek, Kimi-K2.5, Gemma 4, MiniMax-M2, Mixtral,
        # Nemotron-H, and a draft.
        ("model.layers.3.mlp.experts", ["model.layers.3.mlp.experts"], 0),
        ("model.layers.3.mlp.experts", ["language_model.layers.3.mlp.experts"], 0),
        ("language_model.model.layers.3.mlp.experts", ["language_model.layers.3.mlp.experts"], 0),
        ("model.layers.3.moe.experts", ["model.language_model.layers.3.experts"], 0),
        ("model.layers.3.mlp.experts", ["model.layers.3.block_sparse_moe.experts"], 0),
        ("layers.3.block_sparse_moe.experts", ["model.layers.3.block_sparse_moe.experts"], 0),
        ("model.layers.3.mixer.experts", ["backbone.layers.3.mixer.experts"], 0),
        ("draft_model.model.layers.3.mlp.experts", ["model.layers.3.mlp.experts"], 0),
        # Another layer, none, and one of multi-token prediction.
        ("model.layers.3.mlp.experts", ["model.layers.2.mlp.experts"], None),
        ("model.layers.61.mlp.experts", ["model.layers.6.mlp.experts"], None),
        ("", ["model.layers.3.mlp.experts"], None),
        ("model.decoder.mlp.experts", ["model.layers.3.mlp.experts"], None),
        ("mtp.layers.0.mlp.experts", ["model.layers.0.mlp.experts"], None),
        # Two decoders.
        ("talker.layers.3.mlp.experts", ["thinker.layers.3.mlp.experts"] * 2, None),
        (
            "model.thinker.layers.3.x.experts",
            ["a.layers.3.x.experts", "thinker.layers.3.x.experts"],
            1,
        ),
        (
            "thinker.layers.3.x.experts",
            ["a.layers.3.x.experts", "model.thinker.layers.3.x.experts"],
            1,
        ),
    ],
)
def test_a_module_is_known_by_the_number_of_its_layer(
    module: str, converted: list[str], expected: int | None
) -> None:
    found = converted_layer_of(module, converted)
    assert found == (None if expected is None else converted[expected])


# --- layers that are not taken over ---------------------------------------------------------------


class PPMissingLayer(torch.nn.Identity):
    """What both engines put in place of another stage's layer."""


def decoder(*layers: torch.nn.Module) -> torch.nn.Module:
    """A model of these decoder layers, with a vision tower of fewer."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    model.vision = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    return model


CONVERTED_LAYERS = [f"language_model.layers.{number}.mlp.experts" for number in (1, 2)]
HERE, ELSEWHERE = torch.nn.Linear(1, 1), PPMissingLayer()


@pytest.mark.parametrize(
    ("model", "taken_over", "passed_by"),
    [
        (decoder(HERE, HERE, HERE), CONVERTED_LAYERS, None),
        (decoder(HERE, HERE, HERE), CONVERTED_LAYERS[:1], CONVERTED_LAYERS[1]),
        (decoder(HERE, HERE, HERE), [], CONVERTED_LAYERS[0]),
        (decoder(HERE, HERE, ELSEWHERE), CONVERTED_LAYERS[:1], None),
        (decoder(HERE, ELSEWHERE, ELSEWHERE), [], None),
        (decoder(ELSEWHERE, ELSEWHERE, HERE), [], CONVERTED_LAYERS[1]),
        (decoder(HERE), [], None),
    ],
    ids=["all", "one passed by", "none", "first stage", "dense stage", "last stage", "one layer"],
)
def test_a_decoder_layer_that_is_here_must_be_taken_over(
    model: torch.nn.Module, taken_over: list[str], passed_by: str | None
) -> None:
    def check() -> None:
        check_taken_over(
            model, CONVERTED_LAYERS, taken_over, layer_count=len(model.layers), engine=VLLM
        )

    if passed_by is None:
        check()
    else:
        words = rf"vLLM's Module has no fused MoE layer with NVFP4 experts for {passed_by}; the "
        with pytest.raises(ServingError, match=words):
            check()
