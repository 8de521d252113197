#!/usr/bin/env bash
# The options of the TPU compiler that overlap communication with computation, in one place for every launcher.
# Usage: launch/tpu_flags.sh COMMAND...   runs COMMAND with them in LIBTPU_INIT_ARGS;   launch/tpu_flags.sh   prints them.
# Earlier contents of LIBTPU_INIT_ARGS come after them, and so win. libtpu ends at once if it does not know a name; tests/launch
# asks the installed libtpu. Sources: AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py, and openxla.org/xla/flags_guidance.
# Options that libtpu 0.0.52 has on by default are left out (xla_dump_to writes all that are on to *.tpu_comp_env.txt).
# By benchmarks/tpu_flags.py they change little at compile time: siglip_so400m on v5e:16x16 takes 2.64 GiB a chip with them and 2.74
# without, siglip_b16 3.37 with and without. The bytes on the links are the same. Products hide three gathers of siglip_so400m and
# none of siglip_b16, with and without. The effect on a step's time has not been measured.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" && exit ;; esac

flags=(
  # Collectives become a start and a done, and the scheduler puts work between them: FSDP's gathers of weights, the sums of
  # gradients, and the hops of the losses' ring.
  --xla_enable_async_all_gather=true
  --xla_enable_async_all_reduce=true
  --xla_enable_async_collective_permute=true
  # A collective is fused with the computation that hides it.
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
)
export LIBTPU_INIT_ARGS="${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
if [ $# = 0 ]; then echo "$LIBTPU_INIT_ARGS"; else exec "$@"; fi
