"""Ask the installed FlashInfer for its row order, and print its row of `fingerprints.RECORDED`.

    python -m tests.support.record_flashinfer

It must order rows as this package does, for all of `RECORDED_COUNTS`.
"""

from __future__ import annotations

from fp4moe_convert.layouts.fingerprints import RECORDED_COUNTS, compare
from fp4moe_convert.layouts.trtllm_nvfp4 import written_rows

if __name__ == "__main__":
    order = compare(written_rows, RECORDED_COUNTS)
    print(f'    "{order.flashinfer}": "{order.fingerprint}",')
