"""Where a run's time goes, and how often its data had to be repaired."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clipjax import sharding


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


class DataCounts:
    """How often the data had to be repaired, over all processes: images replaced and captions truncated.

    The sum over the processes is a program on the devices, which runs behind the newest step. Nobody waits for it: like a step's
    metrics, it is fetched one log interval late.
    """

    COUNTED: tuple[str, ...] = ("replaced", "truncated")  # keys of a batch, each bool [b] or [b, K] for K captions

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._since = self._nothing()  # of this process, since the last read; in the first row
        self._total = dict.fromkeys(self.COUNTED, 0)  # of all processes, as far as it was fetched
        self._running: deque[dict[str, jax.Array]] = deque()  # results of `read` that are not in the total yet
        add = jax.jit(self._add, out_shardings=sharding.replicated(mesh))
        self._add_up = add.lower(self._put()).compile()  # now: else the first log line would wait for it

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """One more batch of this process."""
        self._since[0] += [*(batch[name].sum() for name in self.COUNTED), len(batch["replaced"])]

    def read(self) -> dict[str, jax.Array]:
        """The counts since the last read, int32 [], and `bad_share`, float32 []: the share of the examples that was replaced.

        The devices may still compute them. All processes must call this at the same step.
        """
        self._running.append(self._add_up(self._put()))
        self._since = self._nothing()
        self._fetch(unread=1)
        return self._running[-1]

    @property
    def total(self) -> dict[str, int]:
        """The counts up to the last read. Waits for the devices."""
        self._fetch(unread=0)
        return dict(self._total)

    def _nothing(self) -> np.ndarray:
        """A row for each of this process's parts of the batch: what is counted, and the number of examples."""
        return np.zeros((sharding.batch_devices(self._mesh) // jax.process_count(), len(self.COUNTED) + 1), np.int32)

    def _put(self) -> jax.Array:
        return sharding.to_global({"counts": self._since}, self._mesh)["counts"]

    def _add(self, rows: jax.Array) -> dict[str, jax.Array]:
        *sums, examples = rows.sum(0)
        counts = dict(zip(self.COUNTED, sums, strict=True))
        return counts | {"bad_share": counts["replaced"] / jnp.maximum(examples, 1)}

    def _fetch(self, unread: int) -> None:
        """Adds all but the newest `unread` results to the total."""
        while len(self._running) > unread:
            counts = self._running.popleft()
            self._total = {name: n + int(counts[name]) for name, n in self._total.items()}
