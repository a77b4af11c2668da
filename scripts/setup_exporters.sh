#!/usr/bin/env bash
# Create the CPU environments in which NVIDIA ModelOpt and llm-compressor export the checkpoints that
# tests convert. Idempotent; two or three minutes and 1.7 GB each; no CUDA packages.
#
#   scripts/setup_exporters.sh [modelopt] [llmcompressor]      # default: both
#
# PYTHON             the interpreter to use; python3
# FP4MOE_EXPORTERS   where they go, and their exports; ${XDG_CACHE_HOME:-~/.cache}/fp4moe-exporters
#
# scripts/exporters lists the packages of each, which are what an export imports.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

[ $# -gt 0 ] || set -- modelopt llmcompressor
for exporter; do
    set_up "$FP4MOE_EXPORTERS" scripts/exporters "$exporter"
done
