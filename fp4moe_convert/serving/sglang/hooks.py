"""SGLang's hooks, in the order in which a start meets them.

1. SGLang reads config.json. The hook puts the source's own ``quantization_config`` back, with the
   converted section below `CONVERTED_KEY`. From here on SGLang sees the checkpoint that it knows,
   and chooses models, backends and options as it would for the original.
2. SGLang makes the quantization config, on each rank. The hook checks the checkpoint and returns
   the same config, but for what it gives to converted layers: an MoE method of ours in the place
   of the method, or of the scheme, that stock chose.
3. That method creates stock's parameters, which already have their final shapes.
4. SGLang has built a model, of any checkpoint. The hook puts a `gate.Gate` before it: all that is
   loaded now or later is judged there. The gate hands the tensors of converted layers to their
   loaders, which copy a rank's share out of them, on any thread.
5. After loading, the method does what stock does, except for the layout: it pads, interleaves and
   shuffles nothing. A parameter that was not loaded stops the engine.
6. An update from a folder is judged before SGLang touches the model. One from tensors that is
   refused is answered with the reason.

A draft that SGLang builds from another class than the checkpoint's, as for multi-token prediction,
has layers of its own, which are never converted; a whole model as a draft is a model like others.
SGLang logs and swallows what a plugin raises at its start, so the hooks raise what must stop the
engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from ...engines.sglang import SGLANG
from ...errors import ServingError
from ...format.contract import QUANT_METHOD, ConvertedSection
from ...source.description import is_mixed_precision, settings_of
from ..checks import (
    CONVERTED_KEY,
    check_row_order,
    check_share,
    read_section,
    refusal,
    warn_if_untested,
)
from ..gate import Gate, gate_for, gate_of, guard

TESTED = ("0.5.23",)

CLASSES_KEY = "fp4moe_architectures"
"""Where config.json's ``architectures`` are kept: SGLang writes a draft's own over them."""


def _restore_section(config: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``get_config``: let a converted checkpoint's config say what the source's said.

    This is the one place that all readers of the section come after; there are a dozen.
    """
    section = getattr(config, "quantization_config", None)
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry

    converted = read_section(section)
    # SGLang goes on without the hooks whose targets it does not have.
    if unhooked := HOOKS.keys() - HookRegistry._patched:
        raise refusal(
            f"this SGLang has no {min(unhooked)} to hook into", f"install SGLang {TESTED[-1]}"
        )
    # hf_quant_config.json nests what config.json has flat. SGLang reads both, but takes the first
    # for the second once it has written its own name for the method into it.
    source = settings_of(converted.source)
    if is_mixed_precision(source):
        # SGLang reads that file, too, for what the section lacks (model_loader/weight_utils.py:283
        # in 0.5.23): the layers' algorithms, or that of the KV cache. It is not here, so that the
        # section says what a file without that key says.
        file = settings_of(converted.source_hf_quant_config or {})
        source = {"kv_cache_quant_algo": None, **file, **source}
    config.quantization_config = {
        "quant_method": "modelopt",
        **source,
        CONVERTED_KEY: section,
        CLASSES_KEY: list(config.architectures or ()),
    }


def _converted(model_config: Any) -> ConvertedSection | None:
    """The section of a converted checkpoint, as `_restore_section` leaves it."""
    section = getattr(model_config.hf_config, "quantization_config", None)
    if not isinstance(section, dict) or CONVERTED_KEY not in section:
        return None
    return read_section(section[CONVERTED_KEY])


def _is_whole(model_config: Any) -> bool:
    """Whether SGLang builds the model that config.json names, not a draft out of other layers."""
    named: object = model_config.hf_config.quantization_config[CLASSES_KEY]
    return named == list(model_config.hf_config.architectures or ())


def _take_over(
    quant_config: Any, model_config: Any, load_config: Any, *_args: Any, **_kwargs: Any
) -> Any:
    """After ``_get_quantization_config``: check a converted checkpoint and return a config of ours.

    Returns:
        None, which lets the config stand, for any other checkpoint and for other layers of one.
    """
    converted = _converted(model_config)
    if converted is None or not _is_whole(model_config):
        return None
    import sglang
    from sglang.srt.runtime_context import get_exec, get_parallel

    from .experts import take_over

    for option, reason in OPTIONS.items():
        if getattr(get_exec().moe, option):
            raise refusal(reason, f"leave --{option.replace('_', '-')} out")
    if (load_format := load_config.load_format) in LOAD_FORMATS:
        raise refusal(
            f"the load format {load_format.value} does not load a checkpoint's tensors",
            "leave --load-format out",
        )
    check_row_order(converted, SGLANG)
    warn_if_untested(SGLANG, sglang.__version__, TESTED)
    for prefix, geometry in converted.layers.items():
        check_share(
            SGLANG, prefix, geometry, get_parallel().moe_tp_size, options="--tp-size and --ep-size"
        )
    take_over(quant_config, converted, model_config)
    return quant_config


def _put_gate(model: Any, model_config: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``_initialize_model``, of any model."""
    converted = _converted(model_config)
    if converted is None:
        guard(model, Gate(None, {}))
        return
    from .experts import loaders_of

    loaders = loaders_of(model)
    gate = gate_for(
        model,
        converted,
        {
            loader.converted_layer.prefix: partial(loader.deliver, name)
            for name, loader in loaders.items()
        },
        layer_count=model_config.num_hidden_layers if _is_whole(model_config) else None,
        engine=SGLANG,
    )
    layers = [loader.layer for loader in loaders.values()]
    guard(model, gate, filled=[each for each in layers if not each.num_fused_shared_experts])


def _answer_update(
    update: Callable[..., tuple[bool, str]], *args: Any, **options: Any
) -> tuple[bool, str]:
    """Around ``update_weights_from_tensor``, the one update that lets what a model raises through
    to the scheduler, which then ends."""
    try:
        return update(*args, **options)
    except ServingError as error:
        return False, str(error)


def _judge_update(
    update: Callable[..., tuple[bool, str]],
    updater: Any,
    model_path: str,
    load_format: str,
    weight_name_filter: Any = None,
    **options: Any,
) -> tuple[bool, str]:
    """Around ``update_weights_from_disk``, which cannot go back once it has begun: it would load
    the same folder once more."""
    gate = gate_of(updater.get_model())
    if gate.converted is not None:
        # Elastic expert parallelism wants single experts again. As with models of which SGLang
        # cannot tell what these are called, all is loaded.
        weight_name_filter = None
    try:
        gate.check_folder(model_path)
    except ServingError as error:
        return False, str(error)
    return update(updater, model_path, load_format, weight_name_filter, **options)


OPTIONS = {
    "kt_weight_path": "KTransformers keeps experts in a form of its own",
    "enable_paged_experts": "paged experts are loaded one by one",
    "enable_elastic_expert_backup": "a backup of experts is loaded one by one",
}
"""Options of SGLang's with which another kernel or loader takes the experts, and why the plugin
cannot serve them."""

LOAD_FORMATS = ("dummy", "sharded_state", "presharded", "remote")
"""Load formats of SGLang's that make weights up, or load what a model has made of a checkpoint, and
then let the layers process it as if it were one."""

UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"

HOOKS: dict[str, tuple[Callable[..., Any], str]] = {
    "sglang.srt.utils.hf_transformers.config.get_config": (_restore_section, "after"),
    "sglang.srt.model_loader.loader._get_quantization_config": (_take_over, "after"),
    "sglang.srt.model_loader.loader._initialize_model": (_put_gate, "after"),
    f"{UPDATER}.update_weights_from_disk": (_judge_update, "around"),
    f"{UPDATER}.update_weights_from_tensor": (_answer_update, "around"),
}


@cache  # SGLang may call it more than once in a process
def register() -> None:
    """Hook into SGLang."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, (hook, when) in HOOKS.items():
        HookRegistry.register(target, hook, HookType(when))
