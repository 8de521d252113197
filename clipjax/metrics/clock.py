"""Where a run's time goes, and how often its data had to be repaired."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Clock:
    """Splits the time between two log lines into training, waiting for data, and pauses, which count as neither."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._restart()

    def _restart(self) -> None:
        self._start, self._examples, self._waited, self._paused = self._now(), 0, 0.0, 0.0

    def count(self, examples: int) -> None:
        """One more step was started on `examples` image-text pairs, over all devices."""
        self._examples += examples

    @contextlib.contextmanager
    def waiting(self, work: jax.Array | None = None) -> Iterator[None]:
        """For `with`, around next(data). `work` is a result of the newest step: while the devices still compute it, the time does
        not count as waiting.
        """
        start = self._now()
        try:
            yield
        finally:
            if work is None or work.is_ready():  # pyright: ignore[reportAttributeAccessIssue]: jax.Array does not declare it
                self._waited += self._now() - start

    @contextlib.contextmanager
    def paused(self, after: Any = None) -> Iterator[None]:
        """For `with`, around evaluations, saving, and the compilation in the first step. The pause starts when the arrays of
        `after` (the state) are computed. Until then the devices still run steps, and that counts as training.
        """
        jax.block_until_ready(after)
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start

    def read(self) -> dict[str, float]:
        """`examples_per_second` and `data_wait` (share of time, 0 to 1) since the last read, without the pauses."""
        seconds = max(self._now() - self._start - self._paused, 1e-9)
        values = {"examples_per_second": self._examples / seconds, "data_wait": self._waited / seconds}
        self._restart()
        return values


class DataCounts:
    """How often the data had to be repaired, over all processes: images replaced and captions truncated."""

    COUNTED: tuple[str, ...] = ("replaced", "truncated")  # keys of a batch, each bool [b] or [b, K] for K captions

    def __init__(self) -> None:
        self.total = dict.fromkeys(self.COUNTED, 0)  # up to the last read
        self._since = np.zeros(len(self.COUNTED), np.int32)  # of this process, since the last read

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """One more batch of this process."""
        self._since += [batch[name].sum() for name in self.COUNTED]

    def read(self) -> dict[str, int]:
        """The counts since the last read. All processes must call this at the same step."""
        of_all = multihost_utils.process_allgather(self._since).sum(0) if jax.process_count() > 1 else self._since
        counts = dict(zip(self.COUNTED, of_all.tolist(), strict=True))
        self.total = {name: self.total[name] + n for name, n in counts.items()}
        self._since[:] = 0
        return counts
