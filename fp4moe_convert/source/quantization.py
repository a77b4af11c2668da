"""How a checkpoint says that it is quantized, and whether that is ModelOpt's NVFP4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import CheckpointError
from ..format.contract import GROUP_SIZE
from ..format.files import CONFIG_NAME, HF_QUANT_CONFIG_NAME
from .checkpoint import Checkpoint


def require_nvfp4(checkpoint: Checkpoint) -> None:
    """Refuse what is not a ModelOpt NVFP4 checkpoint with blocks of 16, and say what it is.

    Raises:
        CheckpointError: already converted, another quantization, or none.
    """
    section = checkpoint.quantization
    if checkpoint.is_converted:
        raise CheckpointError(f"{checkpoint.location}: is already converted")
    if section is None:
        dtype = checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype"))
        raise CheckpointError(
            f"{checkpoint.location}: not NVFP4: it is not quantized"
            + (f" ({CONFIG_NAME} says {dtype})" if dtype else "")
        )
    in_config = checkpoint.config.get("quantization_config") is not None
    file = CONFIG_NAME if in_config else HF_QUANT_CONFIG_NAME
    settings = _settings(section)
    producer = section.get("producer")
    maker = producer.get("name") if isinstance(producer, dict) else None
    method = section.get("quant_method", maker or "modelopt")
    algorithm = settings.get("quant_algo")
    # transformers' reader of ModelOpt's section also knows the method as "modelopt_fp4".
    if not str(method).startswith("modelopt") or algorithm != "NVFP4":
        kind = _words(method, algorithm, section.get("format"))
        raise CheckpointError(f"{file}: not ModelOpt NVFP4: the quantization is {kind}")
    for group_size in _group_sizes(settings):
        if group_size != GROUP_SIZE:
            raise CheckpointError(f"{file}: group size is {group_size}, NVFP4 has {GROUP_SIZE}")


def describe(section: Mapping[str, Any]) -> str:
    """A few words on a section, a source's or a converted one: its method and algorithm."""
    source = section.get("source")
    own = source if isinstance(source, dict) else section
    algorithm = _settings(own).get("quant_algo") or own.get("format")
    return _words(section.get("quant_method"), algorithm) or "none"


def _settings(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """hf_quant_config.json nests what config.json has at the top."""
    nested = section.get("quantization")
    return nested if isinstance(nested, dict) else section


def _words(*values: object) -> str:
    return " ".join(str(value) for value in values if value)


def _group_sizes(settings: Mapping[str, Any]) -> Iterator[Any]:
    groups = settings.get("config_groups")
    described = [settings]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            described.append(weights)
    for each in described:
        if each.get("group_size") is not None:
            yield each["group_size"]
