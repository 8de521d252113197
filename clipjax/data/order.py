"""The order of the examples over all epochs, as a function of the seed and the position.

Grain only permutes the numbers of one epoch. What its pipelines do with a shuffle that is sliced and repeated has changed between
releases (google/grain issue 1200), and a run must go on with the same batches under the next one.
"""

import functools
from dataclasses import dataclass

import grain
import numpy as np


@dataclass(frozen=True)
class Order:
    """Each epoch shuffles all examples anew, and ends with its last full batch: what it leaves out, another epoch has."""

    examples: int
    batch_size: int  # global
    seed: int

    def __getitem__(self, position: int) -> int:
        """The example at a position, which counts on over all epochs."""
        epoch, place = divmod(position, self.examples // self.batch_size * self.batch_size)
        example = _shuffled(self.examples, (derived(self.seed, "order") + epoch) % 2**32)[place]
        assert example is not None  # only a filtered dataset has gaps
        return example


@functools.lru_cache(maxsize=4)  # workers are at the end of one epoch and at the start of the next
def _shuffled(examples: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(examples).shuffle(seed)


@functools.cache
def derived(seed: int, use: str) -> int:
    """A seed of its own in [0, 2^32) for each use, `order` and `choices`: the one that Grain's `seed()` gave in clipjax 0.2."""
    return int(np.random.SeedSequence([seed, {"order": 1, "choices": 3}[use]]).generate_state(1)[0])
