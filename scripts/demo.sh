#!/usr/bin/env bash
# Set up, make a small checkpoint of DeepSeek-V3's width, convert it, verify it, look at it.
#
#   scripts/demo.sh [FOLDER]      # default: demo; takes 2 GB, replaces what an earlier run left
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
bin=${FP4MOE_VENV:-.venv}/bin
folder=${1:-demo}

run() {
    printf '\n$ %s\n' "$*"
    "$bin/$@"
}

rm -rf "$folder/model" "$folder/converted"
run python scripts/make_checkpoint.py "$folder/model" --layers 1 --experts 16 --kv-scales
run fp4moe-convert "$folder/model" "$folder/converted"
run fp4moe verify "$folder/converted" --source "$folder/model"
run fp4moe inspect "$folder/converted"
