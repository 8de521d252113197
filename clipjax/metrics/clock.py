"""Where a run's time goes."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax


class Clock:
    """Splits the time between two log lines into training, waiting for data, and pauses."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._restart()

    def _restart(self) -> None:
        self._start, self._examples, self._waited, self._paused = self._now(), 0, 0.0, 0.0
        self._spent = dict.fromkeys(("save_seconds", "eval_seconds"), 0.0)

    def count(self, examples: int) -> None:
        """One more step was started on `examples` image-text pairs, over all devices."""
        self._examples += examples

    @contextlib.contextmanager
    def waiting(self, work: jax.Array | None = None) -> Iterator[None]:
        """For `with`, around reading a batch and putting it on the devices. `work` is a result of the newest step: while the
        devices still compute it, the time does not count as waiting.
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

    @contextlib.contextmanager
    def spending(self, name: Literal["save_seconds", "eval_seconds"]) -> Iterator[None]:
        """For `with`, within a pause: what its time goes to."""
        start = self._now()
        try:
            yield
        finally:
            self._spent[name] += self._now() - start

    def read(self) -> dict[str, float]:
        """Since the last read:

        - `save_seconds`, `eval_seconds`: how long training stood still for saving and for evaluations;
        - `useful_share`: the share of the time, 0 to 1, in which the run trained: neither paused nor waiting for data;
        - unless only a first step was taken, which has no rate: `examples_per_second` and `data_wait` (the share of time waiting
          for data), both of the time without the pauses.
        """
        seconds = max(self._now() - self._start, 1e-9)
        unpaused = max(seconds - self._paused, 1e-9)
        rates = {"examples_per_second": self._examples / unpaused, "data_wait": self._waited / unpaused} if self._examples else {}
        useful = max(unpaused - self._waited, 0.0) / seconds if self._examples else 0.0
        values = rates | self._spent | {"useful_share": useful}
        self._restart()
        return values
