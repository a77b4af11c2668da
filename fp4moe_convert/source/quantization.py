"""How a checkpoint says that it is quantized, and whether it has NVFP4 experts to convert: those of
ModelOpt, throughout, in mixed precision or amid FP8, and of llm-compressor (compressed-tensors)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import CheckpointError
from ..format.contract import GROUP_SIZE, QUANT_METHOD
from ..format.files import CONFIG_NAME, HF_QUANT_CONFIG_NAME
from .checkpoint import Checkpoint
from .converted import is_converted
from .description import (
    algorithm_of,
    is_compressed_tensors,
    is_fp8_hybrid,
    is_mixed_precision,
    settings_of,
)
from .families import COMPRESSED_TENSORS_LEAVES, FAMILIES, MODELOPT_LEAVES, Leaf
from .names import is_mtp_by_name, layer_number

WEIGHT_ONLY = (
    "weight-only (W4A16), which no engine serves with flashinfer_trtllm, the backend that this "
    "layout is for; serve the original with another MoE backend"
)
_PROJECTIONS = "|".join(sorted({name for family in FAMILIES for name in family.part_names}))
_EXPERTS = re.compile(
    rf"(?P<layer>(?:.*\.)?(?:experts|moe))(?:\.?\*.*|\.(?:[0-9]+|{_PROJECTIONS})(?:[._].*)?)?",
    re.DOTALL,
)
"""A module of routed experts: of all, of one, or a projection; not a router or a shared expert that
lies beside them."""

_Modules: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What a description of mixed precision says of each module, by name."""


@dataclass(frozen=True, slots=True)
class Nvfp4Source:
    """How a source describes NVFP4 experts, whatever else is in it."""

    title: str
    """For messages."""
    leaves: Mapping[Leaf, str]
    """What it calls the tensors of an expert."""
    mixed: bool
    """Whether its layers may differ in their quantization, so that others than NVFP4 pass."""
    algorithms: Mapping[str, frozenset[str]]
    """Of experts, by the layer that it names, up to and including ``.experts`` or ``.moe``."""

    def algorithms_of(self, prefix: str, number: int) -> frozenset[str]:
        """Those of a layer; by its number, where modules have other names than tensors."""
        if prefix in self.algorithms:
            return self.algorithms[prefix]
        own = (each for name, each in self.algorithms.items() if layer_number(name) == number)
        return frozenset().union(*own)


def described_by(checkpoint: Checkpoint) -> Nvfp4Source:
    """What a checkpoint, an original or a converted one, says of its NVFP4 experts. One that
    `require_nvfp4` refuses is taken for an export of ModelOpt."""
    source, file = checkpoint.quantization or {}, checkpoint.hf_quant_config
    if source.get("quant_method") == QUANT_METHOD:
        file, source = source.get("source_hf_quant_config"), source.get("source", {})
    if is_compressed_tensors(source):
        return Nvfp4Source("compressed-tensors NVFP4", COMPRESSED_TENSORS_LEAVES, True, {})
    algorithms: dict[str, frozenset[str]] = {}
    for layer, algorithm in _quantized_experts(_quantized_modules(settings_of(source), file)):
        algorithms[layer] = algorithms.get(layer, frozenset()) | {algorithm}
    mixed = is_mixed_precision(source) or is_fp8_hybrid(source)
    return Nvfp4Source("ModelOpt NVFP4", MODELOPT_LEAVES, mixed, algorithms)


def require_nvfp4(checkpoint: Checkpoint) -> None:
    """Refuse what has no NVFP4 experts with blocks of 16 as ModelOpt or llm-compressor describe
    them, and say what it is.

    Raises:
        CheckpointError: already converted, another quantization, or none.
    """
    if is_converted(checkpoint):
        raise CheckpointError(f"{checkpoint.location}: is already converted")
    section = checkpoint.quantization
    if section is None:
        dtype = checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype"))
        raise CheckpointError(
            f"{checkpoint.location}: not NVFP4: it is not quantized"
            + (f" ({CONFIG_NAME} says {dtype})" if dtype else "")
        )
    file = HF_QUANT_CONFIG_NAME if checkpoint.is_described_in_file else CONFIG_NAME
    settings = settings_of(section)
    producer = section.get("producer")
    maker = producer.get("name") if isinstance(producer, dict) else None
    method = section.get("quant_method", maker or "modelopt")
    modules = _quantized_modules(settings, checkpoint.hf_quant_config)
    sizes = _group_sizes(section, str(method), modules)
    if sizes is None:
        kind = _words(method, settings.get("quant_algo"), section.get("format"))
        why = _why_not(settings, modules)
        raise CheckpointError(
            f"{file}: no NVFP4 experts to convert: the quantization is {kind}{why}"
        )
    for group_size in sizes:
        if group_size not in (GROUP_SIZE, None):
            raise CheckpointError(f"{file}: group size is {group_size!r}, NVFP4 has {GROUP_SIZE}")


def _group_sizes(section: Mapping[str, Any], method: str, modules: _Modules) -> list[Any] | None:
    """The group sizes that are given for NVFP4, a None where none is given; None if a section does
    not describe experts that can be converted."""
    settings = settings_of(section)
    groups = _groups(settings)
    if is_compressed_tensors(section):
        sizes = [group["weights"].get("group_size") for group in groups if _is_nvfp4(group)]
        # A group of MXFP4 may be of something else; the experts' block scales will tell.
        return [size for size in sizes if size in (GROUP_SIZE, None)] or sizes or None
    if is_fp8_hybrid(section):
        return [_group_size(settings)]
    # transformers' reader of ModelOpt's section also knows the method as "modelopt_fp4".
    if not method.lower().startswith("modelopt"):
        return None
    if is_mixed_precision(section):
        if "NVFP4" not in _algorithms_of_experts(settings, modules):
            return None
        return [_group_size(each) for each in modules.values() if algorithm_of(each) == "NVFP4"]
    if algorithm_of(settings) != "NVFP4":
        return None
    weights = [group.get("weights") for group in groups]
    described = [settings, *(each for each in weights if isinstance(each, dict))]
    return [_group_size(each) for each in described]


def _why_not(settings: Mapping[str, Any], modules: _Modules) -> str:
    """What there is to say of experts that have four bits and yet are not converted."""
    algorithm = algorithm_of(settings)
    experts = _algorithms_of_experts(settings, modules)
    if not experts:
        experts = {"W4A16_NVFP4"} if _has_weights_alone(settings) else {algorithm}
    if experts == {"W4A16_NVFP4"}:
        return f", whose experts are {WEIGHT_ONLY}"
    if experts == {"NVFP4_AWQ"}:
        return (
            ", whose experts multiply their input by a pre_quant_scale, which no engine does for "
            "experts; export the model as NVFP4"
        )
    if experts != {algorithm}:
        known = "; this release knows such experts from modelopt, fp8 and compressed-tensors"
        words = " and ".join(sorted(experts))
        return f", whose experts are {words}{known if 'NVFP4' in experts else ''}"
    return ""


def _algorithms_of_experts(settings: Mapping[str, Any], modules: _Modules) -> set[str]:
    """Those that a description of mixed precision gives the decoder's experts."""
    if settings.get("moe_quant_algo"):  # amid FP8
        return {algorithm_of(settings, "moe_quant_algo")}
    return {algorithm for _, algorithm in _quantized_experts(modules)}


def _quantized_experts(modules: _Modules) -> Iterator[tuple[str, str]]:
    """The layers of modules of the decoder's experts, each with the module's algorithm."""
    for name, module in modules.items():
        if (match := _EXPERTS.fullmatch(name)) and not is_mtp_by_name(name):
            yield match["layer"], algorithm_of(module)


def _quantized_modules(
    settings: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None
) -> _Modules:
    """As a description of mixed precision has them. Engines read the file where the section says
    nothing of it."""
    layers = settings.get("quantized_layers")
    if not layers and hf_quant_config is not None:
        layers = settings_of(hf_quant_config).get("quantized_layers")
    found = layers.items() if isinstance(layers, dict) else ()
    return {name: layer for name, layer in found if isinstance(layer, dict)}


def _is_nvfp4(group: Mapping[str, Any]) -> bool:
    """Whether a group of compressed-tensors has weights and activations in FP4."""
    both = (group.get("weights"), group.get("input_activations"))
    return all(map(_is_fp4, both))


def _is_fp4(tensors: object) -> bool:
    """Whether a group of compressed-tensors says so of its weights, or of its activations."""
    if not isinstance(tensors, dict):
        return False
    return (tensors.get("num_bits"), tensors.get("type")) == (4, "float")


def _group_size(settings: Mapping[str, Any]) -> object:
    """As ModelOpt's readers take it, in quotes or not."""
    size = settings.get("group_size")
    return GROUP_SIZE if size == str(GROUP_SIZE) else size


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    each = groups.values() if isinstance(groups, dict) else ()
    return [group for group in each if isinstance(group, dict)]


def _has_weights_alone(settings: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors quantizes the activations of nothing that has FP4 weights."""
    four_bits = [
        group.get("input_activations")
        for group in _groups(settings)
        if _is_fp4(group.get("weights"))
    ]
    return bool(four_bits) and not any(four_bits)


def describe(section: Mapping[str, Any]) -> str:
    """A few words on a section, a source's or a converted one: its method and algorithm."""
    source = section.get("source")
    own = source if isinstance(source, dict) else section
    algorithm = settings_of(own).get("quant_algo") or own.get("format")
    return _words(section.get("quant_method"), algorithm) or "none"


def _words(*values: object) -> str:
    return " ".join(str(value) for value in values if value)
