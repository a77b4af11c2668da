#!/usr/bin/env bash
# Create .venv with everything the demo, the tests and the benchmarks need. Idempotent; no GPU.
#
#   scripts/setup.sh
#
# PYTHON        the interpreter to use; python3
# FP4MOE_VENV   where the environment goes; .venv
#
# Where pip would take a CUDA build of torch (several GB), name an index with CPU builds first:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${FP4MOE_VENV:-.venv}
lock=requirements-cpu.txt

if [ -f "$venv/ready" ] && [ "$venv/ready" -nt "$lock" ] && [ "$venv/ready" -nt pyproject.toml ]; then
    exit 0
fi
echo "setting up $venv (a few minutes the first time)" >&2
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

pip install "$(grep '^torch==' "$lock")"
# The lock names every package. FlashInfer's own list would add gigabytes of CUDA packages that
# asking it for the row order does not touch, so nothing is resolved here.
pip install --no-deps -r "$lock"
pip install --no-deps --editable .
touch "$venv/ready"
