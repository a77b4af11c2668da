"""Compare a converted layer with what FlashInfer's own kernels make of the source, on a GPU.

    python -m tests.support.gpu_check                   # one DeepSeek-V3 layer: 256 experts, 6.9 GB
    python -m tests.support.gpu_check --experts 8       # the same width, 0.9 GB
    python -m tests.support.gpu_check --ungated --experts 128 --hidden 2688 --intermediate 1856

The 128x4 tiles of the block scales come from `block_scale_interleave`, which exists only as a CUDA
kernel, so a test without a GPU can hold them only against a formula. This script makes a
checkpoint, converts it with the command line, and lays every expert out once more on the GPU with
FlashInfer's public functions. Exit code 0: all bytes are equal. docs/gpu-check.md has a record.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from flashinfer import block_scale_interleave, reorder_rows_for_gated_act_gemm, shuffle_matrix_a
from safetensors import safe_open

from .make_checkpoint import Spec, make_checkpoint

EPILOGUE_TILE_M = 128


class Tensors:
    """All tensors of a folder by name, read one at a time by the safetensors library."""

    def __init__(self, folder: Path) -> None:
        self._files = {
            name: file
            for path in folder.glob("*.safetensors")
            for file in [safe_open(path, "pt")]
            for name in file.keys()  # noqa: SIM118 (not a dict)
        }

    def whole(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name).view(torch.uint8).cuda()

    def expert(self, name: str, expert: int) -> torch.Tensor:
        return self._files[name].get_slice(name)[expert].view(torch.uint8).cuda()


def flashinfer_layout(sources: list[torch.Tensor], *, scales: bool) -> torch.Tensor:
    """[up; gate], up alone, or down, [rows, bytes], as the TRT-LLM kernels want it."""
    matrix = torch.cat(sources)
    if len(sources) == 2:
        matrix = reorder_rows_for_gated_act_gemm(matrix)
    matrix = shuffle_matrix_a(matrix, EPILOGUE_TILE_M).contiguous()
    return block_scale_interleave(matrix).reshape(matrix.shape) if scales else matrix


def padded(matrix: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """With zeros up to multiples of these."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % cols, 0, -matrix.shape[0] % rows))


def check_layer(source: Tensors, out: Tensors, prefix: str, spec: Spec) -> int:
    """Compare all four matrices of every expert; returns the bytes compared."""
    nbytes = 0
    w13, multiple = (("up",), 128) if spec.ungated else (("up", "gate"), 64)
    per_byte = {"weight": 2, "weight_scale": 16}  # values of a row
    for expert in range(spec.experts):
        for leaf in ("weight", "weight_scale"):
            for ours, projections in (("w13", w13), ("w2", ("down",))):
                rows, cols = (multiple, 1) if ours == "w13" else (1, multiple // per_byte[leaf])
                matrices = [
                    padded(source.whole(f"{prefix}.{expert}.{each}_proj.{leaf}"), rows, cols)
                    for each in projections
                ]
                expected = flashinfer_layout(matrices, scales=leaf == "weight_scale")
                found = out.expert(f"{prefix}.{ours}_{leaf}", expert)
                if not torch.equal(found, expected):
                    wrong = int((found != expected).sum())
                    sys.exit(f"{prefix}.{ours}_{leaf}[{expert}]: {wrong} bytes differ")
                nbytes += expected.numel()
    return nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--ungated", action="store_true", help="as in Nemotron-H")
    arguments = parser.parse_args()
    spec = Spec(layers=1, dense_layers=0, **vars(arguments))
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        make_checkpoint(source, spec)
        command = "from fp4moe_convert.__main__ import main_convert; main_convert()"
        arguments_ = [str(source), str(out), "--quiet", "--json"]
        run = subprocess.run(
            [sys.executable, "-c", command, *arguments_], check=True, stdout=subprocess.PIPE
        )
        report = json.loads(run.stdout)
        started = time.perf_counter()
        nbytes = check_layer(Tensors(source), Tensors(out), "model.layers.0.mlp.experts", spec)
        seconds = time.perf_counter() - started
    print(f"gpu              {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"flashinfer       {version('flashinfer-python')}, row order {report['row_order']}")
    gate = ", without a gate" if spec.ungated else ""
    print(f"layer            E = {spec.experts}, H = {spec.hidden}, I = {spec.intermediate}{gate}")
    print(f"converted        {report['bytes_out']:,} bytes in {report['seconds']} s")
    print(f"equal            {nbytes:,} bytes of 4 tensors, compared in {seconds:.1f} s")


if __name__ == "__main__":
    main()
