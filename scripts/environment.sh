# shellcheck shell=bash
# Sourced by the other scripts, in the project's folder.

# Where the environments of tests are. Inside quotes, bash leaves a tilde as it is.
caches=${XDG_CACHE_HOME:-~/.cache}
export FP4MOE_ENGINES=${FP4MOE_ENGINES:-$caches/fp4moe-engines}
export FP4MOE_EXPORTERS=${FP4MOE_EXPORTERS:-$caches/fp4moe-exporters}
export FP4MOE_RAY=${FP4MOE_RAY:-$caches/fp4moe-ray}
export FP4MOE_LINTERS=${FP4MOE_LINTERS:-$caches/fp4moe-linters}

# set_up FOLDER LISTS NAME [project]: create the environment FOLDER/NAME, or bring it up to date. It
# gets the packages of LISTS/NAME.txt, which pip resolves; those of LISTS/NAME-no-deps.txt, whose own
# lists would bring CUDA packages of several GB, or more than a test imports; and the project.
set_up() {
    local venv=$1/$3 list=$2/$3.txt no_deps=$2/$3-no-deps.txt project=${4:+$PWD}
    local ready=$venv/ready
    # It names the checkout, because the project is installed where it lies.
    if [ -f "$ready" ] && [ "$(cat "$ready")" = "$project" ] && [ "$ready" -nt "$list" ] &&
        [ "$ready" -nt "$no_deps" ] && [ "$ready" -nt "${project:+pyproject.toml}" ]; then
        return
    fi
    echo "setting up $venv (a few minutes the first time)" >&2
    mkdir -p "$1"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    rm -f "$ready"
    pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

    pip install "$(grep '^torch==' "$list")" "$(grep '^numpy' "$list")"
    "$venv/bin/python" - <<'PY'
import sys, torch
if torch.version.cuda:
    sys.exit("pip took a CUDA build of torch; remove the environment and name an index with CPU "
             "builds: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
PY
    # What the second list misses, it misses on purpose: no warnings of that.
    pip install --no-warn-conflicts --only-binary :all: -r "$list"
    pip install --no-deps -r "$no_deps"
    [ -z "$project" ] || pip install --no-deps --editable .
    printf '%s' "$project" >"$ready"
}
