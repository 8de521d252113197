"""Reads chunks ahead of their use, for an order by windows.

The order says which examples a process needs, so it is known which chunks come next. Threads fetch them ahead; records are taken
from memory; a chunk is dropped when its last example is used. What is in memory: of each of this process's lanes the chunks of a
window that is in use, about `data.lanes` x (`data.window` + a chunk) x the bytes of an example on one process and a part of that
on each of several; and AHEAD chunks or AHEAD_EXAMPLES, but at most AHEAD_BYTES, that are not needed yet.
"""

import collections
import heapq
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from clipjax.data.ordering.order import Planned
from clipjax.data.ordering.windows import Windows
from clipjax.data.source import Fetched, Record, Source

THREADS = 8  # chunks that are fetched at one time: 16 MiB pieces at 20 ms latency come at more than 0.5 GB/s
AHEAD = THREADS  # chunks that are fetched before they are needed
AHEAD_EXAMPLES = 2048  # or as many as hold so many examples
AHEAD_BYTES = 512 * 2**20  # and at most so many bytes, as far as the chunks so far foretell them
HORIZON = 8192  # examples whose chunks are looked up ahead
HORIZON_STEPS = 64  # in at most this many steps
LARGE = 4 * 2**30  # bytes of windows of which the log says what they come from

log = logging.getLogger(__name__)


@dataclass
class _Held:
    """A chunk that is in memory, on its way, or needed soon."""

    position: int  # where it is first needed, counted in this process's examples
    examples: int
    uses: int = 0  # examples that are planned and not yet read
    complete: bool = False  # all of its uses in its epoch are planned
    future: "Future[Fetched] | None" = None


@dataclass
class _Step:
    """The examples of a batch on this process."""

    number: np.ndarray  # [b] of the source; -1: was read
    chunk: np.ndarray  # [b]
    position: int  # of its first example
    epoch: int
    unread: int


class Closed(BaseException):
    """The reader is closed. No Exception: nobody must take the example for a bad one."""


class ChunkReader:
    """Reads this process's examples of an order by windows. Several threads may ask, in roughly increasing position.

    A chunk that can't be fetched makes each of its examples fail; a stand-in whose chunk is not in memory is read by itself."""

    def __init__(self, source: Source, order: Planned[Windows], batch_of_step: Callable[[int], int]) -> None:
        """`batch_of_step(k)`: the batch of the order that this process needs as its k-th, ascending."""
        self._source, self._order, self._batch_of_step = source, order, batch_of_step
        self._lanes = order.order.lanes_of(order.first, order.count)
        self._starts = order.order.starts
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="chunks")
        self._lock, self._closed = threading.Lock(), False
        self._steps: dict[int, _Step] = {}  # those with unread examples, by batch
        self._planned = 0  # steps
        self._reached = -1  # the largest position that was asked for
        self._held: dict[tuple[int, int], _Held] = {}  # by epoch and chunk
        self._ends: list[tuple[int, tuple[int, int]]] = []  # a heap: the last batch that needs a chunk
        self._pending: collections.deque[tuple[int, int]] = collections.deque()  # not yet being fetched, by position
        self._ahead: collections.deque[_Held] = collections.deque()  # fetched or being fetched, and not yet needed, by position
        self._ahead_examples = 0
        self._horizon = max(1, min(HORIZON_STEPS, HORIZON // order.count if order.count else 0)) * order.count
        self._fetched_examples, self._fetched_bytes = 0, 0

    def __call__(self, step: int, place: int, number: int) -> Record:
        """Example `number`, which is at this place of batch `step` or a stand-in for that one. May raise anything."""
        future, chunk = self._use(step, place, number)
        if future is None:
            return self._source.read(number)
        try:
            fetched = future.result()
        except CancelledError:
            raise Closed from None
        return self._source.record_in(fetched, chunk, number - int(self._starts[chunk]))

    def ready_bytes(self) -> int:
        """Bytes of the chunks that are in memory."""
        with self._lock:
            futures = [held.future for held in self._held.values() if held.future is not None]
        return sum(f.result().nbytes for f in futures if f.done() and not f.cancelled() and f.exception() is None)

    def close(self, wait: bool = False) -> None:
        """Ends the threads, each after its fetch, for which this waits if it is to. Who waits for another chunk, or asks later,
        gets Closed."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _use(self, batch: int, place: int, number: int) -> "tuple[Future[Fetched] | None, int]":
        """The chunk of an example, if it is in memory or will be."""
        with self._lock:
            if self._closed:
                raise Closed
            while batch not in self._steps and self._batch_of_step(self._planned) <= batch:
                self._plan()
            i, step = place - self._order.first, self._steps.get(batch)
            if step is None or step.number[i] != number:
                return self._stand_in(batch, number)
            key = (step.epoch, int(step.chunk[i]))
            held = self._held[key]
            self._reached = max(self._reached, step.position + i)
            self._submit()
            step.number[i] = -1
            step.unread -= 1
            if not step.unread:
                del self._steps[batch]
            held.uses -= 1
            self._drop_used(key)
            return held.future, key[1]

    def _stand_in(self, batch: int, number: int) -> "tuple[Future[Fetched] | None, int]":
        chunk = int(np.searchsorted(self._starts, self._starts.dtype.type(number), side="right")) - 1
        held = self._held.get((batch // self._order.batches, chunk))
        return (None if held is None else held.future), chunk

    def _plan(self) -> None:
        """Looks up which chunks the next step needs."""
        batch, position = self._batch_of_step(self._planned), self._planned * self._order.count
        self._planned += 1
        epoch, (number, chunk, last) = batch // self._order.batches, self._order.plan(batch)
        self._steps[batch] = _Step(number.copy(), chunk, position, epoch, len(number))
        for i, (c, end) in enumerate(zip(chunk.tolist(), last.tolist(), strict=True), position):
            held = self._held.get((epoch, c))
            if held is None:
                held = self._held[epoch, c] = _Held(i, int(self._starts[c + 1]) - int(self._starts[c]))
                self._pending.append((epoch, c))
                heapq.heappush(self._ends, (end, (epoch, c)))
            held.uses += 1
        while self._ends and self._ends[0][0] <= batch:
            _, key = heapq.heappop(self._ends)
            self._held[key].complete = True
            self._drop_used(key)

    def _drop_used(self, key: tuple[int, int]) -> None:
        if self._held[key].complete and not self._held[key].uses:
            del self._held[key]

    def _submit(self) -> None:
        """Has the chunks fetched that are needed now, and then as many as may be ahead."""
        while self._ahead and self._ahead[0].position <= self._reached:
            self._ahead_examples -= self._ahead.popleft().examples
        if not self._pending and not self._is_full() and self._planned * self._order.count <= self._reached + self._horizon:
            self._plan()  # one step only: that of the whole horizon would take long, and another example is soon asked for
        while self._pending:
            held = self._held[self._pending[0]]
            if held.position > self._reached and self._is_full():
                return
            held.future = self._pool.submit(self._fetch, self._pending.popleft()[1], held.examples)
            if held.position > self._reached:
                self._ahead.append(held)
                self._ahead_examples += held.examples

    def _is_full(self) -> bool:
        many = len(self._ahead) >= AHEAD and self._ahead_examples >= AHEAD_EXAMPLES
        large = self._ahead_examples * self._fetched_bytes > AHEAD_BYTES * self._fetched_examples
        return many or (bool(self._ahead) and large)

    def _fetch(self, chunk: int, examples: int) -> Fetched:
        fetched = self._source.fetch(chunk)
        with self._lock:
            first = not self._fetched_examples
            self._fetched_examples += examples
            self._fetched_bytes += fetched.nbytes
        if first:
            self._say_memory(fetched.nbytes / examples)
        return fetched

    def _say_memory(self, example: float) -> None:
        """Logs what lanes and windows cost, where that is much. `example`: bytes of one."""
        name, lanes, held = self._source.name, self._order.order.lanes, self._order.order.held
        if self._order.first == 0 and self._order.count * lanes < self._order.share:
            remedy = "set data.lanes to the number of hosts or a multiple"
            log.warning("%s: hosts share lanes, and each fetches all chunks of its lane: %s", name, remedy)
        if (expected := self._lanes * held * example) > LARGE:
            what = "%s: data.order = 'windows' takes about %.0f GiB of memory on this host, %d lanes x %d examples of %.0f kB"
            log.warning(f"{what}; lower data.lanes or data.window", name, expected / 2**30, self._lanes, held, example / 1e3)
