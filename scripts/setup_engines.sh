#!/usr/bin/env bash
# Create the two CPU environments in which SGLang's and vLLM's own code loads models for the tests
# in tests/engines. Idempotent; about three minutes and 2.7 GB each; no CUDA packages.
#
#   scripts/setup_engines.sh
#
# FP4MOE_ENGINES   where they go; ${XDG_CACHE_HOME:-~/.cache}/fp4moe-engines
# PYTHON           the interpreter to use; python3
set -euo pipefail
cd "$(dirname "$0")/engines"
./setup_sglang.sh
./setup_vllm.sh
