"""What marks a converted checkpoint: its ``quantization_config``, and a tensor that says the same
of the bytes beside it.

Letters: **E** experts, **H** hidden size, **I** MoE intermediate size of one expert (not doubled),
**T** tensor-parallel size. The converter, the verifier and the serving plugins all import this
module, so it does no I/O and needs no tensor library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from ..errors import FormatError
from .files import CONFIG_NAME
from .sizes import round_up
from .untrusted import decode_object

FORMAT_VERSION = 2
QUANT_METHOD = "fp4moe"
"""A name of its own, so that an engine without the plugin refuses the checkpoint. Under
``modelopt`` an engine could load a model and leave its experts uninitialised."""

GROUP_SIZE = 16
"""NVFP4: values that share one block scale."""

MARKER_NAME = "fp4moe.layout"
"""A tensor of every converted checkpoint, U8, that holds what an engine must know to judge the
others. config.json may come from elsewhere; this cannot. No model has a tensor of this name, so an
engine without the plugin stops at it."""
MARKER_MULTIPLE = 4096
"""The marker is padded with spaces to a multiple of this, so that it can be the first tensor of a
shard and leave the others where direct I/O can write them."""

Size = Annotated[int, msgspec.Meta(ge=1)]


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
        return {**self.marker.layout_json(), "flashinfer": self.flashinfer}

    @property
    def marker(self) -> Marker:
        """What the marker of a checkpoint with this layout says."""
        return Marker(self.name, self.parameters, self.row_order)


@dataclass(frozen=True, slots=True)
class Marker:
    """What the tensor `MARKER_NAME` says, besides the format version. The release of FlashInfer is
    not part of it: releases with the same row order make the same bytes."""

    layout: str
    parameters: Mapping[str, Any]
    row_order: str

    def layout_json(self) -> dict[str, Any]:
        """The layout as JSON values."""
        return {"name": self.layout, **self.parameters, "row_order": self.row_order}

    def encode(self) -> bytes:
        """The tensor's bytes."""
        content = {"format_version": FORMAT_VERSION, "layout": self.layout_json()}
        text = json.dumps(content).encode()
        return text.ljust(round_up(len(text), MARKER_MULTIPLE))

    @classmethod
    def decode(cls, data: bytes) -> Marker:
        """The inverse of `encode`.

        Raises:
            FormatError: another format version, or not what a converter writes.
        """
        try:
            content = decode_object(data)
        except ValueError as error:
            raise FormatError(f"{MARKER_NAME}: {error}") from None
        check_format_version(MARKER_NAME, content)
        try:
            form = msgspec.convert(content.get("layout"), _MarkedLayoutForm)
        except ValueError as error:
            raise FormatError(f"{MARKER_NAME}: is malformed: {error}") from None
        parameters = _parameters(content["layout"], _MarkedLayoutForm)
        return cls(form.name, parameters, form.row_order)


def check_format_version(where: str, content: Mapping[str, Any]) -> None:
    """Make sure that a converted checkpoint has this release's format version.

    Args:
        where: the file or tensor that says so, for the message.
        content: its JSON.

    Raises:
        FormatError: it has not.
    """
    version = content.get("format_version")
    if type(version) is int and version == FORMAT_VERSION:
        return
    remedy = "convert again"
    if type(version) is int and version > FORMAT_VERSION:
        remedy = "install a newer fp4moe-convert, or convert again with this one"
    raise FormatError(
        f"{where}: format version is {version!r}, this release of fp4moe-convert knows "
        f"{FORMAT_VERSION}; {remedy}"
    )


@dataclass(frozen=True, slots=True)
class ConvertedSection:
    """The section, but for its method and version."""

    layout: LayoutRecord
    layers: Mapping[str, Geometry]
    """By the source's prefix, up to and including ``.experts`` or ``.moe``."""
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
        check_format_version(CONFIG_NAME, section)
        try:
            form = msgspec.convert(section, _SectionForm)
            layout = msgspec.convert(form.layout, _LayoutForm)
        except ValueError as error:  # as msgspec's are
            raise FormatError(f"{CONFIG_NAME}: quantization_config is malformed: {error}") from None
        return cls(
            layout=LayoutRecord(
                name=layout.name,
                parameters=_parameters(form.layout, _LayoutForm),
                row_order=layout.row_order,
                flashinfer=layout.flashinfer,
            ),
            layers=form.layers,
            source=form.source,
            source_hf_quant_config=form.source_hf_quant_config,
        )


class _MarkedLayoutForm(msgspec.Struct):
    """What every layout records, whatever else it does."""

    name: str
    row_order: str


class _LayoutForm(_MarkedLayoutForm):
    flashinfer: str


def _parameters(layout: Mapping[str, Any], form: type[msgspec.Struct]) -> dict[str, Any]:
    """The layout's own settings: what ``form`` does not name."""
    return {key: value for key, value in layout.items() if key not in form.__struct_fields__}


class _SectionForm(msgspec.Struct):
    layout: dict[str, Any]
    layers: dict[str, Geometry]
    source: dict[str, Any]
    source_hf_quant_config: dict[str, Any] | None = None
