"""Told to stop: by SIGTERM, by Ctrl-C or, on a TPU, by a maintenance notice; all processes notice it at the same point."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

STATUS = 75  # EX_TEMPFAIL of sysexits.h: stopped in good order, start it again
INTERRUPTED = 130  # by Ctrl-C, as shells tell it: the person who stopped it will start it, no launcher


class Preempted(Exception):
    """Stopped in good order because it was told to. `status`: what the program ends with."""

    def __init__(self, what: str = "") -> None:
        self.status = INTERRUPTED if _heard.ctrl_c else STATUS
        super().__init__(f"{'interrupted' if _heard.ctrl_c else 'preempted'}{what}")


class _Heard:
    """What the signal handlers leave, and whether it has been told."""

    def __init__(self) -> None:
        self.listening = self.signalled = self.ctrl_c = self.told = False


_heard = _Heard()
_calls = itertools.count(1)  # never anew in one process: JAX finds the moment by it


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Until the block is left, SIGTERM and a first Ctrl-C do not end the process; `told` tells of them. A second Ctrl-C raises
    KeyboardInterrupt. Of several processes, JAX's coordination service listens to SIGTERM from then on, and to what else
    the platform sends. Does nothing outside the main thread, where Python has no signals.
    """
    global _heard
    _heard = _Heard()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard.listening = True
    before = {signal.SIGINT: signal.signal(signal.SIGINT, _on_ctrl_c)}
    if _joined():
        _listen_together()
    else:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        _heard.listening = False
        for number, handler in before.items():
            signal.signal(number, handler)


def told() -> bool:
    """Whether to stop now. Of several processes all must ask as often and in the same order; all get the same answer, a second
    or two after the first of them was told. Costs under a microsecond, and no collective.
    """
    if _heard.listening and not _heard.told:
        if _joined():
            from jax.experimental import multihost_utils

            _heard.told = multihost_utils.reached_preemption_sync_point(next(_calls))
        else:
            _heard.told = _heard.signalled
    return _heard.listening and _heard.told


def check() -> None:
    """Raises Preempted if told to stop; for work that may be dropped, as an evaluation between two batches. As `told`."""
    if told():
        raise Preempted


def _joined() -> bool:
    import jax  # here: the command line names this module's statuses and starts without JAX

    return jax.process_count() > 1


def _listen_together() -> None:
    """JAX's service hears SIGTERM and notices of maintenance from now on, in place of the process."""
    import jax
    from jax._src.distributed import global_state

    jax.config.update("jax_enable_preemption_service", True)
    if global_state.preemption_sync_manager is None:
        global_state.initialize_preemption_sync_manager()


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    if not _heard.signalled:
        _tell("told to stop: saving at the next step")
    _heard.signalled = True


def _on_ctrl_c(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _heard.ctrl_c = True
    _tell("saving at the next step; Ctrl-C again stops at once")
    if _joined():
        os.kill(os.getpid(), signal.SIGTERM)  # JAX's handler tells the others
    else:
        _heard.signalled = True


def _tell(text: str) -> None:
    """A handler may run while a stream is being written to, so it goes to the file itself."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.__stderr__.fileno(), f"\nclipjax: {text}\n".encode())
