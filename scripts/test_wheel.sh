#!/usr/bin/env bash
# Build the package as for a release, install the wheel where nothing else is, and run the demo and the
# tests against it, away from the sources. Without torch: the light installation as pip makes it today.
#
#   scripts/test_wheel.sh
#
# PYTHON   the interpreter to use; python3
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh full
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

# The wheel is built from the sdist, so the sdist has what it takes.
"${FP4MOE_VENV:-.venv}/bin/python" -m build --outdir "$temporary/dist" . >"$temporary/log" ||
    { cat "$temporary/log" >&2 && exit 1; }

"${PYTHON:-python3}" -m venv "$temporary/venv"
python=$temporary/venv/bin/python
"$python" -m pip install -qq --upgrade pip # --group takes 25.1
"$python" -m pip install -qq "$temporary"/dist/*.whl --group pyproject.toml:test

# The tests are the sdist's too, and the package's sources are out of their sight.
mkdir "$temporary/away"
tar -xzf "$temporary"/dist/*.tar.gz -C "$temporary/away" --strip-components 1
rm -r "$temporary/away/fp4moe_convert"
cd "$temporary/away"
"$python" - "$temporary/venv" <<'PY'
import sys, fp4moe_convert
if not fp4moe_convert.__file__.startswith(sys.argv[1]):
    sys.exit(f"not the installed package: {fp4moe_convert.__file__}")
PY
FP4MOE_BIN=$temporary/venv/bin scripts/demo.sh
"$python" -m pytest -n auto --dist worksteal -m 'not flashinfer and not engines and not exporters and not ray'
