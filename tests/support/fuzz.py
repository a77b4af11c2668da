"""Fuzz the readers of headers, index, configuration, manifest and marker, guided by coverage.

    python -m venv /tmp/fuzz-venv && /tmp/fuzz-venv/bin/pip install atheris numpy xxhash
    /tmp/fuzz-venv/bin/pip install --no-deps -e .
    /tmp/fuzz-venv/bin/python -m tests.support.fuzz header --seconds 600 --corpus /tmp/corpus/header

An input fails if it raises anything but a `ConvertError`, takes more than `TIMEOUT_SECONDS`, or
takes the process above `RSS_LIMIT_MB`; it is then kept beside the corpus as ``TARGET-crash-...``,
``-timeout-`` or ``-oom-``. Seeds are built here and read from ``tests/data/fuzz/TARGET``, which the
test suite replays as well. Atheris is needed for fuzzing only; replaying needs nothing.

Targets:
    header    the JSON of a safetensors header
    index     model.safetensors.index.json of a folder that is otherwise valid
    config    config.json and hf_quant_config.json of such a folder, a NUL between them
    manifest  fp4moe_manifest.json of a converted folder; its own checksum is put right
    marker    the tensor that tells a plugin how the others are laid out
    record    what a converted folder records of its source: as in `folder`, but in place of the
              manifest what that says of the source (nothing: sizes and checksums are put right)
    folder    all files at once, a NUL between them, in the order of `PARTS`; offsets are put right

``--keep`` fuzzes nothing: it goes through the corpus, the smallest input first, and copies to
``tests/data/fuzz/TARGET`` what takes a way through the package that no input before it has taken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from .folders import INDEX, MANIFEST, SOURCE

TIMEOUT_SECONDS = 10
RSS_LIMIT_MB = 1024
MAX_INPUT_NBYTES = 16_384
MAX_FILE_NBYTES = 1 << 36  # data is holes, but a plan grows with it

CONFIG, HF_QUANT_CONFIG = "config.json", "hf_quant_config.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PARTS = (CONFIG, HF_QUANT_CONFIG, INDEX, MANIFEST, *SHARDS)
"""What a folder consists of; a part without bytes stands for a file that is not there."""

SEEDS = Path(__file__).resolve().parent.parent / "data" / "fuzz"


# --- valid inputs ---------------------------------------------------------------------------------


def dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def header_of(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """The JSON of a header; dtype, shape and bytes for each tensor."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [start, start + nbytes],
        }
        start += nbytes
    return dump(entries)


def source_folder(quantization: str = "config") -> tuple[bytes, ...]:
    """One layer of two experts, H = 128 and I = 16, norms and an MTP layer; both shards."""
    norms = dict.fromkeys(("norm.weight", "layers.0.norm.weight"), ("BF16", [128], 256))
    shards: tuple[dict[str, Any], dict[str, Any]] = ({}, {**norms})
    for expert, shard in enumerate(shards):
        for name, rows, cols in (
            ("gate_proj", 16, 128),
            ("up_proj", 16, 128),
            ("down_proj", 128, 16),
        ):
            prefix = f"layers.0.mlp.experts.{expert}.{name}"
            nbytes = rows * cols // 2
            shard[f"{prefix}.weight"] = ("U8", [rows, cols // 2], nbytes)
            shard[f"{prefix}.weight_scale"] = ("F8_E4M3", [rows, cols // 16], nbytes // 8)
            shard[f"{prefix}.weight_scale_2"] = ("F32", [], 4)
            shard[f"{prefix}.input_scale"] = ("F32", [1], 4)
    shards[1]["layers.1.mlp.experts.0.up_proj.weight"] = ("BF16", [16, 128], 4096)
    config: dict[str, Any] = {"num_hidden_layers": 1, "n_routed_experts": 2, "torch_dtype": "x"}
    section = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": {"weights": {"group_size": 16}}},
    }
    hf_config = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16},
    }
    if quantization == "config":
        config["quantization_config"] = section
    else:
        config = {"text_config": config}
    return (
        dump(config),
        dump(hf_config) if quantization != "config" else b"",
        dump({"weight_map": {t: SHARDS[i] for i, shard in enumerate(shards) for t in shard}}),
        b"",
        *(header_of(shard) for shard in shards),
    )


def converted_folder() -> tuple[bytes, ...]:
    """What the converter makes of such a layer."""
    from fp4moe_convert import layouts
    from fp4moe_convert.format import contract, manifest
    from fp4moe_convert.storage.header import spec_nbytes

    prefix, geometry = "layers.0.mlp.experts", contract.Geometry(2, 128, 16)
    layout = layouts.DEFAULT
    tensors = {
        spec.name: (spec.dtype, spec.shape, spec_nbytes(spec.dtype, spec.shape))
        for spec in layout.tensors(prefix, geometry)
    }
    tensors[contract.MARKER_NAME] = ("U8", (4096,), 4096)
    tensors[f"{prefix}.0.down_proj.weight"] = ("U8", (0,), 0)
    section = contract.ConvertedSection(
        layout=contract.LayoutRecord(layout.name, layout.parameters, "1234", "0.7.2"),
        layers={prefix: geometry},
        source={"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    ).as_json()
    record = manifest.ShardRecord(1, "00", dict.fromkeys(tensors, "00"))
    content = manifest.Manifest(
        source=manifest.SourceRecord(
            path="x",
            shards={SHARDS[0]: manifest.ShardIdentity(1, "00", modified_ns=1)},
            files={CONFIG: manifest.FileRecord(1, "00")},
        ),
        versions={"fp4moe-convert": "0.1.0", "flashinfer": "0.7.2"},
        row_order="1234",
        max_shard_nbytes=1,
        plan="00",
        shards={SHARDS[0]: record, SHARDS[1]: manifest.ShardRecord(1, "00", {})},
        files={CONFIG: manifest.FileRecord(1, "00")},
    )
    return (
        dump({"num_hidden_layers": 1, "n_routed_experts": 2, "quantization_config": section}),
        b"",
        dump({"weight_map": dict.fromkeys(tensors, SHARDS[0]) | {"norm.weight": SHARDS[1]}}),
        dump(json.loads(content.encode())),
        header_of(tensors),
        header_of({"norm.weight": ("BF16", [128], 256)}),
    )


def marker() -> bytes:
    """What a plugin reads first, less the spaces at its end."""
    from fp4moe_convert import layouts
    from fp4moe_convert.format.contract import Marker

    layout = layouts.DEFAULT
    return Marker(layout.name, layout.parameters, "1234").encode().rstrip()


def seeds(target: str) -> list[bytes]:
    source, hf, converted = source_folder(), source_folder("hf"), converted_folder()
    return {
        "header": [source[4], converted[5], b"{}", dump({"a": {}})],
        "index": [source[2]],
        "config": [b"\0".join(folder[:2]) for folder in (source, hf, converted)],
        "manifest": [converted[3]],
        "marker": [marker()],
        "record": [b"\0".join(folder) for folder in (source, hf)],
        "folder": [b"\0".join(folder) for folder in (source, hf, converted)],
    }[target]


# --- what is done with an input -------------------------------------------------------------------

Check = Callable[[bytes], None]


def described_nbytes(header: bytes) -> int:
    """How much data a header speaks of, so that inputs get past the comparison with a file."""
    end = 0
    with suppress(ValueError, RecursionError, AttributeError):
        for entry in json.loads(header).values():
            with suppress(TypeError, KeyError, IndexError):
                if isinstance(stop := entry["data_offsets"][1], int):
                    end = max(end, stop)
    return end


def with_own_checksum(manifest: bytes) -> bytes:
    """Inputs that are refused for their checksum alone lead nowhere."""
    from fp4moe_convert.format.manifest import sign

    with suppress(ValueError, RecursionError):
        content = json.loads(manifest)
        if isinstance(content, dict) and "manifest" in content:
            del content["manifest"]
            return sign(content)
    return manifest


def with_own_offsets(header: bytes) -> bytes:
    """Tensors one after the other, as long as they say; shapes are what a folder is fuzzed for."""
    from fp4moe_convert.storage.header import spec_nbytes

    with suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):
        content = json.loads(header)
        position = 0
        for name, entry in content.items():
            if name != "__metadata__":
                if not all(isinstance(extent, int) for extent in entry["shape"]):
                    return header
                start, position = position, position + spec_nbytes(entry["dtype"], entry["shape"])
                entry["data_offsets"] = [start, position]
        return dump(content)
    return header


def check_header(text: bytes) -> None:
    from fp4moe_convert.errors import HeaderError
    from fp4moe_convert.storage.header import parse_header

    raw = len(text).to_bytes(8, "little") + text
    file_nbytes = len(raw) + described_nbytes(text)
    with suppress(HeaderError):
        header = parse_header(raw, file_nbytes, "x.safetensors")
        assert header.file_nbytes == file_nbytes < 1 << 64
        assert len({tensor.name.encode() for tensor in header.tensors}) == len(header.tensors)
        position = 0
        for tensor in header.tensors:
            assert tensor.start == position <= tensor.stop
            position = tensor.stop


def check_marker(text: bytes) -> None:
    from fp4moe_convert.errors import FormatError
    from fp4moe_convert.format.contract import Marker

    with suppress(FormatError):
        read = Marker.decode(text)
        assert repr(Marker.decode(read.encode())) == repr(read)  # a NaN equals nothing


class Folder:
    """A model folder whose files are rewritten where they change."""

    def __init__(self, root: Path, parts: Sequence[bytes]) -> None:
        self.root = root
        self._parts: dict[str, bytes] = {}
        self.write(dict(zip(PARTS, parts, strict=True)))

    def write(self, parts: dict[str, bytes]) -> None:
        for name, content in parts.items():
            if self._parts.get(name) == content:
                continue
            self._parts[name] = content
            path = self.root / name
            if not content:
                path.unlink(missing_ok=True)
                continue
            if name == MANIFEST:
                content = with_own_checksum(content)
            if name not in SHARDS:
                path.write_bytes(content)
                continue
            content = with_own_offsets(content)
            with path.open("wb") as file:
                file.write(len(content).to_bytes(8, "little") + content)
                if 0 < (nbytes := described_nbytes(content)) <= MAX_FILE_NBYTES:
                    file.truncate(8 + len(content) + nbytes)

    def read(self) -> None:
        """Whatever reads a folder before it reads weights."""
        from fp4moe_convert import preview
        from fp4moe_convert.errors import ConvertError
        from fp4moe_convert.execution.surroundings import read_manifest
        from fp4moe_convert.inspection import inspect
        from fp4moe_convert.source.checkpoint import open_checkpoint
        from fp4moe_convert.source.identity import describe_source, source_difference
        from fp4moe_convert.storage.local import LocalFolder

        store = LocalFolder(self.root)
        with suppress(ConvertError):
            describe_source(open_checkpoint(store))
        with suppress(ConvertError):
            plan = preview(self.root, max_shard_nbytes=20_000).work.plan
            dump(plan.as_json())
        with suppress(ConvertError):
            dump(inspect(self.root).as_json())
        with suppress(ConvertError):
            read_manifest(self.root).encode()
        with suppress(ConvertError):
            source_difference(open_checkpoint(store), read_manifest(self.root), same_files=True)


class Record:
    """A converted folder whose record of its source is rewritten."""

    def __init__(self, root: Path) -> None:
        from fp4moe_convert import convert

        (root / "source").mkdir()
        source = Folder(root / "source", source_folder())
        self.root = convert(source.root, root / "converted").out_dir
        self._manifest = json.loads((self.root / MANIFEST).read_bytes())

    def check(self, data: bytes) -> None:
        from fp4moe_convert.errors import ConvertError
        from fp4moe_convert.format.manifest import FileRecord, sign
        from fp4moe_convert.restoration import prepare_restoration

        parts = data.split(b"\0", len(PARTS) - 1)
        content = dict(zip(PARTS, parts + [b""] * (len(PARTS) - len(parts)), strict=True))
        said = content.pop(MANIFEST)
        pieces: list[bytes] = []
        files: dict[str, Any] = {}
        shards: dict[str, Any] = {}
        for name, part in content.items():
            if name not in SHARDS:
                if part:
                    files[name] = {"bytes": len(part), "xxh3_128": FileRecord.of(part).checksum}
                    pieces.append(part)
                continue
            text = with_own_offsets(part)
            raw = len(text).to_bytes(8, "little") + text
            pieces.append(raw)
            nbytes = len(raw) + min(described_nbytes(text), MAX_FILE_NBYTES)
            digest = FileRecord.of(raw).checksum
            shards[name] = {"bytes": nbytes, "header": digest, "modified_ns": 1}
        source = {**self._manifest["source"], "files": files, "shards": shards}
        with suppress(ValueError, RecursionError):
            source = json.loads(said)
        record = b"".join(pieces)
        (self.root / SOURCE).write_bytes(record)
        own = {"bytes": len(record), "xxh3_128": FileRecord.of(record).checksum}
        manifest = {
            **{key: value for key, value in self._manifest.items() if key != "manifest"},
            "source": source,
            "files": {**self._manifest["files"], SOURCE: own},
        }
        with suppress(ValueError, RecursionError):
            (self.root / MANIFEST).write_bytes(sign(manifest))
        with suppress(ConvertError):
            work = prepare_restoration(self.root)
            assert work.sources
            for shard in work.shards:
                assert shard.header, shard.name
            work.left_by_us(CONFIG)


def make_check(target: str, root: Path) -> Check:
    """What to call with each input; ``root`` is an empty folder to work in."""
    if target == "header":
        return check_header
    if target == "marker":
        return check_marker
    if target == "record":
        return Record(root).check
    names = {
        "index": (INDEX,),
        "config": (CONFIG, HF_QUANT_CONFIG),
        "manifest": (MANIFEST,),
        "folder": PARTS,
    }[target]
    folder = Folder(root, converted_folder() if target == "manifest" else source_folder())

    def check(data: bytes) -> None:
        parts = data.split(b"\0", len(names) - 1)
        parts += [b""] * (len(names) - len(parts))
        folder.write(dict(zip(names, parts, strict=True)))
        folder.read()

    return check


TARGETS = ("header", "index", "config", "manifest", "marker", "record", "folder")


def corpus(target: str) -> Iterator[tuple[str, bytes]]:
    """The seeds, and the inputs kept in ``tests/data/fuzz``."""
    for number, seed in enumerate(seeds(target)):
        yield f"seed-{number}", seed
    for path in sorted((SEEDS / target).glob("*")):
        yield path.name, path.read_bytes()


# --- mutation that knows JSON ---------------------------------------------------------------------

INTERESTING: tuple[Any, ...] = (
    *(0, 1, -1, 2, 16, 128, 255, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30),
    *(None, True, False, 0.0, -0.0, 1.5, 1e308, float("inf"), float("nan"), 10**999),
    *("", "\0", "\n", "..", "/", "../x", "/dev/zero", "\ud800", "\U0001f600", "a" * 300, "1", "16"),
    *("U8", "F4", "F32", "BF16", "F8_E4M3", "NVFP4", "modelopt", "fp4moe", "quant_method"),
    *("weight_map", "quantization_config", "quantization", "text_config", "source", "layers"),
    *("layers.0.mlp.experts.0.gate_proj.weight", "layers.999999999999999999.experts.00.x"),
    *("x.experts.1.up_proj.weight", "layers.0.mlp.experts.00.gate_proj.weight"),
    *("layers.0.mlp.experts.w13_weight", "layers.0.mlp.experts.0.up_proj.bias", *SHARDS),
    *(CONFIG, ".", "model.safetensors\0"),
    *([], {}, [[]], [{}], {"": {}}, [0, 0], [1, 2, 3]),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container with each of its keys."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        found += [(container, key) for key in keys]
        waiting += [container[key] for key in keys if isinstance(container[key], (dict, list))]
    return found


def mutate_value(root: Any, random_: random.Random) -> Any:
    """Change one or a few values, keys or branches."""
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        found = places(root) if isinstance(root, (dict, list)) else []
        if not found:
            return random_.choice(INTERESTING)
        container, key = random_.choice(found)
        other, other_key = random_.choice(found)
        value = container[key]
        action = random_.randrange(9)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(value, int):
            container[key] = value + random_.choice((-1, 1, -value - 1, value, 16, 127, 2**63))
        elif action == 2 and isinstance(value, str) and value:
            cut = random_.randrange(len(value))
            container[key] = value[:cut] + str(random_.choice(INTERESTING)) + value[cut + 1 :]
        elif action == 3:
            nested = value
            for _ in range(random_.choice((1, 2, 60, 70))):
                nested = [nested] if random_.random() < 0.5 else {str(key): nested}
            container[key] = nested
        elif action == 4 and isinstance(container, dict):
            container[str(random_.choice((other_key, *INTERESTING)))] = value
        elif action == 5 and isinstance(container, dict):
            container[str(random_.choice((other_key, *INTERESTING)))] = container.pop(key)
        elif action == 6 and isinstance(container, list):
            container += [value] * random_.choice((1, 2, 70))
        elif action == 7 and not isinstance(other[other_key], (dict, list)):
            container[key] = other[other_key]
        else:
            container[key] = random_.choice(INTERESTING)
        root = json.loads(json.dumps(root))  # no branch may stand in two places
    return root


def mutate(data: bytes, max_nbytes: int, seed: int, mutate_bytes: Callable[..., bytes]) -> bytes:
    """One part as JSON where it is any, its bytes otherwise, and now and then."""
    random_ = random.Random(seed)
    parts = data.split(b"\0")
    number = random_.randrange(len(parts))
    try:
        if random_.random() < 0.3:
            raise ValueError
        text = dump(mutate_value(json.loads(parts[number]), random_))
        if random_.random() < 0.1:  # the same key twice
            text = text.replace(b"{", b"{" + text[1 : text.find(b",") + 1], 1)
    except (ValueError, RecursionError):
        return bytes(mutate_bytes(data, max_nbytes))
    parts[number] = text
    result = b"\0".join(parts)
    return result if len(result) <= max_nbytes else bytes(mutate_bytes(data, max_nbytes))


# --- what is kept ---------------------------------------------------------------------------------


def steps(check: Check, data: bytes) -> set[tuple[str, int, int]]:
    """The steps from line to line inside the package that ``data`` leads to."""
    found: set[tuple[str, int, int]] = set()

    def follow(frame: FrameType, event: str, _: object) -> Any:
        file = frame.f_code.co_filename
        if "fp4moe_convert" not in file:
            return None
        last = frame.f_lineno

        def line(frame: FrameType, event: str, _: object) -> Any:
            nonlocal last
            if event == "line":
                found.add((file, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line if event == "call" else None

    sys.settrace(follow)
    try:
        check(data)
    finally:
        sys.settrace(None)
    return found


def keep(target: str, check: Check, folder: Path) -> None:
    """Copy the inputs of ``folder`` that lead somewhere new."""
    known = set().union(*(steps(check, content) for _, content in corpus(target)))
    (SEEDS / target).mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        content = path.read_bytes()
        if new := steps(check, content) - known:
            known |= new
            (SEEDS / target / path.name[:12]).write_bytes(content)


# --- the fuzzer -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="keeps inputs that reach new code here")
    parser.add_argument("--keep", action="store_true", help="of --corpus, for the test suite")
    arguments = parser.parse_args()
    target: str = arguments.target
    if arguments.keep:
        with tempfile.TemporaryDirectory() as root:
            keep(target, make_check(target, Path(root)), arguments.corpus)
        return

    import atheris

    with atheris.instrument_imports(include=["fp4moe_convert"]):
        import fp4moe_convert.conversion
        import fp4moe_convert.inspection
        import fp4moe_convert.restoration  # noqa: F401

    def custom_mutator(data: bytes, max_nbytes: int, seed: int) -> bytes:
        return mutate(data, max_nbytes, seed, atheris.Mutate)

    # On a file system in memory if there is one.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as scratch:
        model, built = Path(scratch, "model"), Path(scratch, "seeds")
        kept: Path = arguments.corpus or Path(scratch, "corpus")
        for folder in (model, built, kept):
            folder.mkdir(parents=True, exist_ok=True)
        for name, content in corpus(target):
            (built / name).write_bytes(content)
        options = [
            f"-timeout={TIMEOUT_SECONDS}",
            f"-rss_limit_mb={RSS_LIMIT_MB}",
            f"-max_len={MAX_INPUT_NBYTES}",
            f"-artifact_prefix={kept.resolve().parent / target}-",
            f"-max_total_time={arguments.seconds}",
            "-print_final_stats=1",
            str(kept),
            str(built),
        ]
        check = make_check(target, model)
        # libFuzzer leaves by _exit, past all that would be cleaned up here.
        if (fuzzer := os.fork()) == 0:
            atheris.Setup([sys.argv[0], *options], check, custom_mutator=custom_mutator)
            atheris.Fuzz()
        try:
            _, status = os.waitpid(fuzzer, 0)
        except KeyboardInterrupt:
            _, status = os.waitpid(fuzzer, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
