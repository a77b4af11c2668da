#!/usr/bin/env bash
# Create the environment in which tests convert on a Ray cluster of this machine. Idempotent; 40
# seconds and 420 MB.
#
#   scripts/setup_ray.sh
#
# PYTHON       the interpreter to use; python3
# FP4MOE_RAY   where it goes; ${XDG_CACHE_HOME:-~/.cache}/fp4moe-ray
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
venv=$FP4MOE_RAY
# It names the checkout, because the project is installed where it lies.
ready=$venv/ready
if [ -f "$ready" ] && [ "$(cat "$ready")" = "$PWD" ] && [ "$ready" -nt requirements.txt ] &&
    [ "$ready" -nt scripts/ray.txt ] && [ "$ready" -nt pyproject.toml ]; then
    exit 0
fi
echo "setting up $venv" >&2
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
rm -f "$ready"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }
pip install --no-deps -r requirements.txt
pip install -r scripts/ray.txt
pip install --no-deps --no-build-isolation --editable .
printf '%s\n' "$PWD" >"$ready"
