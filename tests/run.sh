#!/usr/bin/env bash
# Sets everything up and runs the tests. Usage: tests/run.sh [pytest arguments]; the longest are left out unless CI is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .

# Whole files to two processes, so that each file's programs are compiled once.
pytest=(.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10)
if [ -z "${CI:-}" ]; then
  CLIPJAX_TEST_QUICK=1 exec "${pytest[@]}" -m "not slow and not recipes" "$@"
fi

status=0
part() { # of the tests; that the arguments leave none of it is no failure
  "${pytest[@]}" -m "$1 and not recipes" "${@:2}" || { local code=$? && [ "$code" = 5 ] || status=$code; }
}
part optimized "$@" # programs as users have them
export CLIPJAX_TEST_QUICK=1 # see tests/conftest.py
part "not optimized" "$@"
exit "$status"
