"""What a job shows on its page in a CI system: Markdown, in a file that the system names."""

from __future__ import annotations

import os

from ..ci import JobReport
from ..errors import ConvertError, OutputError, naming, printable

VARIABLE = "GITHUB_STEP_SUMMARY"
"""Of the environment; GitHub's and Gitea's runners set it to the path of a file."""


def add_summary(text: str) -> None:
    """Append to the job's page, where there is one.

    Raises:
        OutputError: its file cannot be written.
    """
    if path := os.environ.get(VARIABLE):
        with naming(path, OutputError), open(path, "a", encoding="utf-8") as file:
            file.write(text)


def done_summary(job: JobReport) -> str:
    """Of a job that has ended well."""
    did = job.conversion
    what = "unchanged" if job.unchanged else "converted"
    how = " and verified" if did.verify_seconds is not None else ", verified by an earlier job"
    rows = {
        "result": what + how,
        "MoE layers": f"{did.layers}",
        "size": f"{did.bytes_out:,} bytes in {did.shards} shards",
        "written by this job": f"{did.bytes_written:,} bytes",
        "time": f"{did.seconds:.1f} s"
        + (f", verifying {did.verify_seconds:.1f} s" if did.verify_seconds is not None else ""),
        "row order": f"`{did.row_order}` (FlashInfer {did.flashinfer})",
        "manifest": f"`{job.verified.manifest}`",
    }
    if pushed := job.pushed:
        rows["pushed"] = f"{pushed.uploaded_nbytes:,} bytes to {pushed.url} at `{pushed.commit}`"
    lines = [_title(job.model), "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += _quoted([f"warning: {warning}" for warning in did.warnings])
    lines += _quoted(list(did.serve.values()))
    return "\n".join(lines) + "\n\n"


def failed_summary(model: str, error: ConvertError) -> str:
    """Of a job that has failed."""
    advice = "The reason may pass: try again." if error.try_again else "Somebody has to look at it."
    lines = [_title(model), f"**Failed.** {advice}", *_quoted([f"error: {error}"])]
    return "\n".join(lines) + "\n\n"


def _title(model: str) -> str:
    return f"## fp4moe: {_plain(model)}\n"


def _quoted(lines: list[str]) -> list[str]:
    """Lines as they are, whatever they hold."""
    return ["", "```", *map(_plain, lines), "```"] if lines else []


def _plain(text: str) -> str:
    return printable(text).replace("\n", "\\n").replace("`", "'")
