"""Draw what `engine_load` has measured: seconds to a loaded model, and peak GPU memory.

    python -m benchmarks.plot_engine_load docs/bench/engine_load.json OUT.svg

The file is a list of reports, as `engine_load --json` writes one. It needs the dependency group
`bench`. Drawn are the engines' default loaders, one rank at a time, with files in the page cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .report import Bar, Panel, parser_of, plot

COLORS = {"original": "tab:gray", "plain": "tab:orange", "converted": "tab:blue"}
TITLES = {"sglang": "SGLang", "vllm": "vLLM"}
SIZES = {1: "T = 1", 8: "one rank of T = 8"}


def panel_of(runs: Sequence[Any], title: str, unit: str, key: str, scale: float) -> Panel:
    """A bar for each way."""
    values = {
        way: [run[key] / scale for run in runs if run["setting"]["way"] == way] for way in COLORS
    }
    bars = [
        Bar(way, color, values[way], f"{median(values[way]):.2f}") for way, color in COLORS.items()
    ]
    return Panel(title, unit, bars)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("reports", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    runs = [run for report in json.loads(arguments.reports.read_text()) for run in report["runs"]]
    marks = ("cold", "fresh", "counts_copies", "warms_up")
    runs = [
        run
        for run in runs
        if run["setting"]["loader"] == "default"
        and run["ranks"] == 1
        and not any(run["setting"][m] for m in marks)
    ]
    panels = []
    for engine, title in TITLES.items():
        for tp_size, size in SIZES.items():
            some = [
                run
                for run in runs
                if (run["setting"]["engine"], run["setting"]["tp_size"]) == (engine, tp_size)
            ]
            panels.append(panel_of(some, f"{title}, {size}", "seconds", "seconds", 1))
            if (engine, tp_size) == ("vllm", 1):
                memory = panel_of(some, "GPU memory, T = 1", "peak, GB", "peak_allocated", 1e9)
    plot(arguments.picture, "A model of 21 GB until it is loaded, on an H100", [*panels, memory])


if __name__ == "__main__":
    main()
