"""Whether this process is one of several."""

import os

import jax

from clipjax.config import ConfigError


def require_one_process() -> None:
    """Raises ConfigError where a launcher started several processes that JAX does not know of: each would train on its own, all
    in the same workdir. A program that has called `jax.distributed.initialize` passes.
    """
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or "one"
    counts = {name: os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")}
    for name, count in (counts | {"TPU worker hosts": str(len(hosts.split(",")))}).items():
        if jax.process_count() == 1 and count.isdecimal() and int(count) > 1:
            why = "several processes would each train alone in the same workdir, as this version does not join hosts yet"
            raise ConfigError(f"{name} = {count}: {why}; start one process on one host (Slurm: srun --ntasks=1 --exclusive)")
