"""Print the version of an installed engine and the architectures that it has models for, as
``fp4moe_convert/engines/ENGINE_models.txt`` records them.

    ENGINE_PYTHON tests/support/record_models.py vllm > fp4moe_convert/engines/vllm_models.txt

After an architecture stands what its loader may call the down projection of an expert, where its
module makes fused experts. It reads the engine's sources and imports nothing of them.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

Found = Iterator[tuple[str, set[str]]]
"""Architectures, and the names of their experts' down projections."""


def architectures_of_vllm(root: Path) -> Found:
    """Keys of the registry's tables of models that generate; some of them run through the
    Transformers backend, which makes fused MoE layers as well."""
    tables = {"_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS"}
    for node in ast.parse((root / "model_executor/models/registry.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if names & tables:
                for architecture, place in ast.literal_eval(node.value).items():
                    yield architecture, down_projections(*modules_of_vllm(root, place[0]))


def modules_of_vllm(root: Path, module: str) -> list[ast.Module]:
    """A model's own; of one that is a package, all of it."""
    name = module if "." in module else f"vllm.model_executor.models.{module}"
    path = root.parent / name.replace(".", "/")
    paths = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return [ast.parse(each.read_text()) for each in paths]


def architectures_of_sglang(root: Path) -> Found:
    """Names of the classes that the modules of models offer."""
    for path in (root / "srt/models").rglob("*.py"):
        module = ast.parse(path.read_text())
        for name in entry_classes(module):
            yield name, down_projections(module)


def entry_classes(module: ast.Module) -> Iterator[str]:
    """Names of the classes that one module offers."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
            yield from (n.id for n in ast.walk(node.value) if isinstance(n, ast.Name))


def down_projections(*modules: ast.Module) -> set[str]:
    """What a loader looks for, or renames to that: w2, down_proj. Rather too many than too few.
    Other modules of a model have a down_proj, too, so that alone the name says nothing."""
    nodes = [node for module in modules for node in ast.walk(module)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    keywords = {k.arg: k.value for call in calls for k in call.keywords}
    makes = [call for call in calls if ast.unparse(call.func) == "FusedMoEFactory"]
    if not makes and "ckpt_down_proj_name" not in keywords:
        return set()
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    found = {"w2"} if any(re.search(r"\bw2\b", text) for text in texts) else set()
    read = [k.value for call in calls for k in call.keywords if k.arg == "ckpt_down_proj_name"]
    by_default = any("ckpt_names" not in {k.arg for k in call.keywords} for call in makes)
    if (
        by_default
        or any(ast.unparse(value) != "'w2'" for value in read)
        or any(".down_proj." in text for text in texts)
    ):
        found.add("down_proj")
    return found


if __name__ == "__main__":
    engine = sys.argv[1]
    spec = importlib.util.find_spec(engine)
    assert spec is not None
    assert spec.submodule_search_locations
    read = {"vllm": architectures_of_vllm, "sglang": architectures_of_sglang}[engine]
    models: dict[str, set[str]] = {}
    for name, projections in read(Path(spec.submodule_search_locations[0])):
        models.setdefault(name, set()).update(projections)
    print(importlib.metadata.version(engine))
    for name in sorted(models):
        print(name, *sorted(models[name]))
