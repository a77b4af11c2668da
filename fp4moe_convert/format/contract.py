"""The ``quantization_config`` of a converted checkpoint, and the sizes of its layers.

Letters: **E** experts, **H** hidden size, **I** MoE intermediate size of one expert (not doubled),
**T** tensor-parallel size. The converter, the verifier and the serving plugins all import this
module, so it does no I/O and needs no tensor library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from ..errors import FormatError
from .files import CONFIG_NAME

FORMAT_VERSION = 1
QUANT_METHOD = "fp4moe"
"""A name of its own, so that an engine without the plugin refuses the checkpoint. Under
``modelopt`` an engine could load a model and leave its experts uninitialised."""

GROUP_SIZE = 16
"""NVFP4: values that share one block scale."""

Size = Annotated[int, msgspec.Meta(ge=1)]


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes of one MoE layer, as in the source (I not padded)."""

    experts: Size
    hidden: Size
    intermediate: Size
    gated: bool = True

    def as_json(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor."""

    name: str
    dtype: str
    """safetensors spelling: "U8", "F8_E4M3", "F32"."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayoutRecord:
    """Which layout the experts have, and whose row order it is."""

    name: str
    parameters: Mapping[str, Any]
    """The layout's own settings, such as ``epilogue_tile_m``."""
    row_order: str
    """Fingerprint of the row order (`layouts.fingerprints`)."""
    flashinfer: str
    """The FlashInfer release that it is of."""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **self.parameters,
            "row_order": self.row_order,
            "flashinfer": self.flashinfer,
        }


@dataclass(frozen=True, slots=True)
class ConvertedSection:
    """The section, but for its method and version."""

    layout: LayoutRecord
    layers: Mapping[str, Geometry]
    """By the source's prefix, up to and including ``.experts``."""
    source: Mapping[str, Any]
    """The source's own description of its quantization, verbatim."""
    source_hf_quant_config: Mapping[str, Any] | None = None
    """hf_quant_config.json, where ``source`` is config.json's section and says it differently."""

    def as_json(self) -> dict[str, Any]:
        section = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "layout": self.layout.as_json(),
            "layers": {prefix: sizes.as_json() for prefix, sizes in self.layers.items()},
            "source": dict(self.source),
        }
        if self.source_hf_quant_config is not None:
            section["source_hf_quant_config"] = self.source_hf_quant_config
        return section

    @classmethod
    def from_json(cls, section: Mapping[str, Any]) -> ConvertedSection:
        """The inverse of `as_json`.

        Raises:
            FormatError: another format version, or not what a converter writes.
        """
        version = section.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise FormatError(
                f"{CONFIG_NAME}: the checkpoint has format version {version!r}, "
                f"this release of fp4moe-convert knows {FORMAT_VERSION}"
            )
        try:
            form = msgspec.convert(section, _SectionForm)
            layout = msgspec.convert(form.layout, _LayoutForm)
        except ValueError as error:  # as msgspec's are
            raise FormatError(f"{CONFIG_NAME}: quantization_config is malformed: {error}") from None
        return cls(
            layout=LayoutRecord(
                name=layout.name,
                parameters={
                    key: value
                    for key, value in form.layout.items()
                    if key not in _LayoutForm.__struct_fields__
                },
                row_order=layout.row_order,
                flashinfer=layout.flashinfer,
            ),
            layers=form.layers,
            source=form.source,
            source_hf_quant_config=form.source_hf_quant_config,
        )


class _LayoutForm(msgspec.Struct):
    """What every layout records, whatever else it does."""

    name: str
    row_order: str
    flashinfer: str


class _SectionForm(msgspec.Struct):
    layout: dict[str, Any]
    layers: dict[str, Geometry]
    source: dict[str, Any]
    source_hf_quant_config: dict[str, Any] | None = None
