"""Checkpoints that the field's own exporters have written: NVIDIA ModelOpt and llm-compressor.

`make_checkpoint` and `model_zoo` write what a checkpoint is believed to look like. Here the
exporters' own code writes tiny random models of transformers' own classes, on a CPU, in the
environments of scripts/setup_exporters.sh. They are made when a test first asks for one, and kept
beside these environments until the code here or the exporters' versions change.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..environments import environments

HERE = Path(__file__).parent
LISTS = HERE.parents[2] / "scripts" / "exporters"


@dataclass(frozen=True)
class Export:
    """What is known of one exporter's checkpoint of one family."""

    row: str = "experts.N.{gate,up,down}_proj"
    """Of the table of families."""
    refusal: str | None = None
    """Part of the message with which `convert` refuses it; None where it converts."""
    config: dict[str, Any] = field(default_factory=dict)
    """What engines read in config.json, and transformers 5 does not write, or not like this. The
    published models have it; who exports one has to add it by hand."""


DEEPSEEK_V3 = Export(
    config={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
)
MINIMAX_M2 = Export(
    row="experts.N.{w1,w3,w2}",
    config={
        "rotary_dim": 64,
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
)
NEMOTRON_H = Export(
    row="experts.N.{up,down}_proj",
    config={
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mtp_layers_block_type": ["attention", "moe"],
    },
)
QWEN3_NEXT = Export(config={"full_attention_interval": 2})
WEIGHT_ONLY = Export(refusal="whose experts are weight-only (W4A16)")
BIASED = Export(refusal="bias' is not a tensor of a ")

EXPORTS: dict[str, Export] = {
    "modelopt-deepseek_v3": DEEPSEEK_V3,
    "modelopt-deepseek_v3-NVFP4_EXPERTS_ONLY": DEEPSEEK_V3,
    "modelopt-ernie4_5_moe": Export(),
    "modelopt-gemma4": Export(),
    "modelopt-glm4_moe": Export(),
    "modelopt-gpt_oss": BIASED,
    "modelopt-llama4": Export(row="experts.{gate_up,down}_proj"),
    "modelopt-minimax_m2": MINIMAX_M2,
    "modelopt-mixtral": Export(row="experts.N.{w1,w3,w2}"),
    "modelopt-nemotron_h": NEMOTRON_H,
    "modelopt-nemotron_h-MAMBA_MOE_NVFP4_CONSERVATIVE": NEMOTRON_H,
    "modelopt-qwen2_moe": Export(),
    "modelopt-qwen3_5_moe": Export(),
    "modelopt-qwen3_moe": Export(),
    "modelopt-qwen3_moe-W4A16_NVFP4": WEIGHT_ONLY,
    "modelopt-qwen3_next": QWEN3_NEXT,
    "modelopt-qwen3_next-NVFP4_MLP_ONLY": QWEN3_NEXT,
    "modelopt-qwen3_vl_moe": Export(),
    "llmcompressor-deepseek_v3": DEEPSEEK_V3,
    "llmcompressor-gemma4": Export(),
    "llmcompressor-glm4_moe": Export(),
    "llmcompressor-gpt_oss": BIASED,
    "llmcompressor-llama4": Export(),
    "llmcompressor-minimax_m2": replace(
        MINIMAX_M2, refusal="MiniMaxM2ForCausalLM looks for the w2 of experts"
    ),
    "llmcompressor-mixtral": Export(),
    "llmcompressor-nemotron_h": NEMOTRON_H,
    "llmcompressor-qwen3_moe": Export(),
    "llmcompressor-qwen3_moe-NVFP4A16": WEIGHT_ONLY,
    "llmcompressor-qwen3_next": QWEN3_NEXT,
}
"""By the exporter, the family, and what is quantized where that is not all of NVFP4."""

CONVERTED = [name for name, export in EXPORTS.items() if export.refusal is None]


def exported(name: str) -> Path:
    """The folder that an exporter has written, for reading only.

    Args:
        name: of `EXPORTS`.

    Raises:
        FileNotFoundError: the exporter's environment does not exist.
        RuntimeError: the exporter has failed.
    """
    exporter, _, export = name.partition("-")
    own = [each.partition("-")[2] for each in EXPORTS if each.startswith(f"{exporter}-")]
    digest = sha256(" ".join(own).encode())
    sources = HERE / "models.py", HERE / f"export_{exporter}.py"
    for path in (*sources, *sorted(LISTS.glob(f"{exporter}*.txt"))):
        digest.update(path.read_bytes())
    folder = environments("exporters") / "exports" / f"{exporter}-{digest.hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{exporter}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                run_exporter(exporter, Path(temporary, "out"), own)
                Path(temporary, "out").rename(folder)
    return folder / export


def run_exporter(exporter: str, out: Path, exports: list[str]) -> None:
    """Let an exporter write its exports into ``out``, each into a folder of its name.

    Raises:
        FileNotFoundError, RuntimeError: as `exported`.
    """
    python = environments("exporters") / exporter / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{python} does not exist: run scripts/setup_exporters.sh")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    script = HERE / f"export_{exporter}.py"
    run = subprocess.run(
        [python, script, out, *exports], env=environment, capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(f"{script.name} has failed:\n{run.stderr[-4000:]}")


def make(folder: Path, name: str) -> None:
    """Copy an export to ``folder``, with a config.json that engines can read.

    Raises:
        FileNotFoundError, RuntimeError: as `exported`.
        FileExistsError: ``folder`` exists.
    """
    shutil.copytree(exported(name), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | EXPORTS[name].config
    section = config["quantization_config"]
    # ModelOpt leaves a mark of its own in the names of Nemotron-H's modules.
    section["ignore"] = [re.sub(r"\.\x00[^*]*", "", module) for module in section["ignore"]]
    path.write_text(json.dumps(config, indent=2) + "\n")
