#!/usr/bin/env bash
# Create the CPU environments in which SGLang's and vLLM's own code loads models for the tests in
# tests/engines. Idempotent; about three minutes and 2.8 GB each; no CUDA packages.
#
#   scripts/setup_engines.sh [sglang] [vllm]      # default: both
#
# PYTHON           the interpreter to use; python3
# FP4MOE_ENGINES   where they go; ${XDG_CACHE_HOME:-~/.cache}/fp4moe-engines
#
# scripts/engines lists the packages of each, which are what loading a model imports.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

[ $# -gt 0 ] || set -- sglang vllm
for engine; do
    set_up "$FP4MOE_ENGINES" scripts/engines "$engine" with-project
done
