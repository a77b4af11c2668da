"""Print the version of an installed engine and the architectures that it has models for, as
``fp4moe_convert/serving/ENGINE/models.txt`` records them.

    ENGINE_PYTHON tests/support/record_models.py vllm > fp4moe_convert/serving/vllm/models.txt

It reads the engine's sources and imports nothing of them.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path


def architectures_of_vllm(root: Path) -> Iterator[str]:
    """Keys of the registry's tables of models that generate; some of them run through the
    Transformers backend, which makes fused MoE layers as well."""
    tables = {"_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS"}
    for node in ast.parse((root / "model_executor/models/registry.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if names & tables:
                yield from (key.value for key in node.value.keys if isinstance(key, ast.Constant))


def architectures_of_sglang(root: Path) -> Iterator[str]:
    """Names of the classes that the modules of models offer."""
    for path in (root / "srt/models").rglob("*.py"):
        yield from entry_classes(ast.parse(path.read_text()))


def entry_classes(module: ast.Module) -> Iterator[str]:
    """Names of the classes that one module offers."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
            yield from (n.id for n in ast.walk(node.value) if isinstance(n, ast.Name))


if __name__ == "__main__":
    engine = sys.argv[1]
    spec = importlib.util.find_spec(engine)
    assert spec is not None
    assert spec.submodule_search_locations
    read = {"vllm": architectures_of_vllm, "sglang": architectures_of_sglang}[engine]
    names = set(read(Path(spec.submodule_search_locations[0])))
    print(importlib.metadata.version(engine), *sorted(names), sep="\n")
