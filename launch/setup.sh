#!/usr/bin/env bash
# Sets up ./.venv with clipjax, what its tests need, and a colour-emoji font. Safe to run again; quick when nothing is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=
for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
  if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "setup: no Python 3.11 or later with venv; install one (Debian, Ubuntu: apt install python3 python3-venv) or set PYTHON" >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv

# The PyTorch side of the parity tests is pinned to what they were written against.
pins="torch==2.13.0 torchvision==0.28.0 open_clip_torch==3.3.0"
stamp=$(cat pyproject.toml launch/setup.sh | cksum)
if [ "$(cat .venv/clipjax.stamp 2>/dev/null)" != "$stamp" ]; then
  echo "setup: installing into .venv (a few minutes the first time)" >&2
  # shellcheck disable=SC2086
  .venv/bin/python -m pip install --quiet --disable-pip-version-check $pins -e ".[torch,test]"
  echo "$stamp" > .venv/clipjax.stamp
fi

if ! .venv/bin/clipjax data prepare emoji >/dev/null 2>&1; then
  if command -v apt-get >/dev/null; then
    echo "setup: installing a colour-emoji font and the library that joins its sequences" >&2
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    $as_root apt-get update -qq && $as_root apt-get install -y -qq fonts-noto-color-emoji libfribidi0 >/dev/null
  fi
  .venv/bin/clipjax data prepare emoji # says which font to install where this did not
fi
