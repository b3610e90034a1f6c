#!/bin/sh
# Everything CI checks: lint, format, types, tests, recipes. Runs all of it, fails if any fails.
# With `--runtimes`, also the tests in programs that take long to install; it installs them first.
set -eu
cd "$(dirname "$0")/.."
case ${1:-} in
    '' | --runtimes) ;;
    *) printf 'usage: sh scripts/test.sh [--runtimes]\n' >&2 && exit 2 ;;
esac
sh scripts/setup.sh dev
if [ "${1:-}" = --runtimes ]; then
    sh scripts/runtimes.sh
    sh scripts/peers.sh
fi
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
check python -m pytest -n auto
if [ "${1:-}" = --runtimes ]; then
    check python -m pytest -m runtimes
fi
for recipe in recipes/*.yaml; do
    check compresso run --check "$recipe"
done
if [ -n "$failed" ]; then
    printf '\nfailed:%s\n' "$failed" >&2
    exit 1
fi
printf '\nall checks passed\n' >&2
