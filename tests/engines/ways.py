"""Every way into an engine, times what it is offered, times the server: what both engines share."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from driver import Outcomes

SERVERS = ("original", "converted", "original, no plugin")
"""What the server was started from. Without the plugin no converted checkpoint starts."""
OFFERS = ("original", "converted", "another order")
"""Of the same model."""

TO_UNCONVERTED = (
    "^fp4moe: these weights are converted, the model was built for a checkpoint that is"
)
TO_CONVERTED = (
    "^fp4moe: .*: these weights are not converted, the model was built for a checkpoint that is"
)
OTHER_ORDER = "^fp4moe: the weights were laid out for the row order xxh3_128:00"


class Case(NamedTuple):
    model: str
    way: str
    server: str
    offered: str

    def __str__(self) -> str:
        return f"{self.model}: {self.way}: {self.offered} -> {self.server}"

    @property
    def has_plugin(self) -> bool:
        return not self.server.endswith("no plugin")


def attempt(outcomes: Outcomes, case: Case, run: Callable[[], str], stock_stops: str) -> None:
    """Record what becomes of a case, and whether that is right."""
    expected = _expected(case, stock_stops)
    try:
        detail = run()
        passed = expected is None
    except Exception as error:
        detail = " ".join(str(error).split())
        passed = expected is not None and re.search(expected, detail) is not None
        if not passed:
            traceback.print_exc()
    outcomes.record(str(case), passed, detail)


def _expected(case: Case, stock_stops: str) -> str | None:
    """A pattern of the message that refuses, or None where the load has to succeed."""
    if case.server.startswith(case.offered):
        return None
    if not case.has_plugin:
        return stock_stops
    if case.way == "ipc_cache":
        return "^the keys of the weight cache differ"
    if case.server == "original":
        # An original's tensors do not wait, so that its loader may see one that is converted first.
        return f"{TO_UNCONVERTED}|{stock_stops}" if is_iterator(case.way) else TO_UNCONVERTED
    return TO_CONVERTED if case.offered == "original" else OTHER_ORDER


def is_iterator(way: str) -> bool:
    return way.endswith(", iterator")


def leaves_unchanged(error: Exception, way: str, server: str) -> bool:
    """Whether a model must be as it was after this error.

    Of stock's it is broken. So it is where an iterator tells too late that it is converted: an
    original cannot be held back until its last tensor.
    """
    too_late = is_iterator(way) and server == "original"
    return "fp4moe: " in str(error) and not too_late


def clone(value: Any) -> Any:
    """Of a tensor; other values are as they are."""
    return value.clone() if hasattr(value, "clone") else value


def other_order(converted: Path, folder: Path) -> Path:
    """A converted folder whose rows are in another order: its marker and its config.json say so."""
    from safetensors.torch import load_file, save_file

    from fp4moe_convert.format.contract import Marker

    if folder.exists():
        return folder
    shutil.copytree(converted, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layout"]["row_order"] = "xxh3_128:00"
    (folder / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["fp4moe.layout"]
    tensors = load_file(shard)
    marker = tensors["fp4moe.layout"]
    data = Marker.decode(marker.numpy().tobytes())
    other = Marker(data.layout, data.parameters, "xxh3_128:00").encode()
    tensors["fp4moe.layout"] = marker.new_tensor(list(other))
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def names_and_tensors(folder: Path) -> list[tuple[str, Any]]:
    """All tensors of a folder, in the order of files and names; a converted one's marker first."""
    from safetensors.torch import load_file

    found = [
        each for path in sorted(folder.glob("*.safetensors")) for each in load_file(path).items()
    ]
    return sorted(found, key=lambda each: each[0] != "fp4moe.layout")


class Folders:
    """What is offered, and folders with the configuration of one and the weights of another."""

    work: Path
    original: Callable[[str], Path]
    converted: Callable[[str], Path]

    def folder(self, kind: str, name: str) -> Path:
        """An original, a converted checkpoint, or one of another row order."""
        if kind == "another order":
            return other_order(self.converted(name), self.work / f"{name}-other")
        folder: Path = getattr(self, kind)(name)
        return folder

    def mixed(self, server: str, kind: str, name: str) -> Path:
        """A new folder each time: engines keep configurations by path."""
        folder = Path(tempfile.mkdtemp(dir=self.work)) / name
        shutil.copytree(self.folder(kind, name), folder)
        shutil.copy(self.folder(server, name) / "config.json", folder)
        return folder
