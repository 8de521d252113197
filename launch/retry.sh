#!/usr/bin/env bash
# Runs a command until it is done, with waits between the tries: `launch/retry.sh --help`.
set -uo pipefail
set -m # a command in a group of its own gets Ctrl-C from here alone and not from the terminal as well; nor does it ignore it

usage() {
  cat <<'TEXT'
usage: launch/retry.sh COMMAND...
       launch/retry.sh .venv/bin/clipjax train CONFIG.py --workdir RUN

Runs COMMAND, and again by the status it ends with:
  0, 2, 130   that is the end: done, wrong use, or stopped by Ctrl-C; so are 126 and 127, a command that can't be run
  75          again after RETRY_PAUSE seconds (2): it was preempted, or another process was, and has saved its state
  any other   again after RETRY_FIRST seconds (5), then twice that, and so on up to RETRY_MOST (300)
It gives up, with the command's status, after RETRIES (5) tries in a row without progress, whatever their statuses.
A try made progress if it left a newer checkpoint in the --workdir that COMMAND names; where it names none on this machine,
if it ran for RETRY_LONG seconds (600). Progress begins the count and the waits anew.

SIGTERM, SIGINT and SIGHUP go on to COMMAND, once each, and it is not started again: who sends them to the job, as Slurm
before it takes the machines away, or the person at the terminal, decides when it goes on. The status is COMMAND's.
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

newest() { # the step of the newest finished checkpoint, -1 for none; Orbax gives a folder its bare number once it is whole
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
  # shellcheck disable=SC2064  # the name of now
  trap "forward $name" "$name"
done

await() { # the status of process $1, through the signals that interrupt a wait
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
  wait "$1" # remembered: the wait before may have told of a signal while the process ended
}

failures=0 back_off=$first
while :; do
  before=$(newest) began=$SECONDS
  "$@" &
  child=$!
  if [ -n "$stopped" ]; then forward "$stopped"; fi # it came just before
  await "$child"
  status=$?
  child=
  case $status in 0 | 2 | 126 | 127 | 130) exit $status ;; esac
  if [ -n "$stopped" ]; then
    say "status $status after SIG$stopped: not started again"
    exit $status
  fi
  after=$(newest)
  if [ "$after" -gt "$before" ] || { [ ! -d "$workdir" ] && ((SECONDS - began >= long)); }; then
    failures=0 back_off=$first
  else
    failures=$((failures + 1))
  fi
  if ((failures && failures >= retries)); then
    say "status $status; tries in a row without progress: $failures, so this is the end"
    exit $status
  fi
  wait_for=$pause
  if [ $status != 75 ]; then
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
