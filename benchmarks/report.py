"""What the benchmarks say: progress, tables, bars and JSON."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

Json = dict[str, Any]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the text at the top of a module."""
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def headline(environment: Json) -> str:
    return f"{environment['model_bytes'] / 1e9:.2f} GB in and out, {where(environment)}"


def where(environment: Json) -> str:
    return f"{environment['cores']} cores, {environment['file_system']}, {environment['date']}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines with the first column to the left and the others to the right."""
    cells = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *others = (
            f"{cell:{'<' if i == 0 else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join((first, *others)).rstrip()


def write_json(path: Path | None, content: Any) -> None:
    """Write the results, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


class Bar(NamedTuple):
    """One bar of a panel: its height is the median of the values."""

    name: str
    color: str
    values: list[float]
    label: str


class Panel(NamedTuple):
    title: str
    unit: str
    bars: list[Bar]


def plot(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write a picture of panels side by side: dots for the runs, bars for their medians.

    Args:
        path: its ending chooses the format, .png or .svg.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    import matplotlib.pyplot as plt

    width = max(10, 3 * len(panels))
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.5), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        for place, bar in enumerate(panel.bars):
            count = len(bar.values)
            axis.bar(place, median(bar.values), width=0.6, color=bar.color, alpha=0.35)
            # Side by side, in the order of the rounds.
            step = 0.4 / max(1, count - 1)
            shifts = [place + (i - (count - 1) / 2) * step for i in range(count)]
            axis.scatter(shifts, bar.values, s=22, color=bar.color, zorder=3)
            axis.annotate(
                bar.label,
                (place, max(bar.values)),
                (0, 6),
                textcoords="offset points",
                ha="center",
            )
        axis.set_xticks(range(len(panel.bars)), [textwrap.fill(bar.name, 10) for bar in panel.bars])
        axis.set_title(panel.title, fontsize=11)
        axis.set_ylabel(panel.unit)
        axis.margins(y=0.12)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
