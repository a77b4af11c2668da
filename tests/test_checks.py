"""What stops an engine before it loads a converted checkpoint, and with which words."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp4moe_convert.engines.sglang import SGLANG
from fp4moe_convert.engines.vllm import VLLM
from fp4moe_convert.errors import ServingError
from fp4moe_convert.format.contract import ConvertedSection, Geometry, LayoutRecord
from fp4moe_convert.layouts import fingerprints
from fp4moe_convert.layouts.base import RowOrder
from fp4moe_convert.layouts.trtllm_nvfp4 import TRTLLM_NVFP4
from fp4moe_convert.serving.checks import (
    check_row_order,
    check_share,
    read_section,
    refusal,
    warn_if_untested,
)

pytestmark = pytest.mark.flashinfer

FALSE = "xxh3_128:" + "0" * 32
WAY_OUT = "serve the original checkpoint instead"


def converted(row_order: str = TRTLLM_NVFP4.fingerprint) -> ConvertedSection:
    return ConvertedSection(
        layout=LayoutRecord(TRTLLM_NVFP4.name, TRTLLM_NVFP4.parameters, row_order, "0.7.2.post1"),
        layers={"model.layers.3.mlp.experts": Geometry(256, 7168, 2048)},
        source={"quant_method": "modelopt", "quant_algo": "NVFP4"},
    )


def section(**changes: Any) -> dict[str, Any]:
    """What config.json says."""
    return converted().as_json() | changes


def refuses(reason: str, remedy: str | None = None) -> Any:
    """The whole of one message."""
    message = f"fp4moe: {reason}; {f'{remedy}, or ' if remedy else ''}{WAY_OUT}"
    return pytest.raises(ServingError, match=f"^{re.escape(message)}$")


def test_a_refusal_says_what_to_do() -> None:
    assert str(refusal("no")) == f"fp4moe: no; {WAY_OUT}"
    assert str(refusal("no", "try again")) == f"fp4moe: no; try again, or {WAY_OUT}"


# --- the section ----------------------------------------------------------------------------------


def test_a_section_is_read() -> None:
    assert read_section(section()) == converted()


def test_a_section_is_read_where_flashinfer_cannot_be_imported(
    install_flashinfer: Callable[[str | None], None],
) -> None:
    """A front end does not initialize CUDA for it."""
    install_flashinfer("99.0")
    assert read_section(section()) == converted()


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        *((version, "convert again") for version in (1, 0, None, "2")),
        (3, "install a newer fp4moe-convert, or convert again with this one"),
    ],
)
def test_an_unknown_format_version_is_refused(version: object, remedy: str) -> None:
    with refuses(
        f"config.json: format version is {version!r}, this release of fp4moe-convert knows 2",
        remedy,
    ):
        read_section(section(format_version=version))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "cutlass_nvfp4"}, "cutlass_nvfp4 (epilogue_tile_m 128)"),
        ({"epilogue_tile_m": 64}, "trtllm_nvfp4 (epilogue_tile_m 64)"),
        ({"swizzled": True}, "trtllm_nvfp4 (epilogue_tile_m 128, swizzled True)"),
    ],
)
def test_an_unknown_layout_is_refused(changes: dict[str, object], words: str) -> None:
    with refuses(
        f"config.json: the layout is {words}, "
        "this release of fp4moe-convert knows trtllm_nvfp4 (epilogue_tile_m 128)"
    ):
        read_section(section(layout=section()["layout"] | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"layers": {"model.layers.3.mlp.experts": {"experts": 0, "hidden": 1, "intermediate": 1}}},
        {"layout": {"name": "trtllm_nvfp4"}},
        {"source": "modelopt"},
    ],
    ids=str,
)
def test_a_malformed_section_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(
        ServingError,
        match=rf"^fp4moe: config\.json: quantization_config is malformed: [^\n]+; {WAY_OUT}$",
    ):
        read_section(section(**changes))


def test_a_server_of_another_checkpoint_imports_no_more_than_it_needs() -> None:
    """SGLang calls the hooks in each of its processes. FlashInfer would initialize CUDA there."""
    program = "import sys, fp4moe_convert.serving.sglang.hooks; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert not {"flashinfer", "sglang", "vllm"} & set(done.stdout.decode().split())


# --- the order of rows ----------------------------------------------------------------------------


@pytest.fixture
def flashinfer_answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the engine's FlashInfer have some order of rows."""

    def answer(fingerprint: str) -> None:
        monkeypatch.setattr(fingerprints, "ask", lambda: RowOrder(fingerprint, "9.9"))

    return answer


def test_the_installed_flashinfer_orders_rows_as_we_do() -> None:
    check_row_order(converted(), SGLANG)


def test_another_row_order_is_refused_in_one_message(
    flashinfer_answers: Callable[[str], None],
) -> None:
    """Laid out wrongly, weights would not crash but answer nonsense."""
    ours = TRTLLM_NVFP4.fingerprint
    flashinfer_answers(FALSE)
    with refuses(
        f"the checkpoint was laid out for the row order {ours} of flashinfer 0.7.2.post1, "
        f"this SGLang has flashinfer 9.9 with {FALSE}",
        "convert again with it",
    ):
        check_row_order(converted(), SGLANG)


def test_the_order_that_the_checkpoint_says_counts_not_the_one_that_we_write(
    flashinfer_answers: Callable[[str], None],
) -> None:
    """It may be of a later release than this plugin."""
    flashinfer_answers(FALSE)
    check_row_order(converted(FALSE), VLLM)


def test_a_checkpoint_of_another_order_is_refused_by_the_installed_flashinfer() -> None:
    ours = TRTLLM_NVFP4.fingerprint
    with pytest.raises(ServingError, match=f"row order {FALSE} of .* vLLM has .* with {ours};"):
        check_row_order(converted(FALSE), VLLM)


def test_flashinfer_is_asked_on_the_cpu_whatever_the_default_device() -> None:
    """Engines set another one while they build a model. On "meta" tensors have no values."""
    with torch.device("meta"):
        check_row_order(converted(), VLLM)
        assert torch.empty(1).device.type == "meta"


def test_a_flashinfer_that_cannot_be_asked_is_refused(
    install_flashinfer: Callable[[str | None], None],
) -> None:
    install_flashinfer("99.0")
    with pytest.raises(
        ServingError,
        match=r"^fp4moe: flashinfer: cannot be imported \([^\n]+install flashinfer-python; "
        f"{WAY_OUT}$",
    ):
        check_row_order(converted(), VLLM)


# --- ranks ----------------------------------------------------------------------------------------


def test_ranks_that_cannot_share_a_layer_are_refused() -> None:
    """SGLang fills with zeros what is not whole blocks of 16, vLLM cannot cut there."""
    geometry = Geometry(8, 256, 96)
    check_share(SGLANG, "layer", geometry, 4, options="--tp-size")
    check_share(VLLM, "layer", geometry, 2, options="--tp")
    with refuses(
        "layer: 4 ranks cannot share an intermediate size of 96",
        "use --tp for one of 1, 2, 3, 6 ranks to an expert",
    ):
        check_share(VLLM, "layer", geometry, 4, options="--tp")


# --- releases that were not tested ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.33.0", ["0.33.0"]),
        ("0.33.0+cu130", ["0.33.0"]),
        ("0.33.7.dev1+g12ab", ["0.32.0", "0.33.*"]),
    ],
)
def test_a_tested_release_is_nothing_to_warn_of(
    caplog: pytest.LogCaptureFixture, version: str, tested: list[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        warn_if_untested(VLLM, version, tested)
    assert caplog.messages == []


@pytest.mark.parametrize("version", ["0.34.0", "0.33.0.post1", "10.33.0", "nonsense"])
def test_another_release_is_warned_of_once(caplog: pytest.LogCaptureFixture, version: str) -> None:
    with caplog.at_level(logging.DEBUG):
        warn_if_untested(VLLM, version, ["0.32.*", "0.33.0"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    message = f"fp4moe: tested with vLLM 0.32.*, 0.33.0, this is {version}; if it does not load, "
    assert caplog.messages == [message + WAY_OUT]
