"""What ModelOpt and llm-compressor themselves have written is converted, or refused for the true
reason; `support.exporters` has them write it. tests/engines loads the same checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import exporters
from support.folders import every_file
from support.round_trip import there_and_back
from typer.testing import CliRunner

from fp4moe_convert import CheckpointError, convert, inspect, verify
from fp4moe_convert.cli.commands import app
from fp4moe_convert.source.checkpoint import open_checkpoint
from fp4moe_convert.storage.local import LocalFolder

pytestmark = pytest.mark.exporters


REFUSED = [name for name in exporters.EXPORTS if name not in exporters.CONVERTED]


@pytest.mark.parametrize("name", exporters.CONVERTED)
def test_an_export_is_converted(name: str, tmp_path: Path) -> None:
    source = exporters.exported(name)
    found = inspect(source)
    assert set(found.families.values()) == {exporters.EXPORTS[name].row}
    arguments = ["convert", str(source), str(tmp_path / "converted"), "--dry-run", "--json"]
    planned = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert list(tmp_path.iterdir()) == []
    report = convert(source, tmp_path / "converted", verify=True)
    assert planned["families"] == found.families
    assert report.warnings == found.warnings == planned["warnings"] == []
    assert report.passed_layers == {}
    assert report.layers == len(found.layers) == len(moe_layers(source))
    converted = inspect(tmp_path / "converted")
    assert converted.layers == found.layers
    assert converted.serve == report.serve == planned["serve"] != {}
    assert verify(tmp_path / "converted", source=source).tensors == report.tensors_out
    there_and_back(source, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_an_export_is_refused_for_the_true_reason(name: str, tmp_path: Path) -> None:
    source, reason = exporters.exported(name), exporters.EXPORTS[name].refusal
    assert reason is not None
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        convert(source, tmp_path / "out")
    found = inspect(source)
    assert (found.state, found.serve) == ("unsupported", {})
    assert reason in (found.reason or "")
    assert list(tmp_path.iterdir()) == []


def test_a_list_counts_layers_and_a_nul_harms_nothing() -> None:
    """Nemotron-H of transformers 5 has no num_hidden_layers, and ModelOpt leaves a mark of its own,
    with a NUL in it, in the names of its modules."""
    source = exporters.exported("modelopt-nemotron_h")
    config = json.loads((source / "config.json").read_text())
    assert "num_hidden_layers" not in config
    assert any("\0" in module for module in config["quantization_config"]["ignore"])
    assert open_checkpoint(LocalFolder(source)).text.layer_count == 4


@pytest.mark.parametrize("exporter", ["modelopt", "llmcompressor"])
def test_an_exporter_writes_the_same_bytes_again(exporter: str, tmp_path: Path) -> None:
    """Otherwise a test could pass here and fail elsewhere."""
    exporters.run_exporter(exporter, tmp_path, ["qwen3_moe"])
    again, before = (
        every_file(folder / "qwen3_moe")
        for folder in (tmp_path, exporters.exported(f"{exporter}-qwen3_moe").parent)
    )
    assert again.pop("model.safetensors") == before.pop("model.safetensors")
    assert again.keys() == before.keys()


def moe_layers(folder: Path) -> set[str]:
    """The layers that have routed experts, by the names of their tensors alone."""
    checkpoint = open_checkpoint(LocalFolder(folder))
    names = (tensor.name for shard in checkpoint.shards for tensor in shard.header.tensors)
    matches = (re.match(r".*\.layers\.\d+(?=\..*experts\.(\d|gate_up))", name) for name in names)
    return {match[0] for match in matches if match}
