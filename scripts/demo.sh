#!/usr/bin/env bash
# Set up, make a small checkpoint of DeepSeek-V3's width, convert it, verify it, look at it.
#
#   scripts/demo.sh [FOLDER]      # default: demo; takes 3 GB, replaces what an earlier run left
#
# FP4MOE_BIN    take python and fp4moe from this folder, and set nothing up
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${FP4MOE_BIN:-}" ] || scripts/setup.sh
bin=${FP4MOE_BIN:-${FP4MOE_VENV:-.venv}/bin}
folder=${1:-demo}

run() {
    printf '\n$ %s\n' "$*"
    "$bin/$1" "${@:2}"
}

rm -rf "$folder/model" "$folder/converted"
run python tests/support/make_checkpoint.py "$folder/model" --layers 1 --experts 16 --kv-scales
run fp4moe-convert "$folder/model" "$folder/converted"
run fp4moe verify "$folder/converted" --source "$folder/model"
run fp4moe inspect "$folder/converted"
