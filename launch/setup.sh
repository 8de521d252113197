#!/usr/bin/env bash
# Sets up ./.venv with clipjax, what its tests need, and a colour-emoji font. Safe to run again; quick when nothing is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*" >&2; }

debian() { # installs Debian or Ubuntu packages, as root or with sudo
  command -v apt-get >/dev/null || return 1
  local as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || return 1
    as_root=(sudo)
  fi
  say "installing $*"
  ${as_root[@]+"${as_root[@]}"} apt-get update -qq && ${as_root[@]+"${as_root[@]}"} apt-get install -y -qq "$@" >/dev/null
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

if [ ! -x .venv/bin/python ]; then
  if ! python=$(find_python) && ! { debian python3 python3-venv && python=$(find_python); }; then
    say "no Python 3.11 or later with venv; install one, or set PYTHON to it"
    exit 2
  fi
  "$python" -m venv .venv
fi

# The versions that the tests last ran with. PyTorch is only for checking exports; training does not need it.
stamp=$(cat pyproject.toml launch/constraints.txt | cksum)
if [ "$(cat .venv/clipjax.stamp 2>/dev/null)" != "$stamp" ]; then
  say "installing into .venv (minutes the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt torch torchvision -e ".[torch,test]"
  echo "$stamp" >.venv/clipjax.stamp
fi

# This also builds the dataset. The second call shows the error if the packages could not be installed.
.venv/bin/clipjax data prepare emoji >/dev/null 2>&1 || debian fonts-noto-color-emoji libfribidi0 || true
.venv/bin/clipjax data prepare emoji >/dev/null
