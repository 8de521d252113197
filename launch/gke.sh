#!/usr/bin/env bash
# Fills in launch/gke.yaml and gives it to kubectl: `launch/gke.sh --help`.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/gke.sh COMMAND [OPTION...] [CONFIG.py|NAME [--any.config.field VALUE ...]]

  launch/gke.sh apply --context C --name N --image I --topology v5e:16x16 --workdir gs://BUCKET/RUN siglip_b16

COMMAND
  render     prints the JobSet
  apply      starts it
  status     shows the state of the JobSet and its pods
  logs       follows the log of the first machine
  delete     ends it; training saves first

OPTION (or an environment variable, or a default)
  --context C     CLIPJAX_CONTEXT    the cluster, by kubectl's name for it (kubectl config get-contexts)
  --name N        CLIPJAX_NAME       name of the JobSet
  --image I       CLIPJAX_IMAGE      image with clipjax for TPUs, as launch/Dockerfile makes it
  --topology T    CLIPJAX_TOPOLOGY   of a slice, as `clipjax plan` takes it: v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4
  --workdir W     CLIPJAX_WORKDIR    gs://BUCKET/RUN: checkpoints, metrics
  --slices S      1                  number of slices of that topology, each a node pool
  --restarts R    20                 how often all slices start again before the JobSet fails
  --account A     default            Kubernetes service account that may write to the bucket
  --spot                             use cheaper machines that can be taken away
  --env NAME=VALUE                   variable for the training, as TFDS_DATA_DIR=gs://BUCKET/tfds; may be repeated
  --dry-run                          prints the commands, and runs none

The JobSet ends at once where training ends with 2 (wrong use) or 3 (a failure that would come again). After any other failure, and
after 75 (preempted), first each machine and then all slices start again.
TEXT
}

say() { echo "gke: $*" >&2; }
wrong() { say "$*" && exit 2; }

context=${CLIPJAX_CONTEXT:-} name=${CLIPJAX_NAME:-} image=${CLIPJAX_IMAGE:-} topology=${CLIPJAX_TOPOLOGY:-} workdir=${CLIPJAX_WORKDIR:-}
slices=1 restarts=20 account=default spot='' dry='' environment=()
case "${1:---help}" in
-h | --help) usage && exit ;;
render | apply | status | logs | delete) command=$1 && shift ;;
*) wrong "no command $1; see launch/gke.sh --help" ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
  -h | --help) usage && exit ;;
  --spot) spot='cloud.google.com/gke-spot: "true"' ;;
  --dry-run) dry=1 ;;
  --context | --name | --image | --topology | --workdir | --slices | --restarts | --account | --env)
    [ $# -gt 1 ] || wrong "$1: needs a value"
    if [ "$1" = --env ]; then environment+=("$2"); else printf -v "${1#--}" %s "$2"; fi
    shift
    ;;
  -*) wrong "unknown option $1; options of clipjax go after CONFIG.py; see launch/gke.sh --help" ;;
  *) break ;;
  esac
  shift
done

missing=''
needs() { # NAME what it is
  [ -n "${!1}" ] || missing="$missing
  --$1, or CLIPJAX_$(echo "$1" | tr '[:lower:]' '[:upper:]'): $2"
}
[ "$command" = render ] || needs context "the cluster, one of: kubectl config get-contexts"
needs name "a name for the JobSet"
case "$command" in
render | apply)
  needs image "an image with clipjax, as launch/Dockerfile makes it"
  needs topology "of a slice, as v5e:16x16"
  needs workdir "gs://BUCKET/RUN, where checkpoints stay when the machines are gone"
  [ $# -gt 0 ] || missing="$missing
  CONFIG.py|NAME: what to train, as siglip_b16"
  ;;
esac
[ -z "$missing" ] || wrong "missing:$missing"
[[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || wrong "--name = '$name': must consist of a-z, 0-9 and -, a rule of Kubernetes"
case "$workdir" in '' | gs://?*) ;; *) wrong "--workdir = '$workdir': must be gs://BUCKET/RUN, which all machines see" ;; esac
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || wrong "--slices = '$slices': must be a whole number, 1 or more"
[[ "$restarts" =~ ^[0-9]+$ ]] || wrong "--restarts = '$restarts': must be a whole number"

if [ "$command" = render ] || [ "$command" = apply ]; then
  case "$1" in */* | *.py) file=$1 ;; *) file=configs/$1.py ;; esac
  [ -e "$(dirname "${BASH_SOURCE[0]}")/../$file" ] || [ "${file#/}" != "$file" ] ||
    say "CONFIG.py|NAME = '$1': is not in this checkout; the image must have it as $file"
fi

text() { # a YAML string
  local one="'"
  echo "'${1//$one/$one$one}'"
}
fields() { # its arguments, joined by commas
  local all='' one
  for one in "$@"; do all="$all, $one"; done
  echo "${all#, }"
}

flat="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
of_cubes() { # SHAPE MOST: whether it consists of cubes of 4x4x4 chips, sorted, and has at most MOST chips
  local lengths before=4 length chips=1
  read -r -a lengths <<<"${1//x/ }"
  [ ${#lengths[@]} = 3 ] || return 1
  for length in "${lengths[@]}"; do
    if ((length % 4 || length < before)); then return 1; fi
    before=$length chips=$((chips * length))
  done
  ((chips <= $2))
}

render() {
  local kind=${topology%%:*} shape=${topology#*:} chips=1 of=4 known='' most='' length
  # Labels and shapes: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. A machine has four chips; v5e and v6e also
  # have slices of one machine with one chip, and with eight.
  case "$kind" in
  v4) kind=tpu-v4-podslice most=4096 ;;
  v5e) kind=tpu-v5-lite-podslice known=$flat ;;
  v5p) kind=tpu-v5p-slice most=6144 ;;
  v6e) kind=tpu-v6e-slice known=$flat ;;
  tpu7x) most=9216 ;;
  *) wrong "--topology = '$topology': must be v4, v5e, v5p, v6e or tpu7x and a shape, as v5e:16x16" ;;
  esac
  known=${known:-2x2x1 2x2x2 2x2x4 2x4x4}
  [[ "$shape" =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] || wrong "--topology = '$topology': must be a kind and a shape, as v5e:16x16"
  case " $known " in
  *" $shape "*) ;;
  *)
    { [ -n "$most" ] && of_cubes "$shape" "$most"; } || wrong "--topology = '$topology': there are no such slices; ${topology%%:*} comes as" \
      "${known// /, }${most:+, and AxBxC with A <= B <= C, multiples of four, up to $most chips}"
    ;;
  esac
  for length in ${shape//x/ }; do chips=$((chips * length)); done
  case "$shape" in 1x1) of=1 ;; 2x4) of=8 ;; esac

  local arguments=() variables=() one line known value
  for one in "${train[@]}" --workdir "$workdir"; do arguments+=("$(text "$one")"); done
  for one in ${environment[@]+"${environment[@]}"}; do
    [[ "$one" =~ ^[A-Za-z_][A-Za-z_0-9]*= ]] || wrong "--env = '$one': must be NAME=VALUE"
    variables+=("{name: ${one%%=*}, value: $(text "${one#*=}")}")
  done
  # shellcheck disable=SC2034,SC2155  # read below by the names in gke.yaml
  local NAME=$name RESTARTS=$restarts SLICES=$slices HOSTS=$((chips / of)) CHIPS=$of ACCELERATOR=$kind TOPOLOGY=$shape SPOT=$spot \
    IMAGE=$(text "$image") SERVICE_ACCOUNT=$(text "$account") ARGS="[$(fields "${arguments[@]}")]" \
    ENV="[$(fields ${variables[@]+"${variables[@]}"})]"
  while IFS= read -r line; do
    while [[ "$line" =~ ^([^\$]*)\$\{([A-Z_]+)\}(.*)$ ]]; do
      known=${BASH_REMATCH[2]} value=''
      [ -n "${!known+set}" ] || wrong "launch/gke.yaml asks for $known, which launch/gke.sh does not set"
      value=${!known}
      printf '%s%s' "${BASH_REMATCH[1]}" "$value"
      line=${BASH_REMATCH[3]}
    done
    printf '%s\n' "$line"
  done <"$(dirname "${BASH_SOURCE[0]}")/gke.yaml"
}

kube() { # with --dry-run prints the command
  if [ -z "$dry" ]; then kubectl --context="$context" "$@"; else echo "kubectl --context=$context $*"; fi
}
train=("$@") of_it="jobset.sigs.k8s.io/jobset-name=$name"
case "$command" in
render) render ;;
apply)
  rendered=$(render)
  if [ -n "$dry" ]; then printf '%s\n' "$rendered"; fi
  kube apply --filename=- <<<"$rendered"
  ;;
status)
  kube get jobset "$name" --output=wide
  kube get pods --selector="$of_it" --output=wide
  ;;
logs) kube logs --follow --container=train --selector="$of_it,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" ;;
delete) kube delete jobset "$name" ;;
esac
