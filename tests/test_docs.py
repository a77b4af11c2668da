"""What docs/models.md and docs/serving.md say of models is what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import exporters, model_zoo

from fp4moe_convert import inspect
from fp4moe_convert.engines import ENGINES, tensor_parallel_sizes
from fp4moe_convert.engines.engine import Model
from fp4moe_convert.format.contract import Geometry
from fp4moe_convert.source.families import FAMILIES

DOCS = Path(__file__).parents[1] / "docs"
POWERS = {1, 2, 4, 8, 16}


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    section = (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def names(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


CONVERTED = table("models.md", "Converted")


def test_every_row_of_the_table_and_no_other_is_documented() -> None:
    documented = [names(row) for _, _, row, _, _ in CONVERTED]
    assert {name for cell in documented for name in cell} == {each.name for each in FAMILIES}


def test_every_model_that_is_run_is_documented_once() -> None:
    run = [name for *_, cell in CONVERTED for name in names(cell)]
    assert sorted(run) == sorted([*model_zoo.FAMILIES, *exporters.CONVERTED])


def test_every_model_that_is_refused_is_documented_once() -> None:
    tried = [name for *_, cell in table("models.md", "Refused") for name in names(cell)]
    refused = exporters.EXPORTS.keys() - exporters.CONVERTED
    assert sorted(tried) == sorted(refused)


@pytest.mark.parametrize("case", model_zoo.FAMILIES)
def test_a_model_has_the_documented_row_and_engines(case: str, tmp_path: Path) -> None:
    model_zoo.make(tmp_path / case, case)
    found = inspect(tmp_path / case)
    [(row, engines)] = [
        (names(row), engines.split(", "))
        for _, _, row, engines, run in CONVERTED
        if case in names(run)
    ]
    assert set(found.families.values()) == set(row)
    can = found.prospects.tensor_parallel
    assert engines == [engine.title for engine in ENGINES if engine.name in can]


@pytest.mark.exporters
@pytest.mark.parametrize("name", exporters.CONVERTED)
def test_an_export_has_the_documented_engines(name: str) -> None:
    [engines] = [engines.split(", ") for *_, engines, run in CONVERTED if name in names(run)]
    can = inspect(exporters.exported(name)).prospects.tensor_parallel
    assert engines == [engine.title for engine in ENGINES if engine.name in can]


@pytest.mark.parametrize("name", exporters.CONVERTED)
def test_an_export_stands_in_the_documented_row(name: str) -> None:
    [row] = [names(row) for _, _, row, _, run in CONVERTED if name in names(run)]
    assert row == [exporters.EXPORTS[name].row]


@pytest.mark.parametrize("row", table("models.md", "Parallel sizes"), ids=lambda row: row[0])
def test_parallel_sizes(row: list[str]) -> None:
    model, experts, hidden, intermediate, *documented = row
    [(family, engines, run)] = [
        (names(own[2]), own[3].split(", "), names(own[4]))
        for own in CONVERTED
        if own[0] == re.sub(r" \(\w+\)$", "", model)
    ]
    [projections] = [each.projections for each in FAMILIES if [each.name] == family]
    geometry = Geometry(
        experts=int(experts),
        hidden=int(hidden),
        intermediate=int(intermediate),
        gated="gate" in projections,
    )
    made = [model_zoo.FAMILIES[name] for name in run if name in model_zoo.FAMILIES]
    named = [(each.top or each.config).get("architectures") or [] for each in made]
    architectures = tuple(name for names in named for name in names)
    sizes = tensor_parallel_sizes(Model(architectures, {}, {}), [geometry])
    assert documented == [
        ", ".join(str(size) for size in sizes[engine.name] if size in POWERS)
        if engine.title in engines
        else "-"
        for engine in ENGINES
    ]


def test_what_exports_lack_is_documented() -> None:
    """By model, each key of config.json; with the value where it is the same for every model."""
    documented = {
        names(model)[0]: {re.sub(r'"|:.*', "", key): key for key in names(keys)}
        for model, keys in table("serving.md", "Exports that engines do not read")
    }
    for name, export in exporters.EXPORTS.items():
        family = name.split("-")[1]
        for key, value in export.config.items():
            text = documented[family][key]
            assert ":" not in text or json.loads(f"{{{text}}}") == {key: value}
    assert documented.keys() == {
        name.split("-")[1] for name, export in exporters.EXPORTS.items() if export.config
    }


def test_readme_leads_to_it() -> None:
    assert "docs/models.md" in (DOCS.parent / "README.md").read_text()
    assert "(models.md)" in (DOCS / "README.md").read_text()
