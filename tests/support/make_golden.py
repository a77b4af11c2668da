"""Make tests/data/golden: what SGLang and vLLM themselves turn ModelOpt NVFP4 experts into.

    python -m tests.support.make_golden     # a minute and 1.5 GB in the temporary folder; no GPU

Needs numpy and xxhash here and an environment for each engine, by default
~/.cache/fp4moe-engines/{sglang,vllm}. Checkpoints come from make_checkpoint.py and are not kept: a
test makes the same one again from the `Spec` in the record.

Written are `digests.json`, with size and XXH3-128 digest of each tensor on each rank, and all bytes
of one small case, `tiny_sglang.safetensors` and `tiny_vllm.safetensors`, to look into when a digest
differs. Rows, cuts and padding in them are the engines' doing. The 128x4 tiles of the block scales
are not: a CUDA kernel makes them, and without a GPU `jobs.interleave_block_scales` stands in.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from .cpu_engines.jobs import Job
from .environments import environments
from .make_checkpoint import Spec, make_checkpoint
from .processes import finding_support

ENGINES = ("sglang", "vllm")
TARGET = Path(__file__).resolve().parents[1] / "data" / "golden"
LAYER = 0  # the checkpoints have one MoE layer and no other


def spec(
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    differing_scales: bool = False,
    ungated: bool = False,
) -> Spec:
    return Spec(
        layers=1,
        dense_layers=0,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        shards=2,
        vocab_size=16,
        differing_scales=differing_scales,
        ungated=ungated,
    )


TINY = "E4-H256-I128"
CASES = {
    TINY: spec(4, 256, 128),
    "E4-H256-I192": spec(4, 256, 192, differing_scales=True),
    "E4-H256-I96": spec(4, 256, 96),  # I is no multiple of 64
    "E4-H256-I80": spec(4, 256, 80),  # nor of 32
    "E4-H384-I128": spec(4, 384, 128),  # vLLM pads H to 512
    "E8-H512-I320": spec(8, 512, 320, differing_scales=True),
    "E4-H1024-I256": spec(4, 1024, 256),
    "E2-H7168-I2048": spec(2, 7168, 2048),  # DeepSeek-V3
    "E2-H2048-I768": spec(2, 2048, 768),  # Qwen3-30B-A3B
    "E4-H256-I192-ungated": spec(4, 256, 192, ungated=True),  # I is no multiple of 128
    "E4-H384-I448-ungated": spec(4, 384, 448, ungated=True),
    "E2-H2688-I1856-ungated": spec(2, 2688, 1856, ungated=True),  # Nemotron-3 Nano
}


def jobs_of(engine: str, case: str, checkpoint: Path) -> Iterator[Job]:
    """All ranks of TP 1 to 4 and, where each is left two experts, of EP 2.

    SGLang gives a rank I/T rounded up to 64, or to 128 without a gate, and the last ones what is
    left. vLLM gives each rank I/T and pads that: its bytes are those of the T = 1 file, but not
    always a slice of them.
    """
    made = CASES[case]
    for tp_size in (1, 2, 3, 4):
        width, rest = divmod(made.intermediate, tp_size)
        # vLLM also cuts within a block of 16 values and then drops scales: nothing to follow.
        if engine == "vllm" and not rest and width % 16:
            continue
        for tp_rank in range(tp_size):
            yield Job(case, str(checkpoint), LAYER, tp_size, tp_rank, ep_size=1, ep_rank=0)
    if made.experts >= 4:
        for ep_rank in range(2):
            yield Job(case, str(checkpoint), LAYER, 1, 0, ep_size=2, ep_rank=ep_rank)


def run_engine(engine: str, python: Path, jobs: list[Job], work: Path) -> dict[str, Any]:
    """Run all jobs in the engine's environment; returns its results, digests added."""
    job_file = work / f"{engine}.json"
    job_file.write_text(json.dumps([asdict(job) for job in jobs]))
    out = work / engine
    subprocess.run(
        [python, "-m", f"support.cpu_engines.{engine}_golden", job_file, out],
        check=True,
        # What an engine leaves behind goes with the work folder.
        env=finding_support() | {"TMPDIR": str(work)},
    )
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    for job, run in zip(jobs, results["runs"], strict=True):
        del run["checkpoint"], run["layer"]
        run["engine"] = engine
        if "refused" not in run:
            run["tensors"] = digests(out / job.file_name)
            # SGLang's loader threads write gate and up into the same two places: where these
            # differ, the one that stays is a matter of chance.
            if engine == "sglang" and CASES[job.case].differing_scales:
                del run["tensors"]["w13_input_scale"]
    return results


def digests(path: Path) -> dict[str, dict[str, Any]]:
    """Dtype, shape and XXH3-128 of each tensor of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: {
            "dtype": info["dtype"],
            "shape": info["shape"],
            "xxh3_128": xxhash.xxh3_128_hexdigest(
                data[start + info["data_offsets"][0] : start + info["data_offsets"][1]]
            ),
        }
        for name, info in sorted(header.items())
    }


def record(results: dict[str, dict[str, Any]]) -> str:
    """``digests.json``: one line for each run, so that a change shows as the lines it touches."""
    head = {
        "engines": {engine: result["versions"] for engine, result in results.items()},
        "layer": LAYER,
        "cases": {case: asdict(made) for case, made in CASES.items()},
    }
    runs = [json.dumps(run) for result in results.values() for run in result["runs"]]
    opened = json.dumps(head, indent=1).removesuffix("\n}")
    return opened + ',\n "runs": [\n  ' + ",\n  ".join(runs) + "\n ]\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for engine in ENGINES:
        parser.add_argument(
            f"--{engine}",
            type=Path,
            default=environments("engines") / engine / "bin" / "python",
            help=f"Python that has {engine} (default: %(default)s)",
        )
    arguments = parser.parse_args()
    TARGET.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for case, made in CASES.items():
            make_checkpoint(work / case, made)
        results = {}
        for engine in ENGINES:
            jobs = [job for case in CASES for job in jobs_of(engine, case, work / case)]
            results[engine] = run_engine(engine, getattr(arguments, engine), jobs, work)
            tiny = next(job for job in jobs if job.case == TINY)
            shutil.copyfile(work / engine / tiny.file_name, TARGET / f"tiny_{engine}.safetensors")
    (TARGET / "digests.json").write_text(record(results))


if __name__ == "__main__":
    main()
