"""Another layout is one module and its test: the worked example of CONTRIBUTING.

The layout is that of FlashInfer's CUTLASS NVFP4 kernels: experts stacked as [up; gate], rows in
their order, block scales in 128x4 tiles. Nothing outside this file knows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.make_checkpoint import Spec, make_checkpoint
from support.tensors import read_tensors
from test_layouts import tiled

from fp4moe_convert import convert, inspect, layouts, verify
from fp4moe_convert.errors import CheckpointError, FormatError
from fp4moe_convert.format.contract import Geometry, TensorSpec
from fp4moe_convert.layouts.base import Move, RowOrder
from fp4moe_convert.source.experts import MoeLayer
from fp4moe_convert.source.families import LEAVES, Projection
from fp4moe_convert.storage.buffers import Bytes


@dataclass(frozen=True)
class Tiles:
    """Block scales [rows, cols] of the sources, one after the other, as 128x4 tiles."""

    sources: int
    cols: int

    @property
    def key(self) -> str:
        return f"Tiles(sources={self.sources}, cols={self.cols})"

    def arrange(self, sources: Sequence[Bytes], out: Bytes) -> None:
        scales = np.concatenate([source.reshape(-1, self.cols) for source in sources])
        tiles = scales.reshape(-1, 4, 32, self.cols // 4, 4).transpose(0, 3, 2, 1, 4)
        out.reshape(tiles.shape)[...] = tiles

    def undo(self, data: Bytes, scratch: Bytes) -> list[Bytes]:
        tiles = data.reshape(-1, self.cols // 4, 32, 4, 4).transpose(0, 3, 2, 1, 4)
        scratch[: data.size] = tiles.reshape(-1)
        return np.split(scratch[: data.size], self.sources)


STACKED: tuple[tuple[str, tuple[Projection, ...]], ...] = (
    ("w13", ("up", "gate")),
    ("w2", ("down",)),
)


class CutlassNvfp4:
    """The `layouts.base.Layout`."""

    name = "cutlass_nvfp4"
    parameters: Mapping[str, Any] = {}
    fingerprint = "rows as they are"

    def check(self, layer: MoeLayer) -> None:
        if layer.geometry.intermediate % 128:
            raise CheckpointError(f"{layer.prefix}: I is not a multiple of 128")

    def tensors(self, prefix: str, geometry: Geometry) -> tuple[TensorSpec, ...]:
        e, h, i = geometry.experts, geometry.hidden, geometry.intermediate
        return (
            TensorSpec(f"{prefix}.w13_weight", "U8", (e, 2 * i, h // 2)),
            TensorSpec(f"{prefix}.w2_weight", "U8", (e, h, i // 2)),
            TensorSpec(f"{prefix}.w13_weight_scale", "F8_E4M3", (e, 2 * i, h // 16)),
            TensorSpec(f"{prefix}.w2_weight_scale", "F8_E4M3", (e, h, i // 16)),
            TensorSpec(f"{prefix}.w13_weight_scale_2", "F32", (e, 2)),
            TensorSpec(f"{prefix}.w2_weight_scale_2", "F32", (e,)),
            TensorSpec(f"{prefix}.w13_input_scale", "F32", (e, 2)),
            TensorSpec(f"{prefix}.w2_input_scale", "F32", (e,)),
        )

    def moves(self, layer: MoeLayer) -> Iterator[Move]:
        for expert in range(layer.geometry.experts):
            for leaf in LEAVES:
                for name, projections in STACKED:
                    sources = [layer.matrices[expert, each, leaf] for each in projections]
                    spans = tuple(source.span(0, source.nbytes) for source in sources)
                    nbytes = sum(span.nbytes for span in spans)
                    arrangement = None
                    if leaf == "weight_scale":
                        arrangement = Tiles(len(sources), sources[0].shape[1])
                    tensor = f"{layer.prefix}.{name}_{leaf}"
                    yield Move(tensor, expert * nbytes, nbytes, spans, arrangement)

    def value_warnings(self, *_: object) -> Iterator[str]:
        return iter(())

    def authority(self, geometries: Iterable[Geometry]) -> RowOrder:  # noqa: ARG002
        return RowOrder(self.fingerprint, "any release")


H, I = 256, 128  # noqa: E741 (the letters of the format)
PREFIX = "model.layers.1.mlp.experts"


@pytest.fixture
def cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = CutlassNvfp4()
    monkeypatch.setattr(layouts, "DEFAULT", layout)
    monkeypatch.setattr(layouts, "LAYOUTS", {layout.name: layout})


@pytest.mark.usefixtures("cutlass")
def test_a_layout_of_another_kind(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, Spec(layers=1, experts=3, hidden=H, intermediate=I, vocab_size=16))
    convert(source, out, verify=True)
    before = {name: tensor.as_bytes() for name, tensor in read_tensors(source).items()}
    after = {name: tensor.as_bytes() for name, tensor in read_tensors(out).items()}
    for expert in range(3):
        up, gate, down = (f"{PREFIX}.{expert}.{name}_proj" for name in ("up", "gate", "down"))
        for leaf, arranged in (("weight", np.ravel), ("weight_scale", tiled)):
            w13 = np.concatenate([before[f"{up}.{leaf}"], before[f"{gate}.{leaf}"]])
            assert np.array_equal(np.ravel(after[f"{PREFIX}.w13_{leaf}"][expert]), arranged(w13))
            w2 = before[f"{down}.{leaf}"]
            assert np.array_equal(np.ravel(after[f"{PREFIX}.w2_{leaf}"][expert]), arranged(w2))
    assert inspect(out).state == "converted"
    verify(out, source)


@pytest.mark.usefixtures("cutlass")
def test_each_layout_knows_its_own_sizes_and_folders(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = tmp_path / "narrow"
    make_checkpoint(narrow, Spec(layers=1, experts=2, hidden=H, intermediate=64, vocab_size=16))
    with pytest.raises(CheckpointError, match="I is not a multiple of 128"):
        convert(narrow, tmp_path / "out")
    convert(tiny, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"the layout is cutlass_nvfp4, this release .* trtllm_"):
        inspect(tmp_path / "out")
