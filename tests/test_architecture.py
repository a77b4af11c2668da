"""Imports point one way, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import fp4moe_convert

PACKAGE = Path(fp4moe_convert.__file__).parent
DOCUMENT = Path(__file__).parent.parent / "docs" / "architecture.md"

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or not path.name.startswith("__")  # these name what users call
}


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that one of them imports, wherever in its text."""
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE.name, *folder[: len(folder) + 1 - node.level]] if node.level else []
            base += [node.module] if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            package, _, module = name.partition(".")
            if package == PACKAGE.name:
                yield module if module in MODULES else module.rpartition(".")[0]


def may_import() -> dict[str, set[str]]:
    """What each module at the top of the package may import, besides its own parts."""
    below: dict[str, set[str]] = {}
    for line in re.findall(r"^.* <- .*$", DOCUMENT.read_text(), re.MULTILINE):
        so_far: set[str] = set()
        for level in line.split(" <- "):
            modules = level.split(", ")
            for module in modules:
                below.setdefault(module, set()).update(so_far)
            so_far.update(modules, *(below[module] for module in modules))
    return below


def test_imports_point_one_way() -> None:
    below = may_import()

    def level(module: str) -> str:
        top = module.partition(".")[0]
        return top if top in below else "commands"

    upward = {
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in imports(path)
        if level(imported) not in {level(module), *below[level(module)]}
    }
    assert upward == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter({module: set(imports(path)) for module, path in MODULES.items()}).prepare()
