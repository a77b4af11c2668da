"""What the engines' own loaders ended with, as tests/data/golden records it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .make_checkpoint import Spec

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
RECORD = json.loads((GOLDEN / "digests.json").read_text())
CASES: dict[str, Spec] = {name: Spec(**spec) for name, spec in RECORD["cases"].items()}
ENGINES: tuple[str, ...] = tuple(RECORD["engines"])
PREFIX = f"model.layers.{RECORD['layer']}.mlp.experts"
"""Of the one MoE layer that each case has."""


def runs_of(case: str, engine: str) -> Iterator[dict[str, Any]]:
    """What is on record of one checkpoint in one engine, a rank at a time."""
    for run in RECORD["runs"]:
        if (run["case"], run["engine"]) == (case, engine):
            yield run
