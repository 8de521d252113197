"""A workdir has one owner: the process that may write to it, and says so in RUN/owner.json.

The owner renews the file's `beat` every EVERY seconds. If the process is gone, another may take the workdir over: on the same
machine at once, from elsewhere when it has seen no beat for MISSED of them. Hosts' clocks may differ, so it watches the file for
that long by its own clock; only a beat that is older than a day needs no watching. A process that finds out that it has lost its
workdir, for instance after it was suspended, stops with a LostError and writes no more.
"""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jax

from clipjax import distributed, swap
from clipjax.files import scheme
from clipjax.preemption import OwnedError, before_sigterm
from clipjax.process import birth, machine

FILE = "owner.json"
EVERY = 30.0  # seconds between two beats
MISSED = 3  # so many beats must be missing before another host takes over
OLD = timedelta(days=1)  # far more than what clocks and time zones of hosts may differ by
POLL = 2.0  # seconds between two looks at another's file

CheckOwner = Callable[[bool], None]  # as Owner.check

log = logging.getLogger(__name__)


def never_lost(look: bool) -> None:
    """`Owner.check` of a process that owns no workdir."""


class LostError(OSError):
    """Another process has taken the workdir over."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of owner.json."""

    host: str = ""
    pid: int = 0
    start: str = ""  # when the process became the owner; ISO 8601, UTC
    beat: str = ""  # when the file was last renewed
    machine: str = ""  # processes of one host with the same `machine` see each other's ids
    birth: str = ""  # when the process began, as exactly as `machine` knows it: ids are used again
    token: str = ""  # of one ownership: never the same twice

    def content(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.start}" if self.host else "an unknown process"


def new_record() -> Record:
    """This process's record, for an ownership that begins now."""
    pid = os.getpid()
    return Record(socket.gethostname(), pid, _now("seconds"), _now(), machine(), birth(pid) or "", uuid.uuid4().hex)


def parse(content: bytes) -> Record:
    """The record in a file. An empty one where the file is damaged."""
    try:
        found = json.loads(content)
        texts = {field.name: str(found.get(field.name, "")) for field in dataclasses.fields(Record) if field.name != "pid"}
        return Record(pid=int(found.get("pid", 0)), **texts)
    except (ValueError, TypeError, AttributeError):
        return Record()


def _now(precision: str = "microseconds") -> str:
    return datetime.now(UTC).isoformat(timespec=precision)


def is_dead(owner: Record) -> bool | None:
    """Whether the owner's process is gone. None: that can't be told from here."""
    if owner.pid > 0 and owner.host == socket.gethostname() and owner.machine in ("", machine()):
        now = birth(owner.pid)
        return now is None or bool(now and owner.birth and now != owner.birth)
    with contextlib.suppress(ValueError, TypeError):  # no date; a date without its time zone
        if datetime.now(UTC) - datetime.fromisoformat(owner.beat) > OLD:
            return True
    return None


def clock() -> float:
    """Seconds that pass also while this machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Owner:
    """This process's ownership of a workdir. A thread renews it until `release`."""

    def __init__(self, workdir: Path, record: Record, version: swap.Version) -> None:
        self._workdir, self._record, self._version = workdir, record, version
        self._renewed = clock()
        self._lost_to: Record | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self, look: bool) -> None:
        """Raises LostError if another process has taken the workdir over, as far as is known.

        `look`: looks at the file, if beats are missing so that another may have. For what is about to write into the workdir.
        """
        if error := self.loss(look):
            raise error

    def loss(self, look: bool) -> LostError | None:
        """The error that `check` raises, or None."""
        if look and clock() - self._renewed > (MISSED - 1) * EVERY:
            self._try_to_renew()
        if self._lost_to is None:
            return None
        what = f"{self._workdir} was taken over by {self._lost_to}"
        return LostError(
            f"{what}: this process had given no sign of life, or its {FILE} was removed. It ends, and writes no more"
        )

    def release(self) -> None:
        """Ends the ownership: removes owner.json, if it still is this process's."""
        self._ended.set()
        try:
            with self._lock:
                now = swap.read(self._workdir / FILE)
                if now and parse(now.content).token == self._record.token:
                    swap.remove(self._workdir / FILE)
        except Exception as error:  # each store's library has its own exceptions
            log.warning("%s: not removed: %s", self._workdir / FILE, error)

    def _beat(self) -> None:
        while not self._ended.wait(EVERY):
            self._try_to_renew()

    def _try_to_renew(self) -> None:
        try:
            with self._lock:
                if not self._lost_to and not self._ended.is_set():
                    self._renew()
        except Exception as error:  # each store's library has its own exceptions
            log.warning("%s: not renewed, will be tried again: %s", self._workdir / FILE, error)

    def _renew(self) -> None:
        before, record = clock(), dataclasses.replace(self._record, beat=_now())
        path, content = self._workdir / FILE, record.content()
        version = swap.swap(path, self._version, content)
        if version is None:
            now = swap.read(path)
            other = parse(now.content) if now else None
            if other and other.token != self._record.token:
                self._lost_to = other
                return
            version = swap.swap(path, now, content)  # a person may have removed the file
        if version:
            self._version, self._renewed = version, before


def claim(workdir: Path) -> Owner:
    """Makes this process the owner of a workdir, whose folder it makes. Takes it over from an owner that is gone.

    Waits for up to MISSED beats if that can't be told at once. Raises OwnedError if the owner lives.
    """
    path, watch = workdir / FILE, _Watched(workdir)
    while True:
        seen = swap.read(path)
        if seen and not watch.is_gone(seen):
            distributed.report_progress()
            time.sleep(POLL)
            continue
        record = new_record()
        if version := swap.swap(path, seen, record.content()):
            if seen:
                _say(f"{workdir}: taken over from {parse(seen.content)}, which {watch.reason}")
            if not swap.is_exclusive(path, version):
                _say(f"{workdir}: its store has no conditional writes, so two runs that start here at the same moment both go on")
            return Owner(workdir, record, version)


class _Watched:
    """The owner of a workdir, as another process sees it."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._first: swap.Version | None = None  # what its file was at first
        self._since = self._told = 0.0
        self.reason = ""  # why the owner counts as gone

    def is_gone(self, seen: swap.Version) -> bool:
        """Whether the owner is gone; False if that is to be seen. Raises OwnedError if it lives."""
        owner = parse(seen.content)
        gone = is_dead(owner)
        if self._first is None:
            self._first, self._since, self._told = seen, clock(), clock() - EVERY
        if gone is False or seen.content != self._first.content:
            raise OwnedError(_refusal(self._workdir, owner))
        silent, limit = clock() - self._since, MISSED * EVERY
        if gone or silent >= limit:
            self.reason = f"gave no sign of life for {limit:.0f} s" if not gone else "is gone"
            return True
        if clock() - self._told >= EVERY:
            self._told = clock()
            _say(f"{self._workdir}: belongs to {owner}; taken over in {limit - silent:.0f} s, unless that gives a sign of life")
        return False


def _refusal(workdir: Path, owner: Record) -> str:
    stop = f", or stop it (`kill {owner.pid}` on {owner.host} makes it save and end)" if owner.host else ""
    return f"{workdir} is being trained by {owner}. Remedy: wait for it{stop}, or choose another --workdir"


@contextlib.contextmanager
def owned(workdir: Path) -> Iterator[CheckOwner]:
    """For `with`: the first process owns the workdir. Gives `Owner.check`, which never raises in other processes.

    Raises OwnedError in all processes where another owner lives. If nothing else was written, the end removes the folder again.
    """
    owner, absent, refusal = None, [], ""
    if jax.process_index() == 0:
        absent = [] if scheme(workdir) else [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
        try:
            owner = claim(workdir)
        except OwnedError as error:
            refusal = str(error)
    if refusal := distributed.value_of_first("the workdir's owner", refusal):
        raise OwnedError(refusal)
    try:
        with before_sigterm(owner.release) if owner else contextlib.nullcontext():
            yield owner.check if owner else never_lost
    except Exception as error:
        loss = owner.loss(look=True) if owner else None
        if loss and not isinstance(error, LostError):  # perhaps Orbax misses what the new owner has removed
            raise loss from error
        raise
    finally:
        if owner:
            owner.release()
            with contextlib.suppress(OSError):
                for folder in absent:
                    folder.rmdir()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
