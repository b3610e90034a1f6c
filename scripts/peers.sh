#!/bin/sh
# Make environments for gptqmodel and auto-round in .runtimes, for the tests that load exports there:
# `sh scripts/peers.sh`. Each sees what is in .venv, but for what it needs in another version.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
sh "$root/scripts/setup.sh" dev

# name, versions as in compresso/runtimes/table.yaml
peer() {
    name=$1
    shift
    python=$root/.runtimes/$name/bin/python
    if [ -x "$python" ] && "$python" -m pip install --quiet --no-deps --no-index "$@" 2>/dev/null; then
        return # all are there in these versions
    fi
    "$root/.venv/bin/python" -m venv "$root/.runtimes/$name"
    own=$("$python" -c 'import site; print(site.getsitepackages()[0])')
    "$root/.venv/bin/python" -c 'import site; print(site.getsitepackages()[0])' >"$own/below.pth"
    "$python" -m pip install --quiet --disable-pip-version-check "$@"
}

peer gptqmodel gptqmodel==7.6.0 optimum==2.3.0
peer autoround auto-round==0.16.1
