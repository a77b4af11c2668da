#!/usr/bin/env bash
# Set up and run the tests, on all cores. Arguments go to pytest, which is left to one core then: tests
# of a file may share what takes minutes to make, such as an engine's results.
#
#   scripts/test.sh [PYTEST_ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh full
venv=$(cd "${FP4MOE_VENV:-.venv}" && pwd)

# FlashInfer, torch and transformers keep caches in HOME, and fail where they cannot. Engines,
# exporters and Ray are looked for where their scripts put them, whatever HOME becomes.
. scripts/environment.sh
[ -w "${HOME:-}" ] || export HOME=$venv

[ $# -gt 0 ] || set -- -n auto --maxprocesses 8 --dist worksteal
exec "$venv/bin/python" -m pytest "$@"
