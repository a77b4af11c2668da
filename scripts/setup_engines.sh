#!/usr/bin/env bash
# Create the CPU environments in which SGLang's and vLLM's own code loads models for the tests in
# tests/engines. Idempotent; about three minutes and 2.8 GB each; no CUDA packages.
#
#   scripts/setup_engines.sh [sglang] [vllm]      # default: both
#
# PYTHON           the interpreter to use; python3
# FP4MOE_ENGINES   where they go; ${XDG_CACHE_HOME:-~/.cache}/fp4moe-engines
#
# scripts/engines lists the packages of each: in ENGINE.txt those that pip resolves, in
# ENGINE-no-deps.txt those whose own lists would bring CUDA packages of several GB. Together they are
# what loading a model imports.
set -euo pipefail
cd "$(dirname "$0")/.."
engines=${FP4MOE_ENGINES:-${XDG_CACHE_HOME:-~/.cache}/fp4moe-engines}

set_up() {
    local engine=$1
    local venv=$engines/$engine
    local list=scripts/engines/$engine.txt no_deps=scripts/engines/$engine-no-deps.txt
    # It names the checkout, because the project is installed where it lies.
    local ready=$venv/ready
    if [ -f "$ready" ] && [ "$(cat "$ready")" = "$PWD" ] && [ "$ready" -nt "$list" ] &&
        [ "$ready" -nt "$no_deps" ] && [ "$ready" -nt pyproject.toml ]; then
        return
    fi
    echo "setting up $venv (a few minutes the first time)" >&2
    mkdir -p "$engines"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    rm -f "$ready"
    pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

    pip install "$(grep '^torch==' "$list")" "$(grep '^numpy' "$list")"
    "$venv/bin/python" - <<'PY'
import sys, torch
if torch.version.cuda:
    sys.exit("pip took a CUDA build of torch; remove the environment and name an index with CPU "
             "builds: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
PY
    # What the second list misses, it misses on purpose: no warnings of that.
    pip install --no-warn-conflicts --only-binary :all: -r "$list"
    pip install --no-deps -r "$no_deps"
    pip install --no-deps --editable .
    printf '%s\n' "$PWD" >"$ready"
}

[ $# -gt 0 ] || set -- sglang vllm
for engine; do
    set_up "$engine"
done
