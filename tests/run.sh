#!/usr/bin/env bash
# Sets everything up and runs the tests. Usage: tests/run.sh [pytest arguments]; the longest are left out unless CI is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .

# Whole files to two processes, so that each file's programs are compiled once.
pytest=(.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder)
# Else three quarters of the time XLA would optimize programs that run for a millisecond.
quick="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 ${XLA_FLAGS:-}"
if [ -z "${CI:-}" ]; then
  XLA_FLAGS=$quick exec "${pytest[@]}" -m "not slow and not recipes" "$@"
fi

status=0
part() { # of the tests; that the arguments leave none of it is no failure
  "${pytest[@]}" -m "$1 and not recipes" "${@:2}" || { local code=$? && [ "$code" = 5 ] || status=$code; }
}
part optimized "$@" # programs as users have them
export XLA_FLAGS=$quick
part "not optimized" "$@"
exit "$status"
