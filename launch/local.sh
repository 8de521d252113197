#!/usr/bin/env bash
# Runs a command as N processes on this machine. JAX joins them, as it joins N hosts. Usage:
#   launch/local.sh N COMMAND...                            e.g. launch/local.sh 2 clipjax train emoji_clip --workdir RUN
#   launch/retry.sh launch/local.sh N COMMAND...            the same, started again when it is preempted or fails
# On a CPU each process simulates JAX_NUM_CPU_DEVICES devices (1). On GPUs process i takes GPU i, unless CUDA_VISIBLE_DEVICES or
# JAX_LOCAL_DEVICE_IDS is set. Process 0 prints as it would alone; the output of the others goes to stderr, each line after the
# number of its process. SIGTERM and Ctrl-C go to all processes. When one fails, the others have CLIPJAX_HEARTBEAT_SECONDS (60)
# plus 30 to notice it, say so and end; then they are killed. Exit status: 2 if any process has it, else 3, else another failure,
# else 75, else 0.
set -euo pipefail

case "${1:-}" in
  "" | *[!0-9]* | 0*) echo "usage: launch/local.sh N COMMAND...: N = ${1:-missing} must be a number of processes" >&2 && exit 2 ;;
esac
[ $# -gt 1 ] || { echo "usage: launch/local.sh N COMMAND...: COMMAND is missing" >&2 && exit 2; }
n=$1
shift
heartbeat=${CLIPJAX_HEARTBEAT_SECONDS:-60}
patience=$((${heartbeat%.*} + 30))

free_port() { # an ephemeral port that nobody listens on
  local port
  while port=$((32768 + RANDOM % 28000)); do
    (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

numbered() { # each line after the number of its process, at once
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

set -m # each process leads its own process group: it gets a signal from this script alone, once, and does not ignore Ctrl-C
pids=()
pass_on() {
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on KILL' EXIT

JAX_COORDINATOR_ADDRESS=127.0.0.1:$(free_port)
export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$n
gpus=0
if [ "$n" -gt 1 ] && [ -z "${CUDA_VISIBLE_DEVICES:-}${JAX_LOCAL_DEVICE_IDS:-}" ] && [ "${JAX_PLATFORMS:-}" != cpu ]; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
for ((i = 0; i < n; i++)); do
  export JAX_PROCESS_ID=$i
  if [ "$gpus" -gt 0 ]; then export CUDA_VISIBLE_DEVICES=$i; fi
  if [ "$i" = 0 ]; then
    "$@" &
  else
    "$@" > >(trap '' TERM INT && numbered "$i" >&2) 2>&1 &
  fi
  pids+=($!)
done

rank() { # how bad a status is
  case $1 in 2) echo 1000 ;; 3) echo 999 ;; 75) echo 1 ;; 0) echo 0 ;; *) echo "$((1 + $1))" ;; esac
}
worst=0
left=(${pids[@]+"${pids[@]}"})
deadline=
while [ ${#left[@]} -gt 0 ]; do
  running=()
  for pid in "${left[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    status=0
    wait "$pid" || status=$?
    if [ "$(rank "$status")" -gt "$(rank "$worst")" ]; then worst=$status; fi
    if [ "$status" != 0 ] && [ -z "$deadline" ]; then deadline=$((SECONDS + patience)); fi
  done
  left=(${running[@]+"${running[@]}"}) # bash 3.2, which a Mac has, takes an empty array for one that is not set
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    pass_on KILL
    deadline=$((SECONDS + patience))
  fi
  sleep 0.2 & # bash handles a signal at once only during `wait`
  wait $! || true
done
trap - EXIT
exit "$worst"
