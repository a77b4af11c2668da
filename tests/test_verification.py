"""A converted folder that was changed afterwards: what is found, and what it is called."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.folders import MANIFEST, change_manifest, flip_bit
from support.make_checkpoint import Spec, make_checkpoint
from support.tensors import read_header as raw_header

from fp4moe_convert import VerifyError, convert, verify
from fp4moe_convert.storage import header as storage_header
from fp4moe_convert.storage.header import Header
from fp4moe_convert.storage.local import LocalReader


def read_header(path: Path) -> Header:
    return storage_header.read_header(LocalReader(path))


SPEC = Spec(
    layers=1, experts=2, hidden=128, intermediate=80, dense_layers=0, vocab_size=16, shards=2
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, converted), for reading only."""
    folder = tmp_path_factory.mktemp("pair")
    make_checkpoint(folder / "source", SPEC)
    convert(folder / "source", folder / "out", max_shard_nbytes=200_000)
    return folder / "source", folder / "out"


@pytest.fixture
def source(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "source"))


@pytest.fixture
def out(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "out"))


def test_an_untouched_folder_verifies(source: Path, out: Path) -> None:
    alone, compared = verify(out), verify(out, source)
    assert (
        alone.tensors
        == compared.tensors
        == sum(len(read_header(path).tensors) for path in out.glob("*.safetensors"))
    )
    assert alone.nbytes + (out / MANIFEST).stat().st_size == sum(
        path.stat().st_size for path in out.iterdir()
    )
    assert (alone.source, compared.source) == (None, str(source))


def name_at(path: Path, position: int) -> str | None:
    """The tensor that a byte of a shard belongs to; None for the header or another file."""
    if path.suffix != ".safetensors":
        return None
    header = read_header(path)
    for tensor in header.tensors:
        if header.nbytes + tensor.start <= position < header.nbytes + tensor.stop:
            return tensor.name
    return None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found_and_named(
    pair: tuple[Path, Path], tmp_path: Path, data: st.DataObject
) -> None:
    out = tmp_path / "flipped"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(pair[1], out)
    path = data.draw(st.sampled_from(sorted(out.iterdir())))
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    tensor = name_at(path, position)
    flip_bit(path, position, data.draw(st.integers(0, 7)))
    with pytest.raises(VerifyError) as caught:
        verify(out)
    assert str(caught.value).startswith(path.name)
    assert tensor is None or repr(tensor) in str(caught.value)


def test_missing_extra_and_truncated_files(out: Path) -> None:
    for name in ("extra", "README.safetensors"):
        (out / name).touch()
        with pytest.raises(VerifyError, match=rf"^{name}: is not in the manifest$"):
            verify(out)
        (out / name).unlink()
    (out / "tokenizer.json").rename(out.parent / "tokenizer.json")
    with pytest.raises(VerifyError, match=r"^tokenizer.json: is missing"):
        verify(out)
    (out.parent / "tokenizer.json").rename(out / "tokenizer.json")
    shard = sorted(out.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(VerifyError, match=rf"^{shard.name}: has \d+ bytes, expected \d+$"):
        verify(out)


def test_a_folder_without_a_manifest(source: Path, out: Path) -> None:
    with pytest.raises(
        VerifyError, match=r"source: not a converted checkpoint, or .* no fp4moe_manifest\.json"
    ):
        verify(source)
    (out / MANIFEST).write_text("[]")
    with pytest.raises(VerifyError, match=r"fp4moe_manifest\.json: not a JSON object"):
        verify(out)


def rewrite_manifest(out: Path, shard: Path, tensor: str) -> None:
    """Make the manifest vouch for the tensor as it now is."""
    header = read_header(shard)
    info = next(info for info in header.tensors if info.name == tensor)
    data = shard.read_bytes()[header.nbytes + info.start : header.nbytes + info.stop]

    def vouch(content: dict[str, Any]) -> None:
        content["shards"][shard.name]["tensors"][tensor] = xxhash.xxh3_128_hexdigest(data)

    change_manifest(out, vouch)


LEAVES = ["weight", "weight_scale", "weight_scale_2", "input_scale"]


@pytest.mark.parametrize(
    "suffix", [*(f".{w}_{leaf}" for w in ("w13", "w2") for leaf in LEAVES), "embed_tokens.weight"]
)
def test_the_source_convicts_a_folder_whose_manifest_lies(
    source: Path, out: Path, suffix: str
) -> None:
    shard, tensor = next(
        (path, info)
        for path in sorted(out.glob("*.safetensors"))
        for info in read_header(path).tensors
        if info.name.endswith(suffix)
    )
    flip_bit(shard, read_header(shard).nbytes + tensor.start)
    rewrite_manifest(out, shard, tensor.name)
    verify(out)
    with pytest.raises(VerifyError, match=rf"^{shard.name}: '{tensor.name}' differs from '.*' in"):
        verify(out, source)


def last_tensor(entries: dict[str, Any]) -> str:
    """The one whose data ends a shard."""
    tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    return max(tensors, key=lambda name: tensors[name]["data_offsets"][1])


def rename_one(entries: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    last = last_tensor(entries)
    return {f"{n}.renamed" if n == last else n: entry for n, entry in entries.items()}, data


def add_one(entries: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    place = [len(data), len(data) + 4]
    added = {"added": {"dtype": "U8", "shape": [4], "data_offsets": place}}
    return entries | added, data + b"more"


def drop_one(entries: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    last = last_tensor(entries)
    start, _ = entries[last]["data_offsets"]
    return {name: entry for name, entry in entries.items() if name != last}, data[:start]


def halve_one(entries: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    last = last_tensor(entries)
    start, stop = entries[last]["data_offsets"]
    shape = [entries[last]["shape"][0] // 2, *entries[last]["shape"][1:]]
    halved = {"shape": shape, "data_offsets": [start, (start + stop) // 2]}
    return entries | {last: entries[last] | halved}, data[: (start + stop) // 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_one, r"'.*\.renamed' is not what the source is converted to"),
        (add_one, "'added' is not what the source is converted to"),
        (halve_one, "'.*' is not what the source is converted to"),
        (drop_one, "'.*' is in no shard, the source has it"),
    ],
)
def test_the_source_convicts_a_shard_of_other_tensors(
    source: Path,
    out: Path,
    change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]],
    message: str,
) -> None:
    """Shard and manifest are made anew, and fit each other."""
    shard = sorted(out.glob("*.safetensors"))[-1]
    entries, start = raw_header(shard)
    entries, data = change(entries, shard.read_bytes()[start:])
    text = json.dumps(entries).encode()
    header = len(text).to_bytes(8, "little") + text
    shard.write_bytes(header + data)

    def vouch(content: dict[str, Any]) -> None:
        content["shards"][shard.name] = {
            "bytes": len(header) + len(data),
            "header": xxhash.xxh3_128_hexdigest(header),
            "tensors": {
                name: xxhash.xxh3_128_hexdigest(data[slice(*entry["data_offsets"])])
                for name, entry in entries.items()
                if name != "__metadata__"
            },
        }

    change_manifest(out, vouch)
    verify(out)
    with pytest.raises(VerifyError, match=message):
        verify(out, source)


@pytest.mark.parametrize("lie", ["renamed", "added", "missing"])
def test_a_manifest_that_lists_other_tensors_than_the_shard_has(out: Path, lie: str) -> None:
    """Of a tensor that no manifest lists nobody would read a byte."""
    shard = sorted(out.glob("*.safetensors"))[0]

    def change(content: dict[str, Any]) -> None:
        tensors = content["shards"][shard.name]["tensors"]
        name = min(tensors)
        if lie != "missing":
            tensors[f"{name}.{lie}"] = tensors[name]
        if lie != "added":
            del tensors[name]

    change_manifest(out, change)
    message = f"^{shard.name}: holds other tensors than the manifest lists$"
    with pytest.raises(VerifyError, match=message):
        verify(out)


Seen = dict[str, tuple[str, list[int]]]
"""Dtype and shape by name."""


@pytest.fixture
def library_sees(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Seen], object]], None]:
    """Let the safetensors library see something else in every file than is in it."""

    def install(change: Callable[[Seen], object]) -> None:
        open_file = safetensors.safe_open

        @contextmanager
        def changed(path: Path, framework: str) -> Iterator[Any]:
            with open_file(path, framework) as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                seen = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
            change(seen)
            views = {
                name: SimpleNamespace(get_dtype=lambda d=dtype: d, get_shape=lambda s=shape: s)
                for name, (dtype, shape) in seen.items()
            }
            yield SimpleNamespace(keys=views.keys, get_slice=views.__getitem__)

        monkeypatch.setattr(safetensors, "safe_open", changed)

    return install


def with_another_dtype(seen: Seen) -> None:
    name = min(seen)
    seen[name] = ("I8", seen[name][1])


def with_another_shape(seen: Seen) -> None:
    name = min(seen)
    seen[name] = (seen[name][0], [1, *seen[name][1]])


def with_one_more(seen: Seen) -> None:
    seen["more"] = ("U8", [0])


def with_one_less(seen: Seen) -> None:
    del seen[min(seen)]


@pytest.mark.parametrize(
    "change", [with_another_dtype, with_another_shape, with_one_more, with_one_less]
)
def test_a_shard_in_which_the_library_sees_something_else(
    source: Path,
    out: Path,
    library_sees: Callable[[Callable[[Seen], object]], None],
    change: Callable[[Seen], None],
) -> None:
    """Engines read with it, so what it sees counts as well."""
    library_sees(lambda _: None)
    verify(out, source)
    library_sees(change)
    shard = sorted(out.glob("*.safetensors"))[0]
    message = f"^{shard.name}: the safetensors library sees other tensors in it$"
    for against in (None, source):
        with pytest.raises(VerifyError, match=message):
            verify(out, against)


@pytest.mark.parametrize(
    "error", [safetensors.SafetensorError("header too odd"), OSError(5, "Input/output error")]
)
def test_a_shard_that_the_library_refuses(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Also where a run decides which finished shards it keeps."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    reason = re.escape(f"the safetensors library refuses it: {error}")
    with pytest.raises(VerifyError, match=f"^{shards[0]}: {reason}$"):
        verify(out)
    notes: list[str] = []
    with pytest.raises(VerifyError, match=reason):
        convert(source, out, max_shard_nbytes=200_000, verify=True, on_note=notes.append)
    assert len(notes) == len(shards)
    assert all(re.fullmatch(rf".*: written again: it is damaged \(.*{reason}\)", n) for n in notes)


def test_padding_that_is_not_zero(source: Path, out: Path) -> None:
    """I = 80 is padded to 128: the last rows of w13 hold nothing."""
    shard, tensor = next(
        (path, info)
        for path in sorted(out.glob("*.safetensors"))
        for info in read_header(path).tensors
        if info.name.endswith(".w13_weight")
    )
    last = read_header(shard).nbytes + tensor.stop - 1
    assert shard.read_bytes()[last] == 0
    flip_bit(shard, last)
    rewrite_manifest(out, shard, tensor.name)
    with pytest.raises(VerifyError, match="is padded with something but zeros"):
        verify(out, source)


def test_a_source_that_is_another_checkpoint(out: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "other", Spec(**{**_fields(SPEC), "vocab_size": 32}))
    with pytest.raises(VerifyError, match="is not the checkpoint that was converted"):
        verify(out, tmp_path / "other")
    with pytest.raises(VerifyError, match="is not the checkpoint that was converted"):
        verify(out, out)


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("tokenizer.json", "tokenizer.json differs"),
        ("config.json", "config.json differs"),
        ("new.txt", "new.txt is new"),
        ("generation_config.json", "generation_config.json is missing"),
    ],
)
def test_a_source_whose_other_files_have_changed(
    source: Path, out: Path, name: str, difference: str
) -> None:
    if difference.endswith("missing"):
        (source / name).unlink()
    else:
        with (source / name).open("a") as file:
            file.write(" ")
    with pytest.raises(VerifyError, match=f"is not the checkpoint that was .*: {difference} "):
        verify(out, source)


def test_a_copy_of_the_source_will_do(source: Path, out: Path) -> None:
    for path in source.iterdir():
        os.utime(path, (0, 0))
    verify(out, source)


def test_another_revision_of_the_source(source: Path, tmp_path: Path) -> None:
    """Known by its name alone."""
    snapshots = tmp_path / "models--nvidia--Tiny" / "snapshots"
    first = Path(shutil.copytree(source, snapshots / "aaaa"))
    second = Path(shutil.copytree(source, snapshots / "bbbb"))
    convert(first, tmp_path / "converted")
    with pytest.raises(VerifyError, match="was converted: revision bbbb is not aaaa "):
        verify(tmp_path / "converted", second)
    verify(tmp_path / "converted", source)


def test_the_text_of_the_manifest_counts_too(source: Path, tmp_path: Path) -> None:
    """A flipped bit can leave what JSON says as it is: "\\u00e9" is "\\u00E9"."""
    out = tmp_path / "converted"
    convert(source.rename(tmp_path / "modèle"), out)
    text = (out / MANIFEST).read_bytes()
    position = text.index(rb"\u00e8") + 4
    flip_bit(out / MANIFEST, position, 5)
    assert json.loads((out / MANIFEST).read_bytes()) == json.loads(text)
    with pytest.raises(VerifyError, match=r"^fp4moe_manifest\.json: has been changed"):
        verify(out)


FOR_PEOPLE = [
    "README.md",
    "readme",
    "LICENSE",
    "LICENSE-MODEL.txt",
    "licence.md",
    "NOTICE",
    "figures/speed.PNG",
    "paper.pdf",
    ".gitattributes",
]


@pytest.mark.parametrize("name", FOR_PEOPLE)
def test_what_no_engine_reads_may_change(source: Path, tmp_path: Path, name: str) -> None:
    """A model card is written after the conversion, and the Hub adds .gitattributes. Both may come
    with the source as well. They are mentioned, whatever has happened to them."""
    added, copied = tmp_path / "added", tmp_path / "copied"
    convert(source, added)
    before = verify(added)
    assert before.documentation == []
    (added / name).parent.mkdir(exist_ok=True)
    (added / name).write_text("mine")
    after = verify(added, source)
    assert after.documentation == [f"{name}: is not in the manifest"]
    assert (after.files, after.nbytes) == (before.files, before.nbytes)

    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("theirs")
    convert(source, copied, verify=True)
    assert verify(copied, source).documentation == []
    (copied / name).write_text("mine")
    assert verify(copied, source).documentation == [f"{name}: has 4 bytes, expected 6"]
    (copied / name).unlink()
    (copied / name).symlink_to(tmp_path / "nowhere")
    assert verify(copied, source).documentation == [f"{name}: No such file or directory"]
    (copied / name).unlink()
    assert verify(copied, source).documentation == [f"{name}: is missing, the manifest lists it"]
    assert verify(copied, source).files == verify(added).files


def test_the_documentation_of_a_source_may_change(source: Path, out: Path) -> None:
    (source / "README.md").write_text("new")
    verify(out, source)


@pytest.mark.parametrize(
    "name",
    [
        "README.py",
        "LICENSE.json",
        "md",
        "tokens.txt",
        "chat_template.jinja",
        "merges.txt",
        "README.md.bin",
        "README.md/config.json",
        "unknown",
    ],
)
def test_what_an_engine_may_read_must_not_change(source: Path, tmp_path: Path, name: str) -> None:
    added, copied = tmp_path / "added", tmp_path / "copied"
    convert(source, added)
    (added / name).parent.mkdir(exist_ok=True)
    (added / name).write_text("mine")
    with pytest.raises(VerifyError, match=rf"^{re.escape(name)}: is not in the manifest$"):
        verify(added)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("theirs")
    convert(source, copied, verify=True)
    (copied / name).write_text("mine")
    with pytest.raises(VerifyError, match=rf"^{re.escape(name)}: has 4 bytes, expected 6$"):
        verify(copied)


def test_links_to_folders_are_extra(out: Path, tmp_path: Path) -> None:
    (out / "more").symlink_to(tmp_path)
    with pytest.raises(VerifyError, match=r"^more: is not in the manifest$"):
        verify(out)


def test_a_source_whose_bytes_have_changed(source: Path, out: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[0]
    flip_bit(shard)
    with pytest.raises(VerifyError, match=rf"differs from '.*' in {shard.name}"):
        verify(out, source)


def _fields(spec: Spec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in spec.__slots__}
