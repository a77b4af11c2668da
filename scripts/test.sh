#!/usr/bin/env bash
# Set up and run the tests. Arguments go to pytest.
#
#   scripts/test.sh [PYTEST_ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh full
exec "${FP4MOE_VENV:-.venv}/bin/python" -m pytest "$@"
