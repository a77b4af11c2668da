"""Whole conversions of small checkpoints, read back with the safetensors library."""

import dataclasses
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support.folders import INDEX, MANIFEST, SOURCE, contents, write_byte
from support.make_checkpoint import Spec, make_checkpoint, tensors_of
from support.tensors import range_of, read_tensors

from fp4moe_convert import Progress, convert, verify

SMALL = Spec(layers=2, experts=4, hidden=256, intermediate=128, shards=3, vocab_size=64)

VARIANTS = {
    "plain": {},
    "mtp and kv scales": {"mtp": True, "kv_scales": True},
    "old export": {"quantization": "hf"},
    "both descriptions": {"quantization": "both"},
    "no index": {"layout": "no-index"},
    "one file": {"layout": "single"},
    "scales of shape [1]": {"scale_shape": "vector"},
    "qwen3": {"style": "qwen3_moe", "dense_layers": 0},
    "padded": {"intermediate": 80},
    "many shards": {"shards": 17},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "source", dataclasses.replace(SMALL, **request.param))
    return tmp_path / "source"


def test_every_kind_of_source_converts(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert(source, out, max_shard_nbytes=10**6)
    assert report.layers == 2
    before, after = read_tensors(source), read_tensors(out)
    assert (report.tensors_in, report.tensors_out) == (len(before), len(after))
    stops = {name for name, tensor in after.items() if not tensor.data}
    taken = {name for name in before if name not in after} | stops
    assert len(taken) == 2 * 4 * 12
    assert all(name.endswith(".experts.0.down_proj.weight") for name in stops)
    assert len(stops) == 2
    assert all((after[name].dtype, after[name].shape) == ("U8", (0,)) for name in stops)
    for name in before.keys() - taken:
        assert after[name].dtype == before[name].dtype, name
        assert after[name].shape == before[name].shape, name
        assert after[name].data == before[name].data, name

    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in after.values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "np") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert not list(out.rglob("*.partial"))
    verify(out, source)


def test_config_is_changed_only_where_the_format_says(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    old_section = before.pop("quantization_config", None)
    section = after.pop("quantization_config")
    assert after == before
    assert list(after) == list(before)

    hf_path = source / "hf_quant_config.json"
    hf_section = json.loads(hf_path.read_text()) if hf_path.exists() else None
    assert not (out / "hf_quant_config.json").exists()
    assert section.pop("source") == (old_section or hf_section)
    if old_section and hf_section:
        assert section.pop("source_hf_quant_config") == hf_section
    layout = section.pop("layout")
    assert layout.pop("row_order").startswith("xxh3_128:")
    assert layout.pop("flashinfer").startswith("0.7.")
    assert layout == {"name": "trtllm_nvfp4", "epilogue_tile_m": 128}
    sizes = {"experts": 4, "hidden": 256, "gated": True}
    intermediate = before["moe_intermediate_size"]
    layers = section.pop("layers")
    assert len(layers) == 2
    assert all(layer == {**sizes, "intermediate": intermediate} for layer in layers.values())
    assert section == {"quant_method": "fp4moe", "format_version": 2}


def test_other_files_are_copied(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, SMALL)
    (source / "assets" / "deep").mkdir(parents=True)
    (source / "assets" / "deep" / "picture.png").write_bytes(os.urandom(20_000_000))
    (source / "empty").touch()
    (source / ".cache").mkdir()
    (source / ".cache" / "download.lock").touch()
    convert(source, out)
    generated = {INDEX, MANIFEST, SOURCE, "config.json"}
    copied = {
        name: data
        for name, data in contents(out).items()
        if name not in generated and not name.endswith(".safetensors")
    }
    assert "tokenizer.json" in copied
    assert copied == {
        name: data
        for name, data in contents(source).items()
        if name in copied or not (name.endswith((".safetensors", ".lock")) or name in generated)
    }


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Sizes at which moves are cut and offsets fall between blocks."""
    spec = Spec(
        layers=1, experts=3, hidden=1152, intermediate=4160, dense_layers=0, vocab_size=33,
        kv_scales=True, shards=3,
    )  # fmt: skip
    make_checkpoint(tmp_path / "wide", spec)
    return tmp_path / "wide"


def test_output_does_not_depend_on_how_it_is_written(wide: Path, tmp_path: Path) -> None:
    """Threads, direct I/O, the file system: the bytes are the same."""
    shm = Path("/dev/shm")
    folders = [tmp_path / name for name in ("one", "many", "buffered")]
    convert(wide, folders[0], threads=1)
    convert(wide, folders[1], threads=9)
    convert(wide, folders[2], direct_io=False)
    expected = contents(folders[0])
    assert contents(folders[1]) == expected
    assert contents(folders[2]) == expected
    if shm.is_dir():
        in_memory = shm / f"fp4moe-test-{os.getpid()}"
        try:
            convert(wide, in_memory)
            assert contents(in_memory) == expected
        finally:
            for path in in_memory.iterdir():
                path.unlink()
            in_memory.rmdir()
    verify(folders[0], wide)


def test_scales_that_differ_are_kept_and_warned_of(tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, layers=1, differing_scales=True)
    make_checkpoint(tmp_path / "source", spec)
    report = convert(tmp_path / "source", tmp_path / "out")
    prefix = "model.layers.1.mlp.experts"
    assert report.warnings == [
        f"{prefix}: gate and up {leaf} differ for 4 of 4 experts; both are kept"
        for leaf in ("weight_scale_2", "input_scale")
    ]
    before, after = read_tensors(tmp_path / "source"), read_tensors(tmp_path / "out")
    for leaf in ("weight_scale_2", "input_scale"):
        pairs = [
            [before[f"{prefix}.{e}.{p}_proj.{leaf}"].as_floats().item() for p in ("gate", "up")]
            for e in range(4)
        ]
        assert after[f"{prefix}.w13_{leaf}"].as_floats().tolist() == pairs
        downs = [before[f"{prefix}.{e}.down_proj.{leaf}"].as_floats().item() for e in range(4)]
        assert after[f"{prefix}.w2_{leaf}"].as_floats().tolist() == downs


def test_progress_adds_up(wide: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = convert(wide, tmp_path / "out", verify=True, on_progress=seen.append)
    for phase in ("converting", "verifying"):
        steps = [progress for progress in seen if progress.phase == phase]
        assert all(a.done < b.done for a, b in pairwise(steps))
        total = sum(len(tensor.data) for tensor in read_tensors(tmp_path / "out").values())
        assert (steps[-1].done, steps[-1].total) == (total, total)
    assert report.verify_seconds is not None
    assert report.verify_seconds > 0
    assert np.isclose(report.bytes_per_second, report.bytes_out / report.seconds)


def test_each_file_is_on_the_disk_before_it_has_its_name(
    tiny: Path, tmp_path: Path, disk_calls: list[tuple[str, ...]]
) -> None:
    """A shard's line in the journal as well. What comes later builds on what is there by then."""
    journal, out = ".fp4moe-journal.jsonl", tmp_path / "out"
    convert(tiny, out, max_shard_nbytes=10**6, threads=1)
    renamed = [call[2] for call in disk_calls if call[0] == "rename"]
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    copied = sorted(path.name for path in tiny.glob("*token*.json"))
    assert len(shards) > 1
    assert renamed[: len(shards)] == shards
    assert set(copied) < set(renamed)
    assert renamed[-3:] == [MANIFEST, "config.json", INDEX]
    for name in renamed:
        place = disk_calls.index(("rename", f"{name}.partial", name))
        before = [("sync", f"{name}.partial")] + [("sync", journal)] * (name in shards)
        assert disk_calls[place - len(before) : place] == before
        assert disk_calls[place + 1] == ("sync", "out")


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    """Nor does it take away what it did not bring."""
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, dataclasses.replace(SMALL, layout="single"))
    names = {tensor.name for tensor in tensors_of(SMALL)}
    scale = next(n for n in sorted(names) if n.endswith("3.down_proj.weight_scale") and "exp" in n)
    path = source / "model.safetensors"
    write_byte(path, range_of(path, scale)[0] + 100, 0xFF)
    with pytest.raises(Exception, match=f"'{scale}' has a NaN block scale"):
        convert(source, out / "deeper")
    assert not (out / "deeper").exists()
    (out / "deeper").mkdir()
    with pytest.raises(Exception, match="NaN"):
        convert(source, out / "deeper")
    assert list((out / "deeper").iterdir()) == []
