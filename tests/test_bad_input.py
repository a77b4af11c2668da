"""Every bad input through the command line: one line of error, the source untouched, and nothing
in the output folder that looks finished."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from support import model_zoo
from support.folders import (
    INDEX,
    MANIFEST,
    SOURCE,
    change_manifest,
    edit_json,
    flip_bit,
    write_byte,
)
from support.make_checkpoint import Spec, make_checkpoint, quantization_section
from support.processes import FP4MOE_CONVERT, kill_at_rename
from support.specs import TINY
from support.tensors import (
    StoredTensor,
    home_of,
    range_of,
    read_header,
    read_tensors,
    write_tensors,
)
from typer.testing import CliRunner

from fp4moe_convert import ConvertError, conversion, inspect, preview
from fp4moe_convert.cli.commands import app, convert_app
from fp4moe_convert.errors import printable
from fp4moe_convert.format.files import is_journal
from fp4moe_convert.layouts import fingerprints as recorded_orders

FIRST, SECOND, THIRD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
LAYER = "model.layers.1.mlp.experts"
EXPERT = f"{LAYER}.1"
HALF_A_PAIR = "\ud800"

Damage = Callable[[Path], None]
Entries = dict[str, Any]


# --- doing damage ---------------------------------------------------------------------------------


def read_tensor(model_dir: Path, tensor: str) -> bytes:
    path = home_of(model_dir, tensor)
    start, stop = range_of(path, tensor)
    return path.read_bytes()[start:stop]


def poke(model_dir: Path, tensor: str, position: int, value: int) -> None:
    """Change one byte of a tensor; a negative position counts from its end."""
    path = home_of(model_dir, tensor)
    start, stop = range_of(path, tensor)
    write_byte(path, (start if position >= 0 else stop) + position, value)


def rewrite_header(path: Path, edit: Callable[[Entries], None]) -> None:
    """Edit a shard's header and leave its data alone; the index goes, so as not to contradict."""
    entries, data = read_header(path)
    content = path.read_bytes()[data:]
    edit(entries)
    raw = json.dumps(entries).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content)
    path.with_name(INDEX).unlink(missing_ok=True)


def rename_tensor(model_dir: Path, old: str, new: str) -> None:
    def edit(entries: Entries) -> None:
        entries[new] = entries.pop(old)

    rewrite_header(home_of(model_dir, old), edit)


def change_entry(model_dir: Path, tensor: str, **fields: Any) -> None:
    rewrite_header(home_of(model_dir, tensor), lambda entries: entries[tensor].update(fields))


# --- what must hold after every failure -----------------------------------------------------------


def fingerprints(folder: Path) -> dict[str, str]:
    """Name and content of everything in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "not a file"
        for path in folder.rglob("*")
    }


def one_error(stderr: str) -> str:
    """The message of the one line on stderr."""
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    return stderr.removeprefix("error: ").removesuffix("\n")


def fails(model_dir: Path, out_dir: Path, *options: str, restoring: bool = False) -> str:
    """Convert, or restore, see it fail as it should, and return the message."""
    before = fingerprints(model_dir)
    command, verb = (app, ["restore"]) if restoring else (convert_app, [])
    result = CliRunner().invoke(command, [*verb, str(model_dir), str(out_dir), *options])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stdout == ""
    assert fingerprints(model_dir) == before
    return one_error(result.stderr)


def inspected(model_dir: Path) -> str:
    """Why a folder cannot be converted, as ``fp4moe inspect`` has it."""
    try:
        return str(inspect(model_dir).reason)
    except ConvertError as error:
        return str(error)


def finished_shards(out_dir: Path) -> list[str]:
    """What the next run can build on."""
    return sorted(path.name for path in out_dir.glob("*.safetensors"))


def holds_nothing_finished(out_dir: Path) -> bool:
    """Shards that are whole may stay, with the journal that says so; nothing else of the run."""
    left = {path.name for path in out_dir.rglob("*")} if out_dir.exists() else set()
    shards = set(finished_shards(out_dir))
    return left == (shards | {".fp4moe-journal.jsonl"} if shards else set())


# --- found before the first byte ------------------------------------------------------------------


def truncate(name: str, nbytes: int) -> Damage:
    def damage(model_dir: Path) -> None:
        os.truncate(model_dir / name, (model_dir / name).stat().st_size + nbytes)

    return damage


def overwrite(name: str, content: bytes) -> Damage:
    """Overwrite the first bytes of a file."""

    def damage(model_dir: Path) -> None:
        with open(model_dir / name, "r+b") as file:
            file.write(content)

    return damage


def edit_config(**changes: Any) -> Damage:
    return lambda model_dir: edit_json(model_dir / "config.json", **changes)


def edit_index(**changes: str) -> Damage:
    def damage(model_dir: Path) -> None:
        path = model_dir / INDEX
        edit_json(path, weight_map=json.loads(path.read_text())["weight_map"] | changes)

    return damage


def shift_a_tensor(by: int) -> Damage:
    """Move all tensors of the second shard but the first, and make room for them."""

    def damage(model_dir: Path) -> None:
        def edit(entries: Entries) -> None:
            tensors = [e for name, e in entries.items() if name != "__metadata__"]
            first = min(tensors, key=lambda e: e["data_offsets"])
            for entry in tensors:
                if entry is not first:
                    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]

        rewrite_header(model_dir / SECOND, edit)
        truncate(SECOND, by)(model_dir)

    return damage


def replace(name: str, make: Callable[[Path], object]) -> Damage:
    """Put something else in a file's place."""

    def damage(model_dir: Path) -> None:
        (model_dir / name).unlink()
        make(model_dir / name)

    return damage


def link_to_a_secret(name: str) -> Damage:
    """Beside the model folder lies what is to stay there."""

    def make(path: Path) -> None:
        secret = path.parent.parent / "secret"
        secret.write_bytes(b"mine")
        path.symlink_to(secret)

    return replace(name, make)


def a_million_empty_tensors(model_dir: Path) -> None:
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(entry % n for n in range(1_000_000)) + b"}"
    (model_dir / SECOND).write_bytes(len(text).to_bytes(8, "little") + text)


def copy_a_shard(model_dir: Path) -> None:
    (model_dir / INDEX).unlink()
    shutil.copy(model_dir / THIRD, model_dir / "model-again.safetensors")


def overlay_a_tensor(model_dir: Path) -> None:
    fixed = {"lm_head.weight": read_tensors(model_dir / THIRD)["lm_head.weight"]}
    write_tensors(model_dir / "fix.safetensors", fixed)
    edit_index(**{"lm_head.weight": "fix.safetensors"})(model_dir)


def drop_an_expert(model_dir: Path) -> None:
    for path in sorted(model_dir.glob("*.safetensors")):

        def edit(entries: Entries) -> None:
            for name in [name for name in entries if name.startswith(f"{EXPERT}.")]:
                entries[name.replace(".experts.1.", ".dropped.1.")] = entries.pop(name)

        rewrite_header(path, edit)


def without(pattern: str) -> Damage:
    """Take the tensors out whose names have a match."""

    def damage(model_dir: Path) -> None:
        (model_dir / INDEX).unlink()
        for path in model_dir.glob("*.safetensors"):
            tensors = sorted(read_tensors(path).items())
            write_tensors(path, {n: t for n, t in tensors if not re.search(pattern, n)})

    return damage


def stack_the_experts(model_dir: Path) -> None:
    without(r"\.experts\.")(model_dir)
    stacked = StoredTensor("U8", (4, 256, 128), bytes(4 * 256 * 128))
    write_tensors(model_dir / "stacked.safetensors", {f"{LAYER}.gate_up": stacked})


BATCHED = "language_model.model.layers.1.feed_forward.experts"


def batched(part: str, dtype: str, *shape: int) -> Damage:
    """A Llama 4 in place of the good one, with 8 experts of H = 256 and I = 128, in one tensor and
    transposed, and another tensor in one file."""

    def damage(model_dir: Path) -> None:
        shutil.rmtree(model_dir)
        model_zoo.make(model_dir, "llama4")
        own = StoredTensor(dtype, shape, bytes(math.prod(shape)))
        tensors = read_tensors(model_dir) | {f"{BATCHED}.{part}": own}
        for path in model_dir.glob("model*"):
            path.unlink()
        write_tensors(model_dir / "model.safetensors", dict(sorted(tensors.items())))

    return damage


def one_large_expert(model_dir: Path) -> None:
    """The same with H = 16384 and I = 8208, in a file that takes no disk."""
    shutil.rmtree(model_dir)
    make_checkpoint(model_dir, Spec(experts=1, intermediate=64, hidden=256, layers=1, vocab_size=8))
    without(r"\.experts\.")(model_dir)
    hidden, intermediate = 16384, 8208
    entries: Entries = {}
    stop = 0
    for name, cols, rows in (
        ("gate_up_proj", hidden, 2 * intermediate),
        ("down_proj", intermediate, hidden),
    ):
        for leaf, dtype, shape in (
            ("", "U8", (1, cols // 2, rows)),
            ("_weight_scale", "F8_E4M3", (1, cols // 16, rows)),
            ("_weight_scale_2", "F32", ()),
            ("_input_scale", "F32", ()),
        ):
            start, stop = stop, stop + (math.prod(shape) if shape else 4)
            entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
            entries[f"{LAYER}.{name}{leaf}"] = entry
    raw = json.dumps(entries).encode()
    path = model_dir / "large.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, path.stat().st_size + stop)


def take_an_expert_from_one_layer(model_dir: Path) -> None:
    without(r"layers\.2\.mlp\.experts\.3\.")(model_dir)
    edit_config(n_routed_experts=None)(model_dir)


def convert_all_but_the_config(model_dir: Path) -> None:
    config = (model_dir / "config.json").read_bytes()
    conversion.convert(model_dir, model_dir.parent / "converted")
    shutil.rmtree(model_dir)
    (model_dir.parent / "converted").rename(model_dir)
    (model_dir / "config.json").write_bytes(config)


def convert_one_layer(model_dir: Path) -> None:
    """What it becomes, beside the other as it was."""
    conversion.convert(model_dir, model_dir.parent / "converted")
    tensors = sorted(read_tensors(model_dir.parent / "converted").items())
    without(rf"{LAYER}\.")(model_dir)
    layer = {n: t for n, t in tensors if n.startswith(f"{LAYER}.")}
    write_tensors(model_dir / "converted.safetensors", layer)


def narrow_the_experts(model_dir: Path) -> None:
    """A checkpoint with H = 192 in place of the good one."""
    shutil.rmtree(model_dir)
    spec = Spec(experts=1, hidden=192, intermediate=64, layers=1, shards=1, vocab_size=8)
    make_checkpoint(model_dir, spec)


GROUPS_OF_32 = quantization_section(TINY)
GROUPS_OF_32["config_groups"]["group_0"]["weights"]["group_size"] = 32

OF_COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "config_groups": quantization_section(TINY)["config_groups"],
}

MIXED_PRECISION = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {LAYER: {"quant_algo": "FP8"}, "lm_head": {"quant_algo": "NVFP4"}},
}

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 4999999999\n"
)


def count_with_six_digits(model_dir: Path) -> None:
    (model_dir / INDEX).unlink()
    (model_dir / FIRST).rename(model_dir / "model-000001-of-000003.safetensors")
    (model_dir / THIRD).rename(model_dir / "model-000003-of-000003.safetensors")
    (model_dir / SECOND).unlink()


UP = f"{EXPERT}.up_proj"
BEFORE_THE_FIRST_BYTE: dict[str, tuple[Damage, str]] = {
    "not a model folder": (
        lambda model_dir: (model_dir / "config.json").unlink(),
        r"{model_dir}: not a model folder: it has no config\.json",
    ),
    "config not JSON": (overwrite("config.json", b"?"), r"config\.json: not JSON: .*"),
    "not quantized": (
        edit_config(quantization_config=None),
        r"{model_dir}: not NVFP4: it is not quantized \(config\.json says bfloat16\)",
    ),
    "FP8": (
        edit_config(quantization_config={"quant_method": "fp8"}),
        r"config\.json: no NVFP4 experts to convert: the quantization is fp8",
    ),
    "weight-only NVFP4": (
        edit_config(quantization_config={"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}),
        r"config\.json: .* modelopt W4A16_NVFP4, whose experts are weight-only \(W4A16\), which .*",
    ),
    "mixed precision": (
        edit_config(quantization_config=MIXED_PRECISION),
        r"config\.json: .* modelopt MIXED_PRECISION, whose experts are FP8",
    ),
    "config of a converted checkpoint": (
        edit_config(quantization_config={"quant_method": "fp4moe", "format_version": 2}),
        rf"config\.json: is that of a converted checkpoint, but {SECOND}: '.+' is as in an .*",
    ),
    "converted, but the config is the original's": (
        convert_all_but_the_config,
        r"{model_dir}: is already converted, as model-.*: 'fp4moe\.layout' says, but .*",
    ),
    "half converted": (
        convert_one_layer,
        r"{model_dir}: holds shards of an original and of a converted checkpoint: .*",
    ),
    "tensor that has a name of a converted layer's": (
        lambda model_dir: rename_tensor(model_dir, "lm_head.weight", f"{LAYER}.w2_weight_scale"),
        rf"'{LAYER}\.w2_weight_scale' is there already: the layer is half converted",
    ),
    "group size": (
        edit_config(quantization_config=GROUPS_OF_32),
        r"config\.json: group size is 32, NVFP4 has 16",
    ),
    "shard missing": (
        lambda model_dir: (model_dir / SECOND).unlink(),
        rf"{INDEX}: names {SECOND}, which is missing",
    ),
    "shard empty": (
        lambda model_dir: os.truncate(model_dir / SECOND, 0),
        rf"{SECOND}: 0 bytes is too short for a header length",
    ),
    "git-lfs pointer in place of a shard": (
        overwrite(SECOND, LFS_POINTER),
        rf"{SECOND}: is a git-lfs pointer, not the file itself; run git lfs pull .*",
    ),
    "git-lfs pointer in place of a tokenizer": (
        overwrite("tokenizer.json", LFS_POINTER),
        r"tokenizer\.json: is a git-lfs pointer, not the file itself; run git lfs pull .*",
    ),
    "web page in place of a shard": (
        overwrite(SECOND, b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"),
        rf"{SECOND}: is a web page, not the file itself; download it again",
    ),
    "web page in place of the config": (
        overwrite("config.json", b"\n<html><body>404</body></html>"),
        r"config\.json: is a web page, not the file itself; download it again",
    ),
    "note of an unfinished download": (
        lambda model_dir: (model_dir / f"{SECOND}.aria2").touch(),
        rf"{SECOND}: its download may be unfinished: {SECOND}\.aria2 lies beside it; finish .*",
    ),
    "one of shards counted with six digits missing": (
        count_with_six_digits,
        r"{model_dir}: model-000002-of-000003\.safetensors is missing, and there is no .*",
    ),
    "shard truncated": (
        truncate(SECOND, -1),
        rf"{SECOND}: is truncated: \d+ bytes, its header describes \d+",
    ),
    "shard too long": (
        truncate(SECOND, 1),
        rf"{SECOND}: has bytes after its data: \d+ bytes, its header describes \d+",
    ),
    "header not JSON": (
        overwrite(SECOND, b"\x10" + bytes(7) + b"?"),
        rf"{SECOND}: header is not JSON: .*",
    ),
    "header lies about its length": (
        overwrite(SECOND, (2**40).to_bytes(8, "little")),
        rf"{SECOND}: header claims 1099511627776 bytes, the limit is 100000000",
    ),
    "header length beyond the file": (
        overwrite(SECOND, (99_999_999).to_bytes(8, "little")),
        rf"{SECOND}: header claims 99999999 bytes, the file has \d+ after the length",
    ),
    "header leaves a hole": (
        shift_a_tensor(1),
        rf"{SECOND}: '.+' leaves a hole: starts at byte \d+, expected \d+",
    ),
    "header overlaps": (
        shift_a_tensor(-1),
        rf"{SECOND}: '.+' overlaps the tensor before it: starts at byte \d+, expected \d+",
    ),
    "offset of 2^63": (
        lambda model_dir: change_entry(
            model_dir, f"{UP}.weight", data_offsets=[2**63 - 128, 2**63]
        ),
        rf"model-.*: '{UP}\.weight' has no valid dtype, shape and data_offsets",
    ),
    "shape that overflows": (
        lambda model_dir: change_entry(model_dir, f"{UP}.weight", shape=[2**32, 2**32]),
        rf"model-.*: '{UP}\.weight' has more elements than 63 bits can count",
    ),
    "a million empty tensors": (
        a_million_empty_tensors,
        rf"{SECOND}: header is not JSON: it has more than 3,000,000 keys and values",
    ),
    "header that nests": (
        overwrite(SECOND, (200).to_bytes(8, "little") + b"[" * 100 + b"]" * 100),
        rf"{SECOND}: header is not a JSON object",
    ),
    "config with a number of a million digits": (
        lambda model_dir: (model_dir / "config.json").write_bytes(b"1" * 10**6),
        r"config\.json: not JSON: a number has more than 1,000 digits",
    ),
    "FIFO in place of a shard": (
        replace(SECOND, os.mkfifo),
        rf"{SECOND}: is not a regular file",
    ),
    "device in place of a shard": (
        replace(SECOND, lambda path: path.symlink_to("/dev/zero")),
        rf"{SECOND}: is not a regular file",
    ),
    "socket among the other files": (
        replace("tokenizer.json", lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)),
        r"tokenizer\.json: is not a regular file",
    ),
    "link that leads outside": (
        link_to_a_secret("tokenizer.json"),
        r"tokenizer\.json: is a link to {parent}/secret, outside the model folder; put the file .*",
    ),
    "shard that is such a link": (
        link_to_a_secret(SECOND),
        rf"{SECOND}: is a link to {{parent}}/secret, outside the model folder; put the file .*",
    ),
    "index names a file with a NUL": (
        edit_index(**{"lm_head.weight": "model\0.safetensors"}),
        rf"{INDEX}: names model\\x00\.safetensors, which is missing",
    ),
    "index names an absolute path": (
        edit_index(**{"lm_head.weight": "/etc/passwd"}),
        rf"{INDEX}: 'lm_head\.weight' is said to be in '/etc/passwd', which is not a file name .*",
    ),
    "header with half a character": (
        lambda model_dir: rename_tensor(model_dir, "lm_head.weight", f"lm{HALF_A_PAIR}"),
        rf"{THIRD}: header is not JSON: .* surrogate.*",
    ),
    "index names a missing file": (
        edit_index(**{"lm_head.weight": "nowhere.safetensors"}),
        rf"{INDEX}: names nowhere\.safetensors, which is missing",
    ),
    "index names a file nobody could": (
        edit_index(**{"lm_head.weight": "n" * 300}),
        rf"{INDEX}: names n{{300}}, which is missing",
    ),
    "index points outside": (
        edit_index(**{"lm_head.weight": "../model.safetensors"}),
        rf"{INDEX}: 'lm_head\.weight' is said to be in '\.\./model\.safetensors', which is not .*",
    ),
    "index names a tensor that is not there": (
        edit_index(**{"lm_head.bias": THIRD}),
        rf"{INDEX}: 'lm_head\.bias' is not in {THIRD}",
    ),
    "tensor in two shards": (
        copy_a_shard,
        rf"model-again\.safetensors: '.+' is in {THIRD} as well; engines load both, .*",
    ),
    "tensor in an overlay and in its old shard": (
        overlay_a_tensor,
        rf"{THIRD}: 'lm_head\.weight' is in fix\.safetensors as well; {INDEX} means that in fix.*",
    ),
    "expert missing": (
        drop_an_expert,
        rf"config\.json: layer '{LAYER}' should have 4 experts, but no shard has expert 1",
    ),
    "more experts than config says": (
        edit_config(n_routed_experts=3),
        rf"model-.*: '{LAYER}\.3\..+' is of expert 3, config\.json allows 3",
    ),
    "fewer experts than another layer": (
        take_an_expert_from_one_layer,
        rf"model\.layers\.2\.mlp\.experts: has 3 experts, {LAYER} has 4, and config\.json .*",
    ),
    "experts of two projections, and not up_proj and down_proj": (
        without(r"\.experts\.\d+\.up_proj\."),
        rf"model-.*: '{LAYER}\.0\.down_proj\.weight' is of experts without a gate: .*",
    ),
    "a layer whose gates are all missing": (
        without(r"layers\.2\.mlp\.experts\.\d+\.gate_proj\."),
        rf"model\.layers\.2\.mlp\.experts: no shard has a gate of any expert, but {LAYER} has .*",
    ),
    "experts without input scales": (
        without(r"\.experts\..*\.input_scale"),
        rf"model-.*: '{LAYER}\.0\.down_proj\.weight' is of experts without an input_scale: .*",
    ),
    "experts in one tensor": (
        stack_the_experts,
        rf"stacked\.safetensors: '{LAYER}\.gate_up' is U8 \[4, 256, 128\]: all experts .*",
    ),
    "all experts' tensor of fewer": (
        batched("down_proj", "U8", 7, 64, 256),
        rf"model\.safetensors: '{BATCHED}\.down_proj' has no expert 7",
    ),
    "all experts' tensor of too many": (
        batched("down_proj", "U8", 2**16 + 1, 1, 2),
        rf"model\.safetensors: '{BATCHED}\.down_proj' is U8 \[65537, 1, 2\], and more than .*",
    ),
    "transposed experts' tensor of other sizes": (
        batched("down_proj", "U8", 8, 256, 64),
        rf"model\.safetensors: '{BATCHED}\.down_proj' is U8 \[64, 256\], transposed, .*",
    ),
    "transposed gate and up of different widths": (
        batched("gate_up_proj", "U8", 8, 128, 255),
        rf"model\.safetensors: '{BATCHED}\.gate_up_proj': \[128, 255\] does not split .*",
    ),
    "transposed experts too large": (
        one_large_expert,
        rf"large\.safetensors: '{LAYER}\.gate_up_proj' has 134479872 bytes for each expert, .*",
    ),
    "leaf missing": (
        lambda model_dir: rename_tensor(model_dir, f"{UP}.input_scale", "elsewhere"),
        rf"model-.*: '{UP}\.input_scale' is missing from every shard",
    ),
    "leaf unknown": (
        lambda model_dir: rename_tensor(model_dir, "lm_head.weight", f"{UP}.bias"),
        rf"{THIRD}: '{UP}\.bias' is not a tensor of a ModelOpt NVFP4 expert .*",
    ),
    "description of another exporter": (
        edit_config(quantization_config=OF_COMPRESSED_TENSORS),
        rf"model-.*: '{LAYER}\..*' is not a tensor of a compressed-tensors NVFP4 expert .*",
    ),
    "dtype unlike the others'": (
        lambda model_dir: change_entry(model_dir, f"{UP}.weight", dtype="I8"),
        rf"model-.*: '{UP}\.weight' is I8 \[128, 128\], expected U8 \[128, 128\] .*",
    ),
    "shape unlike the others'": (
        lambda model_dir: change_entry(model_dir, f"{UP}.weight", shape=[64, 256]),
        rf"model-.*: '{UP}\.weight' is U8 \[64, 256\], expected U8 \[128, 128\] .*",
    ),
    "hidden size": (
        narrow_the_experts,
        rf"model-.*: '{LAYER}\.0\.gate_proj\.weight' gives .* H = 192, which is not a multiple .*",
    ),
    "layer missing": (
        without(r"^model\.layers\.2\."),
        r"{model_dir}: config\.json counts 3 layers, but no shard has a tensor of .*\.2; .*",
    ),
    "experts alone": (
        without(r"^model\.layers\.1\.(?!.*\.experts\.)"),
        r"{model_dir}: no shard has anything but experts of model\.layers\.1; are all .*",
    ),
    "layers alone": (
        without(r"^(?!model\.layers)"),
        r"{model_dir}: no shard has embeddings, a head, or anything outside the layers; are all .*",
    ),
    "no layers to convert": (
        edit_config(num_hidden_layers=1),
        r"{model_dir}: has no layer with NVFP4 experts to convert \(.*\(MTP\).*\)",
    ),
    "no number of layers": (
        edit_config(num_hidden_layers=None),
        r"config\.json: num_hidden_layers is missing",
    ),
    "no engine": (
        edit_config(
            architectures=["MixtralForCausalLM"],
            quantization_config={
                "quant_algo": "NVFP4",
                "quant_method": "modelopt",
                "config_groups": {"group_0": {"weights": {"group_size": 16}}},
            },
        ),
        r"{model_dir}: no engine could serve it once it is converted: SGLang .*; vLLM .*; serve .*",
    ),
}


@pytest.mark.parametrize("case", BEFORE_THE_FIRST_BYTE)
def test_refused_before_the_first_byte(model_dir: Path, tmp_path: Path, case: str) -> None:
    damage, message = BEFORE_THE_FIRST_BYTE[case]
    damage(model_dir)
    found = fails(model_dir, tmp_path / "out")
    for placeholder, path in (("{model_dir}", model_dir), ("{parent}", tmp_path)):
        message = message.replace(placeholder, re.escape(str(path)))
    assert re.fullmatch(message, found), found
    assert not (tmp_path / "out").exists()
    if "is already converted" not in found:
        assert printable(inspected(model_dir)) == found
    short = found.replace(f"{tmp_path}/", "").replace("n" * 300, "nnn...")
    assert DOCUMENTED[case] == f"error: {short}"


# --- a converted folder that is to be restored ----------------------------------------------------

CONVERTED_SHARD = "model-00001-of-00001.safetensors"


def forged(name: str, edit: Callable[[bytes], bytes]) -> Damage:
    """Change a file, and the manifest with it."""

    def damage(folder: Path) -> None:
        content = edit((folder / name).read_bytes())
        (folder / name).write_bytes(content)
        record = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        change_manifest(folder, lambda manifest: manifest["files"].update({name: record}))

    return damage


def forged_manifest(*keys: str, value: Any) -> Damage:
    """Put a value at the end of a path of keys."""

    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return lambda folder: change_manifest(folder, change)


def put_a_shard_twice(folder: Path) -> None:
    """Whole, under another name, and on record."""
    shutil.copy(folder / CONVERTED_SHARD, folder / "model-again.safetensors")

    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"]["model-again.safetensors"] = manifest["shards"][CONVERTED_SHARD]

    change_manifest(folder, change)


def change_a_dtype(folder: Path) -> None:
    path = folder / CONVERTED_SHARD
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F16" ', 1))


def a_value_of_one_expert(folder: Path) -> None:
    """Of a converted Llama 4 in place of the good one."""
    shutil.rmtree(folder)
    model_zoo.make(folder.with_name("model"), "llama4")
    conversion.convert(folder.with_name("model"), folder)
    poke(folder, f"{BATCHED}.w2_input_scale", 5, 0x42)


def record_nothing(folder: Path) -> None:
    (folder / SOURCE).unlink()
    change_manifest(folder, lambda manifest: manifest["files"].pop(SOURCE))


TO_RESTORE: dict[str, tuple[Damage, str]] = {
    "no such folder": (
        shutil.rmtree,
        r"{model_dir}: does not exist; expected a converted checkpoint",
    ),
    "not a converted checkpoint, or unfinished": (
        lambda folder: (folder / MANIFEST).unlink(),
        rf"{{model_dir}}: not a converted checkpoint, or unfinished: it has no {MANIFEST}",
    ),
    "converted by a release that recorded nothing": (
        record_nothing,
        rf"{{model_dir}}: lacks {SOURCE}, the record of its source; copy it .*",
    ),
    "record missing": (
        lambda folder: (folder / SOURCE).unlink(),
        rf"{SOURCE}: is missing, the manifest lists it",
    ),
    "record truncated": (truncate(SOURCE, -1), rf"{SOURCE}: has \d+ bytes, expected \d+"),
    "record damaged": (overwrite(SOURCE, b"?"), rf"{SOURCE}: has checksum .*, expected .*"),
    "record and manifest exchanged for others": (
        forged(SOURCE, lambda data: data.replace(b'"format":"pt"', b'"format":"np"')),
        rf"{{model_dir}}: {SOURCE}: is not the checkpoint that was converted: .*",
    ),
    "record cut short, and the manifest changed to match": (
        forged(SOURCE, lambda data: data[:-1]),
        rf"{SOURCE}: ends inside '{THIRD}'",
    ),
    "record with a byte more, and the manifest changed to match": (
        forged(SOURCE, lambda data: data + b"?"),
        rf"{SOURCE}: has \d+ bytes, what the manifest lists has \d+",
    ),
    "config edited": (
        overwrite("config.json", b" {"),
        r"config\.json: has checksum .*, expected .*",
    ),
    "config not JSON, and the manifest changed to match": (
        forged("config.json", lambda _: b"?"),
        r"config\.json: not JSON: .*",
    ),
    "config without quantization, and the manifest changed to match": (
        forged("config.json", lambda _: b"{}"),
        r"config\.json: has no quantization_config",
    ),
    "converted shard missing": (
        lambda folder: (folder / CONVERTED_SHARD).unlink(),
        rf"{CONVERTED_SHARD}: is missing, the manifest lists it",
    ),
    "converted shard truncated": (
        truncate(CONVERTED_SHARD, -1),
        rf"{CONVERTED_SHARD}: has \d+ bytes, expected \d+",
    ),
    "header of a converted shard damaged": (
        change_a_dtype,
        rf"{CONVERTED_SHARD}: its header has checksum .*, expected .*",
    ),
    "data of a converted shard damaged": (
        lambda folder: flip_bit(folder / CONVERTED_SHARD),
        rf"{CONVERTED_SHARD}: '.*' has checksum .*, expected .*",
    ),
    "data of a value damaged that all experts share": (
        a_value_of_one_expert,
        rf"{CONVERTED_SHARD}: '{BATCHED}\.w2_input_scale' holds different values where .*",
    ),
    "file that does not belong": (
        lambda folder: (folder / "more.json").write_text("{}"),
        r"more\.json: is not in the manifest",
    ),
    "manifest edited": (
        lambda folder: edit_json(folder / MANIFEST, plan="another"),
        rf"{MANIFEST}: has been changed: it does not match its own checksum",
    ),
    "manifest not JSON": (overwrite(MANIFEST, b"?"), rf"{MANIFEST}: not JSON: .*"),
    "another format version": (
        forged_manifest("format_version", value=1),
        rf"{MANIFEST}: format version is 1, this release .*",
    ),
    "row order of another release": (
        forged_manifest("row_order", value="xxh3_128:00"),
        r"{model_dir}: has the row order xxh3_128:00, this release of fp4moe-convert knows .*",
    ),
    "shard of the source with a path for a name": (
        forged_manifest("source", "shards", "../x.safetensors", value={"bytes": 4, "header": "00"}),
        rf"{MANIFEST}: '\.\./x\.safetensors' is no name of a shard",
    ),
    "file on record that is none of the source's configuration": (
        forged_manifest("source", "files", "../x", value={"bytes": 4, "xxh3_128": "00"}),
        rf"{MANIFEST}: '\.\./x' is no file that is on record",
    ),
    "tensor in two converted shards": (
        put_a_shard_twice,
        rf"model-again\.safetensors: '.+' is in {CONVERTED_SHARD} as well",
    ),
}


@pytest.fixture(scope="session")
def tiny_converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading only."""
    return conversion.convert(tiny, tmp_path_factory.mktemp("tiny") / "converted").out_dir


@pytest.mark.parametrize("case", TO_RESTORE)
def test_refused_by_restore(tiny: Path, tiny_converted: Path, tmp_path: Path, case: str) -> None:
    damage, message = TO_RESTORE[case]
    folder = Path(shutil.copytree(tiny_converted, tmp_path / "converted"))
    damage(folder)
    found = fails(folder, tmp_path / "out", "--quiet", restoring=True)
    assert re.fullmatch(message.replace("{model_dir}", re.escape(str(folder))), found), found
    assert holds_nothing_finished(tmp_path / "out")
    assert not (tmp_path / "out").exists() or case.startswith("data ")
    short = found.replace(f"{tmp_path}/", "").replace(f"{tiny.parent}/", "")
    short = re.sub(r"\b[0-9a-f]{32}\b", "...", short)
    assert DOCUMENTED[case] == f"error: {short}"


def unfinished_original(folder: Path) -> None:
    kill_at_rename(f"restore({str(folder / 'converted')!r}, {str(folder / 'out')!r})", 1)


def lose_journals(folder: Path) -> None:
    for path in (folder / "out").glob(".fp4moe-journal*"):
        path.unlink()


def bring_two(folder: Path) -> None:
    """As an artifact of a CI job does that leaves hidden files out."""
    for path in (folder / "two").glob("*.safetensors"):
        path.rename(folder / "out" / path.name)


Step = str | Damage
"""A command, or what else is done in the folder that it is called from."""

CONVERTED_OTHER: list[Step] = ["convert other out"]
PART_OF_OTHER: list[Step] = ["convert other out --part 1/2 --max-shard-size 500KB"]
HELD: dict[str, tuple[list[Step], list[str]]] = {
    "`restore`: a finished conversion, with `--overwrite` too": (
        CONVERTED_OTHER,
        ["restore converted out", "restore converted out --overwrite"],
    ),
    "`restore`: parts of a conversion, with `--overwrite` too": (
        PART_OF_OTHER,
        ["restore converted out", "restore converted out --overwrite"],
    ),
    "`restore`: an unfinished original of another conversion": (
        [unfinished_original, "convert other converted-other"],
        ["restore converted-other out"],
    ),
    "an unfinished original, with `--overwrite` or `--part` too": (
        [unfinished_original],
        [
            "convert model out",
            "convert model out --overwrite",
            "convert model out --part 1/2",
            "ci model out --overwrite",
        ],
    ),
    "a finished conversion of another checkpoint": (CONVERTED_OTHER, ["convert model out"]),
    "an unfinished conversion of another checkpoint": (
        PART_OF_OTHER,
        ["convert model out", "ci model out"],
    ),
    "`--part`, `finish`: parts of another checkpoint": (
        PART_OF_OTHER,
        ["convert model out --part 2/2", "finish out --source model"],
    ),
    "`finish`: one part of two": (PART_OF_OTHER, ["finish out"]),
    "`--part`: parts with another `--max-shard-size`": (
        PART_OF_OTHER,
        ["convert other out --part 1/2", "convert other out --part 2/2"],
    ),
    "parts whose journals are lost, with `--part` or `finish` too": (
        [*PART_OF_OTHER, lose_journals],
        ["convert other out", "convert other out --part 1/2", "finish out"],
    ),
    "`finish`: two parts, and the journal of one is lost": (
        [*PART_OF_OTHER, f"{PART_OF_OTHER[0]}".replace("out --part 1", "two --part 2"), bring_two],
        ["finish out", "convert other out --part 2/2 --max-shard-size 500KB"],
    ),
    "`finish`: no part": ([lambda folder: (folder / "out").mkdir()], ["finish out"]),
    "`finish`: an unfinished original": ([unfinished_original], ["finish out"]),
    "a finished conversion without its manifest, with `--overwrite` too": (
        ["convert other out", lambda folder: (folder / "out" / MANIFEST).unlink()],
        ["convert other out", "convert other out --overwrite"],
    ),
    "`restore`: the original, and one file is missing": (
        ["restore converted out", lambda folder: (folder / "out" / "tokenizer.json").unlink()],
        ["restore converted out", "restore converted out --overwrite"],
    ),
}


@pytest.mark.parametrize("case", HELD)
def test_refused_for_what_the_output_folder_holds(
    tiny: Path,
    tiny_converted: Path,
    made: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in (("model", tiny), ("converted", tiny_converted), ("other", made[0])):
        Path(name).symlink_to(folder)
    steps, commands = HELD[case]
    for step in steps:
        if isinstance(step, str):
            assert CliRunner().invoke(app, [*step.split(), "--quiet"]).exit_code == 0
        else:
            step(tmp_path)

    def left() -> dict[str, str]:
        """But for the journals: a run that has the lock says so."""
        found = fingerprints(tmp_path).items()
        return {name: data for name, data in found if not is_journal(Path(name).name)}

    before = left()
    for command in commands:
        result = CliRunner().invoke(app, [*command.split(), "--quiet"])
        assert (result.exit_code, result.stdout) == (1, ""), command
        short = one_error(result.stderr).replace(f"{made[0].parent}/", "")
        assert DOCUMENTED[case] == f"error: {short}"
        assert left() == before


def documented_errors() -> dict[str, str]:
    """What docs/errors.md says is printed, by input."""
    text = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
    return dict(re.findall(r"^\| (.*?) \| `(error: .*)` \|$", text, re.MULTILINE))


DOCUMENTED = documented_errors()


def test_the_documented_errors_are_those_that_are_tested() -> None:
    assert list(DOCUMENTED) == [*BEFORE_THE_FIRST_BYTE, *TO_RESTORE, *HELD]


def test_refuses_what_it_has_converted_itself(tiny: Path, tmp_path: Path) -> None:
    conversion.convert(tiny, tmp_path / "once")
    assert (
        fails(tmp_path / "once", tmp_path / "twice") == f"{tmp_path / 'once'}: is already converted"
    )
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    "folder",
    ["model-00001-of-00001.safetensors", "config.json.partial", ".fp4moe-journal.jsonl"],
)
def test_refuses_folders_named_like_files_of_the_output(
    model_dir: Path, tmp_path: Path, folder: str
) -> None:
    (model_dir / folder).mkdir()
    (model_dir / folder / "x").touch()
    message = f"{folder}/x: its folder has the name of a file of the output"
    assert fails(model_dir, tmp_path / "out") == inspected(model_dir) == message
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_the_same(model_dir: Path, tmp_path: Path) -> None:
    truncate(SECOND, -1)(model_dir)
    assert fails(model_dir, tmp_path / "out", "--dry-run").startswith(f"{SECOND}: is truncated")


def test_names_with_control_characters_stay_on_the_line(model_dir: Path, tmp_path: Path) -> None:
    odd = model_dir.rename(tmp_path / "two\nlines\x1b[31m")
    (odd / "config.json").unlink()
    message = f"{tmp_path}/two\\nlines\\x1b[31m: not a model folder: it has no config.json"
    assert fails(odd, tmp_path / "out") == message


# --- the output folder ----------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["s3://bucket/out", "hf://org/model", "file:///tmp/out"])
@pytest.mark.parametrize("command", ["convert", "ci", "restore", "convert --dry-run"])
def test_refuses_a_url(
    tiny: Path,
    tiny_converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    url: str,
) -> None:
    """It would be made as a folder below this one. Where there is such a folder, it is meant."""
    monkeypatch.chdir(tmp_path)
    source = tiny_converted if command == "restore" else tiny
    result = CliRunner().invoke(app, [*command.split(), str(source), url])
    why = "is a URL; name a path on this machine, and upload the result from there"
    assert (result.exit_code, result.stderr) == (1, f"error: {Path(url)}: {why}\n")
    assert not list(tmp_path.iterdir())
    scheme, _, _ = url.partition("//")
    Path(scheme).mkdir()
    result = CliRunner().invoke(app, [*command.split(), str(source), url, "--quiet"])
    assert result.exit_code == 0
    assert (tmp_path / url / "config.json").exists() is ("--dry-run" not in command)


def fails_dry_too(model_dir: Path, out_dir: Path) -> str:
    """What a conversion says, and a dry run as well."""
    said = fails(model_dir, out_dir)
    assert fails(model_dir, out_dir, "--dry-run") == said
    return said


def test_refuses_an_out_dir_that_is_the_source(model_dir: Path) -> None:
    message = f"{model_dir}: is the source folder {model_dir}"
    assert fails_dry_too(model_dir, model_dir) == message


def test_refuses_an_out_dir_inside_the_source(model_dir: Path) -> None:
    out_dir = model_dir / "deep" / "out"
    assert (
        fails_dry_too(model_dir, out_dir) == f"{out_dir}: is inside the source folder {model_dir}"
    )


def test_refuses_an_out_dir_around_the_source(model_dir: Path) -> None:
    out_dir = model_dir.parent
    assert fails_dry_too(model_dir, out_dir) == f"{out_dir}: holds the source folder {model_dir}"


@pytest.mark.parametrize(
    ("target", "relation"),
    [("model", "is"), ("model/sub", "is inside"), (".", "holds")],
)
def test_refuses_such_an_out_dir_by_a_link_too(
    model_dir: Path, tmp_path: Path, target: str, relation: str
) -> None:
    (model_dir / "sub").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    assert fails_dry_too(model_dir, link) == f"{link}: {relation} the source folder {model_dir}"


def test_refuses_a_source_by_a_link_too(model_dir: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(model_dir)
    assert fails_dry_too(link, model_dir / "out") == (
        f"{model_dir / 'out'}: is inside the source folder {link}"
    )


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "sub/"])
def test_refuses_an_out_dir_that_is_not_empty(tiny: Path, tmp_path: Path, name: str) -> None:
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    if name.endswith("/"):
        (out_dir / name).mkdir()
    else:
        (out_dir / name).write_text("mine")
    before = fingerprints(out_dir)
    held = name.rstrip("/")
    message = f"{out_dir}: is not empty: it holds {held!r}; choose another folder"
    assert fails_dry_too(tiny, out_dir) == message
    assert fingerprints(out_dir) == before


def test_the_top_of_a_file_system_will_do(model_dir: Path, tmp_path: Path) -> None:
    """ext4 has a lost+found there, which only root may read."""
    for folder in (model_dir, tmp_path / "out"):
        (folder / "lost+found").mkdir(parents=True)
        (folder / "lost+found" / "x").touch()
    conversion.convert(model_dir, tmp_path / "out", verify=True)
    assert conversion.convert(model_dir, tmp_path / "out").bytes_written == 0
    assert (tmp_path / "out" / "lost+found" / "x").exists()


def test_refuses_an_out_dir_that_is_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert fails_dry_too(tiny, tmp_path / "out") == f"{tmp_path / 'out'}: is not a folder"
    assert (tmp_path / "out").read_text() == "mine"


def test_refuses_an_out_dir_under_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out_dir = tmp_path / "file" / "out"
    assert fails(tiny, out_dir) == f"{out_dir}: Not a directory"


def test_refuses_an_out_dir_that_links_to_itself(tiny: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    why = "is a link that leads nowhere; remove it, or name another"
    for out_dir in (loop, loop / "sub"):
        assert fails(tiny, out_dir) == f"{loop}: {why}"


@pytest.mark.parametrize("command", ["convert", "convert --dry-run", "ci", "restore"])
def test_refuses_an_out_dir_that_links_to_nothing(
    tiny: Path, tiny_converted: Path, tmp_path: Path, command: str
) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    source = tiny_converted if command == "restore" else tiny
    result = CliRunner().invoke(app, [*command.split(), str(source), str(link)])
    assert result.exit_code == 1
    assert one_error(result.stderr).startswith(f"{link}: is a link that leads nowhere; ")
    assert not list(tmp_path.glob("nowhere*"))


def test_refuses_an_out_dir_of_too_long_a_name(tiny: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / ("n" * 300)
    assert fails(tiny, out_dir) == f"{out_dir}: File name too long"


def test_refuses_too_little_free_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = tmp_path / "model"
    make_checkpoint(model_dir, Spec(experts=64, layers=1, sparse=True))
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    arguments = [str(model_dir), str(tmp_path / "out")]
    result = CliRunner().invoke(convert_app, arguments)
    assert result.exit_code == os.EX_TEMPFAIL
    message = one_error(result.stderr)
    # 64 experts of 3 x 7168 x 2048 values at 4.5 bits are 1.58 GB; attention and the rest add some.
    found = re.fullmatch(
        rf"{tmp_path / 'out'}: needs (\S+) bytes of free disk, there are 1,500,000,000", message
    )
    assert found, message
    needed = int(found[1].replace(",", ""))
    assert needed == pytest.approx(preview(model_dir).work.plan.bytes_out, 0.01)
    assert needed > 1.58e9
    assert not (tmp_path / "out").exists()


def test_needs_no_more_than_it_says(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = preview(tiny).work.plan
    needed = plan.bytes_out + sum(
        path.stat().st_size
        for path in tiny.iterdir()
        if path.suffix in (".json", ".py") and path.name not in ("config.json", INDEX)
    )
    for free, enough in ((needed - 1, False), (needed, True)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        arguments = [str(tiny), str(tmp_path / "out"), "--quiet"]
        result = CliRunner().invoke(convert_app, arguments)
        assert (result.exit_code == 0) == enough
        assert ("of free disk" in result.stderr) != enough


# --- found while bytes move -----------------------------------------------------------------------


@pytest.fixture(params=["new", "empty"])
def out_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Not there yet, or there and empty."""
    path = tmp_path / "out"
    if request.param == "empty":
        path.mkdir()
    return path


@pytest.mark.parametrize("value", [0x7F, 0xFF])
@pytest.mark.parametrize(
    ("tensor", "position"),
    [
        (f"{LAYER}.0.gate_proj.weight_scale", 0),
        (f"{LAYER}.3.up_proj.weight_scale", 777),
        ("model.layers.2.mlp.experts.3.down_proj.weight_scale", -1),
    ],
    ids=["gate", "up", "down"],
)
def test_a_nan_block_scale(
    model_dir: Path, tmp_path: Path, tensor: str, position: int, value: int
) -> None:
    poke(model_dir, tensor, position, value)
    home = home_of(model_dir, tensor).name
    message = fails(model_dir, tmp_path / "out", "--quiet")
    assert message == f"{home}: {tensor!r} has a NaN block scale (0x7F or 0xFF)"
    assert holds_nothing_finished(tmp_path / "out")


@pytest.mark.parametrize("value", [0x00, 0x7E, 0x80, 0xFE])
def test_other_extreme_block_scales_are_converted(
    model_dir: Path, tmp_path: Path, value: int
) -> None:
    poke(model_dir, f"{UP}.weight_scale", 5, value)
    conversion.convert(model_dir, tmp_path / "out", verify=True)


def before_moving(monkeypatch: pytest.MonkeyPatch, damage: Callable[[], object]) -> None:
    """Do something after the plan has been made and before any byte has moved."""
    scatter = conversion.scatter

    def damaged(*args: Any, **kwargs: Any) -> dict[str, str]:
        damage()
        return scatter(*args, **kwargs)

    monkeypatch.setattr(conversion, "scatter", damaged)


def fails_while_moving(model_dir: Path, out_dir: Path, *options: str, code: int = 1) -> str:
    """As `fails`, where it is the test that changes the source."""
    existed = out_dir.exists()
    result = CliRunner().invoke(convert_app, [str(model_dir), str(out_dir), "--quiet", *options])
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (code, "")
    assert holds_nothing_finished(out_dir)
    assert out_dir.exists() == (existed or bool(finished_shards(out_dir)))
    return one_error(result.stderr)


@pytest.mark.parametrize("option", ["--direct-io", "--no-direct-io"])
def test_a_source_truncated_while_it_is_read(
    model_dir: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    nbytes = (model_dir / SECOND).stat().st_size - 1
    before_moving(monkeypatch, lambda: os.truncate(model_dir / SECOND, nbytes))
    message = fails_while_moving(model_dir, out_dir, option)
    assert message == (
        f"{SECOND}: ends at byte {nbytes}, expected at least {nbytes + 1}: it has become shorter"
    )


def test_a_source_that_vanishes(
    model_dir: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_moving(monkeypatch, (model_dir / SECOND).unlink)
    assert fails_while_moving(model_dir, out_dir) == f"{SECOND}: No such file or directory"


@pytest.mark.parametrize("function", ["pwrite", "fsync", "ftruncate"])
@pytest.mark.parametrize(
    ("number", "option", "code"),
    [
        (errno.ENOSPC, "--direct-io", 75),
        (errno.ENOSPC, "--no-direct-io", 75),
        (errno.EDQUOT, "--direct-io", 75),
        (errno.ESTALE, "--direct-io", 75),
        (errno.EIO, "--direct-io", 1),
    ],
)
def test_a_call_that_fails(
    tiny: Path,
    out_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    number: int,
    option: str,
    code: int,
) -> None:
    """Whichever; tests/test_faults.py has disks that are really full."""

    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    before_moving(monkeypatch, lambda: monkeypatch.setattr(os, function, failing))
    message = fails_while_moving(tiny, out_dir, option, code=code)
    assert message == f"model-00001-of-00001.safetensors.partial: {os.strerror(number)}"


@pytest.mark.parametrize("name", ["config.json", "fp4moe_manifest.json", INDEX, "tokenizer.json"])
def test_a_disk_that_fills_up_at_the_end(
    tiny: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    message = fails_while_moving(tiny, out_dir, code=os.EX_TEMPFAIL)
    assert message == f"{name}: No space left on device"


def test_somebody_elses_file_in_out_dir_survives_a_failure(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_dir = tmp_path / "out"
    poke(model_dir, f"{UP}.weight_scale", 0, 0x7F)
    before_moving(monkeypatch, lambda: (out_dir / "notes.txt").write_text("mine"))
    assert "NaN block scale" in fails(model_dir, out_dir, "--quiet")
    assert [path.name for path in out_dir.iterdir()] == ["notes.txt"]


@pytest.mark.flashinfer
@pytest.mark.parametrize("function", ["shuffle_matrix_a", "reorder_rows_for_gated_act_gemm"])
def test_a_flashinfer_that_is_not_on_record_and_has_another_order(
    tiny: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr(recorded_orders, "RECORDED", {})
    monkeypatch.setattr(f"flashinfer.{function}", lambda rows, *_: rows.flip(0))
    message = fails(tiny, out_dir)
    assert re.fullmatch(
        r"flashinfer \S+: puts row \d+ of \d+ (interleaved )?rows at \d+, expected row \d+: "
        r"this release of fp4moe-convert does not know its layout",
        message,
    )


def test_a_flashinfer_that_does_not_import(
    tiny: Path, out_dir: Path, install_flashinfer: Callable[[str | None], None]
) -> None:
    install_flashinfer("99.0")
    message = fails(tiny, out_dir)
    assert re.fullmatch(r"flashinfer: cannot be imported \(.*\); .* install .*", message)


def test_a_result_that_does_not_verify(
    model_dir: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_surroundings = conversion.write_surroundings

    def write_and_damage(*args: Any, **kwargs: Any) -> None:
        write_surroundings(*args, **kwargs)
        poke(out_dir, "lm_head.weight", 0, 0x55)

    monkeypatch.setattr(conversion, "write_surroundings", write_and_damage)
    arguments = [str(model_dir), str(out_dir), "--quiet", "--verify"]
    result = CliRunner().invoke(convert_app, arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    message = one_error(result.stderr)
    assert message.startswith("model-00001-of-00001.safetensors: 'lm_head.weight' ")
    assert not (out_dir / INDEX).exists()


# --- not bad enough to fail -----------------------------------------------------------------------


def test_differing_gate_and_up_scales_are_kept_with_a_warning(tmp_path: Path) -> None:
    model_dir, out_dir = tmp_path / "model", tmp_path / "out"
    spec = Spec(
        experts=2, hidden=128, intermediate=64, layers=1, vocab_size=8, differing_scales=True
    )
    make_checkpoint(model_dir, spec)
    result = CliRunner().invoke(convert_app, [str(model_dir), str(out_dir), "--quiet"])
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"warning: {LAYER}: gate and up {leaf} differ for 2 of 2 experts; both are kept"
        for leaf in ("weight_scale_2", "input_scale")
    ]
    for leaf in ("weight_scale_2", "input_scale"):
        kept = read_tensor(out_dir, f"{LAYER}.w13_{leaf}")
        assert kept == b"".join(
            read_tensor(model_dir, f"{LAYER}.{expert}.{projection}.{leaf}")
            for expert in range(2)
            for projection in ("gate_proj", "up_proj")
        )
        gate, up = np.frombuffer(kept, "<f4").reshape(2, 2).T
        assert (gate != up).all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("leaf", "both"), [("input_scale", True), ("weight_scale_2", False)])
def test_scales_that_no_engine_can_divide_by_are_named(
    model_dir: Path, tmp_path: Path, value: float, leaf: str, both: bool
) -> None:
    """Calibration never reached such an expert. The bytes stay as they are."""
    projections = ("gate_proj", "up_proj") if both else ("down_proj",)
    for projection in projections:
        name = f"{LAYER}.2.{projection}.{leaf}"
        for position, byte in enumerate(np.float32(value).tobytes()):
            poke(model_dir, name, position, byte)
    result = CliRunner().invoke(convert_app, [str(model_dir), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"warning: {LAYER}: {projection.removesuffix('_proj')} {leaf} is not a positive number "
        f"for 1 of 4 experts (expert 2: {value}); engines divide by it"
        for projection in projections
    ]


def test_other_weights_are_left_out_with_a_warning(model_dir: Path, tmp_path: Path) -> None:
    strays = ("model.gguf", "original/consolidated.00.pth", "pytorch_model-00001-of-00002.bin")
    for name in (*strays, "original/params.json", "vocab.bin"):
        (model_dir / name).parent.mkdir(exist_ok=True)
        (model_dir / name).write_bytes(b"12345")
    result = CliRunner().invoke(convert_app, [str(model_dir), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"warning: {name}: holds 5 bytes of other weights, left out" for name in strays
    ]
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert {"original/params.json", "vocab.bin"} <= found
    assert not found & set(strays)


def test_strays_are_left_out_with_a_warning(model_dir: Path, tmp_path: Path) -> None:
    shutil.copy(model_dir / THIRD, model_dir / "consolidated.safetensors")
    result = CliRunner().invoke(convert_app, [str(model_dir), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0
    assert (
        result.stderr == f"warning: consolidated.safetensors: is not named by {INDEX}, left out\n"
    )
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_a_folder_whose_name_is_not_utf8(tiny: Path, tmp_path: Path) -> None:
    model_dir = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xffel"))
    shutil.copytree(tiny, model_dir)
    arguments = [str(model_dir), str(tmp_path / "out"), "--quiet", "--verify"]
    result = CliRunner().invoke(convert_app, arguments)
    assert result.exit_code == 0, result.exception


def test_a_source_with_a_manifest_of_its_own(model_dir: Path, tmp_path: Path) -> None:
    # Left over from a conversion; the new one has to replace it.
    (model_dir / "fp4moe_manifest.json").write_text("{}")
    conversion.convert(model_dir, tmp_path / "out", verify=True)


# --- as a process of its own ----------------------------------------------------------------------


def run_process(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_process_refuses_before_the_first_byte(model_dir: Path, tmp_path: Path) -> None:
    truncate(SECOND, -1)(model_dir)
    done = run_process(*FP4MOE_CONVERT, str(model_dir), str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (1, "")
    assert one_error(done.stderr).startswith(f"{SECOND}: is truncated")
    assert not (tmp_path / "out").exists()


def test_process_fails_while_bytes_move(model_dir: Path, tmp_path: Path) -> None:
    poke(model_dir, f"{LAYER}.0.gate_proj.weight_scale", 0, 0x7F)
    done = run_process(*FP4MOE_CONVERT, str(model_dir), str(tmp_path / "out"), "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    assert "NaN block scale" in one_error(done.stderr)
    assert not (tmp_path / "out").exists()


def test_process_meets_a_limit_of_the_system(tiny: Path, tmp_path: Path) -> None:
    limited = ("bash", "-c", 'ulimit -f 1000 && exec "$@"', "bash", *FP4MOE_CONVERT)
    done = run_process(*limited, str(tiny), str(tmp_path / "out"), "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    message = "model-00001-of-00001.safetensors.partial: File too large"
    assert one_error(done.stderr) == message
    assert not (tmp_path / "out").exists()
