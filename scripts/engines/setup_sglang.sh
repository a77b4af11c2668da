#!/usr/bin/env bash
# Create the environment in which tests/engines loads models through SGLang. Idempotent; no GPU, no
# CUDA packages. A few minutes and 2.7 GB the first time.
#
#   scripts/engines/setup_sglang.sh
#
# PYTHON          the interpreter to use; python3
# FP4MOE_ENGINES  where the environments go; ~/.cache/fp4moe-engines
#
# Where pip would take a CUDA build of torch, name an index with CPU builds first:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${FP4MOE_ENGINES:-${XDG_CACHE_HOME:-$HOME/.cache}/fp4moe-engines}/sglang
project="$PWD"

# The project is installed where it lies: another checkout needs another installation.
if [ "$venv/ready" -nt scripts/engines/setup_sglang.sh ] && [ "$venv/ready" -nt pyproject.toml ] &&
    [ "$(cat "$venv/ready")" = "$project" ]; then
    exit 0
fi
echo "setting up $venv (a few minutes the first time)" >&2
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

pip install torch==2.13.0 numpy==2.4.6
"$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda and "torch is a CUDA build")'

# What would bring CUDA libraries along; loading models takes none of them.
pip install --no-deps sglang==0.5.23 flashinfer-python==0.7.2.post1 triton==3.9.0 gguf==0.19.0 \
    dill==0.4.1
# What SGLang and FlashInfer import on the way there. That pip misses the rest is meant to be.
pip install --only-binary :all: torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
    transformers==5.19.0 compressed-tensors==0.18.0 openai==2.8.0 \
    aiohttp anthropic apache-tvm-ffi build cloudpickle distro easydict einops fastapi httpx \
    interegular ipython msgspec ninja nvidia-ml-py orjson packaging partial_json_parser pillow \
    prometheus-client psutil pybase64 pydantic python-dateutil python-multipart pyzmq regex \
    requests scipy sentencepiece setproctitle tabulate tiktoken tqdm uvicorn uvloop watchfiles \
    xxhash zstandard 2> >(grep -v -e 'dependency resolver' -e 'which is not installed' \
    -e '^sglang .* but you have' >&2)
pip install --no-deps --editable .
printf '%s' "$project" >"$venv/ready"
