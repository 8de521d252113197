#!/usr/bin/env bash
# Sets everything up and runs the tests. Usage: tests/run.sh [pytest arguments]; the longest are left out unless CI is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
which=()
if [ -z "${CI:-}" ]; then
  which=(-m "not slow")
  # Half of the time LLVM would polish programs that run for a millisecond. CI tests what users get.
  export XLA_FLAGS="--xla_backend_optimization_level=0 ${XLA_FLAGS:-}"
fi
# In their own order, which begins no long file last.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${which[@]}" "$@"
