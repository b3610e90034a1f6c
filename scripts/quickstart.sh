#!/bin/sh
# From a fresh machine to a compressed model and its evaluation, in a few minutes on two cores.
# Needs Python 3.11 or newer with pip, and a network only for the installation.
# Writes to ./compresso-runs of the current directory; options go to `compresso run`.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
sh "$root/scripts/setup.sh"
exec "$root/.venv/bin/compresso" run "$root/recipes/quickstart.yaml" "$@"
