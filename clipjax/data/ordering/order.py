"""The order of the examples over all epochs, as a function of the seed, the step and the place in its batch.

Grain only permutes the numbers of one epoch. What its pipelines do with a shuffle that is sliced and repeated has changed between
releases (google/grain issue 1200), and a run must go on with the same batches under the next one.
"""

import collections
import functools
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain
import numpy as np

KEPT = 1 << 15  # places whose examples are kept, at least those of twice as many batches as NEAR
NEAR = 3  # batches after one that are looked up as a whole for its stand-ins: data.filter may leave out many examples


class Order(ABC):
    """Which example of a source is at each place of each batch. An epoch is `batches` batches; no example comes twice in it."""

    share: int  # places in a batch
    batches: int  # of an epoch

    @abstractmethod
    def at(self, step: int, places: np.ndarray) -> np.ndarray:
        """int64: the examples at these places of batch `step`, which counts on over all epochs."""

    def one(self, step: int, place: int) -> int:
        """The example at one place."""
        return int(self.at(step, np.array([place]))[0])

    def located(self, step: int, places: np.ndarray) -> dict[int, tuple[np.ndarray, ...]]:
        """As `at`, and what else an order knows of these examples, arrays of the same length: by batch, for batch `step`, and for
        those after it that cost little more."""
        return {step: (self.at(step, places),)}

    def stand_in(self, step: int, place: int, tried: int) -> int:
        """The example to try instead of a bad one, after `tried` - 1 others were: that at the same place of a later batch of the
        epoch, from its end on of the first ones. So no example comes twice in a batch.

        When all have been tried, those at the next place of these batches, in the opposite order: there the bad example of that
        place may have found its own, so two places may have the same, but seldom do. Where one batch is the epoch, there are no
        others: then the example of a later place of the same batch."""
        if self.batches == 1:
            return self.one(step, (place + tried) % self.share)
        epoch, batch = divmod(step, self.batches)
        turn, ahead = divmod(tried - 1, self.batches - 1)
        later = batch + 1 + ahead if turn == 0 else batch - 1 - ahead
        return self.one(epoch * self.batches + later % self.batches, (place + turn) % self.share)


Inner = TypeVar("Inner", bound=Order)


@dataclass(frozen=True)
class Random(Order):
    """Each epoch shuffles all examples anew, and ends with its last full batch: what it leaves out, another epoch has."""

    examples: int
    share: int
    seed: int

    @property
    def batches(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  (it follows from the fields)
        return self.examples // self.share

    def at(self, step: int, places: np.ndarray) -> np.ndarray:
        epoch, batch = divmod(step, self.batches)
        shuffled = _shuffled(self.examples, (derived(self.seed, "order") + epoch) % 2**32)
        return np.array([shuffled[batch * self.share + place] for place in places.tolist()], np.int64)


class Planned(Order, Generic[Inner]):
    """An order, of which `count` places from `first` on are computed a batch at a time and kept: those of one process.

    One at a time would cost as much as all of them, where NumPy computes the order."""

    def __init__(self, order: Inner, first: int, count: int) -> None:
        self.order, self.first, self.count = order, first, count
        self.share, self.batches = order.share, order.batches
        self._places = np.arange(first, first + count)
        self._plans: collections.OrderedDict[int, tuple[np.ndarray, ...]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.order, self.first, self.count)  # without what is kept, and its lock

    def at(self, step: int, places: np.ndarray) -> np.ndarray:
        return self.order.at(step, places)

    def one(self, step: int, place: int) -> int:
        own = 0 <= place - self.first < self.count
        return int(self.plan(step)[0][place - self.first]) if own else self.order.one(step, place)

    def stand_in(self, step: int, place: int, tried: int) -> int:
        return super().stand_in(step, place, tried) if tried <= NEAR else self.order.stand_in(step, place, tried)

    def plan(self, step: int) -> tuple[np.ndarray, ...]:
        """The examples at this process's places of batch `step`, and what else the order knows of them (`Order.located`)."""
        with self._lock:
            if step not in self._plans:
                self._plans |= self.order.located(step, self._places)
            self._plans.move_to_end(step)
            while len(self._plans) > max(2 * NEAR, KEPT // max(self.count, 1)):
                self._plans.popitem(last=False)
            return self._plans[step]


@functools.lru_cache(maxsize=4)  # workers are at the end of one epoch and at the start of the next
def _shuffled(examples: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(examples).shuffle(seed)


@functools.cache
def derived(seed: int, use: str) -> int:
    """A seed of its own in [0, 2^32) for each use, `order` and `choices`: the one that Grain's `seed()` gave in clipjax 0.2."""
    return int(np.random.SeedSequence([seed, {"order": 1, "choices": 3}[use]]).generate_state(1)[0])
