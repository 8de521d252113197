"""Chunks are fetched ahead of their use, once each, and dropped after it."""

import collections
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.ordering import chunks
from clipjax.data.ordering.chunks import ChunkReader
from clipjax.data.ordering.order import Planned
from clipjax.data.ordering.windows import Windows
from clipjax.data.source import Fetched, Record, Source

LENGTHS = np.tile([100, 60, 140], 20)
BYTES = 1000  # of an example


class Stored(Source):
    """Examples in chunks, whose images are their numbers. Says what was fetched, and what was read by itself."""

    name, fields = "stored", {}

    def __init__(self, lengths=LENGTHS, broken=(), wait=0.0):
        super().__init__()
        self.lengths, self.broken, self.wait = lengths, set(broken), wait
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.fetched, self.alone, self.lock = [], [], threading.Lock()
        self.running = self.most = 0  # fetches at one time

    def __len__(self):
        return int(self.starts[-1])

    def _record(self, i):
        self.alone.append(i)
        return Record(str(i).encode(), ("",), str(i))

    def chunks(self):
        return self.lengths

    def fetch(self, chunk):
        with self.lock:
            self.fetched.append(chunk)
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.wait)
        with self.lock:
            self.running -= 1
        if chunk in self.broken:
            raise OSError("cut")
        content = range(self.starts[chunk], self.starts[chunk + 1])
        return Fetched(content, BYTES * len(content))

    def record_in(self, fetched, chunk, j):
        return Record(str(fetched.content[j]).encode(), ("",), str(j))


SHARE, WINDOW, LANES = 48, 150, 8


def reader(source, first=0, count=SHARE, start=0, seed=0, lanes=LANES, window=WINDOW):
    order = Planned(Windows(source.chunks(), SHARE, seed, lanes, window), first, count)
    return order, ChunkReader(source, order, lambda k: start + k)


@pytest.fixture(autouse=True)
def few_ahead(monkeypatch):
    monkeypatch.setattr(chunks, "AHEAD", 4)
    monkeypatch.setattr(chunks, "AHEAD_EXAMPLES", 1)


@pytest.fixture(scope="module")
def workers():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def read(order, made, step, workers=None):
    """The numbers of the process's examples of a step, each checked against what was read."""

    def one(place):
        number = order.one(step, place)
        assert made(step, place, number).image == str(number).encode()
        return number

    return list((workers.map if workers else map)(one, range(order.first, order.first + order.count)))


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_each_chunk_is_fetched_once_a_host_and_epoch(hosts, workers):
    count, fetched, used = SHARE // hosts, 0, 0
    for host in range(hosts):
        source = Stored()
        order, made = reader(source, host * count, count)
        seen = np.array([read(order, made, step, workers) for step in range(2 * order.batches)])
        made.close()
        assert not source.alone
        chunk = np.searchsorted(source.starts, seen, side="right") - 1
        needed = collections.Counter(c for epoch in np.split(chunk, 2) for c in np.unique(epoch).tolist())
        found = collections.Counter(source.fetched)
        assert found >= needed
        assert (found - needed).total() <= chunks.AHEAD  # of the third epoch
        fetched, used = fetched + sum(source.lengths[c] * n for c, n in needed.items()), used + seen.size
    assert fetched < (1.01 + 0.02 * hosts) * used  # chunks at the borders of hosts are fetched by both


def test_only_open_windows_and_a_little_ahead_are_in_memory():
    lengths = np.full(800, 10)
    source = Stored(lengths)
    order, made = reader(source, window=100)
    held = []
    for step in range(order.batches):
        read(order, made, step)
        held.append(len(made._held))
    # Of each lane a window is open, of 10 chunks and parts of two more; a few chunks are planned and not yet fetched.
    assert max(held) <= LANES * 12 + 4 + SHARE
    assert np.mean([10 * h for h in held]) < LANES * 100 * 1.6
    assert len(source.fetched) <= 800 + 4
    made.close()


def test_few_chunks_are_fetched_before_they_are_needed():
    source = Stored(np.full(800, 10))
    order, made = reader(source, window=100)
    needed = set()
    for step in range(20):
        numbers = read(order, made, step)
        needed |= set(np.searchsorted(source.starts, numbers, side="right").tolist())
        assert len(needed) <= len(source.fetched) <= len(needed) + chunks.AHEAD
    made.close()


@pytest.mark.parametrize("start", [1, 7, 100, 124, 125, 126, 1000])
def test_a_resumed_run_needs_the_same_chunks(start):
    source = Stored()
    order, made = reader(source, 12, 12, start)
    for step in range(start, start + 6):
        assert read(order, made, step) == order.at(step, np.arange(12, 24)).tolist()
    assert not source.alone
    if start % order.batches < order.batches - 8:  # else chunks of two epochs are fetched
        assert max(map(source.fetched.count, source.fetched)) == 1
    made.close()


def test_skipped_batches_are_not_read():
    source = Stored(np.full(100, 48))
    order = Planned(Windows(source.chunks(), SHARE, 0, 1, 48), 0, SHARE)  # a window is a batch
    made = ChunkReader(source, order, lambda k: k if k < 3 else k + 40)
    for step in (0, 1, 2, 43, 44, 45):
        read(order, made, step)
    made._pool.shutdown()
    skipped = set(np.searchsorted(source.starts, np.concatenate([order.at(s, np.arange(48)) for s in range(5, 42)]), "right") - 1)
    assert not source.alone
    assert not skipped & set(source.fetched) - set(np.searchsorted(source.starts, order.at(3, np.arange(48)), "right") - 1)
    assert len(made._held) < 60


def test_a_chunk_that_cannot_be_fetched_makes_its_examples_fail_and_no_others():
    source = Stored(broken=[7])
    order, made = reader(source)
    failed = 0
    for step in range(order.batches):
        for place in range(SHARE):
            number = order.one(step, place)
            if source.starts[7] <= number < source.starts[8]:
                failed += 1
                with pytest.raises(OSError, match="cut"):
                    made(step, place, number)
            else:
                assert made(step, place, number).image == str(number).encode()
    assert failed > 50
    assert source.fetched.count(7) <= 2  # the second time ahead, for the next epoch
    made.close()


def test_a_stand_in_comes_from_memory_or_is_read_by_itself():
    source = Stored(np.full(800, 10))
    order, made = reader(source)
    read(order, made, 0)
    number = order.one(1, 5)  # of the same windows
    assert made(0, 5, number).image == str(number).encode()
    assert not source.alone
    far = order.one(order.batches // 2, 5)
    assert made(0, 5, far).image == str(far).encode()
    assert source.alone == [far]
    assert read(order, made, 1) == order.at(1, np.arange(SHARE)).tolist()  # and what it used is still there
    made.close()


def test_fetches_overlap(workers):
    source = Stored(np.full(400, 10), wait=0.01)
    order, made = reader(source, window=100)
    for step in range(5):
        read(order, made, step, workers)
    assert source.most == chunks.THREADS
    made.close()


def test_windows_that_take_much_memory_are_said_at_the_start(monkeypatch, caplog):
    monkeypatch.setattr(chunks, "LARGE", LANES * (WINDOW + 100) * BYTES - 1)
    with caplog.at_level(logging.WARNING):
        order, made = reader(Stored())
        read(order, made, 0)
        made.close(wait=True)
    assert "data.order = 'windows'" in caplog.text
    assert "8 lanes x 250 examples of 1 kB" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("lanes", "said"), [(2, True), (4, False), (64, False)])
def test_hosts_that_share_a_lane_are_said(lanes, said, caplog):
    with caplog.at_level(logging.WARNING):
        order, made = reader(Stored(), 0, SHARE // 4, lanes=lanes)
        read(order, made, 0)
        made.close(wait=True)
    assert ("hosts share lanes" in caplog.text) == said


def test_worker_processes_are_refused_with_windows():
    with pytest.raises(ConfigError, match=r"data.worker_kind = 'processes': .*use threads"):
        config.Data(spec="emoji", order="windows", worker_kind="processes")


def test_who_waits_for_a_reader_that_is_closed_is_told_so(workers):
    source = Stored(np.full(400, 10), wait=0.05)
    order, made = reader(source, window=100)
    waiting = [workers.submit(made, 0, place, order.one(0, place)) for place in range(SHARE)]
    made.close()
    errors = [future.exception() for future in waiting]
    assert any(isinstance(error, chunks.Closed) for error in errors)
    assert all(error is None or isinstance(error, chunks.Closed) for error in errors)
