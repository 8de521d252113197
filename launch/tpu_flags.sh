#!/usr/bin/env bash
# The TPU compiler's options for overlapping communication with computation, in one place for every launcher.
# Usage: launch/tpu_flags.sh COMMAND...   runs COMMAND with them in LIBTPU_INIT_ARGS;   launch/tpu_flags.sh   prints them.
# What LIBTPU_INIT_ARGS held before comes after, and so wins. A name that libtpu doesn't know ends it at once: tests/launch asks
# the installed one. Names as in AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py, and openxla.org/xla/flags_guidance.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" && exit ;; esac

flags=(
  # Collectives as a start and a done, between which the scheduler puts work: FSDP's gathers of weights, the sums of gradients,
  # and the hops of the losses' ring.
  --xla_enable_async_all_gather=true
  --xla_enable_async_all_reduce=true
  --xla_enable_async_collective_permute=true
  # A collective fused with the computation that hides it, carried on over several of them; both on the tensor cores.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  # Sums of gradients over `data`, between slices above all: started while the backward pass goes on, layers of unlike size too.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
export LIBTPU_INIT_ARGS="${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
if [ $# = 0 ]; then echo "$LIBTPU_INIT_ARGS"; else exec "$@"; fi
