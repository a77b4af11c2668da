"""A model folder is opened, or refused in one line that says why."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.folders import INDEX, edit_json
from support.make_checkpoint import hf_quant_config, quantization_section
from support.specs import TINY

from fp4moe_convert.errors import CheckpointError, HeaderError
from fp4moe_convert.source import checkpoint as source_checkpoint
from fp4moe_convert.source.checkpoint import Checkpoint
from fp4moe_convert.source.identity import describe_source
from fp4moe_convert.source.quantization import require_nvfp4
from fp4moe_convert.storage.local import LocalFolder

FIRST, SECOND, THIRD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
OTHER_FILES = (
    "configuration_deepseek.py",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def open_checkpoint(folder: Path) -> Checkpoint:
    return source_checkpoint.open_checkpoint(LocalFolder(folder))


def weight_map(model_dir: Path) -> dict[str, str]:
    mapping: dict[str, str] = json.loads((model_dir / INDEX).read_text())["weight_map"]
    return mapping


def write_shard(path: Path, *names: str) -> None:
    """A shard whose tensors are one byte each."""
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]}
        for n, name in enumerate(names)
    }
    raw = json.dumps(entries).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(len(names)))


def refuses(folder: Path, message: str, kind: type[CheckpointError] = CheckpointError) -> None:
    """Opening the folder, or asking for NVFP4, fails with exactly this message."""
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        require_nvfp4(open_checkpoint(folder))


# --- what is opened -------------------------------------------------------------------------------


def test_shards_that_an_index_names(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    require_nvfp4(checkpoint)
    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND, THIRD]
    homes = {t.name: s.name for s in checkpoint.shards for t in s.header.tensors}
    assert homes == weight_map(tiny)
    assert checkpoint.other_files == OTHER_FILES
    assert checkpoint.left_out == {}
    assert checkpoint.text.layer_count == 3


def test_shards_without_an_index(model_dir: Path) -> None:
    with_index = open_checkpoint(model_dir)
    (model_dir / INDEX).unlink()
    without = open_checkpoint(model_dir)
    require_nvfp4(without)
    assert without.shards == with_index.shards
    assert without.other_files == OTHER_FILES


def test_a_single_file(model_dir: Path) -> None:
    for name in (INDEX, FIRST, SECOND, THIRD):
        (model_dir / name).unlink()
    write_shard(model_dir / "model.safetensors", "a", "b")
    checkpoint = open_checkpoint(model_dir)
    require_nvfp4(checkpoint)
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]


def test_an_index_may_leave_tensors_out(model_dir: Path) -> None:
    mapping = weight_map(model_dir)
    del mapping["lm_head.weight"]
    edit_json(model_dir / INDEX, weight_map=mapping)
    names = {t.name for s in open_checkpoint(model_dir).shards for t in s.header.tensors}
    assert "lm_head.weight" in names


def test_strays_are_neither_shards_nor_other_files(model_dir: Path) -> None:
    write_shard(model_dir / "consolidated.safetensors", "lm_head.weight")
    checkpoint = open_checkpoint(model_dir)
    assert list(checkpoint.left_out) == ["consolidated.safetensors"]
    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND, THIRD]
    assert checkpoint.other_files == OTHER_FILES


MTP = ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight")


@pytest.mark.parametrize("file", ["mtp.safetensors", "model-nextn.safetensors"])
@pytest.mark.parametrize("names", [MTP, ("mtp.fc.weight", "mtp.layers.0.mlp.experts.0.up_proj")])
def test_a_file_of_multi_token_prediction_goes_along(
    model_dir: Path, file: str, names: tuple[str, ...]
) -> None:
    """SGLang loads GLM-4.7's although the index does not name it."""
    edit_json(model_dir / "config.json", num_nextn_predict_layers=1)
    write_shard(model_dir / file, *names)
    checkpoint = open_checkpoint(model_dir)
    assert [s.name for s in checkpoint.shards] == sorted([FIRST, SECOND, THIRD, file])
    assert checkpoint.left_out == {}
    assert file in describe_source(checkpoint).shards


def left_out(model_dir: Path, file: str = "mtp.safetensors") -> str:
    """Why a file is not taken for a shard."""
    checkpoint = open_checkpoint(model_dir)
    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND, THIRD]
    assert file not in checkpoint.other_files
    return checkpoint.left_out[file]


@pytest.mark.parametrize(
    "names",
    [(), (*MTP, "model.norm.weight"), ("model.layers.2.extra",), ("model.embed_tokens.weight",)],
)
def test_a_file_of_something_else_does_not(model_dir: Path, names: tuple[str, ...]) -> None:
    edit_json(model_dir / "config.json", num_nextn_predict_layers=1)
    write_shard(model_dir / "mtp.safetensors", *names)
    assert left_out(model_dir) == f"is not named by {INDEX}"


@pytest.mark.parametrize("count", [0, None])
def test_layers_after_the_last_are_mtp_only_if_the_config_says_so(
    model_dir: Path, count: int | None
) -> None:
    """An engine that expects none would stop at their names."""
    edit_json(model_dir / "config.json", num_nextn_predict_layers=count)
    write_shard(model_dir / "mtp.safetensors", *MTP)
    assert left_out(model_dir) == f"is not named by {INDEX}"


def test_a_file_of_mtp_that_the_shards_hold_as_well_does_not_go_along(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", num_nextn_predict_layers=1)
    write_shard(model_dir / "mtp.safetensors", *MTP)
    write_shard(model_dir / "other.safetensors", MTP[0])
    edit_json(model_dir / INDEX, weight_map={**weight_map(model_dir), MTP[0]: "other.safetensors"})
    why = open_checkpoint(model_dir).left_out["mtp.safetensors"]
    assert why == f"is not named by {INDEX}, and other.safetensors holds {MTP[0]!r} as well"


def test_of_two_files_of_mtp_the_one_that_engines_know_goes_along(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", num_nextn_predict_layers=1)
    for file in ("mtp.safetensors", "a-copy.safetensors"):
        write_shard(model_dir / file, *MTP)
    checkpoint = open_checkpoint(model_dir)
    assert [s.name for s in checkpoint.shards] == [FIRST, SECOND, THIRD, "mtp.safetensors"]
    why = checkpoint.left_out["a-copy.safetensors"]
    assert why == f"is not named by {INDEX}, and mtp.safetensors holds {MTP[0]!r} as well"


def test_a_stray_that_cannot_be_read_is_no_reason_to_stop(model_dir: Path) -> None:
    (model_dir / "mtp.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert left_out(model_dir) == (
        f"is not named by {INDEX} and cannot be read (is a git-lfs pointer, not the file itself; "
        "run git lfs pull in the model folder)"
    )


OF_A_WHOLE_FILE = (
    ".sha256 .SHA512 .sha256sum -sha256.txt .md5 .sig .asc .dvc .bak .json .sigstore.json .yml"
)
OF_HALF_A_FILE = (
    ".aria2 .part .partial .incomplete .tmp .crdownload .download .st .lock .sha256.part .3aF29d1B"
)


@pytest.mark.parametrize("ending", OF_A_WHOLE_FILE.split())
def test_what_is_of_a_whole_shard_is_copied(model_dir: Path, ending: str) -> None:
    beside = f"{SECOND}{ending}"
    (model_dir / beside).touch()
    assert beside in open_checkpoint(model_dir).other_files


@pytest.mark.parametrize("ending", OF_HALF_A_FILE.split())
def test_what_may_be_of_half_a_shard_is_refused(model_dir: Path, ending: str) -> None:
    (model_dir / f"{SECOND}{ending}").touch()
    with pytest.raises(CheckpointError, match="its download may be unfinished"):
        open_checkpoint(model_dir)


def test_an_unfinished_file_of_mtp_is_refused_like_a_shard(model_dir: Path) -> None:
    write_shard(model_dir / "mtp.safetensors", "mtp.fc.weight")
    (model_dir / "mtp.safetensors.aria2").touch()
    with pytest.raises(CheckpointError, match=r"^mtp\.safetensors: its download may be"):
        open_checkpoint(model_dir)


def test_a_stray_beyond_the_limits_is_left_out(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = sum(len(s.header.tensors) for s in open_checkpoint(model_dir).shards)
    monkeypatch.setattr(source_checkpoint, "MAX_TENSORS", count + 1)
    write_shard(model_dir / "mtp.safetensors", "mtp.a", "mtp.b")
    assert f"the shards have {count + 2} tensors, the limit is" in left_out(model_dir)


def test_other_files_in_sub_folders(model_dir: Path) -> None:
    for name in ("inference/model.py", "figures/deep/a b.png", "original/x.json"):
        (model_dir / name).parent.mkdir(parents=True)
        (model_dir / name).write_bytes(b"x")
    for name in (".git/HEAD", ".cache/huggingface/x.lock", "inference/.git/HEAD"):
        (model_dir / name).parent.mkdir(parents=True)
        (model_dir / name).write_bytes(b"x")
    added = ("inference/model.py", "figures/deep/a b.png", "original/x.json")
    assert open_checkpoint(model_dir).other_files == tuple(sorted((*OTHER_FILES, *added)))


def test_symlinks_of_a_hub_cache_are_followed(model_dir: Path, tmp_path: Path) -> None:
    expected = open_checkpoint(model_dir)
    repo = tmp_path / "models--nvidia--Tiny-FP4"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model_dir.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")

    checkpoint = open_checkpoint(snapshot)
    require_nvfp4(checkpoint)
    assert [s.header for s in checkpoint.shards] == [s.header for s in expected.shards]
    assert [s.name for s in checkpoint.shards] == [FIRST, SECOND, THIRD]
    assert checkpoint.other_files == OTHER_FILES
    identity = describe_source(checkpoint)
    assert (identity.hub_id, identity.revision) == ("nvidia/Tiny-FP4", "0123abcd")


def test_links_inside_the_folder_are_followed(model_dir: Path) -> None:
    expected = open_checkpoint(model_dir)
    (model_dir / "store").mkdir()
    for name in (SECOND, "tokenizer.json"):
        (model_dir / name).rename(model_dir / "store" / name)
        (model_dir / name).symlink_to(f"store/{name}")
    checkpoint = open_checkpoint(model_dir)
    assert checkpoint.shards == expected.shards
    assert set(checkpoint.other_files) == {*OTHER_FILES, "store/tokenizer.json"}
    assert list(checkpoint.left_out) == [f"store/{SECOND}"]


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", INDEX, SECOND, "sub/x"])
def test_refuses_a_link_that_leads_outside(model_dir: Path, tmp_path: Path, name: str) -> None:
    (model_dir / name).parent.mkdir(exist_ok=True)
    outside = tmp_path / "outside"
    if (model_dir / name).exists():
        (model_dir / name).rename(outside)
    outside.touch()
    (model_dir / name).symlink_to("../" * (name.count("/") + 1) + "outside")
    with pytest.raises(CheckpointError, match=f"^{name}: is a link to {outside}, outside the"):
        open_checkpoint(model_dir)


def test_refuses_a_link_beside_the_blobs_of_a_hub_cache(model_dir: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--nvidia--Tiny-FP4" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    model_dir.rename(snapshot)
    (tmp_path / "secret").touch()
    (snapshot.parent.parent / "secret").touch()
    (snapshot.parent.parent / "blobs").symlink_to("/")
    for target in ("../../secret", tmp_path / "secret", f"../../blobs/{tmp_path}/secret"):
        (snapshot / "x").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"^x: is a link to .*/secret, outside the mod"):
            open_checkpoint(snapshot)
        (snapshot / "x").unlink()


@pytest.mark.parametrize("name", [".fp4moe-journal.jsonl", "x.partial", "sub/x.partial"])
def test_leaves_out_what_would_be_taken_for_unfinished_output(model_dir: Path, name: str) -> None:
    (model_dir / name).parent.mkdir(exist_ok=True)
    (model_dir / name).touch()
    checkpoint = open_checkpoint(model_dir)
    assert checkpoint.left_out == {name: "is unfinished"}
    assert checkpoint.other_files == OTHER_FILES


def test_quantization_only_in_hf_quant_config(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", quantization_config=None)
    (model_dir / "hf_quant_config.json").write_text(json.dumps(hf_quant_config(TINY)))
    checkpoint = open_checkpoint(model_dir)
    require_nvfp4(checkpoint)
    assert checkpoint.quantization == hf_quant_config(TINY)
    assert checkpoint.other_files == OTHER_FILES


def test_quantization_in_both_places(model_dir: Path) -> None:
    (model_dir / "hf_quant_config.json").write_text(json.dumps(hf_quant_config(TINY)))
    checkpoint = open_checkpoint(model_dir)
    require_nvfp4(checkpoint)
    assert checkpoint.quantization == quantization_section(TINY)
    assert checkpoint.hf_quant_config == hf_quant_config(TINY)


@pytest.mark.parametrize("section", [{"quant_method": "fp8"}, "no object"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_nested_section_beside_hf_quant_config_is_a_leftover(
    model_dir: Path, key: str, section: object
) -> None:
    edit_json(model_dir / "config.json", quantization_config=None, text_config={key: section})
    (model_dir / "hf_quant_config.json").write_text(json.dumps(hf_quant_config(TINY)))
    checkpoint = open_checkpoint(model_dir)
    require_nvfp4(checkpoint)
    assert checkpoint.quantization == hf_quant_config(TINY)


# --- not a model folder ---------------------------------------------------------------------------


def test_refuses_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    refuses(tmp_path / "no", f"{tmp_path / 'no'}: does not exist; expected a model folder")


def test_refuses_a_file(model_dir: Path) -> None:
    path = model_dir / FIRST
    refuses(path, f"{path}: is not a folder; expected a model folder")


def test_refuses_a_name_that_the_system_will_not_take(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 300)
    refuses(folder, f"{folder}: File name too long")


def test_refuses_an_empty_folder(tmp_path: Path) -> None:
    refuses(tmp_path, f"{tmp_path}: not a model folder: it has no config.json")


def test_refuses_a_folder_without_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    refuses(model_dir, f"{model_dir}: not a model folder: it has no config.json")


def test_refuses_a_folder_without_shards(model_dir: Path) -> None:
    for name in (INDEX, FIRST, SECOND, THIRD):
        (model_dir / name).unlink()
    refuses(model_dir, f"{model_dir}: not a model folder: it has no *.safetensors files")


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "not JSON: "),
        (b'{"a": ', "not JSON: "),
        (b'{"\xff": 1}', "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
    ids=["empty", "cut", "not UTF-8", "deep", "list", "null"],
)
def test_refuses_json_that_is_not_an_object(
    model_dir: Path, name: str, content: bytes, rule: str
) -> None:
    (model_dir / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(name)}: {rule}") as caught:
        open_checkpoint(model_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, "61", 61.0, True])
def test_refuses_a_count_that_is_not_one(model_dir: Path, value: object) -> None:
    edit_json(model_dir / "config.json", num_hidden_layers=value)
    message = f"config.json: num_hidden_layers is {value!r}, expected a positive integer"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        _ = open_checkpoint(model_dir).text.layer_count


# --- the index ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, {}, [], "x"], ids=repr)
def test_refuses_an_index_without_weight_map(model_dir: Path, value: object) -> None:
    edit_json(model_dir / INDEX, weight_map=value)
    refuses(model_dir, f"{INDEX}: has no weight_map")


def test_refuses_an_index_that_names_a_missing_file(model_dir: Path) -> None:
    (model_dir / SECOND).unlink()
    refuses(model_dir, f"{INDEX}: names {SECOND}, which is missing")


def test_refuses_an_index_that_names_a_dangling_link(model_dir: Path) -> None:
    (model_dir / SECOND).unlink()
    (model_dir / SECOND).symlink_to("../blobs/gone")
    refuses(model_dir, f"{INDEX}: names {SECOND}, which is missing")


@pytest.mark.parametrize(
    "file", ["../x", "/abs.safetensors", "a/b.safetensors", "", ".", "..", 1, None, []], ids=repr
)
def test_refuses_an_index_that_points_outside(model_dir: Path, file: object) -> None:
    edit_json(model_dir / INDEX, weight_map={**weight_map(model_dir), "lm_head.weight": file})
    refuses(
        model_dir,
        f"{INDEX}: 'lm_head.weight' is said to be in {file!r}, "
        "which is not a file name inside the folder",
    )


@pytest.mark.parametrize("file", ["n" * 300, "nul\0", "half \ud800"], ids=["long", "nul", "half"])
def test_refuses_an_index_with_an_impossible_file_name(model_dir: Path, file: str) -> None:
    edit_json(model_dir / INDEX, weight_map={**weight_map(model_dir), "lm_head.weight": file})
    with pytest.raises(CheckpointError):
        open_checkpoint(model_dir)


def test_refuses_an_index_that_names_a_tensor_that_is_not_there(model_dir: Path) -> None:
    edit_json(model_dir / INDEX, weight_map={**weight_map(model_dir), "model.extra": SECOND})
    refuses(model_dir, f"{INDEX}: 'model.extra' is not in {SECOND}")


def test_refuses_an_index_that_names_the_wrong_shard(model_dir: Path) -> None:
    mapping = weight_map(model_dir)
    assert mapping["lm_head.weight"] == THIRD
    edit_json(model_dir / INDEX, weight_map={**mapping, "lm_head.weight": FIRST})
    refuses(model_dir, f"{INDEX}: 'lm_head.weight' is not in {FIRST}")


# --- shards ---------------------------------------------------------------------------------------


def test_refuses_a_tensor_in_two_shards(model_dir: Path) -> None:
    (model_dir / INDEX).unlink()
    write_shard(model_dir / "model-extra.safetensors", "lm_head.weight")
    refuses(
        model_dir,
        f"model-extra.safetensors: 'lm_head.weight' is in {THIRD} as well; engines load both, in "
        "the order of the files' names; delete the file that does not belong, or write it again "
        "without that",
    )


@pytest.mark.parametrize("overlay", ["a-fix.safetensors", "z-fix.safetensors"])
def test_says_which_of_two_shards_an_index_means(model_dir: Path, overlay: str) -> None:
    """A fixed tensor in a file of its own; the old shard was left as it was."""
    write_shard(model_dir / overlay, "lm_head.weight")
    edit_json(model_dir / INDEX, weight_map={**weight_map(model_dir), "lm_head.weight": overlay})
    first, second = sorted((overlay, THIRD))
    refuses(
        model_dir,
        f"{second}: 'lm_head.weight' is in {first} as well; {INDEX} means that in {overlay}, but "
        f"engines load both, in the order of the files' names; write {THIRD} again without it",
    )


def test_refuses_shards_without_an_index_when_their_names_count_more(model_dir: Path) -> None:
    (model_dir / INDEX).unlink()
    (model_dir / SECOND).unlink()
    with pytest.raises(CheckpointError, match=SECOND):
        open_checkpoint(model_dir)


@pytest.mark.parametrize("indexed", [True, False])
def test_refuses_a_fifo_as_shard(model_dir: Path, indexed: bool) -> None:
    if not indexed:
        (model_dir / INDEX).unlink()
    (model_dir / SECOND).unlink()
    os.mkfifo(model_dir / SECOND)
    refuses(model_dir, f"{SECOND}: is not a regular file")


@pytest.mark.parametrize("indexed", [True, False])
def test_refuses_a_folder_as_shard(model_dir: Path, indexed: bool) -> None:
    if not indexed:
        (model_dir / INDEX).unlink()
    (model_dir / SECOND).unlink()
    (model_dir / SECOND).mkdir()
    refuses(model_dir, f"{SECOND}: is not a regular file")


@pytest.mark.parametrize("name", [INDEX, "hf_quant_config.json"])
def test_refuses_a_folder_in_place_of_a_description(model_dir: Path, name: str) -> None:
    (model_dir / name).unlink(missing_ok=True)
    (model_dir / name).mkdir()
    refuses(model_dir, f"{name}: is not a regular file")


@pytest.mark.parametrize("name", ["pipe", "sub/pipe"])
def test_refuses_a_fifo_among_the_other_files(model_dir: Path, name: str) -> None:
    (model_dir / name).parent.mkdir(exist_ok=True)
    os.mkfifo(model_dir / name)
    refuses(model_dir, f"{name}: is not a regular file")


@pytest.mark.parametrize("name", ["hf_quant_config.json", INDEX])
def test_refuses_a_fifo_as_json_without_waiting_for_it(model_dir: Path, name: str) -> None:
    (model_dir / name).unlink(missing_ok=True)
    os.mkfifo(model_dir / name)

    def give_up(*_: object) -> None:
        raise TimeoutError("waited for a FIFO")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        refuses(model_dir, f"{name}: is not a regular file")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["tokenizer.json", "hf_quant_config.json", INDEX])
def test_refuses_a_dangling_link(model_dir: Path, name: str) -> None:
    (model_dir / name).unlink(missing_ok=True)
    (model_dir / name).symlink_to("gone")
    refuses(model_dir, f"{name}: No such file or directory")


def test_a_broken_header_names_its_shard(model_dir: Path) -> None:
    with open(model_dir / SECOND, "r+b") as file:
        file.truncate(7)
    message = f"{SECOND}: 7 bytes is too short for a header length"
    refuses(model_dir, message, HeaderError)


# --- what it is quantized with --------------------------------------------------------------------


def test_refuses_what_is_not_quantized(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", quantization_config=None)
    message = f"{model_dir}: not NVFP4: it is not quantized (config.json says bfloat16)"
    refuses(model_dir, message)


def test_refuses_what_is_not_quantized_and_says_no_dtype(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", quantization_config=None, torch_dtype=None)
    refuses(model_dir, f"{model_dir}: not NVFP4: it is not quantized")


@pytest.mark.parametrize("value", [[], "nvfp4", 1], ids=repr)
def test_refuses_a_quantization_that_is_not_an_object(model_dir: Path, value: object) -> None:
    edit_json(model_dir / "config.json", quantization_config=value)
    refuses(model_dir, "config.json: quantization_config is not an object")


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt FP8"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "modelopt MIXED_PRECISION"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8"}, "modelopt W4A8_NVFP4_FP8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt W4A8_AWQ"),
        ({"quant_method": "modelopt"}, "modelopt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_another_quantization_and_says_which(
    model_dir: Path, section: dict[str, Any], kind: str
) -> None:
    edit_json(model_dir / "config.json", quantization_config=section)
    refuses(model_dir, f"config.json: no NVFP4 experts to convert: the quantization is {kind}")


def groups(**input_activations: Any) -> dict[str, Any]:
    """A section's only group, of FP4 weights."""
    weights = {"num_bits": 4, "type": "float", "group_size": 16}
    return {"config_groups": {"group_0": {"weights": weights, **input_activations}}}


MODELOPT = {"quant_method": "modelopt"}
MIXED = {**MODELOPT, "quant_algo": "MIXED_PRECISION"}
PACKED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
HYBRID = {"quant_method": "fp8", "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4"}
WEIGHT_ONLY = (
    ", whose experts are weight-only (W4A16), which no engine serves with flashinfer_trtllm, the "
    "backend that this layout is for; serve the original with another MoE backend"
)
AWQ = (
    ", whose experts multiply their input by a pre_quant_scale, which no engine does for experts; "
    "export the model as NVFP4"
)
KNOWN = "; this release knows such experts from modelopt, fp8 and compressed-tensors"


def mixed(**algorithms: str) -> dict[str, Any]:
    """What MIXED_PRECISION says of some modules of layer 1 and of multi-token prediction."""
    modules = {f"model.layers.1.{name.replace('_', '.')}": algorithms[name] for name in algorithms}
    modules["mtp.layers.0.mlp.experts.0.up_proj"] = "MXFP4"
    return {"quantized_layers": {name: {"quant_algo": modules[name]} for name in modules}}


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({**MODELOPT, "quant_algo": "W4A16_NVFP4"}, f"modelopt W4A16_NVFP4{WEIGHT_ONLY}"),
        (
            MIXED | mixed(mlp_experts="W4A16_NVFP4", attn="FP8"),
            f"modelopt MIXED_PRECISION{WEIGHT_ONLY}",
        ),
        (
            MIXED | mixed(mlp_experts_0_w1="MXFP8", mlp_experts_1_w1="FP8", attn="NVFP4"),
            "modelopt MIXED_PRECISION, whose experts are FP8 and MXFP8",
        ),
        (MIXED | mixed(mlp_shared="NVFP4"), "modelopt MIXED_PRECISION"),
        (MIXED | mixed(moe_gate="NVFP4", moe_share="NVFP4"), "modelopt MIXED_PRECISION"),
        (MIXED | mixed(moe="FP8"), "modelopt MIXED_PRECISION, whose experts are FP8"),
        (
            {**HYBRID, "quant_method": "mxfp8"},
            f"mxfp8 MIXED_PRECISION, whose experts are NVFP4{KNOWN}",
        ),
        (
            {**HYBRID, "moe_quant_algo": "W4A16_NVFP4"},
            f"fp8 MIXED_PRECISION{WEIGHT_ONLY}",
        ),
        ({"quant_method": "fp8"}, "fp8"),
        (
            {**MODELOPT, "quant_algo": "NVFP4_AWQ"},
            f"modelopt NVFP4_AWQ{AWQ}",
        ),
        (
            PACKED | groups(input_activations={"num_bits": 8, "type": "float"}),
            "compressed-tensors nvfp4-pack-quantized",
        ),
        (
            PACKED | groups(input_activations=None),
            f"compressed-tensors nvfp4-pack-quantized{WEIGHT_ONLY}",
        ),
        (PACKED | groups(), f"compressed-tensors nvfp4-pack-quantized{WEIGHT_ONLY}"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_says_why_experts_of_four_bits_are_not_converted(
    model_dir: Path, section: dict[str, Any], kind: str
) -> None:
    edit_json(model_dir / "config.json", quantization_config=section)
    refuses(model_dir, f"config.json: no NVFP4 experts to convert: the quantization is {kind}")


FOUR_BITS = {"num_bits": 4, "type": "float"}


@pytest.mark.parametrize(
    "section",
    [
        MIXED | mixed(mlp_experts="NVFP4", attn="FP8"),
        MIXED | mixed(mlp_experts_0_w1="nvfp4", mlp_experts_1_w1="FP8"),
        PACKED | groups(input_activations=FOUR_BITS),
        {**PACKED, "quant_method": "compressed_tensors", **groups(input_activations=FOUR_BITS)},
        HYBRID,
        HYBRID | {"group_size": 16} | mixed(mlp_experts="NVFP4"),
        HYBRID | {"moe_quant_algo": "nvfp4", "group_size": "16"},
        {"quant_method": "ModelOpt", "quant_algo": "nvfp4", "group_size": "16"},
        MIXED | {"quant_algo": "mixed_precision"} | mixed(mlp_experts="nvfp4"),
        {**PACKED, "quant_method": "Compressed_Tensors", **groups(input_activations=FOUR_BITS)},
    ],
)
def test_takes_what_says_that_some_experts_are_nvfp4(
    model_dir: Path, section: dict[str, Any]
) -> None:
    edit_json(model_dir / "config.json", quantization_config=section)
    require_nvfp4(open_checkpoint(model_dir))


def test_the_algorithm_of_the_experts_may_stand_in_hf_quant_config(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", quantization_config=MIXED)
    described = {"quantization": mixed(mlp_experts="NVFP4")}
    (model_dir / "hf_quant_config.json").write_text(json.dumps(described))
    require_nvfp4(open_checkpoint(model_dir))
    described = {"quantization": mixed(mlp_experts="FP8")}
    (model_dir / "hf_quant_config.json").write_text(json.dumps(described))
    kind = "modelopt MIXED_PRECISION, whose experts are FP8"
    refuses(model_dir, f"config.json: no NVFP4 experts to convert: the quantization is {kind}")


def test_a_group_of_mxfp4_may_be_of_something_else(model_dir: Path) -> None:
    mxfp4 = {"weights": {**FOUR_BITS, "group_size": 32}, "input_activations": FOUR_BITS}
    own = groups(input_activations=FOUR_BITS)["config_groups"]
    section = PACKED | {"config_groups": {"group_1": mxfp4, **own}}
    edit_json(model_dir / "config.json", quantization_config=section)
    require_nvfp4(open_checkpoint(model_dir))


@pytest.mark.parametrize(
    "section",
    [
        MIXED
        | {
            "quantized_layers": {
                "model.layers.1.mlp.experts": {"quant_algo": "NVFP4", "group_size": 32}
            }
        },
        PACKED
        | {
            "config_groups": {
                "a": {"weights": {**FOUR_BITS, "group_size": 32}, "input_activations": FOUR_BITS}
            }
        },
        HYBRID | {"group_size": 32},
    ],
)
def test_refuses_another_group_size_of_some_experts(
    model_dir: Path, section: dict[str, Any]
) -> None:
    edit_json(model_dir / "config.json", quantization_config=section)
    refuses(model_dir, "config.json: group size is 32, NVFP4 has 16")


def test_engines_read_a_group_size_of_compressed_tensors_as_it_is(model_dir: Path) -> None:
    section = PACKED | groups(input_activations=FOUR_BITS)
    section["config_groups"]["group_0"]["weights"]["group_size"] = "16"
    edit_json(model_dir / "config.json", quantization_config=section)
    refuses(model_dir, "config.json: group size is '16', NVFP4 has 16")


def test_what_a_section_does_not_say_of_activations_is_no_reason(model_dir: Path) -> None:
    """The experts have input scales, so SGLang serves them in four bits."""
    section = {**MODELOPT, "quant_algo": "NVFP4", **groups()}
    edit_json(model_dir / "config.json", quantization_config=section)
    require_nvfp4(open_checkpoint(model_dir))


def test_refuses_another_quantization_in_hf_quant_config(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", quantization_config=None)
    described = hf_quant_config(TINY)
    described["quantization"]["quant_algo"] = "FP8"
    (model_dir / "hf_quant_config.json").write_text(json.dumps(described))
    refuses(
        model_dir,
        "hf_quant_config.json: no NVFP4 experts to convert: the quantization is modelopt FP8",
    )


def test_names_the_file_that_describes_the_quantization(model_dir: Path) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": None}))
    described = hf_quant_config(TINY)
    described["quantization"]["group_size"] = 32
    (model_dir / "hf_quant_config.json").write_text(json.dumps(described))
    refuses(model_dir, "hf_quant_config.json: group size is 32, NVFP4 has 16")


@pytest.mark.parametrize("size", [32, 128, "32"])
def test_refuses_another_group_size(model_dir: Path, size: object) -> None:
    section = quantization_section(TINY)
    section["config_groups"]["group_0"]["weights"]["group_size"] = size
    edit_json(model_dir / "config.json", quantization_config=section)
    refuses(model_dir, f"config.json: group size is {size!r}, NVFP4 has 16")


def test_copying_a_folder_does_not_change_what_it_is(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    ours, theirs = open_checkpoint(tmp_path / "copy"), open_checkpoint(tiny)
    assert describe_source(ours).shards == describe_source(theirs).shards
