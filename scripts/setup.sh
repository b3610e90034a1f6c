#!/bin/sh
# Make .venv ready: `sh scripts/setup.sh [EXTRAS]`, with EXTRAS of pyproject.toml, comma-separated.
# Needs Python 3.11 or newer with pip. Quick when there is nothing to do.
set -eu
extras=${1:-packed,peft,plot}
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/.venv
bin=$venv/bin
# PyPI's torch for Linux brings 3 GB of CUDA along; the build of this index does not. Of one version
# pip prefers that build, so the version is given; where the index cannot be reached, it is PyPI's.
cpu_index=https://download.pytorch.org/whl/cpu
torch_version=2.13.0

say() { printf '%s\n' "$*" >&2; }

find_python() {
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
    say "error: no Python 3.11 or newer with venv; set PYTHON to one"
    exit 5
}

has_nvidia() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

pip_install() { "$bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# Only torch itself: what it needs comes from PyPI, with the package.
install_torch() {
    if "$bin/python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))'; then
        return
    fi
    if has_nvidia || [ "$(uname -s)" != Linux ]; then
        pip_install torch
        return
    fi
    say "installing torch for the CPU"
    pip_install --quiet --no-deps --timeout 15 --retries 0 --extra-index-url "$cpu_index" \
        "torch==$torch_version" || pip_install torch
}

wanted="$extras $(cksum <"$root/pyproject.toml")"
stamp=$venv/ready-$(printf '%s' "$extras" | tr ',' '-')
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$bin/python" -c '' 2>/dev/null; then
    exit 0
fi
if ! "$bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "creating $venv"
    "$python" -m venv --clear "$venv"
fi
install_torch
say "installing compresso[$extras]"
pip_install --editable "$root[$extras]"
printf '%s\n' "$wanted" >"$stamp"
