#!/usr/bin/env bash
# What the workers of launch/tpu_pod.sh get is what is committed here. Usage: launch/committed.sh [CONFIG.py|NAME [OPTION...]]
# Says what is not committed. With the arguments of `clipjax train` it ends with 2 if the workers would lack the config file, or,
# where .venv is set up, if clipjax refuses these arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "committed: $*" >&2; }
wrong() { say "$*" && exit 2; }

case "${1:-}" in -h | --help) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" && exit ;; esac
git rev-parse --quiet --verify HEAD >/dev/null || wrong "$PWD is no git checkout: the workers get what is committed there"

has_config() {
  local config=${1#./} file known
  case "$config" in
  */* | *.py) file=$config ;;
  *) file=configs/$config.py ;;
  esac
  if git cat-file -e "HEAD:$file" 2>/dev/null; then
    git diff --quiet HEAD -- "$file" || wrong "CONFIG.py = '$1': has changes that are not committed, and the workers get what is committed"
  elif [ "$file" != "$config" ]; then
    known=$(git ls-tree --name-only HEAD configs/ | sed -n 's,^configs/\(.*\)\.py$,\1,p' | tr '\n' ' ')
    wrong "NAME = '$1': there is no such packaged config; there are $known"
  elif [ -e "$file" ]; then
    wrong "CONFIG.py = '$1': is not committed, and the workers get what is committed: git add $file && git commit"
  else
    wrong "CONFIG.py = '$1': there is no such file in $PWD, the checkout that the workers get"
  fi
}

as_clipjax='
import sys
from clipjax import cli, commands, config
try:
    commands._configured(cli._parse(["train", *sys.argv[1:]]))
except config.ConfigError as error:
    print(f"clipjax: {error}", file=sys.stderr)
    sys.exit(2)
'
is_accepted() { # by the clipjax that the workers get; any failure but a refusal does not matter here
  local python=$PWD/.venv/bin/python folder status=0
  [ -x "$python" ] || return 0
  folder=$(mktemp -d)
  git archive HEAD | tar -xf - -C "$folder"
  (cd "$folder" && PYTHONPATH=$folder "$python" -c "$as_clipjax" "$@" >&2) || status=$?
  rm -r "$folder"
  [ $status != 2 ] || wrong "clipjax refuses this command: no machines were requested"
}

if [ $# -gt 0 ]; then
  has_config "$1"
  is_accepted "$@"
fi
changes=$(git status --porcelain)
if [ -n "$changes" ]; then
  count=$(wc -l <<<"$changes")
  say "the workers get the commit $(git rev-parse --short HEAD). Not committed, so not part of it:"
  head -n 20 <<<"$changes" >&2
  [ "$count" -le 20 ] || say "and $((count - 20)) more: git status"
fi
