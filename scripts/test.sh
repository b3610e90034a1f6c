#!/bin/sh
# Everything CI checks: lint, format, types, tests, recipes. Runs all of it, fails if any fails.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh dev
PATH=$PWD/.venv/bin:$PATH
failed=

check() {
    printf '\n== %s\n' "$*" >&2
    "$@" || failed="$failed
  $*"
}

check ruff check .
check ruff format --check .
check mypy
check python -m pytest
for recipe in recipes/*.yaml; do
    check compresso run --check "$recipe"
done
if [ -n "$failed" ]; then
    printf '\nfailed:%s\n' "$failed" >&2
    exit 1
fi
printf '\nall checks passed\n' >&2
