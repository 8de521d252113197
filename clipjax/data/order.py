"""The order of the examples over all epochs, as a function of the seed, the step and the place in its batch.

Grain only permutes the numbers of one epoch. What its pipelines do with a shuffle that is sliced and repeated has changed between
releases (google/grain issue 1200), and a run must go on with the same batches under the next one.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import grain
import numpy as np


class Order(ABC):
    """Which example of a source is at each place of each batch. An epoch is `batches` batches; no example comes twice in it."""

    share: int  # places in a batch
    batches: int  # of an epoch

    @abstractmethod
    def at(self, step: int, places: np.ndarray) -> np.ndarray:
        """int64: the examples at these places of batch `step`, which counts on over all epochs."""

    def stand_in(self, step: int, place: int, tried: int) -> int:
        """The example to try, after `tried` others, instead of a bad one: that at the same place of a later batch of the epoch,
        from its end on of the first ones. So no example comes twice in a batch.

        Where one batch is the epoch, there are no others: then the example of a later place of the same batch."""
        if self.batches == 1:
            return int(self.at(step, np.array([(place + tried) % self.share]))[0])
        epoch, batch = divmod(step, self.batches)
        later = epoch * self.batches + (batch + tried) % self.batches
        return int(self.at(later, np.array([place]))[0])


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


@functools.lru_cache(maxsize=4)  # workers are at the end of one epoch and at the start of the next
def _shuffled(examples: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(examples).shuffle(seed)


@functools.cache
def derived(seed: int, use: str) -> int:
    """A seed of its own in [0, 2^32) for each use, `order` and `choices`: the one that Grain's `seed()` gave in clipjax 0.2."""
    return int(np.random.SeedSequence([seed, {"order": 1, "choices": 3}[use]]).generate_state(1)[0])
