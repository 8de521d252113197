"""Several processes as one run: how they start, agree with each other, and end together.

If there is only one process, all of this does nothing.
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
from clipjax.distributed.cluster import detect
from clipjax.status import RESTART_STATUS

PROXIES = {"http_proxy", "https_proxy", "grpc_proxy", "all_proxy"}
_watch: watch.Watch | None = None


def start() -> None:
    """Joins this process to the others of its run, which `cluster.detect` finds in the environment. Call it before anything asks
    JAX for devices.

    From then on, a process that dies, or is silent for CLIPJAX_HEARTBEAT_SECONDS (60), ends the others with status 75 and a
    message that names it. So does a process that makes no progress for 10 times as long in a step, or for 60 times as long while
    it compiles, evaluates or saves. All processes must join within 5 times as long.

    Raises ConfigError where the environment contradicts itself.
    """
    global _watch
    arguments = None if jax.distributed.is_initialized() else detect(os.environ, cloud_tpu_init.running_in_cloud_tpu_vm)
    if arguments is None:
        return
    seconds = watch.heartbeat()
    # Off until `preemption.listening` turns it on: until then SIGTERM must end the process.
    jax.config.update("jax_enable_preemption_service", False)
    with watch.joining(arguments.get("coordinator_address"), arguments.get("num_processes")), _without_proxies():
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(2 * watch.JOIN_BEATS * seconds),
            heartbeat_timeout_seconds=int(5 * seconds) + 30,  # later than the watch, because JAX aborts without naming a process
            shutdown_timeout_seconds=int(seconds) + 30,
        )
        _keep_stdout()
        # Not jax.process_count(): it initialises the devices and so waits for all processes, but no watch runs yet.
        if global_state.num_processes > 1:
            _watch = watch.Watch()


def require_joined() -> None:
    """Raises ConfigError if the processes of a run are not joined. Each would train alone, and all would write one workdir."""
    if not jax.distributed.is_initialized() and detect(os.environ, cloud_tpu_init.running_in_cloud_tpu_vm):
        raise ConfigError("this is one of several processes: call clipjax.distributed.start() before anything asks for devices")


def require_alone(command: str) -> None:
    """Raises ConfigError in one of several processes: each would do all of the command's work, and write the same files."""
    if detect(os.environ, tpu=False):  # on TPU VMs every machine may have a folder of its own
        raise ConfigError(f"{command} is for one process, and this is one of several: start it once, as with `srun --ntasks=1`")


def joined() -> bool:
    """Whether this process is one of several."""
    return _watch is not None


def enter_stage(step: int, stage: str) -> None:
    """This process has finished `step` steps, and begins a stage of the next one: one of `watch.STAGES`."""
    if _watch:
        _watch.enter_stage(step, stage)


def report_progress() -> None:
    """The stage makes progress, as when one more batch of an evaluation is done. Its time limit starts again."""
    if _watch:
        _watch.report_progress()


def leave(status: int, message: object, unforeseen: bool = False) -> object:
    """Ends this process's work with an exit status and a message, or None. Returns the message to print, or None.

    A good status (0, or 75 where all processes stop to be started again) waits for the others. A bad one ends the others with
    the same status, and does not return. `unforeseen`: another process's death may have caused the error. If so, this process
    ends with the status for that.
    """
    if _watch is None:
        return message
    if status in (0, RESTART_STATUS):
        _watch.finish()
        return message if global_state.process_id == 0 else None
    if unforeseen:
        _watch.end_if_another_died()
    _watch.fail(status, message)


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """For `with`: the first process runs the block before the others, which find what it made there, such as shared files."""
    if _watch and global_state.process_id > 0:
        _watch.wait(name)
    yield
    if _watch and global_state.process_id == 0:
        _watch.wait(name)


def agree(name: str, value: str | int) -> None:
    """Raises ConfigError in a process whose value differs from the first process's. `name` is the value's name in the message.

    Processes that differ would go on as one run and compute nonsense.
    """
    if _watch:
        expected = _watch.value_of_first(name, str(value))
        remedy = "all processes need the same command, configuration and data, and one --workdir that they share"
        require(expected == str(value), name, value, f"process 0 has {expected}: {remedy}")


def value_of_first(name: str, value: str) -> str:
    """Process 0's value, in all processes. All of them must call this."""
    return _watch.value_of_first(name, value) if _watch else value


def total(count: int) -> int:
    """The sum of `count` over all processes. All of them must call this."""
    if jax.process_count() == 1:
        return count
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(count)).sum())


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Hides proxy settings: JAX's service runs on one of the run's hosts, but gRPC would ask a proxy for it (jax issue 16788)."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.lower() in PROXIES}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _keep_stdout() -> None:
    """Keeps stdout for results, which other programs read. What Gloo and NCCL print to it from C goes to stderr instead."""
    if sys.stdout is sys.__stdout__ and sys.stdout.fileno() == 1:
        sys.stdout.flush()
        results = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = sys.__stdout__ = os.fdopen(results, "w", encoding=sys.stdout.encoding)
