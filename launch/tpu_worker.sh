#!/usr/bin/env bash
# One machine's part of a run on TPUs; launch/tpu_pod.sh calls it on every worker, launch/Dockerfile while an image is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
usage: launch/tpu_worker.sh COMMAND
  install                      .venv with clipjax for TPUs, at the versions of launch/constraints.txt; quick the second time
  start [NAME=VALUE...] TRAIN  starts `clipjax train TRAIN` under launch/retry.sh, detached from this connection; goes on with
                               one that runs
  follow                       its log until it ends
  wait                         waits for its end and prints its status
  status                       prints what it does now
  stop                         SIGTERM: it saves and ends with 75
TEXT
}

say() { echo "$(hostname): $*"; }

here=.train # log, pid, and status once it has ended
running() { # after a reboot the number may be another program's
  [ -s "$here/pid" ] && grep -qs tpu_worker "/proc/$(cat "$here/pid")/cmdline"
}

install() {
  mkdir -p "$here"
  # The machines' own Python is 3.10, older than clipjax takes; uv brings one. pip's --user folder may not be on the PATH.
  PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [ -x .venv/bin/python ] || uv venv --quiet --python 3.11 .venv
  # Without libtpu's line: tests compile with a newer one than the one JAX's release was made with, which shall run here.
  grep -v '^libtpu==' launch/constraints.txt >"$here/constraints.txt"
  uv pip install --quiet --python .venv/bin/python --constraint "$here/constraints.txt" ".[tpu,gcs]"
  say "installed"
}

start() {
  if running; then
    say "already training"
    return
  fi
  mkdir -p "$here"
  rm -f "$here/status"
  # A session of its own and no terminal, so that it outlives the connection that starts it.
  setsid nohup bash launch/tpu_worker.sh train "$@" >>"$here/log" 2>&1 </dev/null &
  echo $! >"$here/pid"
  say "started"
}

train() { # what `start` detaches: keeps the status that the command ends with; NAME=VALUE as for env(1)
  local child status=0
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  local environment=()
  while [[ "${1:-}" =~ ^[A-Za-z_][A-Za-z_0-9]*= ]]; do environment+=("$1") && shift; done
  env "${environment[@]}" launch/tpu_flags.sh launch/retry.sh .venv/bin/clipjax train "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends a wait before the process ends
  wait "$child" || status=$? # remembered
  echo "$status" >"$here/status.new"
  mv "$here/status.new" "$here/status"
}

status() {
  if running; then
    say "training"
  elif [ -e "$here/status" ]; then
    say "ended with status $(cat "$here/status")"
  elif [ -e "$here/pid" ]; then
    say "ended with status 75" # killed before it could tell, as by a machine that went down: start it again
  else
    say "not started"
  fi
}

case "${1:---help}" in
-h | --help) usage ;;
install | start | train | status) "$@" ;;
follow)
  if running; then
    tail -n 20 -f -s "${POLL:-1}" --pid="$(cat "$here/pid")" "$here/log"
  elif [ -e "$here/log" ]; then
    tail -n 20 "$here/log"
  fi
  ;;
wait)
  while running; do sleep "${POLL:-1}"; done
  status
  ;;
stop) if running; then kill -TERM "$(cat "$here/pid")"; fi ;;
*)
  echo "tpu_worker: no command $1; see launch/tpu_worker.sh --help" >&2
  exit 2
  ;;
esac
