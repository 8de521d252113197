"""Batches that workers make ahead of time, within a bound of memory.

A worker makes a piece at a time: a few consecutive examples of one batch. So all workers make the first batch together, and what
lies ready need not be whole batches. Threads write each example into the arrays of its batch. Processes write into slots of
shared memory, from which a thread copies: a batch is stacked by the time that it is asked for.

Grain's prefetch, which was here before, counts its elements one by one at each read, 1 ms with 10,000 examples ready; its
processes make whole batches, each in shared memory of its own.
"""

import ctypes
import itertools
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np

from clipjax.data.source import share_warnings

Batch = dict[str, Any]  # arrays; of a single example also scalars of NumPy
Make = Callable[[int], Batch]  # makes an example of a process's sequence of examples, by its number
FARTHEST = 16  # batches that may lie ready, however small: more would only be work for nothing at the end of a run
LONGEST = 16  # examples of a piece: enough that handing them over costs little
ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Workers:
    """Who makes the examples, and how far ahead."""

    kind: Literal["threads", "processes"]
    count: int
    prefetch_bytes: int  # of examples that lie ready or are being made, beyond the batch that comes next
    example_bytes: int  # of the arrays of one example

    def ahead(self, batch: int) -> int:
        """How many examples may lie ready, beyond a batch."""
        return min(self.prefetch_bytes // self.example_bytes, FARTHEST * batch)

    def piece(self, batch: int) -> int:
        """How many examples a worker makes at a time: few enough that every worker has some of the first batch."""
        return max(1, min(batch // (2 * self.count), self.ahead(batch) // (2 * self.count), LONGEST))


class BatchStream(Iterator[Batch]):
    """Batches that workers make ahead of time. Close it, or leave its `with` block, to end the workers."""

    def __init__(
        self, make: Make, batch: int, workers: Workers, batches: int | None = None, closing: Callable[[], None] | None = None
    ) -> None:
        """Batch t consists of the examples `make(t * batch)` to `make((t + 1) * batch - 1)`. `batches`: how many there are; None:
        they never end. Processes get `make` pickled. `closing`: is called at the end."""
        self._closing = closing
        self._batch, self._batches, self._piece = batch, batches, workers.piece(batch)
        self._pieces = -(-batch // self._piece)  # of a batch
        in_flight = 2 * workers.count  # so that no worker waits for its next piece
        self._pool = (_Processes if workers.kind == "processes" else _Threads)(make, workers, self._piece, in_flight)
        self._room = threading.Semaphore(workers.ahead(batch) // self._piece + self._pieces)  # pieces that may be begun
        self._coming: queue.SimpleQueue[Stacked | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._feeder = threading.Thread(target=self._feed, name="clipjax-prefetch", daemon=True)
        self._feeder.start()

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise ValueError("these batches are closed")
        stacked = self._coming.get()
        if stacked is None:
            self._coming.put(None)
            raise StopIteration
        arrays = stacked.wait()
        self._room.release(self._pieces)
        return arrays

    def close(self) -> None:
        """Ends the workers, at most after the examples that they are making. May be called twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._room.release()  # the feeder may be waiting for room, or for a worker
        if self._closing is not None:
            self._closing()
        self._pool.close()
        self._feeder.join()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _feed(self) -> None:
        """Gives the workers one piece after another."""
        for t in itertools.count() if self._batches is None else range(self._batches):
            stacked = Stacked(self._batch, self._pieces)
            self._coming.put(stacked)
            for row in range(0, self._batch, self._piece):
                self._room.acquire()
                if self._closed.is_set():
                    return
                first, count = t * self._batch + row, min(self._piece, self._batch - row)
                try:
                    self._pool.start(range(first, first + count), stacked, row)
                except Exception as error:  # the pool is broken
                    stacked.fail(error)
                    return
        self._coming.put(None)


class Stacked:
    """A batch that is being filled."""

    def __init__(self, size: int, pieces: int) -> None:
        self._size, self._missing = size, pieces
        self._arrays: Batch = {}
        self._error: BaseException | None = None
        self._lock, self._done = threading.Lock(), threading.Event()

    def put(self, row: int, examples: Batch, count: int | None = None) -> None:
        """Writes one example, or with `count` the arrays of as many, from row `row` on."""
        with self._lock:
            if not self._arrays:
                stored = {name: np.asarray(value) for name, value in examples.items()}
                shapes = {name: value.shape[0 if count is None else 1 :] for name, value in stored.items()}
                self._arrays = {name: np.empty((self._size, *shapes[name]), stored[name].dtype) for name in stored}
        rows = row if count is None else slice(row, row + count)
        for name, value in examples.items():
            self._arrays[name][rows] = value

    def finish_piece(self) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing == 0:
                self._done.set()

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._done.set()

    def wait(self) -> Batch:
        """The arrays, once all are written. Raises what a worker raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._arrays


class _Threads:
    """Workers that are threads."""

    def __init__(self, make: Make, workers: Workers, piece: int, in_flight: int) -> None:
        self._make, self._closed = make, threading.Event()
        self._executor = ThreadPoolExecutor(workers.count, thread_name_prefix="clipjax-worker")
        self._free = threading.Semaphore(in_flight)

    def start(self, numbers: range, stacked: Stacked, row: int) -> None:
        """Lets a worker make the examples of these numbers, and write them from row `row` on. Waits for one that is free."""
        self._free.acquire()
        self._executor.submit(self._run, numbers, stacked, row)

    def close(self) -> None:
        self._closed.set()
        self._free.release()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self, numbers: range, stacked: Stacked, row: int) -> None:
        try:
            for i, number in enumerate(numbers):
                if self._closed.is_set():
                    return
                stacked.put(row + i, self._make(number))
            stacked.finish_piece()
        except BaseException as error:
            stacked.fail(error)
        finally:
            self._free.release()


class _Processes:
    """Workers that are processes, with shared memory for the pieces that they make."""

    def __init__(self, make: Make, workers: Workers, piece: int, in_flight: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks of threads that it lacks
        self._slot_bytes = piece * (workers.example_bytes + 16 * ALIGNED)  # at most some 16 arrays, each aligned
        memory: Any = context.RawArray(ctypes.c_uint8, in_flight * self._slot_bytes)
        self._memory = np.frombuffer(memory, np.uint8)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(in_flight):
            self._free.put(slot)
        ours, self._ours = context.Pipe(duplex=False)  # a worker ends when this process has closed its end, or has ended
        arguments: Any = make, memory, ours, workers.count
        self._executor: Executor = ProcessPoolExecutor(workers.count, context, _start_worker, arguments)

    def start(self, numbers: range, stacked: Stacked, row: int) -> None:
        """As `_Threads.start`."""
        slot = self._free.get()
        memory = self._memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]

        def copy(future: Future) -> None:
            try:
                placed = future.result()
                stacked.put(row, {name: at.view(memory) for name, at in placed.items()}, len(numbers))
                stacked.finish_piece()
            except BaseException as error:
                stacked.fail(error)
            finally:
                self._free.put(slot)

        self._executor.submit(_make_piece, numbers, slot * self._slot_bytes, self._slot_bytes).add_done_callback(copy)

    def close(self) -> None:
        self._free.put(0)
        self._ours.close()
        self._executor.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Placed:
    """Where an array is in a slot, or the array itself, if the slot has no room for it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    array: np.ndarray | None = None

    def view(self, memory: np.ndarray) -> np.ndarray:
        if self.array is not None:
            return self.array
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        return memory[self.start : self.start + size].view(self.dtype).reshape(self.shape)


# Of a worker process: what makes its examples, and the memory that it shares with the process that asks for them.
_worker: dict[str, Any] = {}


def _start_worker(make: Make, memory: Any, parent: Connection, count: int) -> None:
    """Makes a worker process, one of `count`, log as the command line does, ignore signals, and end when the command line's
    process says so or ends.

    A terminal or Slurm sends signals to all processes, but the command line still needs batches."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    share_warnings(count)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        try:
            parent.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _worker.update(make=make, memory=np.frombuffer(memory, np.uint8))


def _make_piece(numbers: range, start: int, size: int) -> dict[str, _Placed]:
    """Makes examples in a worker process, and writes them to a slot of the shared memory."""
    memory = _worker["memory"][start : start + size]
    placed: dict[str, _Placed] = {}
    for i, number in enumerate(numbers):
        example = _worker["make"](number)
        placed = placed or _place(example, len(numbers), size)
        for name, value in example.items():
            placed[name].view(memory)[i] = value
    return placed


def _place(example: Batch, count: int, size: int) -> dict[str, _Placed]:
    """A place for the arrays of `count` examples like this one, in a slot of `size` bytes."""
    placed, end = {}, 0
    for name, value in example.items():
        value = np.asarray(value)
        shape, start = (count, *value.shape), -(-end // ALIGNED) * ALIGNED
        fits = start + count * value.nbytes <= size
        placed[name] = _Placed(value.dtype, shape, start, None if fits else np.empty(shape, value.dtype))
        end = start + count * value.nbytes if fits else end
    return placed
