"""Which layers are converted, which pass through, which are refused: names, dtypes, shapes only."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fp4moe_convert import layouts
from fp4moe_convert.errors import CheckpointError
from fp4moe_convert.format.contract import Geometry
from fp4moe_convert.source.checkpoint import Checkpoint
from fp4moe_convert.source.experts import MoeLayer, PassedLayer, find_layers
from fp4moe_convert.source.families import LEAVES
from fp4moe_convert.source.spans import Shard
from fp4moe_convert.storage.header import Header, TensorInfo, spec_nbytes
from fp4moe_convert.storage.local import LocalFolder

Tensors = dict[str, tuple[str, tuple[int, ...]]]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
E, H, I = 3, 256, 128  # noqa: E741 (the letters of the format)
PREFIX = "model.layers.1.mlp.experts"
CONFIG = {"num_hidden_layers": 3, "n_routed_experts": E}


def layer(
    prefix: str = PREFIX, *, experts: int = E, hidden: int = H, intermediate: int = I
) -> Tensors:
    """The tensors of one complete NVFP4 layer."""
    tensors: Tensors = {}
    for expert in range(experts):
        for projection in PROJECTIONS:
            rows, cols = (
                (hidden, intermediate) if projection == "down_proj" else (intermediate, hidden)
            )
            name = f"{prefix}.{expert}.{projection}"
            tensors[f"{name}.weight"] = ("U8", (rows, cols // 2))
            tensors[f"{name}.weight_scale"] = ("F8_E4M3", (rows, cols // 16))
            tensors[f"{name}.weight_scale_2"] = ("F32", ())
            tensors[f"{name}.input_scale"] = ("F32", ())
    return tensors


def checkpoint(*shards: Tensors, **config: Any) -> Checkpoint:
    """A checkpoint of shards ``1.safetensors``, ``2.safetensors``, ... that no disk holds."""
    opened = []
    for number, tensors in enumerate(shards, start=1):
        infos, position = [], 0
        for name, (dtype, shape) in tensors.items():
            stop = position + spec_nbytes(dtype, shape)
            infos.append(TensorInfo(name, dtype, shape, position, stop))
            position = stop
        opened.append(Shard(f"{number}.safetensors", Header(8, tuple(infos), "digest"), {}))
    return Checkpoint(
        store=LocalFolder(Path()),
        config={key: value for key, value in (CONFIG | config).items() if value is not None},
        hf_quant_config=None,
        config_files={},
        shards=tuple(opened),
        other_files=(),
        left_out={},
    )


def found(*shards: Tensors, **config: Any) -> list[MoeLayer]:
    """The layers to convert, where none passes through."""
    layers, passed = find_layers(checkpoint(*shards, **config))
    assert passed == []
    return layers


def passed(*shards: Tensors, **config: Any) -> dict[str, str]:
    """The reasons by prefix, where no layer is converted."""
    layers, others = find_layers(checkpoint(*shards, **config))
    assert layers == []
    return {layer.prefix: layer.reason for layer in others}


def refuses(message: str, *shards: Tensors, **config: Any) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        find_layers(checkpoint(*shards, **config))


# --- converted ------------------------------------------------------------------------------------


def test_a_complete_layer() -> None:
    tensors = layer()
    [moe] = found(tensors)
    assert (moe.prefix, moe.number) == (PREFIX, 1)
    assert moe.geometry == Geometry(experts=E, hidden=H, intermediate=I)
    assert moe.tensors == set(tensors)
    for (expert, projection, leaf), matrix in moe.matrices.items():
        assert matrix.tensor.name == f"{PREFIX}.{expert}.{projection}_proj.{leaf}"
        assert matrix.shape == matrix.tensor.shape


def test_a_layer_whose_shards_cut_an_expert_in_two() -> None:
    whole = list(layer().items())
    cut = next(n for n, (name, _) in enumerate(whole) if name.endswith("1.up_proj.weight"))
    [moe] = found(dict(whole[:cut]), dict(whole[cut:]))
    assert moe.matrices[1, "gate", "weight"].shard.name == "1.safetensors"
    assert moe.matrices[1, "up", "weight"].shard.name == "2.safetensors"


def test_names_may_come_in_any_order() -> None:
    [moe] = found(dict(reversed(layer().items())))
    assert moe.geometry.experts == E


def test_layers_come_in_order_of_their_numbers() -> None:
    prefixes = [f"model.layers.{number}.mlp.experts" for number in (10, 9, 0)]
    shards = [layer(prefix) for prefix in prefixes]
    layers = found(*shards, num_hidden_layers=11)
    assert [moe.number for moe in layers] == [0, 9, 10]


def test_layers_may_differ_in_size() -> None:
    other = layer("model.layers.2.mlp.experts", hidden=128, intermediate=48)
    sizes = [(moe.geometry.hidden, moe.geometry.intermediate) for moe in found(layer(), other)]
    assert sizes == [(256, 128), (128, 48)]


def test_tensors_that_are_no_experts_do_not_matter() -> None:
    others: Tensors = {
        "model.layers.1.mlp.gate.weight": ("BF16", (E, H)),
        "model.layers.1.mlp.shared_experts.up_proj.weight": ("U8", (I, H // 2)),
        "model.layers.1.mlp.experts_bias": ("F32", (E,)),
        "lm_head.weight": ("BF16", (8, H)),
    }
    assert len(found(others, layer())) == 1


@pytest.mark.parametrize(
    "key", ["n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"]
)
def test_the_number_of_experts_goes_by_many_names(key: str) -> None:
    [moe] = found(layer(), **{"n_routed_experts": None, key: E})
    assert moe.geometry.experts == E


def test_the_number_of_experts_may_be_unsaid() -> None:
    [moe] = found(layer(experts=5), n_routed_experts=None)
    assert moe.geometry.experts == 5


def test_multimodal_models_nest_their_text_config() -> None:
    tensors = layer("language_model.model.layers.1.mlp.experts")
    nested = dict(CONFIG)
    [moe] = found(tensors, num_hidden_layers=None, n_routed_experts=None, text_config=nested)
    assert moe.number == 1
    assert moe.prefix == "language_model.model.layers.1.mlp.experts"


def test_per_tensor_scales_may_be_vectors_of_one() -> None:
    tensors = {
        name: (dtype, (1,) if dtype == "F32" else shape) for name, (dtype, shape) in layer().items()
    }
    assert len(found(tensors)) == 1


# --- passed through -------------------------------------------------------------------------------


def test_an_mtp_layer_passes_through() -> None:
    tensors = layer("model.layers.3.mlp.experts")
    reason = "layer 3 is not among the 3 hidden layers (MTP)"
    assert passed(tensors) == {"model.layers.3.mlp.experts": reason}


@pytest.mark.parametrize(
    ("dtypes", "said"),
    [(["BF16"], "BF16"), (["F8_E4M3"], "F8_E4M3"), (["F16", "BF16"], "BF16 and F16")],
)
def test_experts_that_are_not_nvfp4_pass_through(dtypes: list[str], said: str) -> None:
    tensors: Tensors = {
        f"{PREFIX}.{expert}.up_proj.weight": (dtype, (I, H)) for expert, dtype in enumerate(dtypes)
    }
    assert passed(tensors) == {PREFIX: f"its experts are {said}, not NVFP4"}


def test_experts_without_weights_pass_through() -> None:
    tensors: Tensors = {f"{PREFIX}.0.up_proj.input_scale": ("F32", ())}
    assert passed(tensors) == {PREFIX: "its experts are without weights, not NVFP4"}


def test_experts_outside_the_layers_pass_through() -> None:
    prefix = "model.extra.experts"
    assert passed(layer(prefix)) == {prefix: "its name has no layer number"}


@pytest.mark.parametrize(
    "prefix",
    [
        "mtp.layers.0.mlp.experts",
        "model.mtp.layers.0.mlp.experts",
        "model.mtp_layers.layers.1.experts",
        "model.mtp.experts",
        "nextn.layers.2.mlp.experts",
    ],
)
def test_multi_token_prediction_passes_through_whatever_its_number(prefix: str) -> None:
    reason = "it is a layer of multi-token prediction (MTP), not of the decoder"
    assert passed(layer(prefix)) == {prefix: reason}


def test_passed_layers_come_in_order_and_beside_converted_ones() -> None:
    bf16: Tensors = {"model.layers.0.mlp.experts.0.up_proj.weight": ("BF16", (I, H))}
    layers, others = find_layers(checkpoint(layer("model.layers.10.mlp.experts"), layer(), bf16))
    assert [moe.prefix for moe in layers] == [PREFIX]
    assert others == [
        PassedLayer("model.layers.0.mlp.experts", "its experts are BF16, not NVFP4"),
        PassedLayer(
            "model.layers.10.mlp.experts", "layer 10 is not among the 3 hidden layers (MTP)"
        ),
    ]


def test_a_model_without_experts_has_no_layers() -> None:
    assert find_layers(checkpoint({"lm_head.weight": ("BF16", (8, H))})) == ([], [])


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_refuses_a_missing_leaf(projection: str, leaf: str) -> None:
    tensors = layer()
    name = f"{PREFIX}.1.{projection}.{leaf}"
    del tensors[name]
    refuses(f"1.safetensors: '{name}' is missing from every shard", tensors)


def test_a_missing_leaf_is_sought_where_its_expert_is() -> None:
    whole = list(layer().items())
    half = len(whole) // 2
    second = dict(whole[half:])
    del second[f"{PREFIX}.2.down_proj.input_scale"]
    message = f"2.safetensors: '{PREFIX}.2.down_proj.input_scale' is missing from every shard"
    refuses(message, dict(whole[:half]), second)


@pytest.mark.parametrize("missing", range(E))
def test_refuses_a_missing_expert(missing: int) -> None:
    tensors = {n: t for n, t in layer().items() if not n.startswith(f"{PREFIX}.{missing}.")}
    message = (
        f"config.json: layer '{PREFIX}' should have 3 experts, but no shard has expert {missing}"
    )
    refuses(message, tensors)


def test_refuses_a_missing_expert_that_config_does_not_count() -> None:
    tensors = {n: t for n, t in layer().items() if not n.startswith(f"{PREFIX}.1.")}
    message = f"{PREFIX}.1: no shard has this expert, but some have later ones"
    refuses(message, tensors, n_routed_experts=None)


def test_refuses_more_experts_than_config_counts() -> None:
    message = f"1.safetensors: '{PREFIX}.2.gate_proj.weight' is of expert 2, config.json allows 2"
    refuses(message, layer(), n_routed_experts=2)


OTHER = "model.layers.2.mlp.experts"


@pytest.mark.parametrize("fewer", [PREFIX, OTHER])
def test_layers_tell_of_a_missing_last_expert_where_config_does_not_count(fewer: str) -> None:
    more = OTHER if fewer == PREFIX else PREFIX
    message = (
        f"{fewer}: has 2 experts, {more} has 3, and config.json does not say how many there should "
        "be; are all shards there?"
    )
    shards = (layer(more), layer(fewer, experts=2))
    refuses(message, *shards, n_routed_experts=None)
    refuses(message, *shards[::-1], n_routed_experts=None, unheard_of_experts=E)


@pytest.mark.parametrize("name", ["gate", "router"])
def test_so_does_the_router(name: str) -> None:
    router: Tensors = {f"model.layers.1.mlp.{name}.weight": ("BF16", (E, H))}
    message = (
        f"{PREFIX}: has 2 experts, model.layers.1.mlp.{name}.weight has 3, and config.json does "
        "not say how many there should be; are all shards there?"
    )
    refuses(message, layer(experts=2), router, n_routed_experts=None)
    assert len(found(layer(), router, n_routed_experts=None)) == 1


def test_config_knows_better_than_a_router() -> None:
    """LongCat's has rows for experts that do nothing and have no tensors."""
    router: Tensors = {"model.layers.1.mlp.gate.weight": ("BF16", (E + 2, H))}
    assert len(found(layer(), router)) == 1
    moe = {"moe": {"num_experts": E}}  # as Mistral has it
    assert len(found(layer(), router, n_routed_experts=None, **moe)) == 1


def test_what_is_no_router_counts_no_experts() -> None:
    others: Tensors = {
        "model.layers.1.mlp.gate.weight": ("BF16", (H, 64)),
        "model.layers.1.mlp.router.weight": ("BF16", (64,)),
    }
    assert len(found(layer(), others, n_routed_experts=None)) == 1


def test_each_layer_may_have_its_own_number_of_experts() -> None:
    shards = (layer(), layer(OTHER, experts=2))
    layers = found(*shards, n_routed_experts=[1, 3, 2])
    assert [moe.geometry.experts for moe in layers] == [3, 2]
    message = f"config.json: layer {OTHER!r} should have 3 experts, but no shard has expert 2"
    refuses(message, *shards, n_routed_experts=[1, 3, 3])


def test_a_huge_number_of_experts_is_refused_at_once() -> None:
    tensors = layer() | {f"{PREFIX}.999999999999.up_proj.weight": ("U8", (I, H // 2))}
    refuses(
        f"{PREFIX}.3: no shard has this expert, but some have later ones",
        tensors,
        n_routed_experts=None,
    )


@pytest.mark.parametrize(
    "name",
    [f"model.layers.{'9' * 5000}.mlp.experts.0.up_proj.weight", f"{PREFIX}.{'9' * 5000}.x"],
    ids=["layer", "expert"],
)
def test_a_number_of_thousands_of_digits_is_no_reason_to_crash(name: str) -> None:
    """To be passed through is allowed, as is any refusal in words."""
    with suppress(CheckpointError):  # int() raises ValueError beyond 4300 digits
        find_layers(checkpoint(layer(), {name: ("U8", (1,))}))


def renamed(tensors: Tensors, *names: str) -> Tensors:
    """With other names for gate, up and down."""
    pairs = list(zip(PROJECTIONS, names, strict=True))
    return {
        next((n.replace(old, new) for old, new in pairs if f".{old}." in n), n): tensor
        for n, tensor in tensors.items()
    }


def without_projection(tensors: Tensors, projection: str) -> Tensors:
    return {name: t for name, t in tensors.items() if f".{projection}." not in name}


def test_experts_without_a_gate() -> None:
    (moe,) = found(without_projection(layer(), "gate_proj"))
    assert moe.family.name == "experts.N.{up,down}_proj"
    assert moe.family.projections == ("up", "down")
    assert moe.geometry == Geometry(experts=E, hidden=H, intermediate=I, gated=False)
    assert len(moe.tensors) == E * 2 * len(LEAVES)


@pytest.mark.parametrize(
    ("names", "missing"), [(("w1", "w3", "w2"), "w1"), (PROJECTIONS, "up_proj")]
)
def test_refuses_other_experts_of_two_projections(names: tuple[str, ...], missing: str) -> None:
    refuses(
        f"1.safetensors: '{PREFIX}.0.{names[2]}.weight' is of experts without a gate: they have "
        "two projections, not three; this release knows such experts where these are up_proj and "
        "down_proj (as in Nemotron-H); serve the original",
        without_projection(renamed(layer(), *names), missing),
    )


def test_layers_with_and_without_gates_are_not_of_one_model() -> None:
    """The gates of one were in a shard that is not there."""
    other = "model.layers.2.mlp.experts"
    refuses(
        f"{other}: no shard has a gate of any expert, but {PREFIX} has them; are all shards there?",
        layer() | without_projection(layer(other), "gate_proj"),
    )


def test_a_gate_that_one_expert_lacks_is_missing() -> None:
    tensors = {name: t for name, t in layer().items() if f"{PREFIX}.1.gate_proj." not in name}
    name = f"{PREFIX}.1.gate_proj.weight"
    refuses(f"1.safetensors: '{name}' is missing from every shard", tensors)


def test_refuses_experts_of_weights_alone() -> None:
    tensors = {name: t for name, t in layer().items() if not name.endswith(".input_scale")}
    refuses(
        f"1.safetensors: '{PREFIX}.0.down_proj.weight' is of experts without an input_scale: "
        "weight-only (W4A16), which no engine serves with flashinfer_trtllm, the backend that this "
        "layout is for; serve the original with another MoE backend",
        tensors,
    )


# --- sources whose layers may differ --------------------------------------------------------------

WEIGHT_ONLY = (
    "its experts are weight-only (W4A16), which no engine serves with flashinfer_trtllm, the "
    "backend that this layout is for; serve the original with another MoE backend"
)
FP8_AND_NVFP4 = "its experts are FP8 and NVFP4, not NVFP4"
COMPRESSED = {"quantization_config": {"quant_method": "compressed-tensors"}}


def mixed(**algorithms: str) -> dict[str, Any]:
    """A section of mixed precision that says the algorithms of modules of layer 1."""
    layers = {
        f"model.layers.1.mlp.{name.replace('__', '.')}": {"quant_algo": algorithm}
        for name, algorithm in algorithms.items()
    }
    section = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    return {"quantization_config": {**section, "quantized_layers": layers}}


def compressed(tensors: Tensors) -> Tensors:
    """The same under the names of compressed-tensors."""
    for old, new in (
        (".weight_scale_2", ".weight_global_scale"),
        (".input_scale", ".input_global_scale"),
    ):
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return {re.sub(r"\.weight$", ".weight_packed", name): tensors[name] for name in tensors}


def without_input_scales(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if not name.endswith(".input_scale")}


@pytest.mark.parametrize(
    ("algorithms", "reason"),
    [
        ({"experts": "W4A16_NVFP4"}, WEIGHT_ONLY),
        ({"experts__0__up_proj": "NVFP4", "experts__1__up_proj": "FP8"}, FP8_AND_NVFP4),
        ({"experts": "W4A8_NVFP4_FP8"}, "its experts are W4A8_NVFP4_FP8, not NVFP4"),
    ],
)
def test_packed_experts_that_are_said_to_be_of_another_kind_pass(
    algorithms: dict[str, str], reason: str
) -> None:
    [(prefix, found)] = passed(layer(), **mixed(**algorithms)).items()
    assert prefix == PREFIX
    assert reason in found


@pytest.mark.parametrize(
    "algorithms",
    [
        {"experts": "NVFP4"},
        {"experts__0__up_proj": "nvfp4"},
        {"shared": "FP8"},
        {"experts": "NVFP4", "experts__shared_expert__up_proj": "FP8"},
        {"experts__0__up_proj": "NVFP4", "experts__gate": "FP8"},
    ],
)
def test_packed_experts_that_are_said_to_be_nvfp4_or_nothing_are_converted(
    algorithms: dict[str, str],
) -> None:
    assert found(layer(), **mixed(**algorithms))


@pytest.mark.parametrize("other", ["talker.model", "model.visual"])
def test_the_algorithm_of_a_layer_of_the_same_number_elsewhere_is_not_that_of_its_own(
    other: str,
) -> None:
    section = mixed(experts="NVFP4")
    layers = section["quantization_config"]["quantized_layers"]
    layers[f"{other}.layers.1.mlp.experts"] = {"quant_algo": "FP8"}
    assert found(layer(), **section)
    renamed = {f"language_model.{name}": tensor for name, tensor in layer().items()}
    assert FP8_AND_NVFP4 in passed(renamed, **section)[f"language_model.{PREFIX}"]


def test_refuses_tensors_that_are_named_otherwise_than_the_description_says() -> None:
    message = (
        f"1.safetensors: '{PREFIX}.0.gate_proj.weight' is not a tensor of a compressed-tensors "
        "NVFP4 expert (gate_proj, up_proj, down_proj with weight_packed, weight_scale, "
        "weight_global_scale, input_global_scale)"
    )
    refuses(message, layer(), **COMPRESSED)
    message = (
        f"1.safetensors: '{PREFIX}.0.gate_proj.weight_packed' is not a tensor of a ModelOpt NVFP4 "
        "expert (gate_proj, up_proj, down_proj with weight, weight_scale, weight_scale_2, "
        "input_scale)"
    )
    refuses(message, compressed(layer()))


def test_a_layer_of_its_own_kind_passes_beside_others() -> None:
    eight_bits = {
        f"model.layers.2.mlp.experts.{n}.up_proj.weight": ("F8_E4M3", (I, H)) for n in (0, 1)
    }
    alone = without_input_scales(layer("model.layers.0.mlp.experts"))
    for source, tensors in (
        (mixed(experts="NVFP4"), layer() | alone),
        (COMPRESSED, compressed(layer() | alone)),
    ):
        [moe], others = find_layers(checkpoint(tensors | eight_bits, **source))
        assert moe.prefix == PREFIX
        assert [each.reason for each in others] == [
            WEIGHT_ONLY,
            "its experts are F8_E4M3, not NVFP4",
        ]


def test_packed_experts_with_other_block_scales_pass() -> None:
    tensors = {
        name: ("U8", shape) if name.endswith("weight_scale") else (dtype, shape)
        for name, (dtype, shape) in compressed(layer()).items()
    }
    assert passed(tensors, **COMPRESSED) == {
        PREFIX: "its block scales are U8, those of NVFP4 are F8_E4M3"
    }


def test_experts_of_compressed_tensors() -> None:
    tensors = compressed(layer())
    [moe] = found(tensors, **COMPRESSED)
    assert moe.tensors == set(tensors)
    assert moe.matrices[2, "gate", "weight_scale_2"].tensor.name == (
        f"{PREFIX}.2.gate_proj.weight_global_scale"
    )
    missing = f"{PREFIX}.1.up_proj.weight_global_scale"
    del tensors[missing]
    refuses(f"1.safetensors: '{missing}' is missing from every shard", tensors, **COMPRESSED)


def test_names_must_be_those_of_the_source() -> None:
    name = f"{PREFIX}.0.gate_proj.weight"
    tensors = layer() | {f"{PREFIX}.0.gate_proj.input_global_scale": ("F32", ())}
    refuses(
        f"1.safetensors: '{name}' is not a tensor of a compressed-tensors NVFP4 expert "
        "(gate_proj, up_proj, down_proj with weight_packed, weight_scale, weight_global_scale, "
        "input_global_scale)",
        tensors,
        **COMPRESSED,
    )
    other = f"{PREFIX}.0.gate_proj.weight_packed"
    refuses(
        f"1.safetensors: '{other}' is not a tensor of a ModelOpt NVFP4 expert "
        "(gate_proj, up_proj, down_proj with weight, weight_scale, weight_scale_2, input_scale)",
        {other: ("U8", (I, H // 2))} | layer(),
    )


def test_refuses_experts_that_scale_their_input() -> None:
    """An NVFP4_AWQ export whose section says NVFP4."""
    name = f"{PREFIX}.1.down_proj.pre_quant_scale"
    refuses(
        f"1.safetensors: '{name}' is of an NVFP4_AWQ expert, which multiplies its input by it; no "
        "engine does that for experts; export the model as NVFP4",
        layer() | {name: ("BF16", (I,))},
    )


STACKED = {
    "fused": ("mlp.experts.gate_up", (E, 2 * I, H // 2)),
    "MXFP4": ("mlp.experts.gate_up_proj_blocks", (E, 2 * I, H // 32, 16)),
    "with a leaf": ("mlp.experts.gate_up_proj.weight", (E, 2 * I, H // 2)),
    "as Step, elsewhere": ("mlp.down_proj.weight", (E, H, I // 2)),
    "of two dimensions": ("ffn.experts.mlp.w1", (E * I, H // 2)),
}


@pytest.mark.parametrize("case", STACKED)
def test_refuses_experts_that_are_stacked(case: str) -> None:
    part, shape = STACKED[case]
    name = f"model.layers.1.{part}"
    tensors: Tensors = {f"{name}_weight_scale": ("F8_E4M3", (1,)), name: ("U8", shape)}
    message = (
        f"2.safetensors: {name!r} is U8 {list(shape)}: all experts of the layer stacked in one "
        "tensor; this release knows such tensors as moe.gate_proj, moe.up_proj and moe.down_proj "
        "(as in Step-3.5), or as experts.gate_up_proj and experts.down_proj, transposed (as in "
        "Llama 4); serve the original"
    )
    refuses(message, {}, tensors)
    refuses(message, layer("model.layers.0.mlp.experts"), tensors)


@pytest.mark.parametrize("scalars", [(), (E,)])
def test_refuses_experts_that_are_stacked_as_they_are_under_the_names_of_transposed_ones(
    scalars: tuple[int, ...],
) -> None:
    tensors: Tensors = {}
    for part, rows, cols in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        tensors[f"{PREFIX}.{part}"] = ("U8", (E, rows, cols // 2))
        tensors[f"{PREFIX}.{part}_weight_scale"] = ("F8_E4M3", (E, rows, cols // 16))
        tensors[f"{PREFIX}.{part}_weight_scale_2"] = ("F32", scalars)
        tensors[f"{PREFIX}.{part}_input_scale"] = ("F32", scalars)
    with pytest.raises(CheckpointError, match=r"gate_up_proj' is U8 \[3, 256, 128\]: all experts"):
        find_layers(checkpoint(tensors))


def test_experts_of_another_model_pass() -> None:
    """No engine serves Qwen3-Omni's talker with the thinker."""
    thinker, talker = (
        {"text_config": {"num_hidden_layers": 3, "num_experts": experts}} for experts in (E, 2)
    )
    prefixes = [f"{model}.{PREFIX}" for model in ("thinker", "talker")]
    [moe], [other] = find_layers(
        checkpoint(
            layer(prefixes[0]),
            layer(prefixes[1], experts=2, intermediate=48),
            num_hidden_layers=None,
            n_routed_experts=None,
            thinker_config=thinker,
            talker_config=talker,
        )
    )
    assert (moe.prefix, other.prefix) == tuple(prefixes)
    assert other.reason == "it is a layer of the talker, not of the text model"


OTHER_STACKS = ["draft", "eagle3", "model.mtp_0", "vision_tower.encoder", "a.model", "z.model"]


@pytest.mark.parametrize("other", OTHER_STACKS)
def test_the_smaller_of_two_models_passes(other: str) -> None:
    """A plugin tells experts by the number of their layer. It passes where the larger is converted,
    too."""
    name = f"{other}.layers.1.mlp.experts"
    tensors = layer() | layer(PREFIX.replace("1", "2")) | layer(name, experts=2)
    layers, [small] = find_layers(checkpoint(tensors))
    assert {moe.prefix for moe in layers} == {PREFIX, PREFIX.replace("1", "2")}
    reason = "model.layers has such a layer 1, and more of them than this other model"
    assert small == PassedLayer(name, reason)
    left = find_layers(checkpoint(layer(name)), converted=[moe.prefix for moe in layers])
    assert left == ([], [small])


def test_layers_of_other_numbers_are_of_the_same_model() -> None:
    others = layer("other.layers.0.mlp.experts")
    assert len(found(layer() | layer(PREFIX.replace("1", "2")) | others)) == 3


@pytest.mark.parametrize("other", OTHER_STACKS)
def test_refuses_two_models_of_a_size(other: str) -> None:
    message = f"{PREFIX} and {other}.layers.1.mlp.experts are of two models with NVFP4 experts"
    with pytest.raises(CheckpointError, match=f"^{message}, and nothing tells"):
        find_layers(checkpoint(layer() | layer(f"{other}.layers.1.mlp.experts")))


@pytest.mark.parametrize("config", ["model", {"num_hidden_layers": 3}, {"num_experts": 5}], ids=str)
def test_a_name_alone_makes_no_other_model(config: object) -> None:
    text = {"num_hidden_layers": 3, "num_experts": E}
    assert len(found(layer(), text_config=text, model_config=config)) == 1
    assert len(found(layer(f"text.{PREFIX}"), text_config=text, model_config=config)) == 1


def test_a_shared_expert_may_lie_among_the_others() -> None:
    tensors: Tensors = {f"{PREFIX}.shared_expert.down_proj.weight": ("U8", (H, I // 2))}
    assert len(found(layer(), tensors)) == 1
    assert find_layers(checkpoint(tensors), converted=[PREFIX]) == ([], [])
    deep: Tensors = {f"{PREFIX}.shared_expert.down_proj.weight": ("U8", (E, H, I // 2))}
    with pytest.raises(CheckpointError, match="stacked in one tensor"):
        found(layer(), deep)


@pytest.mark.parametrize("layers", ["mtp.layers.0", "model.layers.3"])
def test_stacked_experts_of_multi_token_prediction_do_not_matter(layers: str) -> None:
    tensors: Tensors = {f"{layers}.mlp.experts.gate_up": ("U8", (E, 2 * I, H // 2))}
    assert len(found(layer(), tensors)) == 1
    known: Tensors = {f"{layers}.mlp.experts.gate_up_proj": ("U8", (E, 2 * I, H // 2))}
    _, [passed] = find_layers(checkpoint(layer(), known))
    assert passed.prefix == f"{layers}.mlp.experts"
    assert "MTP" in passed.reason


def test_stacked_experts_that_are_not_nvfp4_pass_through() -> None:
    tensors: Tensors = {
        f"model.layers.{n}.mlp.experts.{part}": ("BF16", (E, H, I))
        for n in (1, 2)
        for part in ("gate_up_proj", "down_proj")
    }
    reason = "its experts are BF16, not NVFP4"
    assert passed(tensors) == {PREFIX: reason, OTHER: reason}


def test_three_dimensions_are_not_always_experts() -> None:
    conv: Tensors = {"model.layers.1.linear_attn.conv1d.weight": ("BF16", (512, 1, 4))}
    assert len(found(layer(), conv)) == 1


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BF16", "F4"])
def test_refuses_a_weight_of_another_dtype(dtype: str) -> None:
    name = f"{PREFIX}.1.up_proj.weight"
    refuses(
        f"1.safetensors: '{name}' is {dtype} [128, 128], expected U8 [128, 128] "
        "(H = 256, I = 128, as in expert 0)",
        layer() | {name: (dtype, (128, 128))},
    )


def test_refuses_a_first_weight_of_another_dtype() -> None:
    name = f"{PREFIX}.0.gate_proj.weight"
    refuses(
        f"1.safetensors: '{name}' is BF16 [128, 256], expected U8 [I, H/2]",
        layer() | {name: ("BF16", (128, 256))},
    )


@pytest.mark.parametrize(
    ("leaf", "dtype", "shape", "expected"),
    [
        ("gate_proj.weight", "U8", (128, 64), "U8 [128, 128]"),
        ("up_proj.weight", "U8", (64, 128), "U8 [128, 128]"),
        ("up_proj.weight", "U8", (128 * 128,), "U8 [128, 128]"),
        ("down_proj.weight", "U8", (128, 128), "U8 [256, 64]"),
        ("gate_proj.weight_scale", "F8_E4M3", (128, 8), "F8_E4M3 [128, 16]"),
        ("gate_proj.weight_scale", "U8", (128, 16), "F8_E4M3 [128, 16]"),
        ("down_proj.weight_scale", "F8_E5M2", (256, 8), "F8_E4M3 [256, 8]"),
        ("up_proj.weight_scale_2", "F32", (2,), "F32 []"),
        ("up_proj.weight_scale_2", "BF16", (), "F32 []"),
        ("down_proj.input_scale", "F32", (1, 1), "F32 []"),
    ],
)
def test_refuses_what_is_unlike_the_other_experts(
    leaf: str, dtype: str, shape: tuple[int, ...], expected: str
) -> None:
    name = f"{PREFIX}.2.{leaf}"
    refuses(
        f"1.safetensors: '{name}' is {dtype} {list(shape)}, expected {expected} "
        "(H = 256, I = 128, as in expert 0)",
        layer() | {name: (dtype, shape)},
    )


@pytest.mark.parametrize(
    "rest", ["up_proj.bias", "up_proj.weight_zero_point", "w1.weight", "gate_up_proj.weight", "x"]
)
def test_refuses_an_unknown_leaf(rest: str) -> None:
    name = f"{PREFIX}.1.{rest}"
    refuses(
        f"1.safetensors: '{name}' is not a tensor of a ModelOpt NVFP4 expert "
        "(gate_proj, up_proj, down_proj with weight, weight_scale, weight_scale_2, input_scale)",
        layer() | {name: ("F32", ())},
    )


@pytest.mark.parametrize("hidden", [64, 192, 2880])
def test_refuses_a_hidden_size_that_tiles_do_not_divide(hidden: int) -> None:
    [moe] = found(layer(hidden=hidden))
    message = (
        f"1.safetensors: '{PREFIX}.0.gate_proj.weight' gives hidden size H = {hidden}, "
        "which is not a multiple of 128"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        layouts.DEFAULT.check(moe)


@pytest.mark.parametrize("hidden", [8, 24, 100])
def test_refuses_a_hidden_size_that_blocks_do_not_divide(hidden: int) -> None:
    refuses(
        f"1.safetensors: '{PREFIX}.0.gate_proj.weight' gives hidden size H = {hidden}, "
        "which is not a multiple of 16",
        layer(hidden=hidden),
    )


@pytest.mark.parametrize("intermediate", [8, 24, 100])
def test_refuses_an_intermediate_size_that_blocks_do_not_divide(intermediate: int) -> None:
    refuses(
        f"1.safetensors: '{PREFIX}.0.gate_proj.weight' gives "
        f"intermediate size I = {intermediate}, which is not a multiple of 16",
        layer(intermediate=intermediate),
    )


@pytest.mark.parametrize(
    ("hidden", "intermediate", "said"),
    [(0, 128, "hidden size H = 0"), (256, 0, "intermediate size I = 0")],
)
def test_refuses_empty_experts(hidden: int, intermediate: int, said: str) -> None:
    refuses(
        f"1.safetensors: '{PREFIX}.0.gate_proj.weight' gives {said}, which is not a multiple of 16",
        layer(hidden=hidden, intermediate=intermediate),
    )


@pytest.mark.parametrize("intermediate", [16, 48, 192, 320])
def test_accepts_any_intermediate_size_of_whole_blocks(intermediate: int) -> None:
    [moe] = found(layer(intermediate=intermediate))
    assert moe.geometry.intermediate == intermediate


def test_refuses_two_spellings_of_one_expert() -> None:
    refuses(
        f"2.safetensors: '{PREFIX}.01.up_proj.weight' names the same expert tensor as "
        f"'{PREFIX}.1.up_proj.weight'",
        layer(),
        {f"{PREFIX}.01.up_proj.weight": ("U8", (I, H // 2))},
    )


def test_refuses_a_config_that_does_not_count_its_layers() -> None:
    refuses("config.json: num_hidden_layers is missing", layer(), num_hidden_layers=None)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts"])
def test_refuses_a_count_that_is_not_one(key: str) -> None:
    refuses(f"config.json: {key} is '3', expected a positive integer", layer(), **{key: "3"})
