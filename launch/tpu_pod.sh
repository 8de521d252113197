#!/usr/bin/env bash
# Trains on Cloud TPUs: `launch/tpu_pod.sh --help`. Runs where bash 3.2 does, as on a Mac.
#
# The commands are those of https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources (create, describe, delete),
# .../compute/tpus/tpu-vm (ssh, scp) and .../storage/ls. A slice is addressed by itself rather than all of them by
# `queued-resources ssh --node=all`, which goes on without a slice that it can't prepare, and tells the status of one worker.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_pod.sh COMMAND [OPTION...] [CONFIG.py [--any.config.field VALUE ...]]

  launch/tpu_pod.sh run --project P --zone Z --name N --type v5litepod-16 --spot --workdir gs://BUCKET/RUN configs/siglip_b16.py

COMMAND
  run        all of the following up to the end of the training; a pod that is preempted or fails is made anew, and training
             goes on from --workdir; the pod is deleted in the end
  create     asks for the machines, as a queued resource, and returns at once
  wait       until they are there
  install    this checkout's HEAD and what it needs, on all workers
  train      starts CONFIG.py on all workers, or finds it running, and follows the log to the end; the status is its status
  logs       follows the log of the first worker
  status     what the machines and the training do now
  stop       tells the training to save and end
  delete     the machines, and the request for them

OPTION (or the environment's)
  --project P    CLIPJAX_PROJECT   the project to charge
  --zone Z       CLIPJAX_ZONE      where
  --name N       CLIPJAX_NAME      of the queued resource; its slices are N, or N-0, N-1, ...
  --type T       CLIPJAX_TYPE      accelerator type of a slice: v4-8, v5litepod-256, v5p-128, v6e-16 ...
  --workdir W    CLIPJAX_WORKDIR   gs://BUCKET/RUN: checkpoints, metrics
  --slices S     1                 of that type, joined by the data-centre network
  --spot                           cheaper machines that can be taken away
  --valid-until-duration D         gives the request up after D, as 6h; else it waits in the queue
  --version V                      software version of the machines; else by the type
  --env NAME=VALUE                 for the training, as TFDS_DATA_DIR=gs://BUCKET/tfds; may be repeated
  --keep                           `run` leaves the machines, which go on costing money
  --dry-run                        prints the commands, and runs none

`run` ends with the training's status: 0 done, 2 wrong use. After 75 (preempted), a lost pod, a failed install or no capacity it
tries again, after RETRY_FIRST seconds (30), then twice that and so on up to RETRY_MOST (1800). It gives up after RETRIES (10)
tries in a row without progress, which is another checkpoint in the workdir. It asks for the machines' state every POLL seconds (20).
TEXT
}

exec 3>&1 4>&2 # where dry commands and words go, even from where a command's own output is kept
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
  -*) wrong "unknown option $1; those of clipjax go after CONFIG.py; see launch/tpu_pod.sh --help" ;;
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
needs zone "where the machines are, as us-central1-a"
needs name "a name for the machines"
case "$command" in run | create) needs type "the accelerator type, as v5litepod-16" ;; esac
case "$command" in
run | train)
  needs workdir "gs://BUCKET/RUN, where checkpoints outlive the machines"
  [ $# -gt 0 ] || missing="$missing
  CONFIG.py: what to train, as configs/siglip_b16.py"
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

quoted() { # as a shell reads it back
  local word out='' one="'" inside="'\\''"
  for word in "$@"; do
    case "$word" in '' | *[!A-Za-z0-9_./:=@,+-]*) word="'${word//$one/$inside}'" ;; esac
    out="$out $word"
  done
  echo "${out# }"
}
do_() { # every command that reaches outside goes through here
  if [ -n "$dry" ]; then quoted "$@" >&3; else "$@"; fi
}
resource() { do_ gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on() { # NODE WORKERS COMMAND...: the connection notices within two minutes that a machine is gone
  local alive=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4)
  do_ gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --worker="$2" "${alive[@]}" --command="${*:3}"
}
everywhere() { # FUNCTION ARGUMENTS... for each node at once; fails where one did
  local node pids=() failed=0
  for node in "${nodes[@]}"; do
    if [ -n "$dry" ]; then "$1" "$node" "${@:2}"; else "$1" "$node" "${@:2}" & pids+=($!); fi
  done
  for node in ${pids[@]+"${pids[@]}"}; do wait "$node" || failed=1; done
  return $failed
}

state() { # of the queued resource; none if there is no such
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
  *) wrong "--type = '$type': its software isn't known here; v4-8, v5litepod-16, v5p-8 and v6e-8 are of known kinds; else give --version" ;;
  esac
}

create() { # 75 where the same request can succeed later
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

await() { # until the machines are there; 75 if they won't be
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
  [ -z "$(git status --porcelain --untracked-files=no)" ] || say "what is not committed stays here: installing $(git rev-parse --short HEAD)"
  do_ git archive --format=tar.gz --output="$folder/clipjax.tar.gz" HEAD &&
    everywhere copy "$folder/clipjax.tar.gz" && everywhere on all "$unpack && $(worker install)" || status=1
  [ $status = 0 ] || say "the installation failed on a worker: see above"
  [ -n "$dry" ] || rm -r "$folder"
  return $status
}

training() { # starts and follows; the training's status, or 75 for machines that are gone
  local said statuses one lost=0
  everywhere on all "$(worker start "$(quoted ${environment[@]+"${environment[@]}"} "${train[@]}" --workdir "$workdir")")" || lost=1
  while :; do
    if [ $lost -gt 0 ]; then
      case $(state) in ACTIVE | UNKNOWN) ;; *) say "$name is gone" && return 75 ;; esac
      if ((lost >= 5)); then # a slice may be gone though the request stands
        say "$name can't be reached: deleting it" && { delete || return 75; } && return 75
      fi
      sleep "$poll"
    fi
    if on "${nodes[0]}" 0 "$(worker follow)"; then lost=0; fi # for the eye: what counts is what every worker says in the end
    if said=$(everywhere on all "$(worker wait)"); then
      [ -z "$dry" ] || return 0
      echo "$said"
      statuses=$(sed -n 's/.*: ended with status \([0-9]*\)$/\1/p' <<<"$said")
      # Of unlike ones: wrong use, then what will fail again, then what goes on.
      for one in 2 $(grep -vx -e 0 -e 75 <<<"$statuses" || true) 75; do
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

attempt() { # one way from whatever is there to the end of the training
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
  trap 'say "interrupted; $name goes on, and costs money: launch/tpu_pod.sh logs, stop or delete"; exit 130' INT
  while :; do
    before=$(checkpoints) status=0
    attempt || status=$?
    [ $status = 75 ] || break
    after=$(checkpoints)
    if [ "$before" = "$after" ]; then failures=$((failures + 1)); else failures=0 pause=${RETRY_FIRST:-30}; fi
    local so_far="tries in a row without progress: $failures"
    if ((failures && failures >= ${RETRIES:-10})); then
      say "$so_far, so this is the end"
      break
    fi
    say "$so_far of ${RETRIES:-10}; again in $pause s"
    sleep "$pause"
    pause=$((pause * 2 < ${RETRY_MOST:-1800} ? pause * 2 : ${RETRY_MOST:-1800}))
  done
  if [ -n "$keep" ]; then
    say "$name goes on, and costs money"
  elif [ "$(state)" != none ]; then
    delete || say "$name could not be deleted, and may go on costing money"
  fi
  return $status
}

status() {
  local now
  now=$(state)
  [ -n "$dry" ] || echo "$name: $now"
  if [ "$now" = ACTIVE ]; then everywhere on all "$(worker status)"; fi
}

case "$command" in
wait) await ;;
train) training ;;
logs) on "${nodes[0]}" 0 "$(worker follow)" ;;
stop) everywhere on all "$(worker stop)" ;;
*) "$command" ;;
esac
