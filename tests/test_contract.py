"""What marks a converted checkpoint, in config.json and as a tensor: written, read, refused."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4moe_convert.errors import FormatError
from fp4moe_convert.format.contract import (
    FORMAT_VERSION,
    ConvertedSection,
    Geometry,
    LayoutRecord,
    Marker,
)
from fp4moe_convert.format.sizes import round_up
from fp4moe_convert.source.description import is_fp8_hybrid, is_mixed_precision

PREFIX = "model.layers.3.mlp.experts"
SIZES = {"experts": 256, "hidden": 7168, "intermediate": 2048, "gated": True}

WRITTEN = {
    "quant_method": "fp4moe",
    "format_version": 2,
    "layout": {
        "name": "trtllm_nvfp4",
        "epilogue_tile_m": 128,
        "row_order": "xxh3_128:00",
        "flashinfer": "0.7.2.post1",
    },
    "layers": {PREFIX: SIZES},
    "source": {"quant_method": "modelopt", "ignore": ["lm_head"]},
}
"""As docs/format.md shows it in section 5."""


def section(hf_quant_config: dict[str, Any] | None = None) -> ConvertedSection:
    return ConvertedSection(
        layout=LayoutRecord("trtllm_nvfp4", {"epilogue_tile_m": 128}, "xxh3_128:00", "0.7.2.post1"),
        layers={PREFIX: Geometry(256, 7168, 2048)},
        source={"quant_method": "modelopt", "ignore": ["lm_head"]},
        source_hf_quant_config=hf_quant_config,
    )


def without(path: str) -> dict[str, Any]:
    """The section, less one of its keys."""
    content = json.loads(json.dumps(WRITTEN))
    *parents, last = path.split("/")
    inner = content
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    return dict(content)


def test_what_is_written_is_what_the_format_says() -> None:
    assert section().as_json() == WRITTEN
    assert list(section().as_json()) == list(WRITTEN)
    assert FORMAT_VERSION == 2


@pytest.mark.parametrize("hf_quant_config", [None, {"quantization": {"quant_algo": "NVFP4"}}])
def test_what_is_written_is_read_back_the_same(hf_quant_config: dict[str, Any] | None) -> None:
    content = json.loads(json.dumps(section(hf_quant_config).as_json()))
    assert ConvertedSection.from_json(content) == section(hf_quant_config)
    assert ("source_hf_quant_config" in content) == (hf_quant_config is not None)


values = st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans()))
sizes = st.integers(1, 2**40)


@given(
    st.builds(
        ConvertedSection,
        layout=st.builds(
            LayoutRecord,
            name=st.text(),
            parameters=values.map(
                lambda found: {
                    key: value
                    for key, value in found.items()
                    if key not in ("name", "row_order", "flashinfer")
                }
            ),
            row_order=st.text(),
            flashinfer=st.text(),
        ),
        layers=st.dictionaries(st.text(), st.builds(Geometry, sizes, sizes, sizes, st.booleans())),
        source=values,
        source_hf_quant_config=st.none() | values,
    )
)
def test_any_section_is_read_back_the_same(section: ConvertedSection) -> None:
    assert ConvertedSection.from_json(json.loads(json.dumps(section.as_json()))) == section


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        *((version, "convert again") for version in (1, 0, "2", None, 1.5, [2], True, 2.0)),
        (3, "install a newer fp4moe-convert, or convert again with this one"),
    ],
)
def test_another_format_version_is_refused(version: object, remedy: str) -> None:
    """Before anything else of the section is looked at."""
    rule = f"format version is {version!r}, this release of fp4moe-convert knows 2; {remedy}"
    for content in (WRITTEN | {"format_version": version}, {"format_version": version}):
        with pytest.raises(FormatError, match=f"^{re.escape(f'config.json: {rule}')}$"):
            ConvertedSection.from_json(content)
        with pytest.raises(FormatError, match=f"^{re.escape(f'fp4moe.layout: {rule}')}$"):
            Marker.decode(json.dumps(content).encode())


MARKER = {
    "format_version": 2,
    "layout": {"name": "trtllm_nvfp4", "epilogue_tile_m": 128, "row_order": "xxh3_128:00"},
}
"""As docs/format.md shows it in section 5."""


def test_the_marker_is_what_the_format_says() -> None:
    data = section().layout.marker.encode()
    assert json.loads(data) == MARKER
    assert len(data) == 4096
    assert data.rstrip(b" ")[-1:] == b"}"


@given(st.text(), values, st.text())
def test_any_marker_is_read_back_the_same(
    name: str, parameters: dict[str, Any], row_order: str
) -> None:
    own = {key: value for key, value in parameters.items() if key not in ("name", "row_order")}
    marker = Marker(name, own, row_order)
    data = marker.encode()
    assert Marker.decode(data) == marker
    assert len(data) % 4096 == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON: "),
        (b"\xff" * 4096, "not JSON: "),
        (b"[]", "not a JSON object"),
        (json.dumps({"format_version": 2}).encode(), "is malformed: "),
        (json.dumps({**MARKER, "layout": {"name": "x"}}).encode(), "is malformed: .*`row_order`"),
    ],
)
def test_a_marker_of_another_form_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=rf"^fp4moe\.layout: {reason}"):
        Marker.decode(data)


@pytest.mark.parametrize(
    "missing",
    [
        *("layout", "layers", "source"),
        *("layout/name", "layout/row_order", "layout/flashinfer"),
        *(f"layers/{PREFIX}/{size}" for size in ("experts", "hidden", "intermediate")),
    ],
)
def test_a_section_that_lacks_something_is_refused(missing: str) -> None:
    """By the name of what it lacks."""
    key = missing.rpartition("/")[2]
    with pytest.raises(
        FormatError, match=rf"^config\.json: quantization_config is malformed: .*`{key}`"
    ):
        ConvertedSection.from_json(without(missing))


@pytest.mark.parametrize("path", ["layout", "layers", "source"])
@pytest.mark.parametrize("value", [None, 1, "text", [1]], ids=str)
def test_a_section_of_another_form_is_refused(path: str, value: object) -> None:
    with pytest.raises(FormatError, match=r"^config\.json: quantization_config is malformed: "):
        ConvertedSection.from_json(WRITTEN | {path: value})


def test_a_section_without_gated_is_of_gated_experts() -> None:
    assert ConvertedSection.from_json(without(f"layers/{PREFIX}/gated")) == section()


@pytest.mark.parametrize(
    "changes",
    [
        *({name: size} for name in ("experts", "hidden", "intermediate") for size in (0, -1, "1")),
        {"hidden": 7168.5},
        {"gated": 1},
        {"groups": 2},
    ],
    ids=str,
)
def test_sizes_that_are_none_are_refused(changes: dict[str, object]) -> None:
    """An unknown one too: it may change what the others mean."""
    with pytest.raises(FormatError, match="quantization_config is malformed: "):
        ConvertedSection.from_json(WRITTEN | {"layers": {PREFIX: SIZES | changes}})


def test_sizes_are_read_back_the_same() -> None:
    for geometry in (Geometry(256, 7168, 2048), Geometry(1, 128, 16, gated=False)):
        assert msgspec.convert(geometry.as_json(), Geometry) == geometry
    assert Geometry(256, 7168, 2048).as_json() == SIZES


@pytest.mark.parametrize(
    ("method", "hybrid", "mixed"),
    [("fp8", True, False), ("modelopt", False, True), ("mxfp8", False, True)],
)
def test_engines_read_hf_quant_config_for_modelopts_mixed_precision_alone(
    method: str, hybrid: bool, mixed: bool
) -> None:
    """So what reads it for them must tell it from FP8 with experts in NVFP4, which says the same of
    its algorithms."""
    section = {
        "quant_method": method,
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
    }
    assert (is_fp8_hybrid(section), is_mixed_precision(section)) == (hybrid, mixed)


@given(st.integers(0, 2**40), st.integers(1, 2**20))
def test_round_up(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple
