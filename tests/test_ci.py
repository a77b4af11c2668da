"""`fp4moe ci`: jobs that are repeated, what they report, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faulty_disk import mounted, needs_root
from support.folders import INDEX, contents, flip_bit
from support.hub import Hub
from support.processes import kill_at_rename
from support.specs import SMALL_SHARD_NBYTES
from typer.testing import CliRunner, Result

from fp4moe_convert import convert, verification
from fp4moe_convert.cli.commands import app
from fp4moe_convert.execution import surroundings
from fp4moe_convert.execution.output_folder import OutputFolder

DOCUMENTED = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    return tmp_path / "page.md"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each shard that is read back."""
    read: list[str] = []
    read_back = verification.read_back

    def counted(shards: Any, *arguments: Any, **options: Any) -> int:
        read.extend(shard.name for shard in shards)
        return read_back(shards, *arguments, **options)

    monkeypatch.setattr(verification, "read_back", counted)
    return read


def job(source: Path | str, out: Path, *more: str) -> Result:
    size = str(SMALL_SHARD_NBYTES)
    arguments = ["ci", str(source), str(out), "--max-shard-size", size, "--quiet", *more]
    return CliRunner().invoke(app, arguments)


def done(source: Path | str, out: Path) -> dict[str, Any]:
    result = job(source, out, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert json.loads(out.with_name(f"{out.name}.report.json").read_text()) == report
    return dict(report)


def test_the_second_job_finds_it_done(
    source: Path, tmp_path: Path, expected: dict[str, bytes], page: Path, reads: list[str]
) -> None:
    out = tmp_path / "out"
    first = done(source, out)
    assert first["unchanged"] is False
    assert first["conversion"]["bytes_written"] == first["conversion"]["bytes_out"]
    assert first["conversion"]["verify_seconds"] is not None
    assert contents(out) == expected
    assert len(reads) == 8
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    second = done(source, out)
    assert second["unchanged"] is True
    assert second["conversion"]["bytes_written"] == 0
    assert second["verified_manifest"] == first["verified_manifest"]
    assert second["verified_shards"] == {
        path.name: {"bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}
        for path in sorted(out.glob("*.safetensors"))
    }
    assert len(reads) == 8
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    one, two = page.read_text().split("## fp4moe: ")[1:]
    assert one.startswith(f"{source}\n")
    assert "| result | converted and verified |" in one
    assert "| result | unchanged, verified by an earlier job |" in two
    assert f"vllm serve {out} " in one


def test_from_the_hub(hub: Hub, source: Path, tmp_path: Path) -> None:
    """The second job fetches headers, and no weight."""
    hub.add("org/model", source)
    assert done("org/model", tmp_path / "out")["unchanged"] is False
    sent = sum(stop - start for own in hub.served().values() for start, stop in own)
    again = done("org/model", tmp_path / "out")
    assert again["unchanged"] is True
    assert again["conversion"]["fetched"]["bytes"] < sent / 4


def lose_the_report(out: Path) -> None:
    out.with_name("out.report.json").unlink()


def spoil_the_report(out: Path) -> None:
    out.with_name("out.report.json").write_text('{"verified_manifest": 1}')


def lose_a_shard(out: Path) -> None:
    sorted(out.glob("*.safetensors"))[2].unlink()


def cut_a_shard(out: Path) -> None:
    os.truncate(sorted(out.glob("*.safetensors"))[2], 9)


def lose_it_all(out: Path) -> None:
    shutil.rmtree(out)


def convert_by_hand(out: Path) -> None:
    shutil.rmtree(out)
    convert(out.with_name("source"), out, max_shard_nbytes=SMALL_SHARD_NBYTES)


def stop_a_job_that_verifies(out: Path, *more: str) -> None:
    def stop(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "read_back", stop)
        assert job(out.with_name("source"), out, *more).exit_code == 130
    assert (out / "model.safetensors.index.json").exists()


def lose_a_shard_and_stop(out: Path) -> None:
    lose_a_shard(out)
    stop_a_job_that_verifies(out)


def begin_afresh_and_stop(out: Path) -> None:
    stop_a_job_that_verifies(out, "--overwrite")


def take_the_report_of_another(out: Path) -> None:
    other = out.with_name("other")
    done(out.with_name("source"), other)
    shutil.rmtree(out)
    convert(out.with_name("source"), out, max_shard_nbytes=SMALL_SHARD_NBYTES)
    other.with_name("other.report.json").rename(out.with_name("out.report.json"))


@pytest.mark.parametrize(
    "change",
    [
        *(lose_the_report, spoil_the_report, lose_a_shard, cut_a_shard, lose_it_all),
        *(convert_by_hand, lose_a_shard_and_stop, begin_afresh_and_stop),
        take_the_report_of_another,
    ],
)
def test_what_no_job_has_verified_is_verified(
    source: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    reads: list[str],
    change: Callable[[Path], object],
) -> None:
    out = tmp_path / "out"
    done(source, out)
    change(out)
    reads.clear()
    report = done(source, out)
    assert report["unchanged"] is False
    assert len(reads) >= 8
    assert contents(out) == expected
    assert done(source, out)["unchanged"] is True


@pytest.mark.parametrize("name", [INDEX, "tokenizer.json", "LICENSE"])
def test_a_lost_file_beside_the_shards_is_written_and_that_is_told(
    source: Path, tmp_path: Path, page: Path, reads: list[str], name: str
) -> None:
    """A pipeline that skips its upload of what is unchanged would leave it out."""
    (source / "LICENSE").write_text("as it is")
    out = tmp_path / "out"
    done(source, out)
    before = contents(out)
    if name == "tokenizer.json":
        (out / INDEX).unlink()  # with an index, its loss is refused
    (out / name).unlink()
    reads.clear()
    report = done(source, out)
    assert report["unchanged"] is False
    assert not reads
    assert contents(out) == before
    assert "| result | converted, verified by an earlier job |" in page.read_text()
    assert done(source, out)["unchanged"] is True


def test_a_manifest_of_another_release_is_verified(
    source: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done(source, tmp_path / "out")
    reads.clear()
    monkeypatch.setattr(surroundings, "VERSION", "9.9")
    assert done(source, tmp_path / "out")["unchanged"] is False
    assert len(reads) >= 8
    assert done(source, tmp_path / "out")["unchanged"] is True


def test_a_conversion_that_nobody_has_verified(
    source: Path, tmp_path: Path, expected: dict[str, bytes], reads: list[str]
) -> None:
    """As after a kill between the two, or of a run by hand; one bit is wrong."""
    out = tmp_path / "out"
    convert(source, out, max_shard_nbytes=SMALL_SHARD_NBYTES)
    flip_bit(sorted(out.glob("*.safetensors"))[3])
    report = done(source, out)
    assert report["conversion"]["shards_kept"] == 7
    assert len(reads) >= 8
    assert contents(out) == expected


def test_bad_input(source: Path, tmp_path: Path, page: Path) -> None:
    (source / "config.json").write_text("`not` JSON")
    result = job(source, tmp_path / "out", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: config.json: not JSON")
    assert not (tmp_path / "out.report.json").exists()
    text = page.read_text()
    assert text.startswith(f"## fp4moe: {source}\n\n**Failed.** Somebody has to look at it.\n")
    assert text.endswith(f"```\n{result.stderr}```\n\n")


def test_try_again(source: Path, tmp_path: Path, page: Path) -> None:
    done(source, tmp_path / "out")
    with OutputFolder(tmp_path / "out", source=source):
        result = job(source, tmp_path / "out")
    assert result.exit_code == os.EX_TEMPFAIL
    assert "**Failed.** The reason may pass: try again." in page.read_text()
    assert done(source, tmp_path / "out")["unchanged"] is True


def test_another_conversion_is_in_the_way(source: Path, tmp_path: Path) -> None:
    done(source, tmp_path / "out")
    os.utime(sorted(source.glob("*.safetensors"))[0])
    before = contents(tmp_path / "out")
    result = job(source, tmp_path / "out")
    assert result.exit_code == 1
    assert "holds a finished conversion of another checkpoint" in result.stderr
    assert contents(tmp_path / "out") == before


def test_a_page_that_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and changes nothing: neither a job that is done nor why one has failed."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "page.md"))
    warning = f"warning: {tmp_path}/no/page.md: No such file or directory\n"
    result = job(source, tmp_path / "out", "--json")
    assert (result.exit_code, result.stderr) == (0, warning)
    assert json.loads(result.stdout)["unchanged"] is False
    with OutputFolder(tmp_path / "out", source=source):
        result = job(source, tmp_path / "out")
    assert result.exit_code == os.EX_TEMPFAIL
    assert result.stderr.startswith(warning + "error: ")


def test_a_job_that_was_killed_while_it_wrote_its_report(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out, unfinished = tmp_path / "out", tmp_path / "out.report.json.partial"
    call = f"fp4moe_convert.ci.run_job({str(source)!r}, {str(out)!r}, max_shard_nbytes="
    kill_at_rename(f"import fp4moe_convert.ci\n{call}{SMALL_SHARD_NBYTES})", len(expected))
    assert contents(out) == expected
    assert unfinished.exists()
    assert done(source, out)["conversion"]["bytes_written"] == 0
    assert not unfinished.exists()
    assert done(source, out)["unchanged"] is True


def test_another_place_for_the_report(source: Path, tmp_path: Path) -> None:
    """Made where it is not there; the next job finds it."""
    out, report = tmp_path / "out", tmp_path / "new" / "report"
    for unchanged in (False, True):
        result = job(source, out, "--report", str(report), "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        assert json.loads(report.read_text()) == json.loads(result.stdout)
        assert json.loads(result.stdout)["unchanged"] is unchanged
    assert [path.name for path in report.parent.iterdir()] == ["report"]
    assert not (tmp_path / "out.report.json").exists()


BAD_REPORTS = {
    "new": "is in the way of out",
    "out": "is in the way of out",
    "out/config.json": "is in the way of out",
    "link/../out/r": "is in the way of out",
    "source/config.json": "is in the way of source",
    ".": "is in the way of out",
    "file/report": "Not a directory",
    "link": "is not a regular file",
    "link to a file": "is not a regular file",
    "folder": "is not a regular file",
    "/dev/null": "is not a regular file",
    "r" * 250: "File name too long",
    "s3:/bucket/report": "is a URL; name a path on this machine",
}


def test_a_job_that_fails_makes_no_folder_for_its_report(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{}")
    report = tmp_path / "new" / "deep" / "report"
    assert job(source, tmp_path / "out", "--report", str(report)).exit_code == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("report", BAD_REPORTS)
def test_a_report_that_cannot_be_written_stops_the_job_before_it_begins(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "link to a file").symlink_to("file")
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    out = "new/out" if report == "new" else "out"
    result = job(source.name, Path(out), "--report", report)
    assert (result.exit_code, result.stdout) == (1, "")
    message = BAD_REPORTS[report].replace("out", out)
    assert result.stderr.startswith(f"error: {report}: {message}")
    if report == "out/config.json":
        assert f"| 1 | `{result.stderr.strip()}` |" in DOCUMENTED
    assert result.stderr.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("out", ["/", ".."])
def test_a_folder_without_a_name(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    hub.add("org/model", source)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = job("org/model", Path(out))
    assert (result.exit_code, result.stdout) == (1, "")
    why = "has no name to call the report by; name it with --report"
    assert result.stderr == f"error: {out}: {why}\n"
    assert f"| 1 | `error: /: {why}` |" in DOCUMENTED


@needs_root
def test_a_mounted_folder_in_a_read_only_one(source: Path, tmp_path: Path) -> None:
    """As containers have it."""
    image = tmp_path / "image"
    with mounted(image, "tmpfs", "size=1m"), mounted(image / "out", "tmpfs", "size=16m"):
        subprocess.run(["mount", "-o", "remount,ro", image], check=True)
        result = job(source, image / "out")
        assert result.exit_code == 1
        assert result.stderr == f"error: {image}/out.report.json: Read-only file system\n"
        assert f"| 1 | `{result.stderr.strip().replace(f'{tmp_path}/', '')}` |" in DOCUMENTED
        assert not list((image / "out").iterdir())
        assert job(source, image / "out", "--report", str(tmp_path / "r")).exit_code == 0


def test_advice_for_another_size(source: Path, tmp_path: Path) -> None:
    done(source, tmp_path / "out")
    stopped = job(source, tmp_path / "out", "--max-shard-size", "1MB")
    size = SMALL_SHARD_NBYTES
    assert f"its files have at most {size:,} bytes (--max-shard-size {size}); choose" in str(
        stopped.stderr
    )


def test_afresh(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Whatever lies there, and each time."""
    out = tmp_path / "out"
    done(source, out)
    os.utime(sorted(source.glob("*.safetensors"))[0])
    assert "--overwrite starts afresh" in job(source, out).stderr
    for _ in range(2):
        report = json.loads(job(source, out, "--overwrite", "--json").stdout)
        assert report["unchanged"] is False
        assert report["conversion"]["bytes_written"] == report["conversion"]["bytes_out"]
    assert contents(out).keys() == expected.keys()
    assert done(source, out)["unchanged"] is True


def test_the_table(source: Path, tmp_path: Path) -> None:
    for what in ("converted, verified", "unchanged, verified before"):
        result = job(source, tmp_path / "out")
        assert result.exit_code == 0
        rows = dict(line.split(None, 1) for line in result.stdout.splitlines() if "  " in line)
        assert rows["job"] == what
        assert rows["report"] == str(tmp_path / "out.report.json")
