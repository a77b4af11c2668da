#!/usr/bin/env bash
# Create the CPU environment in which vLLM's own code loads models. Idempotent; three minutes and
# 2.8 GB the first time. Run by scripts/setup_engines.sh, which says what can be set.
#
# vLLM's wheel and FlashInfer's are installed without what they ask for, which would bring CUDA
# packages of several GB; the lists below are what loading a model imports.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${FP4MOE_ENGINES:-${XDG_CACHE_HOME:-$HOME/.cache}/fp4moe-engines}/vllm

# Ready is an environment made by this script for this checkout.
ready=$venv/ready
if [ -f "$ready" ] && [ "$(cat "$ready")" = "$PWD" ] &&
    [ "$ready" -nt scripts/engines/setup_vllm.sh ] && [ "$ready" -nt pyproject.toml ]; then
    exit 0
fi
echo "setting up $venv (a few minutes the first time)" >&2
mkdir -p "$(dirname "$venv")"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
rm -f "$ready"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

pip install torch==2.13.0 numpy
"$venv/bin/python" - <<'PY'
import sys, torch
if torch.version.cuda:
    sys.exit("pip took a CUDA build of torch; remove the environment and name an index with CPU "
             "builds: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
PY
pip install \
    'transformers>=5.16.1,<5.21' 'pydantic>=2.12' 'openai>=2.25' depyf==0.20.0 \
    aiohttp blake3 cachetools cbor2 cloudpickle einops huggingface_hub ijson jsonschema lark \
    msgspec ninja nvidia-ml-py orjson packaging partial-json-parser pillow \
    prometheus_client protobuf psutil py-cpuinfo pybase64 python-json-logger pyyaml pyzmq regex \
    requests safetensors sentencepiece setproctitle tabulate tiktoken tokenizers tqdm uvloop \
    watchfiles xxhash
pip install --no-deps \
    vllm==0.33.0 flashinfer-python==0.7.2.post1 \
    apache-tvm-ffi==0.1.11 compressed-tensors==0.17.0 'fastapi>=0.133,<0.137' \
    'llguidance>=1.7,<1.8' loguru 'oss-harmony>=0.0.11' starlette xgrammar==0.2.8
pip install --no-deps --editable .
printf '%s\n' "$PWD" > "$ready"
