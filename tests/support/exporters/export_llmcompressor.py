"""Quantize and export models as llm-compressor does. Runs in its environment only.

python export_llmcompressor.py OUT FAMILY[-SCHEME] [FAMILY[-SCHEME] ...]

SCHEME is NVFP4, or NVFP4A16 for weights only.
"""

from __future__ import annotations

import sys
import tempfile

import models
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

words = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="a")
tokens = models.tokens()
data = Dataset.from_dict(
    {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
)
for name in sys.argv[2:]:
    family, _, scheme = name.partition("-")
    with tempfile.TemporaryDirectory() as base:
        made = models.make(family)
        made.save_pretrained(base)
        model = type(made).from_pretrained(base, dtype=torch.bfloat16)
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=data,
            recipe=QuantizationModifier(
                targets="Linear",
                scheme=scheme or "NVFP4",
                ignore=[
                    *("re:.*lm_head", "re:.*gate$", "re:.*router", "re:.*self_attn.*"),
                    *("re:.*vision.*", "re:.*visual.*", "re:.*multi_modal_projector.*"),
                ],
            ),
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
        )
        model.save_pretrained(f"{sys.argv[1]}/{name}", save_compressed=True)
