#!/usr/bin/env bash
# Create the CPU environments in which NVIDIA ModelOpt and llm-compressor export the checkpoints that
# tests convert. Idempotent; two or three minutes and 1.7 GB each; no CUDA packages.
#
#   scripts/setup_exporters.sh [modelopt] [llmcompressor]      # default: both
#
# PYTHON             the interpreter to use; python3
# FP4MOE_EXPORTERS   where they go, and their exports; ${XDG_CACHE_HOME:-~/.cache}/fp4moe-exporters
#
# scripts/exporters lists the packages as scripts/engines does: in EXPORTER.txt those that pip
# resolves, in EXPORTER-no-deps.txt those whose own lists ask for more than an export imports.
set -euo pipefail
cd "$(dirname "$0")/.."
exporters=${FP4MOE_EXPORTERS:-${XDG_CACHE_HOME:-~/.cache}/fp4moe-exporters}

set_up() {
    local venv=$exporters/$1
    local list=scripts/exporters/$1.txt no_deps=scripts/exporters/$1-no-deps.txt
    local ready=$venv/ready
    if [ -f "$ready" ] && [ "$ready" -nt "$list" ] && [ "$ready" -nt "$no_deps" ]; then
        return
    fi
    echo "setting up $venv (a few minutes the first time)" >&2
    mkdir -p "$exporters"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    rm -f "$ready"
    pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

    pip install "$(grep '^torch==' "$list")" "$(grep '^numpy==' "$list")"
    "$venv/bin/python" - <<'PY'
import sys, torch
if torch.version.cuda:
    sys.exit("pip took a CUDA build of torch; remove the environment and name an index with CPU "
             "builds: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
PY
    # What the second list misses, it misses on purpose: no warnings of that.
    pip install --no-warn-conflicts -r "$list"
    pip install --no-deps -r "$no_deps"
    touch "$ready"
}

[ $# -gt 0 ] || set -- modelopt llmcompressor
for exporter; do
    set_up "$exporter"
done
