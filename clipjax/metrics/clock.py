"""Where a run's time goes, and how often its data had to be mended."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Clock:
    """Where the time between two log lines goes: to training, to waiting for data, or to pauses that count as neither."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._restart()

    def _restart(self) -> None:
        self._start, self._examples, self._waited, self._paused = self._now(), 0, 0.0, 0.0

    def count(self, examples: int) -> None:
        """One more step was given `examples` pairs, over all devices."""
        self._examples += examples

    @contextlib.contextmanager
    def waiting(self, work: jax.Array | None = None) -> Iterator[None]:
        """Around next(data). `work` is what the devices were given last: while they are busy with it, nobody waits."""
        start = self._now()
        try:
            yield
        finally:
            if work is None or work.is_ready():
                self._waited += self._now() - start

    @contextlib.contextmanager
    def paused(self, after: Any = None) -> Iterator[None]:
        """Around evaluations, saving, and the first step's compilation. The pause starts when the arrays of `after` (the state)
        are there: steps still under way are training, though the host has gone on.
        """
        jax.block_until_ready(after)
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start

    def read(self) -> dict[str, float]:
        """`examples_per_second` and `data_wait` (share of time, 0 to 1) since the last read, pauses left out."""
        seconds = max(self._now() - self._start - self._paused, 1e-9)
        values = {"examples_per_second": self._examples / seconds, "data_wait": self._waited / seconds}
        self._restart()
        return values


class Tally:
    """How often the data had to be mended, over all hosts: pictures replaced and captions truncated."""

    COUNTED = ("replaced", "truncated")  # bool [b] of a batch each

    def __init__(self) -> None:
        self.total = dict.fromkeys(self.COUNTED, 0)  # of all that was read
        self._since = np.zeros(len(self.COUNTED), np.int32)  # of this process since then

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """One more batch of this process."""
        self._since += [batch[name].sum() for name in self.COUNTED]

    def read(self) -> dict[str, int]:
        """The counts since the last read, or since the run was started or resumed. All processes call it, at the same step."""
        everywhere = multihost_utils.process_allgather(self._since).sum(0) if jax.process_count() > 1 else self._since
        counts = dict(zip(self.COUNTED, everywhere.tolist(), strict=True))
        self.total = {name: self.total[name] + n for name, n in counts.items()}
        self._since[:] = 0
        return counts
