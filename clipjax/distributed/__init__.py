"""Several processes, one a host, as one run: their start, what they tell each other on the way, and their common end.

For a process that is alone all of this does nothing.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax._src import cloud_tpu_init
from jax._src.distributed import global_state

from clipjax.config import ConfigError, require
from clipjax.distributed import watch
from clipjax.distributed.cluster import found
from clipjax.distributed.watch import AGAIN

__all__ = ["AGAIN", "agree", "alive", "at", "in_turn", "joined", "leave", "require_joined", "start", "total"]

PROXIES = {"http_proxy", "https_proxy", "grpc_proxy", "all_proxy"}
_watch: watch.Watch | None = None


def start() -> None:
    """Joins this process to the others that its environment tells of (see `cluster.found`). Before anything asks JAX for devices.

    From then on a process that dies, or is silent for CLIPJAX_HEARTBEAT_SECONDS (60), ends the others with status 75 and its
    name; so does one that makes no progress for 10 times as long in a step, or 60 times while it compiles, evaluates or saves.
    All must come within 5 times.

    Raises ConfigError where the environment contradicts itself.
    """
    global _watch
    how = None if jax.distributed.is_initialized() else found(os.environ, cloud_tpu_init.running_in_cloud_tpu_vm)
    if how is None:
        return
    seconds = watch.heartbeat()
    jax.config.update("jax_enable_preemption_service", False)  # till `preemption.listening`: now it would only swallow SIGTERM
    with watch.joining(how.get("coordinator_address"), how.get("num_processes")), _without_proxies():
        jax.distributed.initialize(
            **how,
            initialization_timeout=int(2 * watch.JOIN * seconds),
            heartbeat_timeout_seconds=int(5 * seconds) + 30,  # JAX names nobody and aborts: it comes second
            shutdown_timeout_seconds=int(seconds) + 30,
        )
        _keep_stdout()
        if global_state.num_processes > 1:  # jax.process_count() would make the devices, which waits for all without a watch
            _watch = watch.Watch()


def require_joined() -> None:
    """Raises ConfigError in one of several processes that JAX has not joined: each would train alone, all in one workdir."""
    if not jax.distributed.is_initialized() and found(os.environ, cloud_tpu_init.running_in_cloud_tpu_vm):
        raise ConfigError("this is one of several processes: call clipjax.distributed.start() before anything asks for devices")


def joined() -> bool:
    """Whether this process is one of several."""
    return _watch is not None


def at(step: int, stage: str) -> None:
    """This process has `step` finished steps and begins a stage of the next, one of `watch.STAGES`."""
    if _watch:
        _watch.at(step, stage)


def alive() -> None:
    """The stage makes progress: a further batch of an evaluation is done."""
    if _watch:
        _watch.alive()


def leave(status: int, message: object, unforeseen: bool = False) -> object:
    """The end of this process's work with a status and something to print (or None). A good one (0, or 75 where all stop to be
    started again) waits for the others; a bad one is theirs too, and does not return. Returns what this process shall print.

    `unforeseen`: of an error that may only say that another process is gone; then it is that one's end.
    """
    if _watch is None:
        return message
    if status in (0, AGAIN):
        _watch.meet()
        return message if global_state.process_id == 0 else None
    if unforeseen:
        _watch.blame()
    _watch.fail(status, message)


@contextlib.contextmanager
def in_turn(what: str) -> Iterator[None]:
    """The first process goes through the block before the others: what it makes there (files on a shared disk) they find."""
    if _watch and global_state.process_id > 0:
        _watch.wait(what)
    yield
    if _watch and global_state.process_id == 0:
        _watch.wait(what)


def agree(what: str, value: str | int) -> None:
    """Raises ConfigError in a process whose value is not the first one's: they would go on as one run and compute nonsense."""
    if _watch:
        theirs = _watch.of_the_first(what, str(value))
        remedy = "all processes need the same command, configuration and data, and one --workdir that they share"
        require(theirs == str(value), what, value, f"process 0 has {theirs}: {remedy}")


def total(count: int) -> int:
    """The sum over all processes, each of which must ask."""
    if jax.process_count() == 1:
        return count
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(count)).sum())


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """JAX's service is one of the run's own hosts, but gRPC asks a proxy for it, and waits (jax issue 16788)."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.lower() in PROXIES}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _keep_stdout() -> None:
    """Gloo and NCCL print to standard output from C, amid a result that another program reads: what they print goes to stderr."""
    if sys.stdout is sys.__stdout__ and sys.stdout.fileno() == 1:
        sys.stdout.flush()
        own = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = sys.__stdout__ = os.fdopen(own, "w", encoding=sys.stdout.encoding)
