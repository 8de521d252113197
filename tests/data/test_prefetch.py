"""Batches ahead of time, of examples that the tests make."""

import multiprocessing
import os
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import pytest

from clipjax.data.prefetch import BatchStream, Workers

BYTES = 8 * 8 * 3 + 4
KINDS = ("threads", "processes")


@dataclass(frozen=True)
class Numbered:
    """Images of the number of their example."""

    fails_at: int = -1
    dies_at: int = -1
    sleeps_at: int = -1

    def __call__(self, i):
        if i == self.fails_at:
            raise ZeroDivisionError(f"number {i}")
        if i == self.dies_at:
            os._exit(9)
        if i == self.sleeps_at:
            time.sleep(600)
        return {"image": np.full((8, 8, 3), i % 251, np.uint8), "index": np.int32(i), "even": np.bool_(i % 2 == 0)}


def workers(kind="threads", count=3, prefetch_bytes=2**20, example_bytes=BYTES):
    return Workers(kind, count, prefetch_bytes, example_bytes)


@pytest.mark.parametrize("example_bytes", [BYTES, 1])
@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_examples_in_order(kind, batch, example_bytes):
    """Also where an example is larger than was said, so that it does not fit into shared memory."""
    with BatchStream(Numbered(), batch, workers(kind, example_bytes=example_bytes), batches=5) as stream:
        seen = list(stream)
        assert next(stream, None) is None
    assert len(seen) == 5
    types = {name: (x.shape, x.dtype.name) for name, x in seen[0].items()}
    assert types == {"image": ((batch, 8, 8, 3), "uint8"), "index": ((batch,), "int32"), "even": ((batch,), "bool")}
    index = np.concatenate([b["index"] for b in seen])
    np.testing.assert_array_equal(index, np.arange(5 * batch))
    np.testing.assert_array_equal(np.concatenate([b["even"] for b in seen]), index % 2 == 0)
    for b in seen:
        assert (b["image"] == (b["index"] % 251).astype(np.uint8)[:, None, None, None]).all()


def test_all_workers_make_the_first_batch():
    together = threading.Barrier(8)

    def make(i):
        if i < 32:
            together.wait(timeout=60)  # only if eight examples are made at a time
        return {"index": np.int32(i)}

    with BatchStream(make, 32, workers(count=8)) as stream:
        assert next(stream)["index"].tolist() == list(range(32))


@pytest.mark.parametrize("count", [1, 4, 32])
@pytest.mark.parametrize("prefetch_bytes", [1, 100 * BYTES, 2**30])
def test_bytes_that_lie_ready_are_bounded(prefetch_bytes, count):
    """A slow consumer: the workers make all that they may before it takes the next batch."""
    batch, made, lock = 16, [0], threading.Lock()

    def make(i):
        with lock:
            made[0] += 1
        return Numbered()(i)

    def settled():
        before = -1
        while before != made[0]:
            before = made[0]
            time.sleep(0.05)
        return before

    with BatchStream(make, batch, workers(count=count, prefetch_bytes=prefetch_bytes)) as stream:
        for taken in range(2):
            ready = settled() - taken * batch
            assert ready * BYTES <= prefetch_bytes + 2 * batch * BYTES
            assert ready <= 17 * batch  # however small the examples are
            assert ready >= batch + min(prefetch_bytes // BYTES // 2, 16 * batch)
            next(stream)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_worker_raises(kind):
    """The batches before it come, then the error."""
    with BatchStream(Numbered(fails_at=70), 16, workers(kind)) as stream:
        assert [next(stream)["index"][0] for _ in range(4)] == [0, 16, 32, 48]
        with pytest.raises(ZeroDivisionError, match="number 70"):
            next(stream)


def test_a_process_that_dies():
    with BatchStream(Numbered(dies_at=0), 4, workers("processes", count=1)) as stream, pytest.raises(BrokenProcessPool):
        next(stream)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_waits_for_no_slow_example(kind):
    start = time.monotonic()
    stream = BatchStream(Numbered(sleeps_at=40) if kind == "processes" else Numbered(), 16, workers(kind, count=2))
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="these batches are closed"):
        next(stream)
    assert not multiprocessing.active_children()
    assert time.monotonic() - start < 300  # the example sleeps for 600 s


def test_closing_waits_for_no_slow_thread():
    leave = threading.Event()

    def make(i):
        if i >= 4:
            leave.wait(600)
        return {"index": np.int32(i)}

    with BatchStream(make, 4, workers(count=2, prefetch_bytes=2**20)) as stream:
        next(stream)
    assert not leave.is_set()  # a thread still makes an example
    leave.set()


@pytest.mark.parametrize("kind", KINDS)
def test_closing_before_the_first_batch(kind):
    with BatchStream(Numbered(), 64, workers(kind)):
        pass
    assert not multiprocessing.active_children()


def test_any_number_of_workers_gives_the_same_batches():
    for count, kind in ((1, "threads"), (5, "threads"), (2, "processes")):
        with BatchStream(Numbered(), 6, workers(kind, count)) as stream:
            for t in range(4):
                assert next(stream)["index"].tolist() == list(range(6 * t, 6 * t + 6))
