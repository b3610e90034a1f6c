#!/bin/sh
# Put llama.cpp into .venv: `sh scripts/runtimes.sh`. PyPI has it as source alone, and building that
# takes 10 minutes on 2 cores; the wheel is kept in .wheels, or in the folder that WHEELS names, from
# where later calls, and other checkouts, take it.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=${WHEELS:-$root/.wheels}
python=$root/.venv/bin/python
version=0.3.36

if "$python" -c "import importlib.metadata as m, sys
sys.exit(m.version('llama-cpp-python') != '$version')" 2>/dev/null; then
    exit 0
fi
sh "$root/scripts/setup.sh" dev
mkdir -p "$wheels"
if ! ls "$wheels"/llama_cpp_python-"$version"-*.whl >/dev/null 2>&1; then
    printf 'building llama-cpp-python %s\n' "$version" >&2
    # Images are not of interest: their part of it would take half as long again.
    CMAKE_ARGS="${CMAKE_ARGS:-} -DLLAVA_BUILD=OFF" "$python" -m pip wheel --quiet \
        --disable-pip-version-check --no-deps --wheel-dir "$wheels" "llama-cpp-python==$version"
fi
"$python" -m pip install --quiet --disable-pip-version-check --find-links "$wheels" \
    "llama-cpp-python==$version"
