#!/usr/bin/env bash
# Run the tests that need neither FlashInfer nor an engine on the oldest Python with the oldest packages
# that pyproject.toml admits, and on the newest Python with the newest.
#
#   scripts/test_pythons.sh
#
# A Python that is neither on PATH nor in ~/.pyenv is left out, which is said.
set -euo pipefail
cd "$(dirname "$0")/.."
oldest=3.10
newest=3.13
scripts/setup.sh full
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

# Print the path of an interpreter. pyenv puts commands on PATH that do not work, so each is tried.
find_python() {
    local candidate
    for candidate in "python$1" ~/.pyenv/versions/"$1".*/bin/python; do
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# test_on VERSION [PIP_ARGUMENT ...]
test_on() {
    local version=$1 found
    shift
    if ! found=$(find_python "$version"); then
        echo "left out: there is no Python $version here" >&2
        return
    fi
    local python=$temporary/$version/bin/python
    "$found" -m venv "$temporary/$version"
    "$python" -m pip install -qq --upgrade pip # --group takes 25.1
    "$python" -m pip install -qq "$@" --editable . --group test
    "$python" -m pytest -n auto --dist worksteal -m 'not flashinfer and not engines and not exporters and not ray'
}

"${FP4MOE_VENV:-.venv}/bin/python" - >"$temporary/oldest.txt" <<'PY'
import tomllib
with open("pyproject.toml", "rb") as file:
    for requirement in tomllib.load(file)["project"]["dependencies"]:
        print(requirement.replace(">=", "=="))
PY
test_on "$oldest" -r "$temporary/oldest.txt"
test_on "$newest"
