"""The command line: what it imports, prints and returns. Its failures are in test_bad_input.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.text import Text
from support.folders import INDEX, MANIFEST, SOURCE, contents, flip_bit
from support.processes import kill_at_rename
from support.specs import SMALL_SHARD_NBYTES, TINY
from typer.testing import CliRunner, Result

import fp4moe_convert
from fp4moe_convert import ConversionReport, Progress, convert
from fp4moe_convert.cli.commands import app
from fp4moe_convert.cli.display import LOG_INTERVAL, bar_updater, log_writer
from fp4moe_convert.cli.options import parse_size
from fp4moe_convert.execution.output_folder import OutputFolder

LAYERS = ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
FAMILY = "experts.N.{gate,up,down}_proj"
SIZES = {"experts": TINY.experts, "hidden": TINY.hidden, "intermediate": TINY.intermediate}
ESCAPE = "\x1b"
COLOUR = re.compile(rb"\x1b\[(\d+;)*[34][0-9](;\d+)*m")


def run(*arguments: object) -> Result:
    """``fp4moe`` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def command(
    *arguments: object, python: tuple[str, ...] = (), call: str = "main", prelude: str = ""
) -> list[str]:
    """A command line that runs ``fp4moe`` in a process of its own, after some Python."""
    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
{prelude}
from fp4moe_convert.__main__ import {call}
{call}()
"""
    return [sys.executable, *python, "-c", code, *map(str, arguments)]


def one_json(text: str) -> dict[str, Any]:
    """The only thing on stdout."""
    content = json.loads(text)
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def report(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ConversionReport:
    """`tiny`, converted; for reading only."""
    return convert(tiny, tmp_path_factory.mktemp("converted") / "out")


@pytest.fixture
def converted(report: ConversionReport) -> Path:
    return report.out_dir


# --- imports --------------------------------------------------------------------------------------


def imports_of(*arguments: object) -> set[str]:
    """The top-level modules that a successful run imports."""
    timed = command(*arguments, python=("-X", "importtime"))
    done = subprocess.run(timed, capture_output=True, text=True, timeout=60, check=True)
    names = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"]], ids=" ".join)
def test_help_imports_no_heavy_library(arguments: list[str]) -> None:
    imported = imports_of(*arguments)
    assert "typer" in imported
    assert not imported & {"numpy", "torch", "flashinfer", "xxhash"}


def test_a_dry_run_imports_neither_torch_nor_flashinfer(tiny: Path, tmp_path: Path) -> None:
    imported = imports_of("convert", tiny, tmp_path / "out", "--dry-run")
    assert "numpy" in imported
    assert not imported & {"torch", "flashinfer"}


def test_inspect_and_verify_import_neither_torch_nor_flashinfer(
    tiny: Path, converted: Path
) -> None:
    for arguments in (["inspect", tiny], ["verify", converted, "--source", tiny]):
        assert not imports_of(*arguments) & {"torch", "flashinfer"}


def test_every_public_name_is_there() -> None:
    for name in fp4moe_convert.__all__:
        assert getattr(fp4moe_convert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fp4moe_convert.nonsense


# --- entry points and exit codes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "shows"),
    [("fp4moe", ["convert", "verify", "inspect"]), ("fp4moe-convert", ["--max-shard-size"])],
)
def test_entry_points(script: str, shows: list[str]) -> None:
    path = Path(sysconfig.get_path("scripts")) / script
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    for word in shows:
        assert word in done.stdout


def test_both_entry_points_convert_to_the_same_bytes(
    tiny: Path, tmp_path: Path, report: ConversionReport
) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    by_script = {"fp4moe": ["convert"], "fp4moe-convert": []}
    for script, subcommand in by_script.items():
        arguments = [scripts / script, *subcommand, tiny, tmp_path / script, "--quiet", "--json"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
        assert one_json(done.stdout)["out_dir"] == str(tmp_path / script)
        assert contents(tmp_path / script) == contents(report.out_dir)


def test_exit_code_1_for_a_known_failure(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "no")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (f"error: {tmp_path / 'no'}: does not exist; expected a model folder\n")


def test_exit_code_75_while_another_run_holds_the_folder(tiny: Path, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", source=tiny):
        result = run("convert", tiny, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (os.EX_TEMPFAIL, "")
    assert " is in use by process " in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "model"],
        ["convert", "model", "out", "more"],
        ["convert", "model", "out", "--nonsense"],
        ["convert", "model", "out", "--threads", "0"],
        ["convert", "model", "out", "--threads", "many"],
        ["convert", "model", "out", "--max-shard-size", "12 junk"],
        ["convert", "model", "out", "--max-shard-size", "9" * 400],
        ["convert", "model", "out", "--part", "2"],
        ["convert", "model", "out", "--part", "5/4"],
        ["convert", "model", "out", "--part", "1/2", "--overwrite"],
        ["convert", "model", "out", "--part", "1/2", "--ray", "auto"],
        ["finish"],
        ["verify"],
        ["inspect"],
        ["nonsense"],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_exit_code_2_for_wrong_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


def test_parts(tiny: Path, tmp_path: Path) -> None:
    """What they print; tests/test_parts.py has what they do."""
    arguments = ["convert", tiny, tmp_path / "out", "--max-shard-size", "600KB", "--quiet"]
    whole = one_json(run(*arguments, "--dry-run", "--json").stdout)
    planned = one_json(run(*arguments, "--part", "1/2", "--dry-run", "--json").stdout)
    assert (planned["part"], planned["parts"]) == (1, 2)
    shards = planned["shards"]
    assert list(shards) == list(whole["shards"])[: len(shards)]
    assert len(shards) < len(whole["shards"])
    assert not (tmp_path / "out").exists()

    first = one_json(run(*arguments, "--part", "1/2", "--json").stdout)
    assert (first["part"], first["parts"], first["whole"]) == (1, 2, None)
    assert first["bytes_written"] == first["bytes_out"] == sum(s["bytes"] for s in shards.values())
    assert first["shards_missing"] == len(whole["shards"]) - len(shards) > 0
    again = run(*arguments, "--part", "1/2").stdout
    assert re.search(rf"^waits +for {first['shards_missing']} shards of other parts$", again, re.M)
    last = run(*arguments, "--part", "2/2").stdout
    assert re.search(r"^written +part 2 of 2: ", last, re.M)
    assert re.search(r"^converted +2 MoE layers$", last, re.M)
    finished = run("finish", tmp_path / "out", "--json", "--quiet")
    assert one_json(finished.stdout)["shards_kept"] == len(whole["shards"])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("1000000", 10**6),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("1.5 TB", 1_500_000_000_000),
        ("500MiB", 500 * 2**20),
        (" 2 kib ", 2048),
        ("7B", 7),
        ("0.5KB", 500),
    ],
)
def test_parse_size(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "0", "0.1", "-1", "12 junk", "GB", "5 G B", "1e9", "1,000", "5GB5", "inf", "0x10"]
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a size such as 5GB or 500MiB"):
        parse_size(text)


def test_max_shard_size_reaches_the_plan(tiny: Path, tmp_path: Path) -> None:
    result = run("convert", tiny, tmp_path / "out", "--dry-run", "--json", "--max-shard-size=1MiB")
    plan = one_json(result.stdout)
    assert plan["max_shard_bytes"] == 2**20
    assert len(plan["shards"]) > 1
    assert all(shard["bytes"] <= 2**20 for shard in plan["shards"].values())


# --- results --------------------------------------------------------------------------------------


def test_convert_prints_a_table(tiny: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "an out"
    quoted = re.escape(shlex.quote(str(out_dir)))
    result = run("convert", tiny, out_dir, "--verify")
    assert result.exit_code == 0
    for words in (
        r"converted +2 MoE layers",
        r"tensors +[\d,]+ -> [\d,]+",
        r"bytes +[\d,]+ -> [\d,]+",
        r"other files +4, [\d,]+ bytes, copied as they are",
        r"time +[\d.]+ s, [\d.]+ [GM]B/s",
        r"peak memory +\d+ MB",
        r"verified +every byte against the source",
        r"row order +xxh3_128:[0-9a-f]{32} \(flashinfer [\w.]+(\)|, the newest on record)",
        r"tensor parallel +sglang 1, 2, .*vllm 1, 2\b",
        r"serve +with this package installed beside the engine:",
        rf" +python -m sglang\.launch_server --model-path {quoted} --moe-runner-backend \w+$",
        rf" +vllm serve {quoted} --moe-backend flashinfer_trtllm$",
    ):
        assert re.search(rf"^{words}", result.stdout, re.MULTILINE), words
    assert ESCAPE not in result.stdout
    assert (out_dir / INDEX).is_file()


def test_convert_prints_one_json_object(tiny: Path, tmp_path: Path) -> None:
    result = run("convert", tiny, tmp_path / "out", "--json", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    content = one_json(result.stdout)
    assert content["out_dir"] == str(tmp_path / "out")
    assert content["layers"] == 2
    assert content["tensors_in"] - content["tensors_out"] == 2 * (12 * TINY.experts - 9) - 1
    shards = (tmp_path / "out").glob("*.safetensors")
    assert content["bytes_out"] == sum(path.stat().st_size for path in shards)
    assert content["tensor_parallel"]["vllm"] == [1, 2, 4]
    assert content["verify_seconds"] is None
    assert content["warnings"] == []


def test_a_dry_run_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    result = run("convert", tiny, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert re.search(r"^would convert +2 MoE layers", result.stdout, re.MULTILINE)
    for word in (*LAYERS, FAMILY, "model-00001-of-00001.safetensors"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_plans_what_a_run_does(
    tiny: Path, tmp_path: Path, report: ConversionReport
) -> None:
    result = run("convert", tiny, tmp_path / "out", "--dry-run", "--json")
    plan = one_json(result.stdout)
    assert plan["bytes_out"] == report.bytes_out
    assert plan["tensors_out"] == report.tensors_out
    assert plan["layers"] == {layer: {**SIZES, "gated": True} for layer in LAYERS}
    assert plan["families"] == dict.fromkeys(LAYERS, FAMILY)
    for name, shard in plan["shards"].items():
        assert (report.out_dir / name).stat().st_size == shard["bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_a_run_says(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sub-folders and documentation count, other weights do not. The disk needs room for them."""
    for name in ("assets/deep/a.txt", "assets/b.png", "README.md", "original/params.json"):
        (model_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (model_dir / name).write_text(name)
    (model_dir / "original" / "consolidated.00.pth").write_bytes(b"12345")
    (model_dir / "pytorch_model.bin").write_bytes(b"123")
    arguments = ["convert", model_dir, tmp_path / "out"]
    planned = run(*arguments, "--dry-run", "--json")
    plan = one_json(planned.stdout)
    assert plan["to_fetch_bytes"] is None
    needed = plan["bytes_out"] + plan["other_bytes"]
    for free, code in ((needed - 1, os.EX_TEMPFAIL), (needed, 0)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        dry = run(*arguments, "--dry-run", "--json")
        done = run(*arguments, "--quiet", "--json")
        assert (dry.exit_code, done.exit_code) == (0, code), done.stderr
        short = f"{tmp_path / 'out'}: needs {needed:,} bytes of free disk, there are {free:,}"
        assert (f"warning: {short}" in dry.stderr) is bool(code)
        assert (short in one_json(dry.stdout)["warnings"]) is bool(code)
        assert (short in done.stderr) is bool(code)
    report = one_json(done.stdout)
    assert planned.stderr == done.stderr
    assert planned.stderr.splitlines() == [f"warning: {line}" for line in plan["warnings"]]
    assert [line.split(":")[0] for line in plan["warnings"]] == [
        "original/consolidated.00.pth",
        "pytorch_model.bin",
    ]
    same = ("warnings", "other_files", "other_bytes", "tensor_parallel", "serve", "cannot_serve")
    assert {key: plan[key] for key in same} == {key: report[key] for key in same}
    copied = {
        name: content
        for name, content in contents(tmp_path / "out").items()
        if name not in (INDEX, MANIFEST, SOURCE, "config.json")
        and not name.endswith(".safetensors")
    }
    assert len(copied) == plan["other_files"] == 8
    assert sum(map(len, copied.values())) == plan["other_bytes"]
    shown = run(*arguments, "--dry-run").stdout
    assert re.search(rf"^other files +8, {plan['other_bytes']} bytes", shown, re.MULTILINE)


def test_inspect_a_source(tiny: Path) -> None:
    result = run("inspect", tiny)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(r"^state +source", result.stdout, re.MULTILINE)
    assert re.search(r"^quantization +modelopt NVFP4", result.stdout, re.MULTILINE)
    assert re.search(r"^to convert +2 MoE layers", result.stdout, re.MULTILINE)
    for layer in LAYERS:
        sizes = rf"^ *{layer} +4 +256 +128 +{re.escape(FAMILY)} *$"
        assert re.search(sizes, result.stdout, re.MULTILINE)


def test_inspect_a_source_as_json(tiny: Path) -> None:
    content = one_json(run("inspect", tiny, "--json").stdout)
    assert content["state"] == "source"
    assert content["reason"] is None
    assert content["layers"] == {layer: {**SIZES, "gated": True} for layer in LAYERS}
    assert content["families"] == dict.fromkeys(LAYERS, FAMILY)
    assert content["passed_layers"] == {}
    assert content["shards"] == 3
    assert content["bytes"] == sum(path.stat().st_size for path in tiny.glob("*.safetensors"))
    assert content["row_order"] is None


def test_inspect_a_converted_folder(converted: Path) -> None:
    result = run("inspect", converted)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(r"^state +converted", result.stdout, re.MULTILINE)
    assert re.search(r"^converted +2 MoE layers", result.stdout, re.MULTILINE)


def test_inspect_a_converted_folder_as_json(converted: Path, report: ConversionReport) -> None:
    content = one_json(run("inspect", converted, "--json").stdout)
    assert content["state"] == "converted"
    assert content["quantization"] == "fp4moe NVFP4"
    assert content["families"] == {}
    assert content["layers"] == {layer: {**SIZES, "gated": True} for layer in LAYERS}
    assert content["tensors"] == report.tensors_out
    assert content["bytes"] == report.bytes_out
    assert content["tensor_parallel"] == report.prospects.tensor_parallel
    assert content["serve"] == report.serve
    assert content["row_order"] == report.row_order
    assert content["flashinfer"] == report.flashinfer


def test_inspect_refuses_a_folder_that_is_unfinished(tiny: Path, tmp_path: Path) -> None:
    """A run that was stopped before the index has left a config.json that says "converted"."""
    out_dir = convert(tiny, tmp_path / "out").out_dir
    (out_dir / INDEX).unlink()
    result = run("inspect", out_dir)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {out_dir}: is unfinished: it has no {INDEX}\n"


def test_inspect_says_why_a_folder_is_unsupported(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model_dir / "config.json").write_text(json.dumps(config))
    result = run("inspect", model_dir, "--json")
    assert result.exit_code == 0
    content = one_json(result.stdout)
    assert content["state"] == "unsupported"
    assert content["reason"] == "config.json: no NVFP4 experts to convert: the quantization is fp8"


@pytest.mark.parametrize("with_source", [False, True])
def test_verify(tiny: Path, converted: Path, with_source: bool) -> None:
    options = ["--source", tiny] if with_source else []
    result = run("verify", converted, "--quiet", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(r"^verified +the manifest's checksums", result.stdout, re.MULTILINE)
    assert (f"every byte with {tiny}" in result.stdout) == with_source

    result = run("verify", converted, "--quiet", "--json", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    content = one_json(result.stdout)
    assert content["source"] == (str(tiny) if with_source else None)
    files = [path for path in converted.rglob("*") if path.is_file()]
    assert content["files"] == len(files)


def test_verify_finds_a_changed_byte(tiny: Path, tmp_path: Path) -> None:
    out_dir = convert(tiny, tmp_path / "out").out_dir
    shard = out_dir / "model-00001-of-00001.safetensors"
    flip_bit(shard)
    for options in ([], ["--source", tiny]):
        result = run("verify", out_dir, "--quiet", *options)
        assert (result.exit_code, result.stdout) == (1, "")
        assert re.fullmatch(rf"error: {shard.name}: '.+' .+\n", result.stderr)


# --- progress -------------------------------------------------------------------------------------


def test_progress_in_a_log_is_plain_lines(tiny: Path, tmp_path: Path) -> None:
    result = run("convert", tiny, tmp_path / "out", "--verify")
    lines = result.stderr.splitlines()
    phases = [line.split()[0] for line in lines]
    assert phases == ["converting", "converting", "verifying", "verifying"]
    for line in lines:
        assert re.match(r"(converting|verifying) +\d+%, [\d.]+ of [\d.]+ GB\b", line)
        assert line.isprintable()
    assert "100%" in lines[1]
    assert "100%" in lines[3]


def test_a_log_is_never_silent_for_long() -> None:
    """Systems that run tests take a quarter of an hour without a line for a program that hangs."""
    stream, now = io.StringIO(), 0.0
    write = log_writer(Console(file=stream, width=200), clock=lambda: now)
    written_at = []
    for second in range(901):
        now = float(second)
        before = stream.tell()
        write(Progress("converting", "a layer", 10**9 * (second + 1), 901 * 10**9))
        if stream.tell() > before:
            written_at.append(second)
    assert written_at == [*range(0, 900, int(LOG_INTERVAL)), 900]
    lines = stream.getvalue().splitlines()
    assert lines[0] == "converting   0%, 1.00 of 901.00 GB, a layer"
    assert lines[1] == "converting   1%, 11.00 of 901.00 GB, 1.10 GB/s, 809 s left, a layer"
    assert lines[-1] == "converting 100%, 901.00 of 901.00 GB, 1.00 GB/s, 900.0 s, a layer"


def test_each_phase_of_a_log_has_a_first_and_a_last_line() -> None:
    stream = io.StringIO()
    write = log_writer(Console(file=stream, width=200), clock=lambda: 5.0)
    for phase in ("converting", "verifying"):
        for done in (1, 2, 3):
            write(Progress(phase, "a layer", done, 3))
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "converting  33%",
        "converting 100%",
        "verifying  33%",
        "verifying 100%",
    ]


def test_a_phase_may_come_back() -> None:
    """A job that finds a shard damaged converts and verifies again."""
    stream, now = io.StringIO(), 0.0
    write = log_writer(Console(file=stream, width=200), clock=lambda: now)
    phases = ("converting", "verifying", "verifying", "converting")
    for phase in phases:
        for done in (0, 1, 3):
            now += 1
            write(Progress(phase, "a layer", done * 10**9, 3 * 10**9))
    assert stream.getvalue().splitlines() == [
        line
        for phase in phases
        for line in (
            f"{phase}   0%, 0.00 of 3.00 GB, a layer",
            f"{phase} 100%, 3.00 of 3.00 GB, 1.50 GB/s, 2.0 s, a layer",
        )
    ]


def test_a_log_of_a_slow_network() -> None:
    """The first of what is done says nothing of the time that all will take."""
    stream, now = io.StringIO(), 0.0
    write = log_writer(Console(file=stream, width=200), clock=lambda: now)
    for second, done in ((0, 0), (12, 2), (22, 20), (32, 600)):
        now = float(second)
        write(Progress("converting", "a layer", done * 10**5, 600 * 10**5))
    assert stream.getvalue().splitlines() == [
        "converting   0%, 0.00 of 0.06 GB, a layer",
        "converting   0%, 0.00 of 0.06 GB, 0.0 MB/s, a layer",
        "converting   3%, 0.00 of 0.06 GB, 0.1 MB/s, 638 s left, a layer",
        "converting 100%, 0.06 of 0.06 GB, 1.9 MB/s, 32.0 s, a layer",
    ]


def test_a_log_of_nothing() -> None:
    """An upload may lack nothing but empty files."""
    stream = io.StringIO()
    write = log_writer(Console(file=stream, width=200))
    write(Progress("uploading", "__init__.py", 0, 0))
    assert stream.getvalue() == "uploading 100%, 0.00 of 0.00 GB, __init__.py\n"


def on_a_terminal(arguments: list[str], **env: str) -> bytes:
    """What a successful run writes to stderr when that is a terminal; stdout is a pipe."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "100", **env}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while piece := os.read(ours, 65536):
                written += piece
        except OSError:  # Linux says so when the other side has closed
            pass
        os.close(ours)
        assert process.stdout is not None
        assert ESCAPE.encode() not in process.stdout.read()
    assert process.returncode == 0
    return written


def test_progress_on_a_terminal_is_a_bar(tiny: Path, converted: Path) -> None:
    written = on_a_terminal(command("verify", converted, "--source", tiny))
    assert COLOUR.search(written)
    assert "verifying" in written.decode()
    assert "━━━" in written.decode()
    assert re.search(rb"\d\.\d/\d\.\d MB", written)
    hidden, shown = written.rfind(b"\x1b[?25l"), written.rfind(b"\x1b[?25h")
    assert hidden < shown  # the cursor is back


def test_progress_on_a_dumb_terminal_is_a_log(converted: Path) -> None:
    """As in editors: nothing can be drawn again there."""
    written = on_a_terminal(command("verify", converted), TERM="dumb").decode()
    assert re.search(r"^verifying 100%, ", written, re.MULTILINE)
    assert ESCAPE not in written


def test_a_third_phase_on_a_terminal(source: Path, tmp_path: Path) -> None:
    """A run that resumes checks, converts and verifies; the bar may be too slow for the first."""
    out = tmp_path / "out"
    options = f"max_shard_nbytes={SMALL_SHARD_NBYTES}"
    kill_at_rename(f"convert({str(source)!r}, {str(out)!r}, {options})", 3)
    more = ("--verify", "--max-shard-size", SMALL_SHARD_NBYTES)
    written = on_a_terminal(command("convert", source, out, *more)).decode()
    assert "verifying" in written


def test_a_bar_for_a_phase_that_comes_back() -> None:
    line = Text()
    bar = Bar(console=Console(file=io.StringIO()))
    show = bar_updater(bar, line)
    for phase, total in (("converting", 3), ("verifying", 5), ("verifying", 4), ("converting", 7)):
        for done in (1, 2):
            show(Progress(phase, f"layer {done}", done, total))
            (task,) = bar.tasks
            assert (task.description, task.completed, task.total) == (phase, done, total)
            assert line.plain == f"layer {done}"


def test_no_color_is_respected(converted: Path) -> None:
    written = on_a_terminal(command("verify", converted), NO_COLOR="1")
    assert b"verifying" in written
    assert not COLOUR.search(written)


def test_quiet_shows_no_bar(converted: Path) -> None:
    assert on_a_terminal(command("verify", converted, "--quiet")) == b""


# --- Ctrl-C and broken pipes ----------------------------------------------------------------------


SLOW_READS = """
import time
from fp4moe_convert.storage.local import LocalReader
read = LocalReader.read
LocalReader.read = lambda *args: (time.sleep(0.1), read(*args))[1]
"""


SLOW_IMPORT = """
import builtins, time
import_ = builtins.__import__
def slow(name, *rest):
    if name == "typer":
        print("now", flush=True)
        time.sleep(30)
    return import_(name, *rest)
builtins.__import__ = slow
"""


@pytest.mark.parametrize(
    ("options", "signals", "codes"),
    [
        (["--threads=1"], [signal.SIGINT], {130}),
        (["--max-shard-size=300KB"], [signal.SIGINT], {130}),
        (["--max-shard-size=300KB"], [signal.SIGTERM], {143}),
        ([], [signal.SIGINT] * 3, {130}),
        # On a busy machine both are there before Python looks, and it takes them by number.
        (["--verify"], [signal.SIGTERM, signal.SIGINT], {130, 143}),
    ],
    ids=["one thread", "many shards", "SIGTERM", "impatience", "both"],
)
def test_ctrl_c(
    tiny: Path, tmp_path: Path, options: list[str], signals: list[signal.Signals], codes: set[int]
) -> None:
    out_dir = tmp_path / "out"
    process = subprocess.Popen(
        command(tiny, out_dir, *options, call="main_convert", prelude=SLOW_READS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], 30)[0]
        assert process.stderr.readline().startswith("converting")
        partial = {path.name for path in out_dir.glob("*.partial")}
        started = time.perf_counter()
        for number in signals:
            os.killpg(process.pid, number)  # as a terminal does
            time.sleep(0.02)
        stdout, stderr = process.communicate(timeout=60)
        seconds = time.perf_counter() - started
    assert process.returncode in codes
    assert stdout == ""
    assert stderr == "error: interrupted; run the same command again to resume\n"
    assert partial
    assert {path.name for path in out_dir.iterdir()} >= partial | {".fp4moe-journal.jsonl"}
    assert not (out_dir / INDEX).exists()
    assert seconds < 5  # on a busy machine
    convert(tiny, out_dir, verify=True)


def test_ctrl_c_when_nobody_takes_what_is_printed(tiny: Path, tmp_path: Path) -> None:
    """stderr is a pipe that is full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))
    os.set_blocking(writer, True)
    program = command(tiny, tmp_path / "out", call="main_convert", prelude=SLOW_READS)
    with subprocess.Popen(program, stderr=writer) as process:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("out/*.partial")):
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=20) == 143
        finally:
            process.kill()
    os.close(reader)
    os.close(writer)


def test_ctrl_c_while_the_command_is_still_being_imported(tiny: Path) -> None:
    program = command("inspect", tiny, prelude=SLOW_IMPORT)
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "error: interrupted\n")


def test_a_signal_that_is_ignored_stays_ignored(tiny: Path, tmp_path: Path) -> None:
    """A shell starts background jobs with SIGINT ignored."""
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    slow = SLOW_READS.replace("0.1", "0.02")  # it has to run to its end
    program = command(tiny, tmp_path / "out", call="main_convert", prelude=slow + ignore)
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("converting")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_reader_that_has_gone_is_no_traceback(tiny: Path, options: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("inspect", tiny, *options),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


SNEEZING = """
import contextlib, os, threading, time
def sneeze():
    while True:
        for number in {numbers}:
            with contextlib.suppress(OSError):
                os.write(number, b"a warning in C")
        time.sleep(0.001)
threading.Thread(target=sneeze, daemon=True).start()
from fp4moe_convert.cli.commands import convert_app
from fp4moe_convert.cli.process import run
run(convert_app)
"""


@pytest.mark.parametrize("numbers", [[2], [1, 2]], ids=str)
def test_a_library_that_warns_into_a_closed_stream_does_not_write_into_a_shard(
    tiny: Path, tmp_path: Path, numbers: list[int]
) -> None:
    """Whose numbers the next files to be opened would get."""
    closing = " ".join(f"{number}>&-" for number in numbers)
    program = SNEEZING.replace("{numbers}", str(numbers))
    arguments = [sys.executable, "-c", program, str(tiny), str(tmp_path / "out"), "--json"]
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {closing}', "bash", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert 1 in numbers or one_json(done.stdout)["layers"] == 2
    assert run("verify", tmp_path / "out").exit_code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("log", ["full", "no reader"])
def test_a_log_that_fails_does_not_stop_the_work(tiny: Path, converted: Path, log: str) -> None:
    if log == "full":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stderr = os.pipe()
        os.close(reader)
    done = subprocess.run(
        command("verify", converted, "--source", tiny, "--json"),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(stderr)
    assert done.returncode == 0
    assert one_json(done.stdout)["source"] == str(tiny)


def test_names_that_a_terminal_cannot_show(tiny: Path, tmp_path: Path) -> None:
    odd = tmp_path / "sü☺:fire:"
    odd.symlink_to(tiny)
    done = subprocess.run(
        command("inspect", odd),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"s\xfc\u263a:fire:" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "words", ["inspect MODEL", "inspect MODEL --json", "--help", "convert --help"]
)
def test_a_full_stdout_is_one_error(tiny: Path, words: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(*words.replace("MODEL", str(tiny)).split()),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "error: stdout: No space left on device\n"


@pytest.mark.parametrize(
    "line",
    [
        *("convert '' out", "convert MODEL ''", "convert MODEL out --cache-dir ''"),
        *("ci '' out", "ci MODEL ''", "ci MODEL out --report ''"),
        *("finish ''", "finish CONVERTED --source=", "verify ''", "verify CONVERTED --source ''"),
        *("restore '' out", "restore CONVERTED ''", "inspect ''", "push '' org/name"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    tiny: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """A script has a variable that is not set."""
    here = Path(shutil.copytree(tiny, tmp_path / "here"))
    monkeypatch.chdir(here)
    before = contents(here)
    places = {"MODEL": tiny, "CONVERTED": converted}
    result = run(*(places.get(word, word) for word in shlex.split(line)))
    assert result.exit_code == 2
    assert "is empty; is a variable not set?" in result.stderr
    assert contents(here) == before
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
