"""Finds the other processes of a run in the environment: none, or their number and the address of process 0.

JAX can detect clusters itself. But it takes a process that is alone in Slurm's or Kubernetes' environment for a cluster. So here
JAX gets the name of the cluster, and only where there are several processes.
"""

import logging
from collections.abc import Mapping
from typing import Any

from clipjax.config import ConfigError, require

ADDRESS, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # of a job step; JAX reads them
OPEN_MPI = "OMPI_MCA_orte_hnp_uri"  # set by mpirun: JAX derives the address of process 0 from it
EXPLICIT = f"set {ADDRESS} (host:port of process 0), {COUNT} and {ID}"

log = logging.getLogger(__name__)


def detect(env: Mapping[str, str], tpu: bool) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`, or None for a process that is alone. `tpu`: whether this machine has TPUs.

    Looked up in this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a Slurm step of several tasks; Open
    MPI; on a machine with TPUs, the hosts in GKE's environment or in the metadata server. JAX_COORDINATOR_ADDRESS alone replaces
    the address that a cluster gives.

    Raises ConfigError for values that are not numbers or contradict each other, and for a launcher that sets too few variables.
    """
    address, count, mine = (env.get(name, "") for name in (ADDRESS, COUNT, ID))
    if count or mine:
        return _explicit(address, count, mine)
    of_cluster = _slurm(env) or _open_mpi(env) or (_tpu(env) if tpu else None)
    if address:
        if of_cluster is None:
            raise ConfigError(f"{ADDRESS} = {address!r}: is set, but not which process this is: {EXPLICIT}, or none of them")
        return of_cluster | {"coordinator_address": address}
    return of_cluster


def _explicit(address: str, count: str, mine: str) -> dict[str, Any] | None:
    n, i = _number(COUNT, count or "missing"), _number(ID, mine or "missing")
    require(n > 0, COUNT, n, "must be positive")
    require(0 <= i < n, ID, i, f"must be at least 0 and less than {COUNT} = {n}")
    if n == 1:
        return None
    host, _, port = address.rpartition(":")
    require(bool(host) and port.isdecimal(), ADDRESS, address, f"must be host:port of process 0, one of {n}")
    return dict(coordinator_address=address, num_processes=n, process_id=i, cluster_detection_method="deactivate")


def _number(name: str, text: str) -> int:
    require(text.lstrip("-").isdecimal(), name, text, f"must be a whole number: {EXPLICIT}, or none of them")
    return int(text)


def _slurm(env: Mapping[str, str]) -> dict[str, Any] | None:
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if not tasks.isdecimal() or int(tasks) < 2:
        return None
    if any(name not in env for name in SLURM):
        log.warning("SLURM_NTASKS = %s, but srun did not start this process: it works alone; start all with srun", tasks)
        return None
    arguments: dict[str, Any] = dict(cluster_detection_method="slurm", num_processes=int(tasks))
    # JAX gives each task one device: the one with the task's number on the node. That is wrong where a node has one task, which
    # owns all devices, and where Slurm shows each task only its own device, as number 0.
    bound = len(env.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and env.get("CUDA_VISIBLE_DEVICES", "")
    if (env.get("SLURM_STEP_NUM_NODES") == tasks or bound) and "JAX_LOCAL_DEVICE_IDS" not in env:
        arguments["local_device_ids"] = []  # all that are visible
    return arguments


def _open_mpi(env: Mapping[str, str]) -> dict[str, Any] | None:
    size = env.get("OMPI_COMM_WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 2:
        return None
    require(OPEN_MPI in env, "OMPI_COMM_WORLD_SIZE", size, f"this Open MPI does not give the address of process 0: {EXPLICIT}")
    return dict(cluster_detection_method="ompi")


def _tpu(env: Mapping[str, str]) -> dict[str, Any] | None:
    """For a machine with TPUs only: elsewhere clipjax itself sets some of these variables, for the TPU compiler."""
    if "tpu" not in env.get("JAX_PLATFORMS", "tpu"):
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts is None:  # a TPU VM asks its metadata server; it is joined also if it is alone, to get maintenance notices
        return None if "TPU_SKIP_MDS_QUERY" in env else dict(cluster_detection_method="gcetpu")
    slices = env.get("MEGASCALE_NUM_SLICES") or "1"
    if len(hosts.split(",")) == 1 and slices == "1":
        return None
    if "TPU_WORKER_ID" not in env:
        raise ConfigError(f"TPU_WORKER_HOSTNAMES = {hosts!r}: TPU_WORKER_ID, which of them this is, is missing: {EXPLICIT}")
    return dict(cluster_detection_method="gketpu")
