"""docs/models.md names what an engine does not load, with its words."""

from __future__ import annotations

import sglang_zoo
import vllm_zoo
from test_docs import names, table


def test_what_is_not_loaded_is_documented() -> None:
    documented = {
        (names(name)[0], engine): names(words)[0]
        for name, engine, words, _ in table("models.md", "Not loaded here")
    }
    known = {"SGLang": sglang_zoo.UNLOADABLE | sglang_zoo.NOT_SERVED, "vLLM": vllm_zoo.UNLOADABLE}
    assert documented == {
        (name, engine): words for engine, own in known.items() for name, words in own.items()
    }
