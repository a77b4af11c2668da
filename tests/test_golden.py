"""The converter's bytes against those that SGLang's and vLLM's own loaders end with.

``data/golden/`` was made by the engines' code (support/make_golden.py says how, digests.json with
which versions): whole tensors for one tiny layer, checksums for wider ones and for every tensor-
and expert-parallel rank. A rank must be a slice of the converted file, cut as docs/format.md says
in section 4. The slicer here is of our own; test_converted_layer.py holds the shipped one against
the same record.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray
from support.golden import CASES, ENGINES, GOLDEN, PREFIX, runs_of
from support.make_checkpoint import Spec
from support.tensors import read_tensors

from fp4moe_convert.engines import tensor_parallel_sizes
from fp4moe_convert.engines.engine import Model
from fp4moe_convert.format.contract import Geometry
from fp4moe_convert.storage.buffers import Bytes


def geometry_of(spec: Spec) -> Geometry:
    return Geometry(spec.experts, spec.hidden, spec.intermediate, gated=not spec.ungated)


def raw_tensors(path: Path, prefix: str = "") -> dict[str, Bytes]:
    """All tensors whose names start so, last axis in bytes; read by the safetensors library."""
    return {
        name.removeprefix(prefix): tensor.as_bytes()
        for name, tensor in read_tensors(path).items()
        if name.startswith(prefix)
    }


Indices = NDArray[np.intp]


def row_of(values: Indices, projection: int, projections: int) -> Indices:
    """Where w13 has the rows of these values of I, from one of the projections that interleave."""
    interleaved = projections * values + projection
    block, row = interleaved // 32, interleaved % 32
    return block * 32 + row % 4 * 8 + row // 4


def place_of(rows: Indices, cols: Indices, width: int) -> Indices:
    """Where a matrix in 128x4 tiles, ``width`` bytes to a row, has each of these bytes."""
    rows, cols = rows[:, None], cols[None, :]
    tile = rows // 128 * (width // 4) + cols // 4
    return tile * 512 + rows % 32 * 16 + rows % 128 // 32 * 4 + cols % 4


def rank_slices(file: Mapping[str, Bytes], spec: Spec, run: Mapping[str, Any]) -> dict[str, Bytes]:
    """docs/format.md, section 4, value by value: what one rank takes from the file."""
    sglang, projections = run["engine"] == "sglang", 1 if spec.ungated else 2
    h, own_h, p = spec.hidden, run["hidden"], run["intermediate"]
    width = p if sglang else spec.intermediate // run["tp_size"]
    start = width * run["tp_rank"]
    theirs = np.arange(start, max(start, min(start + width, spec.intermediate)))
    ours = np.arange(len(theirs))
    e = spec.experts // run["ep_size"]
    local = slice(run["ep_rank"] * e, (run["ep_rank"] + 1) * e)

    def empty(rows: int, cols: int) -> Bytes:
        return np.zeros((e, rows, cols), np.uint8)

    w13_weight = empty(projections * p, own_h // 2)
    w13_scale = empty(projections * p, own_h // 16)
    for each in range(projections):
        to, from_ = (row_of(values, each, projections) for values in (ours, theirs))
        w13_weight[:, to, : h // 2] = file["w13_weight"][local][:, from_]
        cols = np.arange(h // 16)
        places = place_of(from_, cols, h // 16)
        scales = file["w13_weight_scale"][local].reshape(e, -1)[:, places]
        w13_scale.reshape(e, -1)[:, place_of(to, cols, own_h // 16)] = scales
    w2_weight, w2_scale = empty(own_h, p // 2), empty(own_h, p // 16)
    w2_weight[:, :h, : len(ours) // 2] = file["w2_weight"][local][:, :, theirs[::2] // 2]
    places = place_of(np.arange(h), theirs[::16] // 16, file["w2_weight_scale"].shape[2])
    scales = file["w2_weight_scale"][local].reshape(e, -1)[:, places]
    w2_scale.reshape(e, -1)[:, place_of(np.arange(h), ours[::16] // 16, p // 16)] = scales
    return {
        "w13_weight": w13_weight,
        "w2_weight": w2_weight,
        "w13_weight_scale": w13_scale,
        "w2_weight_scale": w2_scale,
        "w13_weight_scale_2": file["w13_weight_scale_2"].reshape(spec.experts, -1)[local],
        "w2_weight_scale_2": file["w2_weight_scale_2"].reshape(spec.experts, -1)[local],
        # Both engines keep every expert's activation scale on every rank: they use the maximum.
        "w13_input_scale": file["w13_input_scale"],
        "w2_input_scale": file["w2_input_scale"],
    }


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, golden_folder: Callable[[str], Path]) -> Any:
    """(name, spec, the layer's tensors as the converted file has them)."""
    name = request.param
    return name, CASES[name], raw_tensors(golden_folder(name), f"{PREFIX}.")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_is_a_slice_of_the_file(case: Any, engine: str) -> None:
    name, spec, tensors = case
    served = tensor_parallel_sizes(Model((), {}, {}), [geometry_of(spec)])[engine]
    checked = 0
    for run in runs_of(name, engine):
        if "refused" in run:
            assert run["tp_size"] not in served, run
            continue
        if run["tp_size"] not in served:
            continue  # vLLM cuts within a block of 16 values; nothing is promised
        slices = rank_slices(tensors, spec, run)
        for tensor, recorded in run["tensors"].items():
            digest = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(slices[tensor]).tobytes())
            assert digest == recorded["xxh3_128"], (tensor, run)
            checked += 1
    assert checked, "no run of this engine on record"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tiny_layer_byte_for_byte(engine: str, golden_folder: Callable[[str], Path]) -> None:
    """The same, but where it fails one can see which bytes."""
    ours = raw_tensors(golden_folder("E4-H256-I128"), f"{PREFIX}.")
    for name, theirs in raw_tensors(GOLDEN / f"tiny_{engine}.safetensors").items():
        np.testing.assert_array_equal(ours[name], theirs, err_msg=name)
