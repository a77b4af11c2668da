"""A model folder as a store of files: what it lists, and what it opens. Links that lead out of it
are in test_checkpoint.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from support.faulty_disk import needs_root

from fp4moe_convert.errors import CheckpointError, MissingFileError
from fp4moe_convert.format.manifest import FileIdentity, Provenance, ShardIdentity
from fp4moe_convert.storage.local import LocalFolder
from fp4moe_convert.storage.reader import read_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in ("config.json", "b/z", "b/a", ".hidden", ".git/HEAD", "b/.cache/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_files_are_listed_in_order_with_those_in_sub_folders(folder: Path) -> None:
    """But for what tools keep beside a model."""
    listing = LocalFolder(folder).listing()
    assert listing.files == (".hidden", "b/a", "b/z", "config.json")
    assert not listing.left_out


def test_links_to_folders_are_left_out_and_said_to_be(folder: Path) -> None:
    (folder / "round").symlink_to(folder)
    (folder / "b" / "away").symlink_to("/usr")
    (folder / "link").symlink_to("b/a")
    (folder / "dangling").symlink_to("nowhere")
    listing = LocalFolder(folder).listing()
    assert listing.files == (".hidden", "b/a", "b/z", "config.json", "dangling", "link")
    assert listing.left_out == dict.fromkeys(["b/away", "round"], "is a link to a folder")


@pytest.mark.parametrize(
    ("name", "reason"), [("nothing", "does not exist"), ("config.json", "is not a folder")]
)
def test_what_is_no_folder_does_not_exist(folder: Path, name: str, reason: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"^{folder / name}: {reason}; expected a model folder"
    ):
        LocalFolder(folder / name).check_exists()


@pytest.mark.parametrize("name", ["b/a", "link"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_file_is_opened_under_the_name_it_is_listed_by(
    folder: Path, name: str, direct: bool
) -> None:
    (folder / "link").symlink_to("b/a")
    reader = LocalFolder(folder).open(name, direct=direct)
    assert (reader.name, reader.nbytes) == (name, 3)
    assert reader.identity == FileIdentity.of((folder / "b/a").stat())
    assert read_all(reader, 3) == b"b/a"
    with pytest.raises(CheckpointError, match=f"^{name}: has 3 bytes, the limit is 2$"):
        read_all(reader, 2)


def not_to_be_opened(*_: object) -> int:
    pytest.fail("a device was opened")


def test_a_link_to_a_device_is_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening one may do something to it."""
    (folder / "tape").symlink_to("/dev/null")
    monkeypatch.setattr(os, "open", not_to_be_opened)
    with pytest.raises(CheckpointError, match=r"^tape: is not a regular file$"):
        LocalFolder(folder).open("tape")


@needs_root
def test_a_device_in_the_folder_is_not_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mknod(folder / "tape", 0o020666, os.makedev(1, 3))
    monkeypatch.setattr(os, "open", not_to_be_opened)
    with pytest.raises(CheckpointError, match=r"^tape: is not a regular file$"):
        LocalFolder(folder).open("tape")


@pytest.mark.parametrize("name", ["nothing", "b/nothing", "nul\0", "long" * 100, "dangling"])
def test_a_file_that_is_not_there_is_told_from_others(folder: Path, name: str) -> None:
    """A caller may have words of its own for that. No file can have some names."""
    (folder / "dangling").symlink_to("nowhere")
    with pytest.raises(MissingFileError, match=r"No such file or directory$"):
        LocalFolder(folder).open(name)


def test_a_folder_may_be_reached_by_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    store = LocalFolder(tmp_path / "link")
    assert store.location == str(tmp_path / "link")
    assert store.local_path == tmp_path / "link"
    assert read_all(store.open("b/a"), 3) == b"b/a"
    assert store.provenance() == Provenance(str(folder))


def test_a_snapshot_of_the_hub_says_which_it_is(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--nvidia--DeepSeek--V3" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    known = LocalFolder(snapshot).provenance()
    assert known == Provenance(str(snapshot), "nvidia/DeepSeek/V3", "0123abcd")
    assert known.address == str(snapshot)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (FileIdentity(5, modified_ns=7), '{"bytes": 5, "header": "ab", "modified_ns": 7}'),
        (FileIdentity(5, etag="e"), '{"bytes": 5, "header": "ab", "etag": "e"}'),
        (FileIdentity(5), '{"bytes": 5, "header": "ab"}'),
    ],
)
def test_an_identity_in_a_manifest(file: FileIdentity, expected: str) -> None:
    identity = ShardIdentity.of(file, "ab")
    assert json.dumps(msgspec.to_builtins(identity)) == expected
    assert msgspec.convert(json.loads(expected), ShardIdentity) == identity
    assert identity.file == file
