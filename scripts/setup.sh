#!/usr/bin/env bash
# Create .venv, or bring it up to date. Idempotent; no GPU.
#
#   scripts/setup.sh         # what fp4moe needs: 15 seconds, 165 MB
#   scripts/setup.sh full    # also what the tests, the checks and the benchmarks need: torch for the
#                            # CPU, FlashInfer, ruff and so on; a minute or more, 1.8 GB
#
# PYTHON        the interpreter to use, 3.11 or later; python3
# FP4MOE_VENV   where the environment goes; .venv
#
# Where pip would take a CUDA build of torch (several GB), name an index with CPU builds first:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${FP4MOE_VENV:-.venv}
kind=${1:-light}
case $kind in
    light) lock=requirements.txt ;;
    full) lock=requirements-full.txt ;;
    *) echo "usage: scripts/setup.sh [light|full]" >&2 && exit 2 ;;
esac

# One file for each kind. It names the checkout, because the project is installed where it lies.
ready=$venv/ready-$kind
if [ -f "$ready" ] && [ "$(cat "$ready")" = "$PWD" ] && [ "$ready" -nt requirements.txt ] &&
    [ "$ready" -nt "$lock" ] && [ "$ready" -nt pyproject.toml ]; then
    exit 0
fi
echo "setting up $venv ($kind)" >&2
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

# A CUDA build of torch needs packages that the lock does not name.
[ "$kind" = light ] || pip install "$(grep '^torch==' "$lock")"
# The locks name every other package, so nothing is resolved. FlashInfer's own list would add gigabytes
# of CUDA packages that asking it for the row order does not touch.
pip install --no-deps -r "$lock"
pip install --no-deps --no-build-isolation --editable .
printf '%s\n' "$PWD" >"$venv/ready-light"
[ "$kind" = light ] || printf '%s\n' "$PWD" >"$ready"
