"""No silent hang: which process died, froze or makes no progress, and the end of the others.

JAX's coordination service, which process 0 runs, does not tell: when a process dies the others either wait in a collective for
ever or abort with SIGABRT and a stack trace, and one that is alive and stuck (in its data, say) is nobody's concern. So each
process posts a beat in the service's key-value store, with its step and what it is doing; process 0 compares them and posts the
verdict for which all others wait. Whoever can't reach process 0 any more gives that verdict by itself.
"""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import jax
from jax._src.distributed import global_state  # where Orbax and multihost_utils find the client too

from clipjax.preemption import STATUS as AGAIN

SECONDS = "CLIPJAX_HEARTBEAT_SECONDS"
JOIN, STALL, PAUSE = 5, 10, 60  # times the heartbeat: all must have come; a step; compiling, evaluating, saving or preparing
FOREVER = 1000 * 86400 * 365  # milliseconds
BEATS, VERDICT, SEEN = "clipjax/beat/", "clipjax/verdict", "clipjax/seen/"
STAGES = ("preparing", "evaluating or saving", "reading data", "compiling", "training", "ending")  # in the order of a step


class Beat(NamedTuple):
    """What a process says of itself. `beats` only grows, so that a beat is told from the one before."""

    beats: int
    host: str
    step: int
    stage: str
    since: float  # seconds

    @property
    def place(self) -> tuple[int, int]:
        """How far it is."""
        return self.step, STAGES.index(self.stage)

    @property
    def patience(self) -> int:
        return STALL if self.stage in ("reading data", "training") else PAUSE


def heartbeat() -> float:
    """Seconds after which a silent process counts as dead."""
    return float(os.environ.get(SECONDS) or 60)


def judge(beats: dict[int, Beat], silent: dict[int, float], limit: float) -> str | None:
    """What is wrong, of all processes' newest beats and the seconds since each came; None: nothing.

    Silence is told first: who waits for a silent process makes no progress either. Of the others the one that is furthest behind
    is to blame, for they wait for it, with STALL or PAUSE times `limit` seconds of patience.
    """
    lost = [i for i in sorted(silent) if silent[i] > limit]
    if lost:
        names = ", ".join(f"process {i} ({beats[i].host})" for i in lost)
        return f"{names} of {len(beats)} died or hangs: no sign of life for {max(silent[i] for i in lost):.0f} s"
    behind = min(beat.place for beat in beats.values())
    slow = {i: beat for i, beat in beats.items() if beat.place == behind}
    waited = min(beat.since for beat in slow.values())
    first = next(iter(slow.values()))
    if waited <= first.patience * limit:
        return None
    names = ", ".join(f"process {i} ({beat.host})" for i, beat in sorted(slow.items())[:8])
    return f"{names} of {len(beats)}: no progress for {waited:.0f} s at step {first.step}, {first.stage}"


class Watch:
    """The threads of one process: one posts, one listens and, on process 0, compares."""

    def __init__(self) -> None:
        self._limit = heartbeat()
        self._every = min(10.0, self._limit / 6)
        self._client, self._me, self._n = global_state.client, global_state.process_id, global_state.num_processes
        self._at = (0, "preparing", time.monotonic())
        self._count, self._posted = 0, time.monotonic()
        self._over = threading.Event()  # all have come to a good end
        self._leaving = threading.Event()  # the main thread has nothing more to do
        self._ending = threading.Lock()  # one thread ends the process
        self._meetings = itertools.count()
        _delay_aborts()
        self._post()
        self._beats = self.others()  # the names of all hosts, before any can die
        for what in (self._posting, self._listening):
            threading.Thread(target=what, daemon=True).start()

    def at(self, step: int, stage: str) -> None:
        """This process begins `stage` (one of STAGES) of a step."""
        self._at = step, stage, time.monotonic()

    def alive(self) -> None:
        """The stage makes progress."""
        self._at = *self._at[:2], time.monotonic()

    def others(self) -> dict[int, Beat]:
        """The newest beat of every process, this one's too, once all have posted one."""
        while True:
            found = self._client.key_value_dir_get(BEATS)
            beats = {int(name.rpartition("/")[2]): Beat(*json.loads(value)) for name, value in found}
            if len(beats) == self._n:
                return beats
            time.sleep(0.05)

    def wait(self, what: str) -> None:
        """For all processes to come here: whoever does not is named, sooner or later, and ends this process."""
        self._client.wait_at_barrier(f"clipjax/{what}/{next(self._meetings)}", FOREVER)

    def of_the_first(self, what: str, value: str) -> str:
        """Process 0's value, on each process that asks as often and in the same order as process 0."""
        key = f"clipjax/{what}/{next(self._meetings)}"
        if self._me:
            return self._client.blocking_key_value_get(key, FOREVER)
        self._client.key_value_set(key, value)
        return value

    def meet(self) -> None:
        """Waits for all processes to come to their good end, and leaves JAX's service with them."""
        self.at(self._at[0], "ending")
        self.wait("end")
        self._over.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # whoever dies now has done its work
            jax.distributed.shutdown()

    def fail(self, status: int, message: object) -> NoReturn:
        """Ends this process and all others with `status`. `message` is printed by the first that fails, with its name."""
        first = self._decide(status, str(message)) and message is not None
        self._end(status, f"process {self._me} ({socket.gethostname()}): {message}" if first else None)

    def blame(self) -> None:
        """After an error that another's death may have caused: ends as the others do if it was so, else returns.

        It was not so if everyone posts a beat that is younger than the error."""
        before, limit = self.others(), time.monotonic() + self._limit + 3 * self._every
        while time.monotonic() < limit:
            time.sleep(self._every / 2)
            now = self.others()
            if all(now[i].beats > before[i].beats + 1 for i in now):
                return

    def _post(self) -> None:
        step, stage, since = self._at
        self._count += 1
        beat = Beat(self._count, socket.gethostname(), step, stage, time.monotonic() - since)
        self._client.key_value_set(f"{BEATS}{self._me}", json.dumps(beat), allow_overwrite=True)
        self._posted = time.monotonic()

    def _posting(self) -> None:
        while not self._over.wait(self._every):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the other thread minds process 0
                self._post()

    def _listening(self) -> None:
        came = dict.fromkeys(self._beats, time.monotonic())
        while not self._over.is_set():
            before, wait = time.monotonic(), min(1.0, self._every)
            verdict = self._verdict(wait)
            now = time.monotonic()
            if now - before > wait + self._limit / 2:  # this process itself was stopped: what it missed is nobody's silence
                came, self._posted = dict.fromkeys(came, now), now
            if self._over.is_set():
                return
            if verdict:
                status, message = verdict
                if status != AGAIN:  # most likely this process finds the same: it may close its files
                    self._leaving.wait(self._every)
                self._end(status, message if status == AGAIN else None)
            if self._me == 0:
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    for i, beat in self.others().items():
                        if beat.beats != self._beats[i].beats:
                            self._beats[i], came[i] = beat, now
                wrong = judge(self._beats, {i: now - came[i] for i in came}, self._limit)
                if wrong and self._decide(AGAIN, wrong):
                    self._end(AGAIN, wrong)
            elif now - self._posted > self._limit or (now - self._posted > self._every + 1 and not _answers()):
                name = f"process 0 ({self._beats[0].host}) of {self._n}"
                self._end(AGAIN, f"{name} died or hangs: JAX's coordination service, which it runs, does not answer", alone=True)

    def _verdict(self, seconds: float) -> tuple[int, str] | None:
        """What a process has posted, waiting for it for a while."""
        try:
            return tuple(json.loads(self._client.blocking_key_value_get(VERDICT, int(1000 * seconds))))
        except jax.errors.JaxRuntimeError:  # none yet
            return None

    def _decide(self, status: int, message: str) -> bool:
        """Whether this process is the first with a verdict."""
        try:
            self._client.key_value_set(VERDICT, json.dumps((status, message)))
        except jax.errors.JaxRuntimeError:  # there is one, or nobody to tell
            return False
        return True

    def _end(self, status: int, message: str | None, alone: bool = False) -> NoReturn:
        """Ends this process. `alone`: process 0 is gone, there is nobody to tell."""
        self._leaving.set()
        if not self._ending.acquire(blocking=False):
            time.sleep(1e6)  # the other thread is at it
        if message:
            print(f"clipjax: {message}", file=sys.stderr)
        with contextlib.suppress(Exception):
            sys.stderr.flush()
            sys.stdout.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self._me and not alone:
                self._client.key_value_set(f"{SEEN}{self._me}", "")
            elif not self._me:  # the service ends with this process: the others shall have read the verdict before
                limit = time.monotonic() + self._every + 3
                while time.monotonic() < limit and len(self._client.key_value_dir_get(SEEN)) < self._n - 1:
                    time.sleep(0.05)
        os._exit(status)  # not sys.exit: threads in a collective and barriers at exit would wait for the dead


def _answers() -> bool:
    """Whether anything listens where process 0 ran the service. A stopped process does: its machine answers for it."""
    host, _, port = global_state.coordinator_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # unknown: only time tells
        return True
    return True


def _delay_aborts() -> None:
    """Where process 0 dies, JAX's client of its service aborts this process at once (jax 0.10.2; its callback for that can't be
    called from Python). libc's `sleep` as the handler of SIGABRT takes the signal's number for its argument: the thread that
    aborts waits for six seconds, in which the watch tells what happened and ends with its own status. Then, or for any other
    reason to abort, it goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


@contextlib.contextmanager
def joining(address: str | None, n: int | None) -> Iterator[None]:
    """Ends this process where the others do not come in time; JAX would abort it without saying who is waited for."""
    seconds = JOIN * heartbeat()

    def end() -> None:
        what = f"the {n} processes" if n else "all processes"
        print(f"clipjax: {what} of this run did not come within {seconds:.0f} s", end="", file=sys.stderr)
        where = global_state.coordinator_address or address
        print(f" to process 0{f' at {where}' if where else ''}: start one on every host", file=sys.stderr, flush=True)
        os._exit(AGAIN)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
