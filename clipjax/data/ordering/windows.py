"""An order of large sequential reads, `data.order = "windows"`, as a closed form of (seed, step, place).

The source's examples lie in chunks, each of which is one read. In every epoch the chunks are permuted, and the examples of each
chunk; laid out in that order, from an example drawn at random on, they are cut into `lanes` ranges. Lane l fills a fixed part of
every batch. In a lane each `window` of examples is shuffled. So a process that makes a part of every batch needs its own lanes
only, of each of them the chunks of one window at a time, and each chunk once an epoch.

Two refinements keep the reads even. The first windows of the lanes differ in length (by the golden ratio, so that those of any
run of lanes are spread evenly): else all lanes would need new chunks at the same step. And every other lane goes backwards
through its range: the chunk that two neighbours share is then needed by both at the same end of the epoch, and is not read twice.
"""

import functools
import threading

import numpy as np

from clipjax.data.ordering.order import Order
from clipjax.data.ordering.permutation import hashed, permuted

AT_ONCE = 512  # places that are looked up at one time: fewer cost as much
GOLDEN = 2654435769  # 2^32 divided by the golden ratio


class Windows(Order):
    """Examples by (step, place), whatever the number of processes. Each epoch has floor(n / b) batches of b different examples;
    which ones are left out differs.

    For 400 million examples in chunks of 128, an epoch's table takes 12.5 MB, and so do the chunks' starts."""

    def __init__(self, chunks: np.ndarray, share: int, seed: int, lanes: int, window: int) -> None:
        """`chunks`: int [c], the examples of each chunk. `share`: this source's examples in a global batch."""
        self.examples, self.share, self.window = int(chunks.sum()), share, window
        self.batches = self.examples // share
        dtype = np.uint32 if self.examples < 2**32 else np.uint64
        self.starts = np.concatenate([[0], np.cumsum(chunks)]).astype(dtype)  # of each chunk in the source, and its end
        self.lanes = min(lanes, share)
        self._cuts = np.arange(self.lanes + 1) * share // self.lanes  # of a batch into lanes
        self._widths = np.diff(self._cuts)
        numbers = np.arange(len(self._widths))
        shift = (numbers * GOLDEN % 2**32 * window) >> 32  # by how much the first window of each lane is shorter
        self._shift = np.where(self.batches * self._widths > window, shift, 0)
        self._seed = np.random.SeedSequence([seed, 4]).generate_state(1, np.uint64)
        self._lock = threading.Lock()
        # Two: readers are at one epoch's end and at the next one's start.
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def at(self, step: int, places: np.ndarray) -> np.ndarray:
        return self._located(*divmod(step, self.batches), places)[0]

    def located(self, step: int, places: np.ndarray) -> dict[int, tuple[np.ndarray, ...]]:
        """Of the examples at these places of batch `step`, and of a few batches after it if the places are few: their numbers,
        the numbers of their chunks, and the batch after which no example of the chunk is needed in this epoch."""
        epoch, first = divmod(step, self.batches)
        size = len(places)
        steps = max(1, min(AT_ONCE // max(size, 1), self.batches - first))
        number, chunk, rank = self._located(epoch, np.repeat(np.arange(first, first + steps), size), np.tile(places, steps))
        found = number, chunk, self._last_steps(epoch, rank)
        return {step + k: tuple(values[k * size : (k + 1) * size] for values in found) for k in range(steps)}

    def _located(self, epoch: int, step: int | np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers, chunks, and the rank of each chunk in its epoch. `step`: within the epoch."""
        table, offset, key = self.epoch(epoch)
        laid = (self._laid(step, places, key) + offset) % self.examples
        rank = np.searchsorted(table, laid.astype(table.dtype), side="right") - 1
        chunk = permuted(rank, len(self.starts) - 1, hashed(key, 1))
        start = self.starts[chunk].astype(np.int64)
        count = self.starts[chunk + 1].astype(np.int64) - start
        within = permuted(laid - table[rank].astype(np.int64), count, hashed(key, 2, chunk))
        return start + within, chunk, rank

    def epoch(self, epoch: int) -> tuple[np.ndarray, int, np.ndarray]:
        """The starts of the permuted chunks in the layout and its end [c + 1], the example of the layout with which lane 0
        begins, and the key."""
        with self._lock:  # two threads would both compute it
            return self._epoch(epoch)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, int, np.ndarray]:
        key, count = hashed(self._seed, epoch), len(self.starts) - 1
        table = np.zeros(count + 1, self.starts.dtype)
        for first in range(0, count, 1 << 16):  # in parts: what is computed on the way would take more memory than the result
            chunk = permuted(np.arange(first, min(first + (1 << 16), count)), count, hashed(key, 1))
            lengths = self.starts[chunk + 1] - self.starts[chunk]
            table[first + 1 : first + 1 + len(chunk)] = table[first] + np.cumsum(lengths, dtype=table.dtype)
        return table, int(permuted(np.zeros(1, np.int64), self.examples, hashed(key, 3))[0]), key

    @property
    def held(self) -> int:
        """About how many examples are in the chunks that a lane has in use: a window, and at its ends the rest of a chunk."""
        return min(self.window + self.examples // (len(self.starts) - 1), self.batches * int(self._widths.max()))

    def lanes_of(self, first: int, count: int) -> int:
        """How many lanes have a place among the `count` ones of a batch from `first` on."""
        low, high = np.searchsorted(self._cuts, [first, first + count - 1], side="right")
        return int(high - low) + 1

    def _laid(self, step: int | np.ndarray, places: np.ndarray, key: np.ndarray) -> np.ndarray:
        """The examples at these places, in the layout from lane 0 on."""
        lane = np.searchsorted(self._cuts, places, side="right") - 1
        width = self._widths[lane]
        passed = step * width + places - self._cuts[lane]  # examples of the lane before this one
        number = (passed + self._shift[lane]) // self.window
        low, high = self._bounds(lane, number)
        passed = low + permuted(passed - low, high - low, hashed(key, 4, lane, number))
        first, last = self.batches * self._cuts[lane], self.batches * self._cuts[lane + 1] - 1
        return np.where(lane % 2 == 0, first + passed, last - passed)

    def _bounds(self, lane: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first example of a lane's window, and the one after its last, counted from the lane's start."""
        low = number * self.window - self._shift[lane]
        return np.maximum(low, 0), np.minimum(low + self.window, self.batches * self._widths[lane])

    def _last_steps(self, epoch: int, rank: np.ndarray) -> np.ndarray:
        """The step, counted over all epochs, after which no example of a chunk is needed in this epoch; at worst the epoch's last
        one, for a chunk that a whole lane lies in, or that holds both ends of the layout."""
        table, offset, _ = self.epoch(epoch)
        low, high = table[rank].astype(np.int64), table[rank + 1].astype(np.int64)
        first = (low - offset) % self.examples
        stop, used = first + high - low, self.batches * self.share
        ends = np.minimum(np.stack([first, stop - 1]), used - 1)
        lane = np.searchsorted(self.batches * self._cuts, ends, side="right") - 1
        begin, width = self.batches * self._cuts[lane], self._widths[lane]
        passed = np.where(lane % 2 == 0, ends - begin, begin + self.batches * width - 1 - ends)
        _, after = self._bounds(lane, (passed + self._shift[lane]) // self.window)
        step = ((after - 1) // width).max(0)
        together = (lane[0] == lane[1]) | ((lane[1] == lane[0] + 1) & (lane[0] % 2 == 1))  # neighbours, which both start there
        return epoch * self.batches + np.where(together & (stop <= self.examples), step, self.batches - 1)
