#!/usr/bin/env bash
# Sets everything up and runs the tests. Usage: tests/run.sh [pytest arguments]; the longest are left out unless CI is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ -n "${CI:-}" ]; then which=() ; else which=(-m "not slow"); fi
exec .venv/bin/python -m pytest -n 2 --dist loadfile "${which[@]}" "$@"
