#!/usr/bin/env bash
# Set up and run the tests. Arguments go to pytest.
#
#   scripts/test.sh [PYTEST_ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh full
venv=$(cd "${FP4MOE_VENV:-.venv}" && pwd)
# FlashInfer makes a folder as it is imported, by default in HOME, which may not be writable.
export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$venv}
exec "$venv/bin/python" -m pytest "$@"
