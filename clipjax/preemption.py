"""Requests to stop: SIGTERM, Ctrl-C or, on a TPU, a maintenance notice. All processes of a run see a request at the same step."""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from clipjax.status import INTERRUPTED_STATUS, RESTART_STATUS, WRONG_USE_STATUS

RESTARTS = "CLIPJAX_RESTARTS"  # 1: whoever started this process starts it again after RESTART_STATUS


class OwnedError(Exception):
    """Another process owns the workdir. `status`: the exit status of the program; a launcher that tries again sets RESTARTS."""

    def __init__(self, what: str) -> None:
        self.status = RESTART_STATUS if os.environ.get(RESTARTS) == "1" else WRONG_USE_STATUS
        super().__init__(what)


class Preempted(Exception):
    """The run was asked to stop, and has saved its state. `status`: the exit status of the program."""

    def __init__(self, what: str = "") -> None:
        self.status = INTERRUPTED_STATUS if _signals.ctrl_c else RESTART_STATUS
        super().__init__(f"{'interrupted' if _signals.ctrl_c else 'preempted'}{what}")


class _Signals:
    """What the signal handlers have noted, and what `requested` has answered."""

    def __init__(self) -> None:
        self.listening = self.signalled = self.ctrl_c = self.requested = False


_signals = _Signals()
_waking = -1  # the pipe that wakes the thread of `before_sigterm` at a signal; -1: none does
_calls = itertools.count(1)  # one count for the life of the process: with it JAX finds the step at which all stop


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """For `with`: inside, SIGTERM and a first Ctrl-C do not end the process; `requested` reports them.

    A second Ctrl-C raises KeyboardInterrupt. Where there are several processes, JAX's coordination service handles SIGTERM, and
    the platform's notices, from here until the process ends. Does nothing outside the main thread, where Python has no signals.
    """
    global _signals
    _signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signals.listening = True
    # Signals from here on wake no thread of `before_sigterm`: it may look when this is over already, and would end the process.
    waking = _waking
    _wake_by(-1)
    before = {signal.SIGINT: signal.signal(signal.SIGINT, _on_ctrl_c)}
    if _joined():
        _listen_together()
    else:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        _signals.listening = False
        _wake_by(waking)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def before_sigterm(do: Callable[[], object]) -> Iterator[None]:
    """For `with`: where SIGTERM ends the process at once, which is outside `listening`, `do` is called before.

    In a thread that the signal wakes. Python's own handlers wait for the main thread, which may be in XLA's compiler for minutes.
    Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    done = threading.Event()

    def end(*_: object) -> None:
        done.wait(10)
        _die()

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is end:
                do()
                done.set()
                _die()
        os.close(reading)

    threading.Thread(target=wait, daemon=True).start()
    signal.signal(signal.SIGTERM, end)
    before = _waking
    _wake_by(writing)
    try:
        yield
    finally:
        _wake_by(before)
        os.close(writing)
        if not _joined():  # else JAX's service goes on handling the signal
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _die() -> None:
    """Ends this process as SIGTERM does by default. Not by Python's `signal`, which only the main thread may call."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal(signal.SIGTERM, None)
    os.kill(os.getpid(), signal.SIGTERM)


def _wake_by(pipe: int) -> None:
    """From now on a signal writes to this pipe."""
    global _waking
    if pipe != _waking:
        signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
        _waking = pipe


# A child's signals are not its parent's. From the fork until Python runs in it, a child would write to its parent's pipe.


def _before_fork() -> None:
    if _waking != -1 and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def _after_fork() -> None:
    if _waking != -1 and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(_waking, warn_on_full_buffer=False)


def _after_fork_in_child() -> None:
    if _waking != -1:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def requested() -> bool:
    """Whether the run should stop now.

    Where there are several processes, all must call this equally often and in the same order. All get the same answer, one or
    two seconds after the first of them got a signal. A call takes less than a microsecond and needs no collective.
    """
    if _signals.listening and not _signals.requested:
        if _joined():
            from jax.experimental import multihost_utils

            _signals.requested = multihost_utils.reached_preemption_sync_point(next(_calls))
        else:
            _signals.requested = _signals.signalled
    return _signals.listening and _signals.requested


def check() -> None:
    """Raises Preempted if a stop is requested. Call it between two batches of work that may be dropped, as an evaluation. With
    several processes, the rules of `requested` hold."""
    if requested():
        raise Preempted


def _joined() -> bool:
    import jax  # not above: the command line reads the statuses above, and starts without JAX

    return jax.process_count() > 1


def _listen_together() -> None:
    """From now on JAX's service handles SIGTERM and maintenance notices, instead of this process."""
    import jax
    from jax._src.distributed import global_state

    jax.config.update("jax_enable_preemption_service", True)
    if global_state.preemption_sync_manager is None:
        global_state.initialize_preemption_sync_manager()


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    if not _signals.signalled:
        _print("stop requested: saving at the next step")
    _signals.signalled = True


def _on_ctrl_c(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _signals.ctrl_c = True
    _print("saving at the next step; Ctrl-C again stops at once")
    if _joined():
        os.kill(os.getpid(), signal.SIGTERM)  # JAX's handler passes it on to the other processes
    else:
        _signals.signalled = True


def _print(text: str) -> None:
    """Writes to stderr's file descriptor: a handler may run while the stream is in use."""
    with contextlib.suppress(OSError, ValueError):
        if sys.__stderr__ is not None:  # None: a program without a console
            os.write(sys.__stderr__.fileno(), f"\nclipjax: {text}\n".encode())
