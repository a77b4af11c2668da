"""Readers fed with anything raise a `ConvertError` or nothing, within bounds of time and memory.

The harness and the valid inputs are those of ``support/fuzz.py``, which looks much longer and is
guided by coverage; what it kept lies in ``data/fuzz`` and is replayed here.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from support import fuzz
from support.strategies import json_values
from typer.testing import CliRunner

from fp4moe_convert import preview
from fp4moe_convert.cli.commands import app
from fp4moe_convert.errors import CheckpointError, FormatError, HeaderError, VerifyError
from fp4moe_convert.execution.surroundings import read_manifest
from fp4moe_convert.format.untrusted import MAX_DEPTH, MAX_DIGITS, MAX_VALUES, decode
from fp4moe_convert.inspection import inspect
from fp4moe_convert.source import checkpoint
from fp4moe_convert.source.checkpoint import MAX_CONFIG_NBYTES, MAX_INDEX_NBYTES, Checkpoint
from fp4moe_convert.storage.header import MAX_DIMENSIONS, MAX_NAME_LENGTH, parse_header, read_header
from fp4moe_convert.storage.local import LocalFolder, LocalReader

SHARD = fuzz.SHARDS[0]
MAX_DATA_NBYTES = 1 << 20


def open_checkpoint(folder: Path) -> Checkpoint:
    return checkpoint.open_checkpoint(LocalFolder(folder))


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Check]:
    """What the fuzzer does with an input, by target."""
    return {
        target: fuzz.make_check(target, tmp_path_factory.mktemp(target)) for target in fuzz.TARGETS
    }


def write_folder(root: Path, parts: tuple[bytes, ...]) -> Path:
    fuzz.Folder(root, parts)
    return root


# --- what the fuzzer starts from, and what it kept ------------------------------------------------


def test_the_fuzzer_starts_from_folders_that_are_valid(tmp_path: Path) -> None:
    for name in ("config", "hf"):
        (tmp_path / name).mkdir()
        folder = write_folder(tmp_path / name, fuzz.source_folder(name))
        assert preview(folder).work.plan.tensors_in == 27
        assert inspect(folder).state == "source"
    (tmp_path / "converted").mkdir()
    folder = write_folder(tmp_path / "converted", fuzz.converted_folder())
    assert inspect(folder).state == "converted"
    assert list(read_manifest(folder).shards) == list(fuzz.SHARDS)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_replay(checks: dict[str, fuzz.Check], target: str) -> None:
    inputs = dict(fuzz.corpus(target))
    assert len(inputs) > 5
    for content in inputs.values():
        checks[target](content)


def test_the_corpus_is_small() -> None:
    files = [path for path in fuzz.SEEDS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_almost_valid_input(checks: dict[str, fuzz.Check], target: str) -> None:
    """A few values, keys or branches of a valid input are changed."""
    seeds = fuzz.seeds(target)

    @settings(max_examples=100)
    @given(st.sampled_from(seeds), st.integers(0, 2**64))
    def check(seed: bytes, number: int) -> None:
        random_ = random.Random(number)
        parts = seed.split(b"\0")
        part = random_.choice([i for i, content in enumerate(parts) if content])
        parts[part] = fuzz.dump(fuzz.mutate_value(json.loads(parts[part]), random_))
        checks[target](b"\0".join(parts))

    check()


@settings(max_examples=200)
@given(st.sampled_from(fuzz.seeds("header")), st.integers(0, 2**64))
def test_what_we_accept_the_safetensors_library_accepts(seed: bytes, number: int) -> None:
    text = fuzz.dump(fuzz.mutate_value(json.loads(seed), random.Random(number)))
    raw = len(text).to_bytes(8, "little") + text
    nbytes = fuzz.described_nbytes(text)
    # Python takes NaN and Infinity for JSON; in a header they can only stand where nobody looks.
    if nbytes > MAX_DATA_NBYTES or b"NaN" in text or b"Infinity" in text:
        return
    try:
        header = parse_header(raw, len(raw) + nbytes, "x.safetensors")
    except HeaderError:
        return
    found = {name: info["shape"] for name, info in deserialize(raw + bytes(nbytes))}
    assert found == {tensor.name: list(tensor.shape) for tensor in header.tensors}


anything = st.binary(max_size=60) | json_values.map(fuzz.dump)


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_arbitrary_input(checks: dict[str, fuzz.Check], target: str) -> None:
    @settings(max_examples=50)
    @given(st.lists(anything, min_size=1, max_size=len(fuzz.PARTS)))
    def check(parts: list[bytes]) -> None:
        checks[target](b"\0".join(parts))

    check()


brackets = st.recursive(
    st.sampled_from(["0", '""', '"["', '"]}"', '"\\"["', '"\\\\"', '"\\\\\\"{"']),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda values: f"[{','.join(values)}]")
        | inner.map(lambda value: f'{{"}}[":{value}}}')
    ),
    max_leaves=8,
)


@given(brackets, st.integers(0, MAX_DEPTH))
def test_depth_is_counted_right(text: str, wrapped: int) -> None:
    """Whatever the strings hold."""

    def depth(value: Any) -> int:
        if not isinstance(value, (dict, list)):
            return 0
        return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)

    content = json.loads(text)
    for inner in (wrapped, MAX_DEPTH - depth(content)):
        nested = f"{'[' * inner}{text}{']' * inner}".encode()
        if inner + depth(content) <= MAX_DEPTH:
            assert decode(nested, object) == json.loads(nested)
        else:
            with pytest.raises(ValueError, match=r"^it nests deeper than 64 levels$"):
                decode(nested, object)
    inner = MAX_DEPTH - depth(content) + 1
    with pytest.raises(ValueError, match=r"^it nests deeper than 64 levels$"):
        decode(f"{'[' * inner}{text}{']' * inner}".encode(), object)


# --- bounds, one by one ---------------------------------------------------------------------------

JSON_BOUNDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "depth": (
        lambda: b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        "it nests deeper than 64 levels",
    ),
    "depth without an end": (lambda: b'{"a":' * 100_000, "it nests deeper than 64 levels"),
    "digits": (
        lambda: b'{"a":1' + b"0" * MAX_DIGITS + b"}",
        "a number has more than 1,000 digits",
    ),
    "values": (
        lambda: b'{"a":[' + b"0," * MAX_VALUES + b"0]}",
        "it has more than 3,000,000 keys and values",
    ),
}


@pytest.mark.parametrize("name", [fuzz.CONFIG, fuzz.HF_QUANT_CONFIG, fuzz.INDEX])
@pytest.mark.parametrize("bound", JSON_BOUNDS)
def test_json_beyond_a_bound(tmp_path: Path, name: str, bound: str) -> None:
    make, rule = JSON_BOUNDS[bound]
    folder = write_folder(tmp_path, fuzz.source_folder())
    (folder / name).write_bytes(make())
    with pytest.raises(CheckpointError, match=rf"^{name}: not JSON: {rule}$"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("bound", "rule"),
    [
        ("depth", "'a' has no valid dtype, shape and data_offsets"),
        ("depth without an end", "header is not JSON: .*"),
        ("digits", "'a' has no valid dtype, shape and data_offsets"),
        ("values", "header is not JSON: it has more than 3,000,000 keys and values"),
    ],
)
def test_header_beyond_a_bound(tmp_path: Path, bound: str, rule: str) -> None:
    folder = write_folder(tmp_path, fuzz.source_folder())
    content = JSON_BOUNDS[bound][0]()
    (folder / SHARD).write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(HeaderError, match=rf"^{SHARD}: {rule}$"):
        open_checkpoint(folder)


def test_manifest_beyond_a_bound(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, fuzz.converted_folder())
    (folder / fuzz.MANIFEST).write_bytes(JSON_BOUNDS["depth"][0]())
    with pytest.raises(VerifyError, match=r"^fp4moe_manifest\.json: not JSON: it nests deeper"):
        read_manifest(folder)


@pytest.mark.parametrize("name", [fuzz.CONFIG, fuzz.HF_QUANT_CONFIG, fuzz.INDEX])
def test_json_file_that_is_too_large(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, fuzz.source_folder())
    (folder / name).touch()
    limit = MAX_INDEX_NBYTES if name == fuzz.INDEX else MAX_CONFIG_NBYTES
    os.truncate(folder / name, limit + 1)
    with pytest.raises(
        CheckpointError, match=rf"^{name}: has {limit + 1} bytes, the limit is {limit}$"
    ):
        open_checkpoint(folder)


def test_too_many_dimensions(tmp_path: Path) -> None:
    for count in (MAX_DIMENSIONS, MAX_DIMENSIONS + 1):
        header = fuzz.header_of({"a": ("U8", [1] * count, 1)})
        path = tmp_path / SHARD
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
        if count == MAX_DIMENSIONS:
            assert read_header(LocalReader(path)).tensors[0].shape == (1,) * count
        else:
            with pytest.raises(HeaderError, match=r"'a' has 65 dimensions, the limit is 64$"):
                read_header(LocalReader(path))


def test_name_that_is_too_long(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, fuzz.source_folder())
    name = "n" * (MAX_NAME_LENGTH + 1)
    message = f"a tensor's name has {MAX_NAME_LENGTH + 1} characters, the limit is 4096"
    (folder / fuzz.INDEX).write_bytes(fuzz.dump({"weight_map": {name: SHARD}}))
    with pytest.raises(CheckpointError, match=f"^{fuzz.INDEX}: {message}$"):
        open_checkpoint(folder)
    header = fuzz.header_of({name: ("U8", [1], 1)})
    (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(HeaderError, match=f"^{SHARD}: {message}$"):
        read_header(LocalReader(folder / SHARD))


@pytest.mark.parametrize(
    ("constant", "limit", "message"),
    [
        ("MAX_TENSORS", 26, "the shards have 27 tensors, the limit is 26"),
        ("MAX_HEADERS_NBYTES", 2000, r"the shards have \d+ bytes of headers, the limit is 2000"),
        ("MAX_CHECKPOINT_NBYTES", 9000, r"the shards have \d+ bytes, the limit is 9000"),
    ],
)
def test_all_shards_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, limit: int, message: str
) -> None:
    folder = write_folder(tmp_path, fuzz.source_folder())
    (folder / fuzz.INDEX).unlink()
    open_checkpoint(folder)
    monkeypatch.setattr(checkpoint, constant, limit)
    with pytest.raises(CheckpointError, match=rf"^{fuzz.SHARDS[1]}: with it, {message}$"):
        open_checkpoint(folder)


def entries(count: int, name_nbytes: int) -> Iterator[bytes]:
    """A header of empty tensors."""
    yield b"{"
    for i in range(count):
        comma = b"," if i else b""
        yield comma + b'"%0*d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % (name_nbytes, i)
    yield b"}"


def repeated(start: bytes, piece: bytes, nbytes: int, stop: bytes = b"") -> Iterator[bytes]:
    """About ``nbytes`` of ``piece``, between ``start`` and ``stop``."""
    yield start
    thousand = piece * 1000
    yield from repeat(thousand, nbytes // len(thousand))
    yield stop


# What costs a parser most; 99,999,000 bytes and a few more are just below the limit. In pieces: the
# tests that measure memory start processes, and what this one had at its peak counts as theirs.
HOSTILE: dict[str, tuple[Callable[[], Iterator[bytes]], str]] = {
    "a million empty tensors": (lambda: entries(1_000_000, 7), "more than 3,000,000 keys and val"),
    "as many tensors as there may be": (lambda: entries(270_000, 300), "270000 tensors"),
    "empty lists": (
        lambda: repeated(b"[", b"[],", 99_999_000, b"[]]"),
        "more than 3,000,000 keys and values",
    ),
    "nested": (
        lambda: chain(repeated(b"", b"[", 3_000_000), repeated(b"", b"]", 3_000_000)),
        "header is not a JSON object",
    ),
    "closed, never opened": (
        lambda: repeated(b"[", b"]", 99_999_000),
        "header is not a JSON object",
    ),
    "brackets in strings": (
        lambda: repeated(b'{"', b'"]', 99_999_000),
        "header is not JSON: ",
    ),
    "digits": (lambda: repeated(b"", b"1", 99_999_000), "header is not a JSON object"),
    "a name of 100 MB, a character of it four bytes wide": (
        lambda: repeated(b'{"\xf0\x9f\x98\x80', b"x", 99_999_000, b'":0}'),
        "a tensor's name has 99999001 characters, the limit is 4096",
    ),
}

READ_A_HEADER = """
import sys, time
from pathlib import Path
from fp4moe_convert.errors import HeaderError
from fp4moe_convert.storage.header import read_header
from fp4moe_convert.storage.local import LocalReader
started = time.perf_counter()
try:
    print(len(read_header(LocalReader(Path(sys.argv[1]))).tensors), "tensors")
except HeaderError as error:
    print(str(error)[-200:])
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0], time.perf_counter() - started)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its peak of memory")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_header_takes_less_than_1_gib(tmp_path: Path, kind: str) -> None:
    make, outcome = HOSTILE[kind]
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(bytes(8))
        file.writelines(make())
        nbytes = file.tell() - 8
        file.seek(0)
        file.write(nbytes.to_bytes(8, "little"))
    done = subprocess.run(
        [sys.executable, "-c", READ_A_HEADER, path],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    path.unlink()
    said, numbers = done.stdout.splitlines()
    peak_kib, seconds = map(float, numbers.split())
    assert outcome in said
    assert peak_kib < 2**20
    assert seconds < 60


# --- what fuzzing and reading for it have found ---------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"source": {"path": "x"}},
        {"source": {"path": "x", "shards": {"x": 1}, "files": {}}},
        {"source": {"path": "x", "shards": {}, "files": {"x": []}}},
        {"shards": []},
        {"shards": {"x": {}}},
        {"shards": {"x": {"bytes": 1, "header": "", "tensors": {"a": 1}}}},
        {"files": {"x": None}},
        {"files": {"x": {"bytes": "1", "xxh3_128": ""}}},
        {"versions": None},
    ],
    ids=repr,
)
def test_manifest_with_a_checksum_but_not_of_its_form(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    parts = dict(zip(fuzz.PARTS, fuzz.converted_folder(), strict=True))
    parts[fuzz.MANIFEST] = fuzz.dump({**json.loads(parts[fuzz.MANIFEST]), **change})
    folder = write_folder(tmp_path, tuple(parts.values()))
    with pytest.raises(VerifyError, match=r"^fp4moe_manifest\.json: is malformed: .* - at `\$\."):
        read_manifest(folder)


@pytest.mark.parametrize("size", ["16", None, 0, -1, True, 1.5, []], ids=repr)
def test_converted_layer_whose_size_is_none(tmp_path: Path, size: object) -> None:
    parts = dict(zip(fuzz.PARTS, fuzz.converted_folder(), strict=True))
    config = json.loads(parts[fuzz.CONFIG])
    config["quantization_config"]["layers"]["layers.0.mlp.experts"]["intermediate"] = size
    parts[fuzz.CONFIG] = fuzz.dump(config)
    with pytest.raises(FormatError, match=r"^config\.json: quantization_config is malformed"):
        inspect(write_folder(tmp_path, tuple(parts.values())))


def test_converted_folder_whose_name_no_folder_can_have() -> None:
    with pytest.raises(VerifyError, match=r"File name too long$"):
        read_manifest(Path("n" * 300))


def test_config_with_half_a_surrogate_pair(tmp_path: Path) -> None:
    # Printing it as it is would end in a UnicodeEncodeError.
    folder = write_folder(tmp_path, fuzz.source_folder())
    (folder / fuzz.HF_QUANT_CONFIG).unlink(missing_ok=True)
    for text in ("\\ud800", "\\udc00", "\\ude00\\ud83d", "\\ud83d\\ude00\\ude00"):
        (folder / fuzz.CONFIG).write_text(f'{{"torch_dtype": "{text}"}}')
        result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out")])
        assert result.exit_code == 1
        assert re.search(r"is not quantized \(config\.json says .*\\ud[89a-f]..", result.stderr)
    for text in ("\\ud83d\\ude00", "\\\\ud800", "\\u0064\\u8000"):
        (folder / fuzz.CONFIG).write_text(f'{{"torch_dtype": "{text}"}}')
        assert open_checkpoint(folder).config["torch_dtype"] in ("\U0001f600", "\\ud800", "d\u8000")


def test_experts_so_wide_that_a_row_fills_the_memory(tmp_path: Path) -> None:
    parts = dict(zip(fuzz.PARTS, fuzz.source_folder(), strict=True))
    header = json.loads(parts[SHARD])
    header["layers.0.mlp.experts.0.gate_proj.weight"]["shape"] = [16, 2**30]
    parts[SHARD] = fuzz.dump(header)
    with pytest.raises(CheckpointError, match=r"gives hidden size H = 2147483648, the limit is"):
        preview(write_folder(tmp_path, tuple(parts.values())))
