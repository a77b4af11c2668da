"""What config.json says of the text model, at its top or in a nested object.

Multimodal models nest it as ``text_config``, ``llm_config``, ``thinker_config.text_config`` and so
on, beside objects that describe vision or audio and have layers of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import CheckpointError
from ..format.files import CONFIG_NAME

Json = Mapping[str, Any]
Path = tuple[str, ...]

PER_LAYER_LISTS = ("layers_block_type", "hybrid_override_pattern", "block_configs", "layer_types")
"""An entry, or a letter, for each layer. Nemotron-H of transformers 5 has nothing else to count
them by."""
EXPERT_COUNT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
"""How E is spelled: DeepSeek and GLM, Qwen, Mixtral and MiniMax, ERNIE and Step. SGLang 0.5.23 and
vLLM 0.33.0 read no other keys of a layer's routed experts."""
SECTION_KEYS = ("quantization_config", "compression_config")
"""What describes a quantization. Engines read the second where there is no first."""

_NAMES = ("thinker_config", "llm_config", "language_config", "text_config")
"""Objects that are a text model's by their name, in the order in which SGLang takes them."""
_TOP, _OTHER = len(_NAMES), len(_NAMES) + 1


@dataclass(frozen=True)
class TextConfig:
    """The object of config.json that has the text model's layers."""

    config: Json
    """All of config.json."""
    path: Path
    """The keys that lead to the object; none where config.json itself is it."""

    @property
    def own(self) -> Json:
        """The object itself."""
        return self._around[0][1]

    @cached_property
    def layer_count(self) -> int | None:
        """How many layers the decoder has, without those of multi-token prediction.

        Raises:
            CheckpointError: it is not a positive integer.
        """
        if said := _layer_count(self.own):
            return _positive(self.path, *said)
        lists = [self.own[key] for key in PER_LAYER_LISTS if _is_list(self.own.get(key))]
        return len(lists[0]) if lists else None

    def expert_count(self, layer: int) -> int | None:
        """How many routed experts a layer has, if config.json says so.

        Raises:
            CheckpointError: it is not a positive integer.
        """
        blocks = self.own.get("block_configs")
        if isinstance(blocks, list) and layer < len(blocks) and isinstance(blocks[layer], dict):
            for path, key, value in _expert_counts(blocks[layer]):
                return _positive((*self.path, "block_configs", str(layer), *path), key, value)
        if self._experts is None:
            return None
        path, key, value = self._experts
        if not isinstance(value, list):
            return _positive(path, key, value)
        # One for each layer. ERNIE's has one for text and one for vision.
        return _positive(path, key, value[layer]) if len(value) == self.layer_count else None

    @cached_property
    def _experts(self) -> tuple[Path, str, Any] | None:
        """What says first how many experts there are, from the object outwards."""
        for above, content in self._around:
            for path, key, value in _expert_counts(content):
                return (*above, *path), key, value
        return None

    @cached_property
    def announces_mtp(self) -> bool:
        """Whether it says that the model has layers of multi-token prediction."""
        return any(value for key, value in self.own.items() if "nextn" in key or "mtp" in key)

    def owner_of(self, name: str) -> str | None:
        """Which other model with experts a tensor belongs to, by the first part of its name:
        ``talker`` where config.json has a talker_config, as Qwen3-Omni's. None where it may be the
        text model's."""
        owner = name.partition(".")[0]
        key = f"{owner}_config"
        content = self.config.get(key)
        if key in (*self.path[:1], *SECTION_KEYS) or not isinstance(content, dict):
            return None
        within = (each for _, each in objects_in(content))
        has_experts = any(_describes_layers(each) and any(_expert_counts(each)) for each in within)
        return owner if has_experts else None

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embedding, and of the head, if config.json says so."""
        sizes = (content.get("vocab_size") for _, content in self._around)
        return next((size for size in sizes if type(size) is int and size > 1), None)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the head may be the embedding. That is transformers' default."""
        said = [content.get("tie_word_embeddings") for _, content in self._around]
        return True in said or False not in said

    @property
    def sections(self) -> dict[tuple[Path, str], Any]:
        """What describes its quantization, by the path to an object and the key there. Those
        nearer to the top come first, because engines look there first."""
        own = [self.path[:depth] for depth in range(len(self.path) + 1)]
        found = {
            (path, key): content[key]
            for path, content in objects_in(self.config)
            if path in own or _is_named(path)
            for key in SECTION_KEYS
            if content.get(key) is not None
        }
        return dict(sorted(found.items(), key=lambda place: len(place[0][0])))

    @cached_property
    def _around(self) -> list[tuple[Path, Json]]:
        """The object itself, then those around it."""
        found = [self.config]
        for key in self.path:
            found.append(found[-1][key])
        return [(self.path[:depth], found[depth]) for depth in range(len(self.path), -1, -1)]


def find_text_config(config: Json) -> TextConfig:
    """Find the object that has the text model's layers. Its name or its experts tell it from one of
    vision.

    Raises:
        CheckpointError: several may be meant, and they differ.
    """
    layered = {path: each for path, each in objects_in(config) if _describes_layers(each)}
    by_name = {p: each for p, each in layered.items() if p and _is_named(p)} or layered
    with_experts = [p for p, each in by_name.items() if any(_expert_counts(each))]
    candidates = sorted(with_experts or by_name or [()], key=_rank)
    first, *others = (TextConfig(config, path) for path in candidates)
    for other in others:
        if _rank(other.path) == _rank(first.path) and other.layer_count != first.layer_count:
            raise CheckpointError(
                f"{CONFIG_NAME}: {'.'.join(first.path)} has {first.layer_count} layers and "
                f"{'.'.join(other.path)} has {other.layer_count}, and nothing tells which of them "
                "is the text model's"
            )
    return first


def objects_in(config: Json, path: Path = ()) -> Iterator[tuple[Path, Json]]:
    """``config`` and every object nested in it, each with the keys that lead there; lists and
    sections apart."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and key not in SECTION_KEYS:
            yield from objects_in(value, (*path, key))


def without_sections(text: TextConfig) -> dict[str, Any]:
    """config.json without any description of the text model's quantization.

    A model's own code may prefer a nested one to that at the top, as SGLang's Kimi-K3 does.
    """
    places = text.sections

    def copied(path: Path, content: Json) -> dict[str, Any]:
        return {
            key: copied((*path, key), value) if isinstance(value, dict) else value
            for key, value in content.items()
            if (path, key) not in places
        }

    return copied((), text.config)


def _is_named(path: Path) -> bool:
    return all(key in _NAMES for key in path)


def _rank(path: Path) -> list[int]:
    return [_NAMES.index(key) if key in _NAMES else _OTHER for key in path] or [_TOP]


def _describes_layers(content: Json) -> bool:
    return _layer_count(content) is not None or any(
        _is_list(content.get(key)) for key in PER_LAYER_LISTS
    )


def _layer_count(content: Json) -> tuple[str, Any] | None:
    """What an object says of its number of layers, with the key.

    LongCat's num_hidden_layers counts two attentions a layer, and vLLM 0.33.0 passes over it
    (transformers_utils/model_arch_config_convertor.py:761). On the Hub it has neither that key nor
    a model_type, and is known by its architecture (transformers_utils/config.py:182).
    """
    architectures = content.get("architectures")
    names = [content.get("model_type")]
    names += architectures if isinstance(architectures, list) else []
    is_longcat = any(str(name).startswith(("longcat_flash", "LongcatFlash")) for name in names)
    keys = [*(["num_layers"] if is_longcat else []), "num_hidden_layers"]
    return next(((key, content[key]) for key in keys if content.get(key) is not None), None)


def _expert_counts(content: Json) -> Iterator[tuple[Path, str, Any]]:
    """E as an object says it, or as one says it that is nested in it and has no layers of its own:
    Mistral's ``moe``, DBRX's ``ffn_config``."""
    nested = [
        ((key,), value)
        for key, value in content.items()
        if isinstance(value, dict) and key not in SECTION_KEYS and not _describes_layers(value)
    ]
    for path, each in [((), content), *nested]:
        for key in EXPERT_COUNT_KEYS:
            if each.get(key):
                yield path, key, each[key]


def _is_list(value: object) -> bool:
    return isinstance(value, (list, str)) and len(value) > 0


def _positive(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        name = ".".join((*path, key))
        raise CheckpointError(f"{CONFIG_NAME}: {name} is {value!r}, expected a positive integer")
    return value
