#!/usr/bin/env bash
# The TPU compiler's options for overlapping communication with computation, in one place for every launcher.
# Usage: launch/tpu_flags.sh COMMAND...   runs COMMAND with them in LIBTPU_INIT_ARGS;   launch/tpu_flags.sh   prints them.
# What LIBTPU_INIT_ARGS held before comes after, and so wins. A name that libtpu doesn't know ends it at once: tests/launch asks
# the installed one. Names as in AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py, and openxla.org/xla/flags_guidance;
# those of its options that libtpu 0.0.52 has on by itself are left out (xla_dump_to writes what is on to *.tpu_comp_env.txt).
# By benchmarks/tpu_flags.py they change little at compile time: siglip_so400m, v5e:16x16, takes 2.64 GiB a chip with them and 2.74
# without, siglip_b16 3.37 with and without; what is sent is the same, and so are the three gathers of the former that products
# hide, and none of the latter. What they do to a step's time has not been measured.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" && exit ;; esac

flags=(
  # Collectives as a start and a done, between which the scheduler puts work: FSDP's gathers of weights, the sums of gradients,
  # and the hops of the losses' ring.
  --xla_enable_async_all_gather=true
  --xla_enable_async_all_reduce=true
  --xla_enable_async_collective_permute=true
  # A collective fused with the computation that hides it.
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
)
export LIBTPU_INIT_ARGS="${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
if [ $# = 0 ]; then echo "$LIBTPU_INIT_ARGS"; else exec "$@"; fi
