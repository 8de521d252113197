#!/usr/bin/env bash
# The part of a run that one TPU machine does. launch/tpu_pod.sh calls it on every worker, launch/Dockerfile during its build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
usage: launch/tpu_worker.sh COMMAND
  install                      makes .venv with clipjax for TPUs, at the versions of launch/constraints.txt; quick the second time
  start [NAME=VALUE...] TRAIN  starts `clipjax train TRAIN` under launch/retry.sh, detached from this connection, unless a
                               training runs
  follow                       prints its log until it ends
  wait                         waits for its end and prints its status
  status                       prints its present state
  stop                         sends SIGTERM: it saves and ends with 75
TEXT
}

say() { echo "$(hostname): $*"; }

folder=.train # holds log, pid, and status after the end
running() { # checks the program too: after a reboot another one may have the pid
  [ -s "$folder/pid" ] && grep -qs tpu_worker "/proc/$(cat "$folder/pid")/cmdline"
}

install() {
  mkdir -p "$folder"
  # The Python of these machines is 3.10, too old for clipjax; uv installs another. pip's --user folder may not be on the PATH.
  PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  [ -x .venv/bin/python ] || uv venv --quiet --python 3.11 .venv
  # Without the line of libtpu: the tests compile with a newer one, but a TPU needs the one that JAX was released with.
  grep -v '^libtpu==' launch/constraints.txt >"$folder/constraints.txt"
  uv pip install --quiet --python .venv/bin/python --constraint "$folder/constraints.txt" ".[tpu,gcs]"
  say "installed"
}

start() {
  if running; then
    say "already training"
    return
  fi
  mkdir -p "$folder"
  rm -f "$folder/status"
  # Its own session and no terminal, so that it continues when the connection ends.
  setsid nohup bash launch/tpu_worker.sh train "$@" >>"$folder/log" 2>&1 </dev/null &
  echo $! >"$folder/pid"
  say "started"
}

train() { # `start` detaches this: it writes down the status of the command; NAME=VALUE as for env(1)
  local child status=0
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  local environment=()
  while [[ "${1:-}" =~ ^[A-Za-z_][A-Za-z_0-9]*= ]]; do environment+=("$1") && shift; done
  env "${environment[@]}" launch/tpu_flags.sh launch/retry.sh .venv/bin/clipjax train "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends `wait` early
  wait "$child" || status=$? # bash remembers the status
  echo "$status" >"$folder/status.new"
  mv "$folder/status.new" "$folder/status"
}

status() {
  if running; then
    say "training"
  elif [ -e "$folder/status" ]; then
    say "ended with status $(cat "$folder/status")"
  elif [ -e "$folder/pid" ]; then
    say "ended with status 75" # killed before it could write its status, as when the machine went down: start it again
  else
    say "not started"
  fi
}

case "${1:---help}" in
-h | --help) usage ;;
install | start | train | status) "$@" ;;
follow)
  if running; then
    tail -n 20 -f -s "${POLL:-1}" --pid="$(cat "$folder/pid")" "$folder/log"
  elif [ -e "$folder/log" ]; then
    tail -n 20 "$folder/log"
  fi
  ;;
wait)
  while running; do sleep "${POLL:-1}"; done
  status
  ;;
stop) if running; then kill -TERM "$(cat "$folder/pid")"; fi ;;
*)
  echo "tpu_worker: no command $1; see launch/tpu_worker.sh --help" >&2
  exit 2
  ;;
esac
