"""A commit of a model on the Hub is one source: streamed, in the cache, and in a copy of that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from support.folders import every_file, flip_bit, without_source
from support.hub import Hub, snapshot_without_links
from support.specs import SMALL_SHARD_NBYTES
from test_network import run_until
from typer.testing import CliRunner, Result

from fp4moe_convert import Part, convert, convert_part, open_store
from fp4moe_convert.cli.commands import app
from fp4moe_convert.format.files import JOURNAL_NAME

ID = "org/model"


def download(_: Hub) -> None:
    snapshot_download(ID)


def download_without_links(_: Hub) -> None:
    snapshot_without_links(ID)


def copy(_: Hub) -> None:
    """The cache, with new times of change."""
    cache = Path(constants.HF_HUB_CACHE)
    cache.rename(cache.with_name("before"))
    shutil.copytree(cache.with_name("before"), cache, symlinks=True, copy_function=shutil.copyfile)
    for path in cache.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    shutil.rmtree(cache.with_name("before"))


def prune(_: Hub) -> None:
    shutil.rmtree(constants.HF_HUB_CACHE)


MOVES = [download, copy, prune, download_without_links, copy, prune, download]
"""What can happen to a cache, one after the other."""


def job(out: Path) -> Result:
    size = str(SMALL_SHARD_NBYTES)
    return CliRunner().invoke(app, ["ci", ID, str(out), "--max-shard-size", size, "--quiet"])


def test_a_job_finds_it_done_wherever_it_lies(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(ID, source)
    assert job(tmp_path / "out").exit_code == 0
    done = every_file(tmp_path / "out")
    for move in MOVES:
        move(hub)
        result = job(tmp_path / "out")
        assert (result.exit_code, result.stderr) == (0, ""), move
        assert every_file(tmp_path / "out") == done


@pytest.mark.parametrize("streamed_first", [True, False])
def test_a_run_goes_on_wherever_it_lies(
    hub: Hub,
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    streamed_first: bool,
) -> None:
    hub.add(ID, source)
    out, parts = tmp_path / "out", [Part(1, 2), Part(2, 2)]
    notes: list[str] = []
    for part, streams in zip(parts, (streamed_first, not streamed_first), strict=True):
        download(hub)
        if streams:
            prune(hub)
        report = convert_part(
            ID, out, part, max_shard_nbytes=SMALL_SHARD_NBYTES, on_note=notes.append
        )
    assert report.whole is not None
    assert not [note for note in notes if "written again" in note]
    assert without_source(every_file(out)) == without_source(expected)


def test_what_has_been_fetched_of_a_shard_is_kept(
    hub: Hub, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, source)
    out, notes = tmp_path / "out", list[str]()
    for fraction in (0.4, 0.5, 0.6, 0.7):  # a run may end between two shards
        run_until(hub, out, fraction, SMALL_SHARD_NBYTES)
        if list(out.glob("*.partial")):
            break
    before = {path.name: path.stat().st_ino for path in out.glob("model-*")}
    assert any(name.endswith(".partial") for name in before)
    download(hub)
    convert(ID, out, max_shard_nbytes=SMALL_SHARD_NBYTES, on_note=notes.append)
    after = {path.name: path.stat().st_ino for path in out.glob("model-*")}
    assert {after[name.removesuffix(".partial")] for name in before} == set(before.values())
    assert not [note for note in notes if "written again" in note]
    assert without_source(every_file(out)) == without_source(expected)


# --- what is another source -----------------------------------------------------------------------


def grow(shard: Path) -> None:
    """A longer header, with its own spaces at its end."""
    content = shard.read_bytes()
    nbytes = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + nbytes] + b" " * 8
    shard.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + nbytes :])


def rename_in_header(shard: Path) -> None:
    """Another header of the same length."""
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"format":"pt"', b'"format":"tp"', 1))


@pytest.mark.parametrize("edit", [grow, rename_in_header, flip_bit])
def test_a_cached_file_that_has_been_edited_is_another(
    hub: Hub, source: Path, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    hub.add(ID, source)
    download(hub)
    store = open_store(ID)  # online, a file of another size would not be used at all
    assert store.local_path is not None
    shard = store.local_path / "model-00002-of-00003.safetensors"
    convert(store, tmp_path / "out")
    edit(shard)
    result = CliRunner().invoke(app, ["convert", str(store.local_path), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"in the source, {shard.name} " in result.stderr


def test_a_folder_that_is_no_snapshot_is_another(hub: Hub, source: Path, tmp_path: Path) -> None:
    """With the same names, sizes and headers."""
    hub.add(ID, source)
    run_until(hub, tmp_path / "out", 0.6, SMALL_SHARD_NBYTES)
    assert (tmp_path / "out" / JOURNAL_NAME).exists()
    notes: list[str] = []
    convert(source, tmp_path / "out", max_shard_nbytes=SMALL_SHARD_NBYTES, on_note=notes.append)
    assert any("has changed since" in note for note in notes)
    result = job(tmp_path / "out")
    assert result.exit_code == 1
    assert "has been written again since" in result.stderr
