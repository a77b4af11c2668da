"""What a converted checkpoint is; ``docs/format.md`` says the same in prose.

Letters: **E** experts, **H** hidden size, **I** MoE intermediate size of one expert (not doubled),
**T** tensor-parallel size. It does no I/O and knows no tensors, so that the
converter, the verifier and the serving plugins can all stand on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import FormatError

FORMAT_VERSION = 1
QUANT_METHOD = "fp4moe"
LAYOUT_NAME = "trtllm_nvfp4"
EPILOGUE_TILE_M = 128

GROUP_SIZE = 16
"""Values that share one block scale."""
HIDDEN_MULTIPLE = 128
"""The kernel's tiles leave no remainder in H; other sizes are refused."""
INTERMEDIATE_MULTIPLE = 64
"""I is zero-padded to this in the file: 2I rows of w13 then fill whole tiles of 128."""

CONFIG_NAME = "config.json"
HF_QUANT_CONFIG_NAME = "hf_quant_config.json"
INDEX_NAME = "model.safetensors.index.json"
MANIFEST_NAME = "fp4moe_manifest.json"
JOURNAL_NAME = ".fp4moe-journal.jsonl"
"""Lies beside the shards for as long as a conversion is unfinished."""
PARTIAL_SUFFIX = ".partial"
"""What a file's name ends in until its last byte is on the disk."""


def shard_name(number: int, count: int) -> str:
    """Name of output shard ``number`` (from 1) of ``count``, as the Hub spells it."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of one MoE layer, as in the source (I not padded)."""

    experts: int
    hidden: int
    intermediate: int
    gated: bool = True

    @property
    def padded_intermediate(self) -> int:
        """I as the file holds it."""
        return round_up(self.intermediate, INTERMEDIATE_MULTIPLE)

    def as_json(self) -> dict[str, Any]:
        return {
            "experts": self.experts,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "gated": self.gated,
        }


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor looks like from outside."""

    name: str
    dtype: str
    """safetensors spelling: "U8", "F8_E4M3", "F32"."""
    shape: tuple[int, ...]


class LayerTensors(NamedTuple):
    """The eight tensors that stand for one layer's experts."""

    w13_weight: TensorSpec
    w2_weight: TensorSpec
    w13_weight_scale: TensorSpec
    w2_weight_scale: TensorSpec
    w13_weight_scale_2: TensorSpec
    w2_weight_scale_2: TensorSpec
    w13_input_scale: TensorSpec
    w2_input_scale: TensorSpec


def layer_tensors(prefix: str, geometry: Geometry) -> LayerTensors:
    """Names, dtypes and shapes of a converted layer.

    Args:
        prefix: the source's prefix up to and including ``.experts``.
        geometry: the layer's sizes.
    """
    e, h, i = geometry.experts, geometry.hidden, geometry.padded_intermediate

    def spec(leaf: str, dtype: str, *shape: int) -> TensorSpec:
        return TensorSpec(f"{prefix}.{leaf}", dtype, shape)

    return LayerTensors(
        w13_weight=spec("w13_weight", "U8", e, 2 * i, h // 2),
        w2_weight=spec("w2_weight", "U8", e, h, i // 2),
        w13_weight_scale=spec("w13_weight_scale", "F8_E4M3", e, 2 * i, h // GROUP_SIZE),
        w2_weight_scale=spec("w2_weight_scale", "F8_E4M3", e, h, i // GROUP_SIZE),
        w13_weight_scale_2=spec("w13_weight_scale_2", "F32", e, 2),
        w2_weight_scale_2=spec("w2_weight_scale_2", "F32", e),
        w13_input_scale=spec("w13_input_scale", "F32", e, 2),
        w2_input_scale=spec("w2_input_scale", "F32", e),
    )


def quantization_section(
    layers: Mapping[str, Geometry],
    *,
    row_order: str,
    flashinfer: str,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """The ``quantization_config`` of a converted checkpoint's config.json.

    The method has a name of its own so that an engine without the plugin refuses the checkpoint;
    labelled ``modelopt``, stock vLLM would load a Qwen3-MoE with uninitialised experts.

    Args:
        layers: geometry of each converted layer, by prefix.
        row_order: fingerprint of FlashInfer's row order (`row_order.RowOrder`).
        flashinfer: version of the FlashInfer that gave it.
        source: the source's own description of its quantization, verbatim.
    """
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "layout": {
            "name": LAYOUT_NAME,
            "epilogue_tile_m": EPILOGUE_TILE_M,
            "row_order": row_order,
            "flashinfer": flashinfer,
        },
        "layers": {prefix: geometry.as_json() for prefix, geometry in layers.items()},
        "source": dict(source),
    }


@dataclass(frozen=True, slots=True)
class Conversion:
    """What the ``quantization_config`` of a converted checkpoint says."""

    layers: Mapping[str, Geometry]
    """By prefix, up to and including ``.experts``."""
    row_order: str
    """Fingerprint of the row order."""
    flashinfer: str
    """The FlashInfer that gave it."""
    source: Mapping[str, Any]
    """The source's own description of its quantization."""


def read_quantization_section(section: Mapping[str, Any]) -> Conversion:
    """The inverse of `quantization_section`.

    Raises:
        FormatError: another version or layout, or not what a converter writes.
    """
    version = section.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{CONFIG_NAME}: the checkpoint has format version {version!r}, "
            f"this release of fp4moe-convert knows {FORMAT_VERSION}"
        )
    try:
        layout = section["layout"]
        if (layout["name"], layout["epilogue_tile_m"]) != (LAYOUT_NAME, EPILOGUE_TILE_M):
            raise FormatError(
                f"{CONFIG_NAME}: the layout is {layout['name']} with an epilogue tile of "
                f"{layout['epilogue_tile_m']}, expected {LAYOUT_NAME} with {EPILOGUE_TILE_M}"
            )
        return Conversion(
            layers={prefix: _geometry(sizes) for prefix, sizes in section["layers"].items()},
            row_order=str(layout["row_order"]),
            flashinfer=str(layout["flashinfer"]),
            source=dict(section["source"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(f"{CONFIG_NAME}: quantization_config is malformed: {error!r}") from None


def _geometry(sizes: Mapping[str, Any]) -> Geometry:
    geometry = Geometry(**sizes)
    for size in (geometry.experts, geometry.hidden, geometry.intermediate):
        if type(size) is not int or size < 1:
            raise ValueError(f"{size!r} is not a size")
    return geometry


MAX_TENSOR_PARALLEL = 64


def tensor_parallel_sizes(geometry: Geometry) -> dict[str, list[int]]:
    """The sizes T at which each engine's rank holds a slice of the file (docs/format.md, 4).

    Both engines want T to divide I. SGLang rounds I/T up to 64, cuts there and fills with zeros,
    as the slices do; vLLM cuts at I/T, which is the same only where that is whole blocks of 64.
    """
    i = geometry.intermediate
    sizes = [size for size in range(1, MAX_TENSOR_PARALLEL + 1) if i % size == 0]
    return {
        "sglang": sizes,
        "vllm": [size for size in sizes if size == 1 or i % (size * INTERMEDIATE_MULTIPLE) == 0],
    }


def common_tensor_parallel_sizes(geometries: Iterable[Geometry]) -> dict[str, list[int]]:
    """The sizes at which each engine can serve all of these layers."""
    sizes = [tensor_parallel_sizes(geometry) for geometry in geometries]
    return {
        engine: [size for size in sizes[0][engine] if all(size in s[engine] for s in sizes)]
        for engine in (sizes[0] if sizes else ())
    }
