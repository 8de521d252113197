#!/usr/bin/env bash
# Trains on Cloud TPUs: `launch/tpu_pod.sh --help`. Needs only bash 3.2, which a Mac has.
#
# Reference of the commands: https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources (create, describe, delete),
# .../compute/tpus/tpu-vm (ssh, scp) and .../storage/ls. Each slice gets its own ssh: `queued-resources ssh --node=all` continues
# without a slice that it can't prepare, and returns the status of one worker only.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_pod.sh COMMAND [OPTION...] [CONFIG.py|NAME [--any.config.field VALUE ...]]

  launch/tpu_pod.sh run --project P --zone Z --name N --type v5litepod-16 --spot --workdir gs://BUCKET/RUN siglip_b16

COMMAND
  run        does create, wait, install, train and delete; when the pod is preempted or fails, it creates a new one and resumes
             from --workdir
  create     requests the machines, as a queued resource, and returns at once
  wait       waits until the machines are ready
  install    installs what is committed in this checkout, and its requirements, on all workers
  train      starts the training on all workers, or finds it running, and follows the log to the end; returns its status
  logs       follows the log of the first worker
  status     shows the state of the machines and of the training
  stop       asks the training to save and end
  delete     deletes the machines and the request

OPTION (or an environment variable, or a default)
  --project P    CLIPJAX_PROJECT   the project to charge
  --zone Z       CLIPJAX_ZONE      zone of the machines
  --name N       CLIPJAX_NAME      name of the queued resource; its slices are N, or N-0, N-1, ...
  --type T       CLIPJAX_TYPE      accelerator type of a slice: v4-8, v5litepod-256, v5p-128, v6e-16 ...
  --workdir W    CLIPJAX_WORKDIR   gs://BUCKET/RUN: checkpoints, metrics
  --slices S     1                 number of slices of that type, joined by the data-centre network
  --spot                           use cheaper machines that can be taken away
  --valid-until-duration D         give up the request after D, as 6h; else it stays in the queue
  --version V                      software version of the machines; else it follows from the type
  --env NAME=VALUE                 variable for the training, as TFDS_DATA_DIR=gs://BUCKET/tfds; may be repeated
  --keep                           `run` does not delete the machines, which continue to cost money
  --dry-run                        prints the commands, and runs none

`run` ends with the training's status: 0 success, 2 wrong use, 3 a failure that would come again. After 75 (preempted), a lost pod, a failed install or a lack of capacity
it tries again, after RETRY_FIRST seconds (30), then twice that and so on up to RETRY_MOST (1800). It gives up after RETRIES (10)
tries in a row without progress, that is, without a new checkpoint in the workdir. It checks the machines every POLL seconds (20).
TEXT
}

exec 3>&1 4>&2 # for dry commands and messages, also where the output of a command is captured
say() { echo "tpu_pod: $*" >&4; }
wrong() { say "$*" && exit 2; }

project=${CLIPJAX_PROJECT:-} zone=${CLIPJAX_ZONE:-} name=${CLIPJAX_NAME:-} type=${CLIPJAX_TYPE:-} workdir=${CLIPJAX_WORKDIR:-}
slices=1 version='' keep='' dry='' request=() environment=()
case "${1:---help}" in
-h | --help) usage && exit ;;
run | create | wait | install | train | logs | status | stop | delete) command=$1 && shift ;;
*) wrong "no command $1; see launch/tpu_pod.sh --help" ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
  -h | --help) usage && exit ;;
  --spot) request+=("$1") ;;
  --keep) keep=1 ;;
  --dry-run) dry=1 ;;
  --project | --zone | --name | --type | --workdir | --slices | --version | --env | --valid-until-duration)
    [ $# -gt 1 ] || wrong "$1: needs a value"
    case "$1" in
    --env) environment+=("$2") ;;
    --valid-until-duration) request+=("$1=$2") ;;
    *) printf -v "${1#--}" %s "$2" ;;
    esac
    shift
    ;;
  -*) wrong "unknown option $1; options of clipjax go after CONFIG.py; see launch/tpu_pod.sh --help" ;;
  *) break ;;
  esac
  shift
done

missing=''
needs() { # NAME what it is
  [ -n "${!1}" ] || missing="$missing
  --$1, or CLIPJAX_$(echo "$1" | tr '[:lower:]' '[:upper:]'): $2"
}
needs project "the project to charge"
needs zone "zone of the machines, as us-central1-a"
needs name "a name for the machines"
case "$command" in run | create) needs type "the accelerator type, as v5litepod-16" ;; esac
case "$command" in
run | train)
  needs workdir "gs://BUCKET/RUN, where checkpoints stay when the machines are gone"
  [ $# -gt 0 ] || missing="$missing
  CONFIG.py|NAME: what to train, as siglip_b16"
  ;;
esac
[ -z "$missing" ] || wrong "missing:$missing"
case "$workdir" in '' | gs://?*) ;; *) wrong "--workdir = '$workdir': must be gs://BUCKET/RUN, which all workers see" ;; esac
case "$slices" in '' | *[!0-9]* | 0*) wrong "--slices = '$slices': must be a whole number, 1 or more" ;; esac
for one in ${environment[@]+"${environment[@]}"}; do
  [[ "$one" =~ ^[A-Za-z_][A-Za-z_0-9]*= ]] || wrong "--env = '$one': must be NAME=VALUE"
done
train=("$@")

cd "$(dirname "${BASH_SOURCE[0]}")/.."
where=(--project="$project" --zone="$zone")
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
poll=${POLL:-20}

quoted() { # quotes words for a shell
  local word out='' one="'" inside="'\\''"
  for word in "$@"; do
    case "$word" in '' | *[!A-Za-z0-9_./:=@,+-]*) word="'${word//$one/$inside}'" ;; esac
    out="$out $word"
  done
  echo "${out# }"
}
do_() { # runs a command that leaves this machine; with --dry-run prints it
  if [ -n "$dry" ]; then quoted "$@" >&3; else "$@"; fi
}
resource() { do_ gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on() { # NODE WORKERS COMMAND...; the connection fails within two minutes after a machine is gone
  local alive=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4)
  do_ gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --worker="$2" "${alive[@]}" --command="${*:3}"
}
on_all_nodes() { # FUNCTION ARGUMENTS...: for each node, in parallel; fails if one fails
  local node pids=() failed=0
  for node in "${nodes[@]}"; do
    if [ -n "$dry" ]; then "$1" "$node" "${@:2}"; else "$1" "$node" "${@:2}" & pids+=($!); fi
  done
  for node in ${pids[@]+"${pids[@]}"}; do wait "$node" || failed=1; done
  return $failed
}

state() { # state of the queued resource; none if it does not exist
  if [ -n "$dry" ]; then
    resource describe "--format=value(state.state)"
    echo ACTIVE
    return
  fi
  local answer complaint
  complaint=$(mktemp)
  if answer=$(resource describe "--format=value(state.state)" 2>"$complaint"); then
    echo "${answer:-UNKNOWN}"
  elif grep -q NOT_FOUND "$complaint"; then
    echo none
  else
    cat "$complaint" >&2
    echo UNKNOWN
  fi
  rm -f "$complaint"
}

software() { # https://cloud.google.com/tpu/docs/runtimes
  case "$type" in
  v6e-*) echo v2-alpha-tpuv6e ;;
  v5p-*) echo v2-alpha-tpuv5 ;;
  v5litepod-*) echo v2-alpha-tpuv5-lite ;;
  v[234]-*) echo tpu-ubuntu2204-base ;;
  *) wrong "--type = '$type': its software version is not known; known kinds are those of v4-8, v5litepod-16, v5p-8 and v6e-8; else give --version" ;;
  esac
}

create() { # returns 75 if the same request can succeed later
  local slice=(--node-id="$name") complaint status=0
  [ "$slices" = 1 ] || slice=(--node-count="$slices" --node-prefix="$name")
  [ -n "$version" ] || version=$(software) || exit
  complaint=$(mktemp)
  resource create "${slice[@]}" --accelerator-type="$type" --runtime-version="$version" ${request[@]+"${request[@]}"} --async \
    2>"$complaint" || status=1
  cat "$complaint" >&2
  if [ $status = 1 ] && grep -qiE "capacity|exhausted|unavailable|deadline|internal|aborted|already_exists" "$complaint"; then status=75; fi
  rm -f "$complaint"
  return $status
}

await() { # until the machines are ready; returns 75 if they fail
  local now before='' unknown=0
  while :; do
    now=$(state)
    [ "$now" = "$before" ] || say "$name is ${now}"
    before=$now
    case "$now" in
    ACTIVE) return ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING | none) return 75 ;;
    UNKNOWN) if ((++unknown >= 5)); then say "$name: gcloud can't tell its state" && return 1; fi ;;
    *) unknown=0 ;; # WAITING_FOR_RESOURCES, ACCEPTED, CREATING, PROVISIONING
    esac
    sleep "$poll"
  done
}

worker() { echo "bash clipjax/launch/tpu_worker.sh $*"; }
copy() { do_ gcloud compute tpus tpu-vm scp "$2" "$1:clipjax.tar.gz" "${where[@]}" --worker=all; }
unpack="mkdir -p clipjax && tar -xzf clipjax.tar.gz -C clipjax"
install() {
  local folder=${TMPDIR:-/tmp} status=0
  [ -n "$dry" ] || folder=$(mktemp -d)
  do_ git archive --format=tar.gz --output="$folder/clipjax.tar.gz" HEAD &&
    on_all_nodes copy "$folder/clipjax.tar.gz" && on_all_nodes on all "$unpack && $(worker install)" || status=1
  [ $status = 0 ] || say "the installation failed on a worker: see above"
  [ -n "$dry" ] || rm -r "$folder"
  return $status
}

training() { # starts the training and follows it; returns its status, or 75 if the machines are gone
  local said statuses one lost=0
  on_all_nodes on all "$(worker start "$(quoted ${environment[@]+"${environment[@]}"} "${train[@]}" --workdir "$workdir")")" || lost=1
  while :; do
    if [ $lost -gt 0 ]; then
      case $(state) in ACTIVE | UNKNOWN) ;; *) say "$name is gone" && return 75 ;; esac
      if ((lost >= 5)); then # a slice may be gone although the request is ACTIVE
        say "$name can't be reached: deleting it" && { delete || return 75; } && return 75
      fi
      sleep "$poll"
    fi
    if on "${nodes[0]}" 0 "$(worker follow)"; then lost=0; fi # only to show the log; the status comes from every worker
    if said=$(on_all_nodes on all "$(worker wait)"); then
      [ -z "$dry" ] || return 0
      echo "$said"
      statuses=$(sed -n 's/.*: ended with status \([0-9]*\)$/\1/p' <<<"$said")
      # If they differ: wrong use first, then what would come again, then another failure, then 75.
      for one in 2 3 $(grep -vx -e 0 -e 75 <<<"$statuses" || true) 75; do
        ! grep -qx "$one" <<<"$statuses" || return "$one"
      done
      ! grep -q 'not started$' <<<"$said" || return 75
      return 0
    fi
    lost=$((lost + 1))
    say "lost the connection"
  done
}

checkpoints() { do_ gcloud storage ls "$workdir/checkpoints/" --project="$project" 2>/dev/null || true; }
delete() { resource delete --force --quiet; }

attempt() { # from the present state of the machines to the end of the training
  local status=0 now
  now=$(state)
  case "$now" in
  UNKNOWN) if [ -z "$known" ]; then return 1; else return 75; fi ;;
  FAILED | SUSPENDING | SUSPENDED) say "$name is $now: deleting it" && { delete || return 75; } && now=none ;;
  esac
  known=1
  if [ -n "$dry" ] || [ "$now" = none ]; then create || return; fi
  await || return 75
  install || return 75
  training || status=$?
  return $status
}

run() {
  local failures=0 pause=${RETRY_FIRST:-30} status before after known=''
  [ -n "$version" ] || version=$(software) || exit
  trap 'say "interrupted; $name continues, and costs money: launch/tpu_pod.sh logs, stop or delete"; exit 130' INT
  while :; do
    before=$(checkpoints) status=0
    attempt || status=$?
    [ $status = 75 ] || break
    after=$(checkpoints)
    if [ "$before" = "$after" ]; then failures=$((failures + 1)); else failures=0 pause=${RETRY_FIRST:-30}; fi
    local so_far="tries in a row without progress: $failures"
    if ((failures && failures >= ${RETRIES:-10})); then
      say "$so_far, giving up"
      break
    fi
    say "$so_far of ${RETRIES:-10}; again in $pause s"
    sleep "$pause"
    pause=$((pause * 2 < ${RETRY_MOST:-1800} ? pause * 2 : ${RETRY_MOST:-1800}))
  done
  if [ -n "$keep" ]; then
    say "$name continues, and costs money"
  elif [ "$(state)" != none ]; then
    delete || say "$name could not be deleted, and may continue to cost money"
  fi
  return $status
}

status() {
  local now
  now=$(state)
  [ -n "$dry" ] || echo "$name: $now"
  if [ "$now" = ACTIVE ]; then on_all_nodes on all "$(worker status)"; fi
}

case "$command" in # before anything costs money
run | train) bash launch/committed.sh "${train[@]}" ;;
create | install) bash launch/committed.sh ;;
esac
case "$command" in
wait) await ;;
train) training ;;
logs) on "${nodes[0]}" 0 "$(worker follow)" ;;
stop) on_all_nodes on all "$(worker stop)" ;;
*) "$command" ;;
esac
