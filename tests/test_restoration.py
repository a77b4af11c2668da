"""Restore gives back the source's files, each byte of them, or stops before the first one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash
from support import model_zoo
from support.folders import (
    INDEX,
    MANIFEST,
    SOURCE,
    change_manifest,
    edit_json,
    every_file,
    flip_bit,
)
from support.make_checkpoint import Spec, make_checkpoint
from support.processes import kill_at_rename
from support.round_trip import there_and_back
from support.specs import MANY_SHARDS, SMALL_SHARD_NBYTES
from support.tensors import StoredTensor, range_of, read_tensors, write_tensors
from typer.testing import CliRunner

from fp4moe_convert import (
    CheckpointError,
    FormatError,
    OutputError,
    Part,
    RunReport,
    VerifyError,
    convert,
    convert_part,
    restoration,
    restore,
    verify,
)
from fp4moe_convert.cli.commands import app
from fp4moe_convert.execution import filling
from fp4moe_convert.format.files import JOURNAL_NAME
from fp4moe_convert.layouts.trtllm_nvfp4 import TrtllmNvfp4
from fp4moe_convert.plan import check_moves_cover
from fp4moe_convert.readback import read_back
from fp4moe_convert.restoration import prepare_restoration
from fp4moe_convert.source import recorded
from fp4moe_convert.storage import reader

SMALL = Spec(layers=2, experts=4, hidden=256, intermediate=128, shards=3, vocab_size=64)

VARIANTS = {
    "scalars [1]": dataclasses.replace(SMALL, scale_shape="vector"),
    "MTP, KV-cache scales": dataclasses.replace(SMALL, mtp=True, kv_scales=True),
    "hf_quant_config.json only": dataclasses.replace(SMALL, quantization="hf"),
    "both configurations": dataclasses.replace(SMALL, quantization="both"),
    "no index": dataclasses.replace(SMALL, layout="no-index"),
    "a single file": dataclasses.replace(SMALL, shards=1, layout="single"),
    "padded I": dataclasses.replace(SMALL, intermediate=48),
    "more shards than layers": dataclasses.replace(SMALL, shards=9, differing_scales=True),
    "qwen3_moe": dataclasses.replace(SMALL, style="qwen3_moe", dense_layers=0),
}


def round_trip(source: Path, folder: Path, **options: Any) -> RunReport:
    convert(source, folder / "converted", **options)
    return there_and_back(source, folder, **options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direct_io", [True, False])
def test_a_round_trip(tmp_path: Path, variant: str, direct_io: bool) -> None:
    make_checkpoint(tmp_path / "source", VARIANTS[variant])
    report = round_trip(tmp_path / "source", tmp_path, direct_io=direct_io)
    assert report.tensors_out == len(read_tensors(tmp_path / "source"))
    assert report.layers == 2


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    model_zoo.make(tmp_path / "source", family)
    round_trip(tmp_path / "source", tmp_path, max_shard_nbytes=SMALL_SHARD_NBYTES)


def test_tensors_in_an_order_of_somebody_else(tmp_path: Path) -> None:
    """Data that starts anywhere, tensors without data, metadata, and the experts' parts far apart
    in files of their own: what the header says is what comes back."""
    make_checkpoint(tmp_path / "made", dataclasses.replace(SMALL, layout="no-index"))
    tensors = read_tensors(tmp_path / "made")
    source = Path(shutil.copytree(tmp_path / "made", tmp_path / "source"))
    for path in source.glob("*.safetensors"):
        path.unlink()
    names = sorted(tensors, key=lambda name: name[::-1])
    for number in range(5):
        own = {name: tensors[name] for name in names[number::5]}
        own |= {f"empty.{number}": StoredTensor("F32", (0, 3), b"")}
        own = {f"odd.{number}": StoredTensor("U8", (3,), b"abc"), **own}
        write_tensors(source / f"{number}.safetensors", own)
    write_tensors(source / "none.safetensors", {})
    write_tensors(source / "x.safetensors", {"nothing": StoredTensor("BF16", (0,), b"")})
    round_trip(source, tmp_path)


def test_a_file_of_mtp_that_the_index_does_not_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_checkpoint(source, SMALL)
    write_tensors(source / "mtp.safetensors", {"mtp.norm.weight": StoredTensor("U8", (1,), b"x")})
    round_trip(source, tmp_path)


def test_what_a_conversion_leaves_out_does_not_come_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_checkpoint(source, SMALL)
    expected = every_file(source)
    (source / "pytorch_model.bin").write_bytes(b"123")
    (source / "stray.safetensors").write_bytes(b"123")
    convert(source, tmp_path / "converted")
    restore(tmp_path / "converted", tmp_path / "restored")
    assert every_file(tmp_path / "restored") == expected


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "OPEN_FILES", 2)
    assert reader.OPEN_FILES > 2
    make_checkpoint(tmp_path / "source", dataclasses.replace(SMALL, shards=12))
    round_trip(tmp_path / "source", tmp_path)


@pytest.mark.parametrize("bound", [0, 3000])
def test_edges_are_written_whenever_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    monkeypatch.setattr(filling, "MAX_EDGES_NBYTES", bound)
    make_checkpoint(tmp_path / "source", SMALL)
    round_trip(tmp_path / "source", tmp_path)


# --- what is not as it was ------------------------------------------------------------------------


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    return convert(source, tmp_path / "converted", max_shard_nbytes=SMALL_SHARD_NBYTES).out_dir


def forget(folder: Path, name: str) -> None:
    """Take a file out of the manifest, and away."""
    (folder / name).unlink()
    change_manifest(folder, lambda content: content["files"].pop(name))


def test_without_a_record(converted: Path, tmp_path: Path) -> None:
    (converted / SOURCE).unlink()
    with pytest.raises(VerifyError, match=rf"^{SOURCE}: is missing, the manifest lists it$"):
        restore(converted, tmp_path / "out")
    convert(tmp_path / "source", tmp_path / "other")
    forget(tmp_path / "other", SOURCE)
    with pytest.raises(
        CheckpointError, match=rf"other: lacks {SOURCE}, the record of its source; "
    ):
        restore(tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_of_another_source(converted: Path, tmp_path: Path) -> None:
    """Somebody has exchanged a byte, and made checksum and manifest fit."""
    record = converted / SOURCE
    data = record.read_bytes().replace(b'"format":"pt"', b'"format":"np"')
    assert data != record.read_bytes()
    record.write_bytes(data)
    with pytest.raises(VerifyError, match=rf"^{SOURCE}: has checksum"):
        restore(converted, tmp_path / "out")
    digest = xxhash.xxh3_128_hexdigest(data)
    change_manifest(converted, lambda content: content["files"][SOURCE].update(xxh3_128=digest))
    with pytest.raises(VerifyError, match=r"is not the checkpoint that was converted: .* differs"):
        restore(converted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_cut_short_or_too_long(converted: Path, tmp_path: Path) -> None:
    whole = (converted / SOURCE).read_bytes()
    for data, what in (
        (whole[:-1], "ends inside"),
        (whole[:100], "ends inside"),
        (b"", "ends inside"),
        (whole + b"x", "what the manifest lists has"),
    ):
        (converted / SOURCE).write_bytes(data)
        new = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        change_manifest(converted, lambda content, new=new: content["files"].update({SOURCE: new}))
        with pytest.raises(CheckpointError, match=rf"^{SOURCE}: .*{what}"):
            restore(converted, tmp_path / "out")


def test_a_record_that_is_too_large_is_not_read(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "MAX_NBYTES", 100)
    with pytest.raises(CheckpointError, match=rf"^{SOURCE}: has \d+ bytes, the limit is 100$"):
        restore(converted, tmp_path / "out")


def test_a_record_without_a_config(converted: Path, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        nbytes = content["source"]["files"].pop("config.json")["bytes"]
        data = (converted / SOURCE).read_bytes()[nbytes:]
        (converted / SOURCE).write_bytes(data)
        content["files"][SOURCE] = {
            "bytes": len(data),
            "xxh3_128": xxhash.xxh3_128_hexdigest(data),
        }

    change_manifest(converted, edit)
    message = rf"{SOURCE}: not a model folder: it has no config\.json$"
    with pytest.raises(CheckpointError, match=message):
        restore(converted, tmp_path / "out")


@pytest.mark.parametrize("nbytes", [None, "5", -1], ids=["missing", "text", "negative"])
def test_the_size_of_a_shard_must_be_known(converted: Path, tmp_path: Path, nbytes: object) -> None:
    def edit(content: dict[str, Any]) -> None:
        shard = min(content["source"]["shards"].values(), key=str)
        del shard["bytes"]
        if nbytes is not None:
            shard["bytes"] = nbytes

    change_manifest(converted, edit)
    with pytest.raises(VerifyError, match=rf"^{MANIFEST}: is malformed: .*bytes"):
        restore(converted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["copied", "recorded", "a shard"])
@pytest.mark.parametrize("name", ["../evil.md", "../converted/evil.md", "{}/evil.md"])
def test_no_name_in_a_manifest_leads_out(
    converted: Path, tmp_path: Path, place: str, name: str
) -> None:
    """Names of files become paths. Of what no engine reads, a file may differ or be missing."""
    (tmp_path / "evil.md").write_text("evil")
    (converted / "evil.md").write_text("evil")
    name = name.format(tmp_path)
    record = {"bytes": 4, "xxh3_128": xxhash.xxh3_128_hexdigest(b"evil")}

    def edit(content: dict[str, Any]) -> None:
        if place == "copied":
            content["files"][name] = record
        elif place == "recorded":
            content["source"]["files"][name] = {**record, "bytes": 0}
        else:
            content["source"]["shards"][name] = {"bytes": 4, "header": "00"}

    change_manifest(converted, edit)
    before = every_file(tmp_path)
    if place == "copied":
        restore(converted, tmp_path / "out")
        assert every_file(tmp_path / "out") == every_file(tmp_path / "source")
        shutil.rmtree(tmp_path / "out")
    else:
        with pytest.raises(CheckpointError, match=rf"^{MANIFEST}: '.*evil\.md' is no "):
            restore(converted, tmp_path / "out")
    assert every_file(tmp_path) == before


def test_damaged_data(converted: Path, tmp_path: Path) -> None:
    """No shard that damaged bytes have gone into gets its name."""
    name = sorted(path.name for path in converted.glob("*.safetensors"))[2]
    header = json.loads((converted / name).read_bytes()[8:].split(b"}}")[0] + b"}}")
    tensor = next(key for key in header if key.endswith("w13_weight"))
    flip_bit(converted / name, range_of(converted / name, tensor)[1] - 1)
    with pytest.raises(VerifyError, match=rf"^{name}: '{tensor}' has checksum"):
        restore(converted, tmp_path / "out", threads=1)
    assert not [path for path in (tmp_path / "out").glob("*") if path.suffix == ".json"]
    flip_bit(converted / name, range_of(converted / name, tensor)[1] - 1)
    restore(converted, tmp_path / "out")
    assert every_file(tmp_path / "out") == every_file(tmp_path / "source")


def test_a_file_that_a_person_has_changed(converted: Path, tmp_path: Path) -> None:
    edit_json(converted / "config.json", rope_scaling=None)
    with pytest.raises(VerifyError, match=r"^config\.json: "):
        restore(converted, tmp_path / "out")


def test_documentation_comes_as_it_is(source: Path, tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE"):
        (source / name).write_text("theirs")
    convert(source, tmp_path / "converted")
    (tmp_path / "converted" / "README.md").write_text("mine")
    (tmp_path / "converted" / "LICENSE").unlink()
    (tmp_path / "converted" / "NOTICE").write_text("new")
    report = restore(tmp_path / "converted", tmp_path / "out", verify=True)
    assert [line.split(":")[0] for line in report.warnings] == ["LICENSE", "NOTICE", "README.md"]
    found = every_file(tmp_path / "out")
    assert found.pop("README.md") == b"mine"
    expected = every_file(source)
    assert found == {n: data for n, data in expected.items() if n not in ("README.md", "LICENSE")}


def test_another_row_order(converted: Path, tmp_path: Path) -> None:
    change_manifest(converted, lambda content: content.update(row_order="xxh3_128:00"))
    with pytest.raises(FormatError, match=r"has the row order xxh3_128:00, this release .* knows"):
        restore(converted, tmp_path / "out")


def test_a_layout_that_loses_something_is_not_restored(converted: Path) -> None:
    work = prepare_restoration(converted)
    check_moves_cover(work.original, work.moves)
    for moves in (work.moves[1:-1], work.moves[:-1], (*work.moves, work.moves[-1])):
        with pytest.raises(VerifyError, match=r"the converted tensors hold its data up to byte"):
            check_moves_cover(work.original, moves)


def test_an_original_is_not_restored(source: Path, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="not a converted checkpoint, or unfinished"):
        restore(source, tmp_path / "out")


# --- the output folder ----------------------------------------------------------------------------


def test_a_finished_folder_is_left_alone(converted: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    restore(converted, tmp_path / "out")

    def states() -> dict[Path, tuple[int, ...]]:
        """Without the time of the last reading, of which restore does some."""
        stats = {path: path.stat() for path in (tmp_path / "out").rglob("*")}
        return {p: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats.items()}

    before = states()
    report = restore(converted, tmp_path / "out", verify=True, on_note=notes.append)
    assert (report.bytes_written, report.shards_kept) == (0, report.shards)
    assert notes == [f"already finished: {tmp_path / 'out'} is the original"]
    assert states() == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("file", ["config.json", "a header", "a shard cut short"])
def test_a_folder_of_somebody_is_left_alone(
    converted: Path, source: Path, file: str, overwrite: bool
) -> None:
    """The original itself, with one file edited."""
    shard = min(source.glob("*.safetensors"))
    if file == "config.json":
        edit_json(source / "config.json", rope_scaling=1)
    elif file == "a header":
        shard.write_bytes(shard.read_bytes().replace(b'"pt"', b'"np"', 1))
    else:
        os.truncate(shard, 3)
    before = every_file(source)
    with pytest.raises(OutputError, match="is not empty: it holds"):
        restore(converted, source, overwrite=overwrite)
    assert every_file(source) == before


def test_a_finished_conversion_is_left_alone(converted: Path, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "other")
    before = every_file(tmp_path / "other")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds a finished conversion"):
            restore(converted, tmp_path / "other", overwrite=overwrite)
    assert every_file(tmp_path / "other") == before
    with pytest.raises(OutputError, match=f"{converted}: is the source folder"):
        restore(converted, converted)
    with pytest.raises(OutputError, match="is inside the source folder"):
        restore(converted, converted / "out")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("renames", [0, 3, 14], ids=["no shard", "shards", "all but the index"])
def test_an_unfinished_conversion_is_left_alone(
    converted: Path, source: Path, tmp_path: Path, renames: int, overwrite: bool
) -> None:
    """Of whatever is converted."""
    out = tmp_path / "out"
    call = f"convert({str(source)!r}, {str(out)!r}, max_shard_nbytes={SMALL_SHARD_NBYTES})"
    kill_at_rename(call, renames)
    before = every_file(out)
    with pytest.raises(OutputError, match=r"holds an unfinished conversion( of .*)?, which fp4moe"):
        restore(converted, out, overwrite=overwrite)
    after = every_file(out)
    assert after.pop(JOURNAL_NAME).startswith(before.pop(JOURNAL_NAME))
    assert after == before
    report = convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert report.shards_kept == min(renames, report.shards)


def test_parts_that_are_put_beside_an_unfinished_original(
    converted: Path, source: Path, tmp_path: Path
) -> None:
    """Neither is what the other may delete."""
    killed(converted, out := tmp_path / "out", 1)
    convert_part(source, parts := tmp_path / "parts", Part(2, 2), max_shard_nbytes=500_000)
    shutil.copytree(parts, out, dirs_exist_ok=True, ignore=lambda *_: [JOURNAL_NAME])
    before = every_file(out).keys()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds an unfinished conversion of"):
            restore(converted, out, overwrite=overwrite)
        with pytest.raises(OutputError, match="holds an original that is not fully restored"):
            convert(source, out, overwrite=overwrite)
    assert every_file(out).keys() == before


def killed(converted: Path, out: Path, renames: int) -> None:
    """A run that dies at its rename of this number."""
    call = f"restore({str(converted)!r}, {str(out)!r}, threads=1)"
    kill_at_rename(call, renames)


@pytest.mark.parametrize("renames", [0, 1, 2, 4, 6, 8])
def test_a_killed_run_resumes(converted: Path, source: Path, tmp_path: Path, renames: int) -> None:
    """Three shards, then files; from the fourth rename on all shards are kept."""
    out = tmp_path / "out"
    killed(converted, out, renames)
    assert (out / JOURNAL_NAME).exists()
    notes: list[str] = []
    report = restore(converted, out, on_note=notes.append)
    assert report.shards_kept == min(renames, 3)
    assert every_file(out) == every_file(source)


def test_a_killed_run_of_another_checkpoint_is_not_built_on(
    converted: Path, source: Path, tmp_path: Path
) -> None:
    killed(converted, tmp_path / "out", 2)
    convert(source, tmp_path / "other", max_shard_nbytes=2 * SMALL_SHARD_NBYTES)
    with pytest.raises(OutputError, match="an original that is not fully restored, and this is an"):
        restore(tmp_path / "other", tmp_path / "out")
    report = restore(tmp_path / "other", tmp_path / "out", overwrite=True)
    assert report.shards_kept == 0
    assert every_file(tmp_path / "out") == every_file(source)


def test_overwrite_starts_afresh(converted: Path, source: Path, tmp_path: Path) -> None:
    killed(converted, tmp_path / "out", 2)
    assert restore(converted, tmp_path / "out", overwrite=True).shards_kept == 0
    assert every_file(tmp_path / "out") == every_file(source)


def test_a_file_that_a_person_has_put_into_an_unfinished_folder(
    converted: Path, tmp_path: Path
) -> None:
    killed(converted, tmp_path / "out", 8)
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(OutputError, match=r"'config\.json' is not the source's; put it right"):
        restore(converted, tmp_path / "out")


def test_a_result_that_does_not_verify_is_taken_back(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_beside = restoration._write_beside

    def damaging(work: Any, out_dir: Path) -> None:
        write_beside(work, out_dir)
        flip_bit(out_dir / work.shards[1].name)

    with monkeypatch.context() as patch:
        patch.setattr(restoration, "_write_beside", damaging)
        with pytest.raises(VerifyError, match="differs from"):
            restore(converted, tmp_path / "out", verify=True)
    assert not (tmp_path / "out" / INDEX).exists()
    assert restore(converted, tmp_path / "out", verify=True).shards_kept == 0
    verify(converted, tmp_path / "out")


def test_a_converted_shard_that_changes_meanwhile(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = TrtllmNvfp4.moves
    shard = sorted(converted.glob("*.safetensors"))[0]

    def touching(self: TrtllmNvfp4, layer: Any) -> Any:
        os.utime(shard)
        return undo(self, layer)

    monkeypatch.setattr(TrtllmNvfp4, "moves", touching)
    with pytest.raises(CheckpointError, match=rf"^{shard.name}: has changed while it was read$"):
        restore(converted, tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", SOURCE])
def test_a_file_that_changes_meanwhile(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def damaging(*args: Any, **options: Any) -> int:
        flip_bit(converted / name, 0)
        return read_back(*args, **options)

    monkeypatch.setattr(restoration, "read_back", damaging)
    with pytest.raises(CheckpointError, match=rf"^{name}: has changed while it was read$"):
        restore(converted, tmp_path / "out")


# --- the command ----------------------------------------------------------------------------------


def test_the_command(converted: Path, source: Path, tmp_path: Path) -> None:
    arguments = ["restore", str(converted), str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--verify", "--json", "--quiet"])
    assert (done.exit_code, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["layers"] == MANY_SHARDS.layers
    assert report["bytes_out"] == report["bytes_written"]
    assert report["verify_seconds"] > 0
    assert every_file(tmp_path / "out") == every_file(source)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "already finished" in done.stderr
    assert "kept" in done.stdout
    (converted / SOURCE).unlink()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert done.stderr == f"error: {SOURCE}: is missing, the manifest lists it\n"
