"""Quantize and export models as NVIDIA ModelOpt does. Runs in its environment only.

python export_modelopt.py OUT FAMILY[-CONFIGURATION] [FAMILY[-CONFIGURATION] ...]

CONFIGURATION is one of ModelOpt's, without _CFG; NVFP4_DEFAULT quantizes all linear layers.
"""

from __future__ import annotations

import sys

import modelopt.torch.quantization as mtq
import models
from modelopt.torch.export import export_hf_checkpoint

for name in sys.argv[2:]:
    family, _, configuration = name.partition("-")
    model = mtq.quantize(
        models.make(family),
        getattr(mtq, f"{configuration or 'NVFP4_DEFAULT'}_CFG"),
        lambda model: [model(row[None]) for row in models.tokens()],
    )
    export_hf_checkpoint(model, export_dir=f"{sys.argv[1]}/{name}")
