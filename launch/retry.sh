#!/usr/bin/env bash
# Runs a command until it succeeds, with pauses between the tries: `launch/retry.sh --help`.
set -uo pipefail
set -m # the command has its own process group: it gets Ctrl-C from this script, not from the terminal too, and does not ignore it

usage() {
  cat <<'TEXT'
usage: launch/retry.sh COMMAND...
       launch/retry.sh .venv/bin/clipjax train CONFIG.py --workdir RUN

Runs COMMAND. The status it ends with decides what follows:
  0, 2, 3, 130  the end: success, wrong use, a failure that would come again, or Ctrl-C; also 126 and 127, a command that can't be run
  75            again after RETRY_PAUSE seconds (2): it or another process was preempted, and has saved its state; if 75 comes again
                without progress, as when the machines are not yet all back, with the pauses of any other
  any other     again after RETRY_FIRST seconds (5), then twice that, and so on up to RETRY_MOST (300)
It gives up after RETRIES (5) tries in a row without progress, whatever their statuses.
A try makes progress if it leaves a newer checkpoint in the --workdir of COMMAND; if that is not a folder of this machine,
if it runs for RETRY_LONG seconds (600). After progress the count and the pauses start from the beginning.

SIGTERM, SIGINT and SIGHUP go to COMMAND, once each, and it is not started again: the sender (Slurm before it takes the
machines away, or the person at the terminal) decides when it continues. The status is that of COMMAND.
TEXT
}

say() { echo "retry: $*" >&2; }

case "${1---help}" in
-h | --help)
  usage
  exit 0
  ;;
-*)
  say "unknown option $1; see launch/retry.sh --help"
  exit 2
  ;;
esac

retries=${RETRIES:-5} pause=${RETRY_PAUSE:-2} first=${RETRY_FIRST:-5} most=${RETRY_MOST:-300} long=${RETRY_LONG:-600}
for value in "RETRIES=$retries" "RETRY_PAUSE=$pause" "RETRY_FIRST=$first" "RETRY_MOST=$most" "RETRY_LONG=$long"; do
  if [[ ! ${value#*=} =~ ^[0-9]+$ ]]; then
    say "$value: must be a whole number"
    exit 2
  fi
done

workdir=
previous=
for argument in "$@"; do
  case "$argument" in
  --workdir=*) workdir=${argument#*=} ;;
  *) [ "$previous" = --workdir ] && workdir=$argument ;;
  esac
  previous=$argument
done

newest() { # step of the newest complete checkpoint, -1 for none; a folder gets the bare number as its name when it is complete
  local path name step=-1
  for path in "$workdir"/checkpoints/*/; do
    name=$(basename "$path")
    if [[ $name =~ ^[0-9]+$ ]] && ((10#$name > step)); then step=$((10#$name)); fi
  done
  echo "$step"
}

child=
stopped=
forward() {
  stopped=$1
  if [ -n "$child" ]; then kill -s "$1" "$child" 2>/dev/null; fi
}
for name in TERM INT HUP; do
  # shellcheck disable=SC2064  # expand the name now
  trap "forward $name" "$name"
done

await() { # the status of process $1; a signal ends `wait` early, so it waits again
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
  wait "$1" # bash remembers the status; the wait before may have returned that of a signal
}

export CLIPJAX_RESTARTS=1 # for COMMAND: after status 75 it is started again
failures=0 back_off=$first preempted=0
while :; do
  before=$(newest) began=$SECONDS
  "$@" &
  child=$!
  if [ -n "$stopped" ]; then forward "$stopped"; fi # the signal came just before the start
  await "$child"
  status=$?
  child=
  case $status in 0 | 2 | 3 | 126 | 127 | 130) exit $status ;; esac
  if [ -n "$stopped" ]; then
    say "status $status after SIG$stopped: not started again"
    exit $status
  fi
  after=$(newest)
  if [ "$after" -gt "$before" ] || { [ ! -d "$workdir" ] && ((SECONDS - began >= long)); }; then
    failures=0 back_off=$first preempted=0
  else
    failures=$((failures + 1))
  fi
  if ((failures && failures >= retries)); then
    say "status $status; tries in a row without progress: $failures, giving up"
    exit $status
  fi
  wait_for=$pause
  if [ $status = 75 ]; then preempted=$((preempted + 1)); else preempted=0; fi
  if [ $preempted != 1 ]; then
    wait_for=$back_off back_off=$((back_off * 2 < most ? back_off * 2 : most))
  fi
  say "status $status; tries in a row without progress: $failures of $retries; again in $wait_for s"
  sleep "$wait_for" &
  child=$!
  await "$child"
  child=
  if [ -n "$stopped" ]; then
    say "SIG$stopped: not started again"
    exit $status
  fi
done
