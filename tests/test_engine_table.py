"""What the converter says of engines that are not installed: the sizes they can serve, and how."""

from __future__ import annotations

import shlex

import pytest
from support.golden import CASES, runs_of

from fp4moe_convert.format.contract import Geometry
from fp4moe_convert.serving.engine import Engine
from fp4moe_convert.serving.engines import ENGINES, serve_commands, tensor_parallel_sizes

NAMES = [engine.name for engine in ENGINES]

by_engine = pytest.mark.parametrize("engine", ENGINES, ids=NAMES)


def sizes_of(engine: Engine, intermediate: int) -> list[int]:
    return engine.tensor_parallel_sizes(Geometry(4, 256, intermediate))


@by_engine
@pytest.mark.parametrize("case", CASES)
def test_the_rule_of_an_engine_agrees_with_its_recorded_runs(engine: Engine, case: str) -> None:
    """What it refused is not listed, and nothing is listed that it was not seen to load. That each
    rank then is a slice of the file is what test_golden.py compares."""
    listed = sizes_of(engine, CASES[case].intermediate)
    runs = list(runs_of(case, engine.name))
    refused = {run["tp_size"] for run in runs if "refused" in run}
    assert not refused & set(listed)
    for size in {run["tp_size"] for run in runs} & set(listed):
        ranks = {run["tp_rank"] for run in runs if run["tp_size"] == size}
        assert ranks == set(range(size))
    assert {size for size in listed if size <= 4} <= {run["tp_size"] for run in runs} - refused
    if engine.name == "sglang":  # it cuts as the file is cut: all that it loads is served
        assert {run["tp_size"] for run in runs} - refused <= set(listed)


@pytest.mark.parametrize(
    ("intermediate", "sglang", "vllm"),
    [
        (2048, [1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32]),  # DeepSeek-V3
        (1536, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], [1, 2, 3, 4, 6, 8, 12, 24]),
        (768, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], [1, 2, 3, 4, 6, 12]),
        (80, [1, 2, 4, 5, 8, 10, 16, 20, 40], [1]),
        (64, [1, 2, 4, 8, 16, 32, 64], [1]),
    ],
)
def test_sizes_that_engines_can_serve(
    intermediate: int, sglang: list[int], vllm: list[int]
) -> None:
    geometry = Geometry(4, 256, intermediate)
    assert tensor_parallel_sizes([geometry]) == {"sglang": sglang, "vllm": vllm}


def test_a_size_must_suit_all_layers() -> None:
    layers = [Geometry(4, 256, 192), Geometry(4, 256, 128), Geometry(8, 256, 192)]
    assert tensor_parallel_sizes(layers) == {"sglang": [1, 2, 4, 8, 16, 32, 64], "vllm": [1]}
    assert tensor_parallel_sizes(iter(layers)) == tensor_parallel_sizes(layers)


def test_without_layers_there_are_no_sizes() -> None:
    assert tensor_parallel_sizes([]) == {}


@by_engine
@pytest.mark.parametrize(
    "folder", ["/models/out", "my model", "it's", "$(reboot)", "a;b", "-x", "modèle", 'two "words"']
)
def test_the_serve_command_names_the_folder_to_a_shell(engine: Engine, folder: str) -> None:
    """As one word, whatever is in it."""
    command = serve_commands(folder)[engine.name]
    words = shlex.split(command)
    assert words.count(folder) == 1
    assert "\n" not in command
    assert words[-1] == "flashinfer_trtllm"


def test_serve_commands() -> None:
    assert serve_commands("/models/my out") == {
        "sglang": "python -m sglang.launch_server --model-path '/models/my out' "
        "--moe-runner-backend flashinfer_trtllm",
        "vllm": "vllm serve '/models/my out' --moe-backend flashinfer_trtllm",
    }
