"""Public reports of things that went wrong, each as a situation, and what becomes of it now.

The reports are others' and of other programs; the situations are ours. `BY_COMMAND` goes through
the real command. `BY_ENGINE` says which cases of tests/engines have the situation, through the
engines' own loaders.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support import model_zoo
from support.folders import INDEX, edit_json
from support.make_checkpoint import make_checkpoint
from support.processes import FP4MOE_CONVERT
from support.specs import TINY
from support.tensors import StoredTensor, home_of, range_of, read_tensors, write_tensors

FIRST, SECOND, THIRD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
LAYER = "model.layers.1.mlp.experts"


class Report(NamedTuple):
    reports: str
    """Where people met it: repository#number."""
    situation: Callable[[Path, Path], None]
    """Prepares the source, and the output folder, which is not there yet."""
    says: str
    """A pattern in what is printed."""
    fails: bool = False
    also: Callable[[Path, Path], None] = lambda _source, _out: None
    """What else must hold of both folders afterwards."""


def family(name: str) -> Callable[[Path, Path], None]:
    def make(source: Path, _out: Path) -> None:
        shutil.rmtree(source)
        model_zoo.make(source, name)

    return make


def nvfp4_mtp(source: Path, _out: Path) -> None:
    """A layer of multi-token prediction that is counted from 0."""
    tensors = read_tensors(source)
    number = re.escape("model.layers.1.")
    for name in [name for name in tensors if name.startswith("model.layers.1.mlp.experts.")]:
        tensors[re.sub(f"^{number}", "mtp.layers.0.", name)] = tensors[name]
    rewrite(source, tensors)


def rewrite(source: Path, tensors: dict[str, StoredTensor]) -> None:
    """All tensors in one shard, indexed."""
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    write_tensors(source / "model.safetensors", tensors)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (source / INDEX).write_text(json.dumps(index))


def on_a_fresh_volume(source: Path, out: Path) -> None:
    for folder in (source, out):
        (folder / "lost+found").mkdir(parents=True)


def half_downloaded(source: Path, _out: Path) -> None:
    with (source / SECOND).open("r+b") as shard:
        shard.seek(-1000, os.SEEK_END)
        shard.write(bytes(1000))
    (source / f"{SECOND}.aria2").touch()


def six_digits(source: Path, _out: Path) -> None:
    (source / INDEX).unlink()
    (source / FIRST).rename(source / "model-000001-of-000003.safetensors")
    (source / SECOND).rename(source / "model-000002-of-000003.safetensors")
    (source / THIRD).unlink()


def finished_and_edited(source: Path, out: Path) -> None:
    subprocess.run([*FP4MOE_CONVERT, source, out, "--quiet"], check=True, capture_output=True)
    edit_json(out / "config.json", rope_scaling={"type": "yarn"})


def the_edit_is_there(_source: Path, out: Path) -> None:
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == {"type": "yarn"}


def same_nan(source: Path, _out: Path) -> None:
    for projection in ("gate_proj", "up_proj"):
        name = f"{LAYER}.2.{projection}.input_scale"
        path = home_of(source, name)
        start, stop = range_of(path, name)
        with path.open("r+b") as shard:
            shard.seek(start)
            shard.write(np.float32("nan").tobytes()[: stop - start])


def pointer(source: Path, _out: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
    (source / SECOND).write_text(text)


def web_page(source: Path, _out: Path) -> None:
    (source / SECOND).write_text("<!DOCTYPE html><html><body>404</body></html>")


def other_weights(source: Path, _out: Path) -> None:
    (source / "original").mkdir()
    shutil.copy(source / FIRST, source / "original" / "consolidated.safetensors")
    for name in ("pytorch_model.bin", "model.gguf"):
        (source / name).write_bytes(bytes(1000))


def they_are_left_out(_source: Path, out: Path) -> None:
    assert not (out / "original").exists()
    assert not {"pytorch_model.bin", "model.gguf"} & set(os.listdir(out))


def nested(key: str, *, section: bool) -> Callable[[Path, Path], None]:
    """Everything but the architecture hangs in one object; with the quantization or without."""

    def move(source: Path, _out: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        top = {"architectures": config.pop("architectures"), "model_type": "wrapper"}
        if not section:
            top["quantization_config"] = config.pop("quantization_config")
        (source / "config.json").write_text(json.dumps({**top, key: config}))

    return move


def overlay(source: Path, _out: Path) -> None:
    tensors = read_tensors(source)
    name = "lm_head.weight"
    write_tensors(source / "overlay.safetensors", {name: tensors[name]})
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][name] = "overlay.safetensors"
    (source / INDEX).write_text(json.dumps(index))


def last_expert_missing(source: Path, _out: Path) -> None:
    """Where E has a name that few models use."""
    config = json.loads((source / "config.json").read_text())
    edit_json(source / "config.json", n_routed_experts=None, moe_num_experts=TINY.experts)
    last = f".experts.{config['n_routed_experts'] - 1}."
    rewrite(source, {n: t for n, t in read_tensors(source).items() if last not in n})


def mtp_beside_the_index(source: Path, out: Path) -> None:
    family("glm4_moe-mtp-file")(source, out)


def it_is_indexed(source: Path, out: Path) -> None:
    index = json.loads((out / INDEX).read_text())["weight_map"]
    beside = read_tensors(source / "mtp.safetensors")
    assert beside
    assert beside.keys() <= index.keys()


def weight_only(source: Path, _out: Path) -> None:
    """With input scales in the shards, but no quantization of activations in the section."""
    config = json.loads((source / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        del group["input_activations"]
    (source / "config.json").write_text(json.dumps(config))


BY_COMMAND = {
    "an MTP layer that is counted from 0": Report(
        "tokenspeed#777, vllm#44087", nvfp4_mtp, r"mtp\.layers\.0\.mlp\.experts: .*\(MTP\)"
    ),
    "a fresh volume": Report(
        "docker-library/mysql#186, longhorn#913", on_a_fresh_volume, "converted +2 MoE layers"
    ),
    "a download that goes on": Report(
        "huggingface_hub#4060", half_downloaded, rf"{SECOND}: its download may be unfinished", True
    ),
    "shards counted with six digits": Report(
        "CoSER#3, sglang#32279", six_digits, "model-000003-of-000003.safetensors is missing", True
    ),
    "a finished folder, edited": Report(
        "omlx#1077", finished_and_edited, "'config.json' has been changed since; .*--overwrite",
        True, the_edit_is_there,
    ),
    "scales that are no numbers": Report(
        "vllm#45212, compressed-tensors#595", same_nan,
        r"gate input_scale is not a positive number for 1 of 4 experts \(expert 2: nan\)",
    ),
    "a git-lfs pointer": Report(
        "transformers#27923", pointer, f"{SECOND}: is a git-lfs pointer, .* git lfs pull", True
    ),
    "a web page": Report("OmniParser#34", web_page, f"{SECOND}: is a web page", True),
    "other weights beside the shards": Report(
        "FreeToken#336, mlx-vlm#1464", other_weights,
        r"(?s)model\.gguf: holds 1,000 bytes of other weights, left out.*original/.*pytorch_model",
        False, they_are_left_out,
    ),
    "sizes in llm_config": Report(
        "aiconfigurator#454", nested("llm_config", section=False), "converted +2 MoE layers"
    ),
    "everything in text_config": Report(
        "vllm-ascend#1276", nested("text_config", section=True), "converted +2 MoE layers"
    ),
    "experts named w1, w2 and w3": Report(
        "sglang#26324", family("minimax_m2"), "converted +[23] MoE layers"
    ),
    "an overlay": Report(
        "colibri#1479",
        overlay,
        rf"'lm_head.weight' is in {THIRD} as well; {INDEX} means that in overlay.safetensors, but ",
        True,
    ),
    "the last expert is missing": Report(
        "sglang#35107", last_expert_missing, "should have 4 experts, but .* has expert 3", True
    ),
    "an MTP file that the index does not name": Report(
        "sglang#17166, Model-Optimizer#750", mtp_beside_the_index, "converted +[23] MoE layers",
        False, it_is_indexed,
    ),
    "prefixes that engines rename": Report(
        "vllm#33876, sglang#18370", family("kimi_k25-legacy"), r"(?s)serve .*sglang.*vllm serve"
    ),
    "weights alone quantized": Report(
        "Model-Optimizer#1265", weight_only, r"(?s)sglang\.launch_server.*cannot serve +vLLM "
    ),
    "Hunyuan v1 in SGLang": Report(
        "sglang hunyuan.py", family("hunyuan_v1_moe"), r"(?s)vllm serve.*cannot serve +SGLang"
    ),
}  # fmt: skip

BY_ENGINE = {
    "a converted folder, reloaded into a server of an original": (
        "vllm#48312, #42821",
        [("vllm_ways", "qwen: reload_weights, path: converted -> original")],
    ),
    "a converted folder with the original's config.json": (
        "Model-Optimizer#261, #228",
        [
            ("vllm_ways", "qwen: start: converted -> original"),
            ("vllm_ways", "qwen: start: converted -> original, no plugin"),
            ("sglang_ways", "qwen3: start: converted -> original"),
            ("sglang_ways", "deepseek: start: converted -> original, no plugin"),
            ("sglang_zoo", "mixtral: mistake, tp 2"),
        ],
    ),
    "fewer layers by an override": ("vllm#30433, #39480", [("sglang_driver", "deepseek 1 layers")]),
    "a pipeline stage without MoE layers": ("", [("vllm_driver", "deepseek: stage 0 of 3")]),
    "a whole converted model as a draft": (
        "sglang#26083, #4351, Model-Optimizer#2027",
        [
            ("sglang_ways", "qwen2_moe: whole model as a draft: converted -> converted"),
            ("vllm_ways", "qwen: whole model as a draft: converted -> converted"),
        ],
    ),
    "another row order, reloaded": (
        "sglang#18085, #22204",
        [
            ("vllm_ways", "qwen: reload_weights, path: another order -> converted"),
            ("sglang_ways", "qwen3: update_weights_from_disk: another order -> converted"),
        ],
    ),
    "an original into a server of a converted checkpoint": (
        "sglang#30749",
        [
            ("sglang_ways", "deepseek: update_weights_from_disk: original -> converted"),
            ("vllm_ways", "deepseek: reload_weights, list: original -> converted"),
        ],
    ),
    "a converted folder into a server of an original": (
        "sglang#30749",
        [("sglang_ways", "deepseek: update_weights_from_disk: converted -> original")],
    ),
    "MegaMoE": ("sglang modelopt_quant.py", [("sglang_driver", "MegaMoE")]),
    "Kimi-K2.5's first upload, Gemma 4": (
        "vllm#33876, sglang#18370",
        [
            ("sglang_zoo", "kimi_k25-legacy: converted, tp 2"),
            ("sglang_zoo", "gemma4: converted, ep 2"),
            ("vllm_zoo", "kimi_k25-legacy: converted, tp 2"),
            ("vllm_zoo", "gemma4: converted, tp 2"),
        ],
    ),
}
"""Situation -> the reports, and the cases of tests/engines that have it."""


@pytest.mark.parametrize("name", BY_COMMAND)
def test_a_report(name: str, tmp_path: Path) -> None:
    report = BY_COMMAND[name]
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, TINY)
    report.situation(source, out)
    done = subprocess.run(
        [*FP4MOE_CONVERT, str(source), str(out)], capture_output=True, text=True, check=False
    )
    printed = done.stderr + done.stdout
    assert done.returncode == report.fails, printed
    assert re.search(report.says, printed), printed
    assert not report.fails or printed.count("\n") == 1, printed
    report.also(source, out)


def test_an_unwritable_home(tiny: Path, tmp_path: Path) -> None:
    """flashinfer#973, #2976, kserve#3562: FlashInfer wants to make a cache there."""
    for number, home in enumerate(("/nonexistent", "/", "")):
        done = subprocess.run(
            [*FP4MOE_CONVERT, str(tiny), str(tmp_path / f"out-{number}"), "--quiet"],
            env={**os.environ, "HOME": home, "XDG_CACHE_HOME": "/proc/none"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("situation", BY_ENGINE)
def test_the_cases_of_the_engines_are_there(
    situation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "engines"))
    _, cases = BY_ENGINE[situation]
    for driver, case in cases:
        assert case in importlib.import_module(driver).case_names()
