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
from support.golden import CASES, ENGINES, GOLDEN, PREFIX, runs_of
from support.make_checkpoint import Spec
from support.tensors import read_tensors

from fp4moe_convert.format.contract import Geometry, round_up
from fp4moe_convert.serving.engines import tensor_parallel_sizes
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


def fit(array: Bytes, axis: int, start: int, nbytes: int) -> Bytes:
    """[start, start + nbytes) of ``axis``, zeros past its end."""
    stop = min(start + nbytes, array.shape[axis])
    part = np.take(array, range(min(start, stop), stop), axis)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, nbytes - part.shape[axis])
    return np.pad(part, padding)


def rank_slices(file: Mapping[str, Bytes], spec: Spec, run: Mapping[str, Any]) -> dict[str, Bytes]:
    """docs/format.md, section 4: what one rank takes from the file."""
    n, multiple = (1, 128) if spec.ungated else (2, 64)  # of w13: up alone, or gate and up
    h, i = spec.hidden, round_up(spec.intermediate, multiple)
    p = round_up(-(-spec.intermediate // run["tp_size"]), multiple)
    rank, padded_h = run["tp_rank"], run["hidden"]
    e = spec.experts // run["ep_size"]
    local = slice(run["ep_rank"] * e, (run["ep_rank"] + 1) * e)

    w13_scale_tiles = fit(file["w13_weight_scale"][local], 1, rank * n * p, n * p)
    w2_scale_tiles = file["w2_weight_scale"][local].reshape(e, h // 128, i // 64, 512)
    w2_scale_tiles = fit(w2_scale_tiles, 2, rank * p // 64, p // 64)
    w2_weight = fit(file["w2_weight"][local], 2, rank * p // 2, p // 2)
    return {
        "w13_weight": fit(
            fit(file["w13_weight"][local], 1, rank * n * p, n * p), 2, 0, padded_h // 2
        ),
        "w2_weight": fit(w2_weight, 1, 0, padded_h),
        "w13_weight_scale": fit(
            w13_scale_tiles.reshape(e, n * p // 128, h // 64, 512), 2, 0, padded_h // 64
        ),
        "w2_weight_scale": fit(w2_scale_tiles, 1, 0, padded_h // 128),
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
    served = tensor_parallel_sizes([geometry_of(spec)])[engine]
    checked = 0
    for run in runs_of(name, engine):
        if "refused" in run:
            assert run["tp_size"] not in served, run
            continue
        if run["tp_size"] not in served:
            continue  # vLLM cuts elsewhere; nothing is promised
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
