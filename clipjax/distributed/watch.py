"""No silent hang: finds the process that died, froze or makes no progress, and ends the others with its name.

JAX's coordination service, which process 0 runs, does not do that. When a process dies, the others either wait in a collective
without end, or abort with SIGABRT and a stack trace. A process that lives but is stuck, for example in reading data, is
not noticed.

So each process posts a beat in the service's key-value store: its step and what it is doing. Process 0 compares the beats. When
something is wrong, it posts a verdict, for which all other processes wait. A process that can't reach process 0 any more decides
by itself.
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
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src.distributed import global_state  # Orbax and multihost_utils find the client there too

from clipjax.status import RESTART_STATUS

SECONDS = "CLIPJAX_HEARTBEAT_SECONDS"

# Limits, in heartbeats: until all processes have joined; for a stage of a step; for compiling, evaluating, saving or preparing.
JOIN_BEATS, STEP_BEATS, LONG_STAGE_BEATS = 5, 10, 60
STAGES = ("preparing", "evaluating or saving", "reading data", "compiling", "training", "ending")  # in the order within a step

FOREVER = 1000 * 86400 * 365  # milliseconds
BEATS, VERDICT, SEEN = "clipjax/beat/", "clipjax/verdict", "clipjax/seen/"  # keys in the store


class Beat(NamedTuple):
    """What a process reports about itself."""

    beats: int  # the number of this beat: no two beats of a process are equal
    host: str
    step: int  # finished steps
    stage: str  # one of STAGES
    since: float  # seconds since the stage began, or last reported progress

    @property
    def position(self) -> tuple[int, int]:
        """How far the process is: its step, and the number of its stage."""
        return self.step, STAGES.index(self.stage)

    @property
    def limit(self) -> int:
        """How many heartbeats the stage may go without progress."""
        return STEP_BEATS if self.stage in ("reading data", "training") else LONG_STAGE_BEATS


class _Stage(NamedTuple):
    """What this process is doing. Always replaced as one object, so that the posting thread never reads half of a change."""

    step: int
    name: str
    began: float  # or last reported progress; time.monotonic()


def heartbeat() -> float:
    """Seconds after which a silent process counts as dead."""
    return float(os.environ.get(SECONDS) or 60)


def diagnose(beats: dict[int, Beat], silent: dict[int, float], limit: float) -> str | None:
    """What is wrong, or None.

    `beats`: the newest beat of every process. `silent`: the seconds since each came. `limit`: the heartbeat in seconds.

    Silent processes are named first, because a process that waits for a silent one makes no progress either. Otherwise the
    processes that are furthest behind are named, because the others wait for them.
    """
    lost = [i for i in sorted(silent) if silent[i] > limit]
    if lost:
        names = ", ".join(f"process {i} ({beats[i].host})" for i in lost)
        return f"{names} of {len(beats)} died or hangs: no sign of life for {max(silent[i] for i in lost):.0f} s"
    last = min(beat.position for beat in beats.values())
    slow = {i: beat for i, beat in beats.items() if beat.position == last}
    waited = min(beat.since for beat in slow.values())
    first = next(iter(slow.values()))
    if waited <= first.limit * limit:
        return None
    names = ", ".join(f"process {i} ({beat.host})" for i, beat in sorted(slow.items())[:8])
    return f"{names} of {len(beats)}: no progress for {waited:.0f} s at step {first.step}, {first.stage}"


class Watch:
    """The two threads of a process: one posts beats, one waits for the verdict and, on process 0, compares the beats."""

    def __init__(self) -> None:
        self._limit = heartbeat()
        self._interval = min(10.0, self._limit / 6)  # seconds between two beats
        self._client: Any = global_state.client  # joined by now, so not None
        self._me, self._n = global_state.process_id, global_state.num_processes
        self._stage = _Stage(0, "preparing", time.monotonic())
        self._count, self._posted = 0, time.monotonic()
        self._finished = threading.Event()  # all processes have ended well
        self._leaving = threading.Event()  # the main thread has nothing more to do
        self._ending = threading.Lock()  # only one thread ends the process
        self._numbers = itertools.count()  # keys and barriers are used once each
        _delay_aborts()
        self._post()
        self._beats = self.newest_beats()  # read now, so that every host's name is known before a process can die
        for target in (self._posting, self._listening):
            threading.Thread(target=target, daemon=True).start()

    def enter_stage(self, step: int, stage: str) -> None:
        """This process begins `stage` (one of STAGES) of a step."""
        self._stage = _Stage(step, stage, time.monotonic())

    def report_progress(self) -> None:
        """The stage makes progress: its time limit starts again."""
        self._stage = self._stage._replace(began=time.monotonic())

    def newest_beats(self) -> dict[int, Beat]:
        """The newest beat of every process, this one included. Waits until each has posted one."""
        while True:
            found = self._client.key_value_dir_get(BEATS)
            beats = {int(name.rpartition("/")[2]): Beat(*json.loads(value)) for name, value in found}
            if len(beats) == self._n:
                return beats
            time.sleep(0.05)

    def wait(self, name: str) -> None:
        """A barrier: returns when all processes have reached it. If one never does, this process ends, and names it."""
        self._client.wait_at_barrier(f"clipjax/{name}/{next(self._numbers)}", FOREVER)

    def value_of_first(self, name: str, value: str) -> str:
        """Process 0's value. All processes must ask equally often and in the same order."""
        key = f"clipjax/{name}/{next(self._numbers)}"
        if self._me:
            return self._client.blocking_key_value_get(key, FOREVER)
        self._client.key_value_set(key, value)
        return value

    def finish(self) -> None:
        """Waits until all processes have ended well, and leaves JAX's service together with them."""
        self.enter_stage(self._stage.step, "ending")
        self.wait("end")
        self._finished.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # a process that dies now has done its work
            jax.distributed.shutdown()

    def fail(self, status: int, message: object) -> NoReturn:
        """Ends this process and all others with `status`. Only the first process that fails prints its message, with its name."""
        decided = self._decide(status, str(message))
        if not decided and status == 1 and (verdict := self._verdict(self._interval)):
            status = verdict[0]  # of the failure that was first: this one may follow from it
        first = decided and message is not None
        self._end(status, f"process {self._me} ({socket.gethostname()}): {message}" if first else None)

    def end_if_another_died(self) -> None:
        """Call it for an error that another process's death may have caused. If it has, this process ends as the others do.

        Returns if not: that is, when every process has posted a beat that is younger than the error.
        """
        before, limit = self.newest_beats(), time.monotonic() + self._limit + 3 * self._interval
        while time.monotonic() < limit:
            time.sleep(self._interval / 2)
            now = self.newest_beats()
            if all(now[i].beats > before[i].beats + 1 for i in now):
                return

    def _post(self) -> None:
        stage = self._stage
        self._count += 1
        beat = Beat(self._count, socket.gethostname(), stage.step, stage.name, time.monotonic() - stage.began)
        self._client.key_value_set(f"{BEATS}{self._me}", json.dumps(beat), allow_overwrite=True)
        self._posted = time.monotonic()

    def _posting(self) -> None:
        """The first thread."""
        while not self._finished.wait(self._interval):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the other thread checks whether process 0 lives
                self._post()

    def _listening(self) -> None:
        """The second thread."""
        seen = dict.fromkeys(self._beats, time.monotonic())  # when each process's newest beat came
        while not self._finished.is_set():
            before, seconds = time.monotonic(), min(1.0, self._interval)
            verdict = self._verdict(seconds)
            now = time.monotonic()
            if now - before > seconds + self._limit / 2:  # this process was stopped for a while: the others only seem silent
                seen, self._posted = dict.fromkeys(seen, now), now
            if self._finished.is_set():
                return
            if verdict:
                status, message = verdict
                if status != RESTART_STATUS:  # most likely the main thread fails in the same way: give it time to close its files
                    self._leaving.wait(self._interval)
                self._end(status, message if status == RESTART_STATUS else None)
            if self._me == 0:
                self._compare(seen, now)
            elif now - self._posted > self._limit or (now - self._posted > self._interval + 1 and not _is_service_up()):
                name = f"process 0 ({self._beats[0].host}) of {self._n}"
                message = f"{name} died or hangs: JAX's coordination service, which it runs, does not answer"
                self._end(RESTART_STATUS, message, alone=True)

    def _compare(self, seen: dict[int, float], now: float) -> None:
        """Process 0 reads the newest beats, notes in `seen` when they came, and ends the run if something is wrong."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for i, beat in self.newest_beats().items():
                if beat.beats != self._beats[i].beats:
                    self._beats[i], seen[i] = beat, now
        wrong = diagnose(self._beats, {i: now - seen[i] for i in seen}, self._limit)
        if wrong and self._decide(RESTART_STATUS, wrong):
            self._end(RESTART_STATUS, wrong)

    def _verdict(self, seconds: float) -> tuple[int, str] | None:
        """Waits up to `seconds` for a verdict: the exit status and the message that a process has posted."""
        try:
            status, message = json.loads(self._client.blocking_key_value_get(VERDICT, int(1000 * seconds)))
        except jax.errors.JaxRuntimeError:  # none yet
            return None
        return status, message

    def _decide(self, status: int, message: str) -> bool:
        """Posts a verdict. Returns whether this process is the first to do so."""
        try:
            self._client.key_value_set(VERDICT, json.dumps((status, message)))
        except jax.errors.JaxRuntimeError:  # there is one already, or the service is gone
            return False
        return True

    def _end(self, status: int, message: str | None, alone: bool = False) -> NoReturn:
        """Ends this process. `alone`: process 0 is gone, so the store can't be used."""
        self._leaving.set()
        if not self._ending.acquire(blocking=False):
            time.sleep(1e6)  # the other thread is ending the process
        if message:
            print(f"clipjax: {message}", file=sys.stderr)
        with contextlib.suppress(Exception):
            sys.stderr.flush()
            sys.stdout.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self._me and not alone:
                self._client.key_value_set(f"{SEEN}{self._me}", "")
            elif not self._me:  # the service ends with this process, so the others must have read the verdict before
                limit = time.monotonic() + self._interval + 3
                while time.monotonic() < limit and len(self._client.key_value_dir_get(SEEN)) < self._n - 1:
                    time.sleep(0.05)
        os._exit(status)  # not sys.exit: threads in a collective, and barriers at exit, would wait for the dead process


def _is_service_up() -> bool:
    """Whether something listens at the service's address. True also for a stopped process: its kernel accepts connections."""
    host, _, port = (global_state.coordinator_address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # unknown: the time limit decides
        return True
    return True


def _delay_aborts() -> None:
    """Delays SIGABRT, so that the watch can end the process with its own message and status.

    Where process 0 dies, JAX's client of its service aborts this process at once (jax 0.10.2; its callback for that can't be
    called from Python). Here libc's `sleep` becomes the handler of SIGABRT. It takes the signal's number as its argument, so the
    thread that aborts sleeps for six seconds and then goes on, as it does for any other reason to abort.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


@contextlib.contextmanager
def joining(address: str | None, n: int | None) -> Iterator[None]:
    """For `with`, around joining: ends this process if the others do not join in time. JAX would abort and give no reason."""
    seconds = JOIN_BEATS * heartbeat()

    def end() -> None:
        who = f"the {n} processes" if n else "all processes"
        print(f"clipjax: {who} of this run did not come within {seconds:.0f} s", end="", file=sys.stderr)
        target = global_state.coordinator_address or address
        print(f" to process 0{f' at {target}' if target else ''}: start one on every host", file=sys.stderr, flush=True)
        os._exit(RESTART_STATUS)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
