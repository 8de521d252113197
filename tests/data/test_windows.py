"""The order by windows: its values are pinned, no epoch has repeats, and chunks are needed no longer than it says."""

import itertools
import math
import tracemalloc
import zlib

import numpy as np
import pytest

from clipjax.data.ordering.order import Planned
from clipjax.data.ordering.permutation import hashed, permuted
from clipjax.data.ordering.windows import Windows


@pytest.mark.parametrize("n", [1, 2, 3, 5, 63, 64, 65, 1000, 65537])
def test_a_permutation_moves_every_element_to_a_place_of_its_own(n):
    assert sorted(permuted(np.arange(n), n, hashed(n, 7)).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_permutations_of_few_elements_are_equally_likely(n):
    keys = 20_000
    found = permuted(np.tile(np.arange(n), keys), n, np.repeat(hashed(np.arange(keys), 5), n)).reshape(keys, n)
    _, counts = np.unique(found, axis=0, return_counts=True)
    expected, freedom = keys / math.factorial(n), math.factorial(n) - 1
    chi_squared = ((counts - expected) ** 2).sum() / expected
    assert len(counts) == freedom + 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)  # its mean, and four of its standard deviations


def test_permutations_leave_no_trace_of_the_order():
    """Of 2,048 elements: neighbours are as far apart as any two, and each element goes everywhere."""
    p = permuted(np.arange(2048), 2048, hashed(3, 4))
    assert abs(np.corrcoef(np.arange(2048), p)[0, 1]) < 0.1
    assert abs(np.corrcoef(p[:-1], p[1:])[0, 1]) < 0.1
    places = permuted(np.full(16_000, 5), 8, hashed(np.arange(16_000)))
    assert np.bincount(places, minlength=8) == pytest.approx(2000, abs=200)


def test_parameters_that_differ_by_element_give_what_each_gives_alone():
    sizes, keys = np.array([9, 9, 100, 1, 70_000]), hashed(np.arange(5))
    together = permuted(np.array([0, 8, 50, 0, 69_999]), sizes, keys)
    alone = [
        permuted(np.array([i]), n, keys[k : k + 1])[0] for k, (i, n) in enumerate(zip([0, 8, 50, 0, 69_999], sizes, strict=True))
    ]
    assert together.tolist() == alone


def chunks(count, seed=0, low=1, high=300):
    return np.random.default_rng(seed).integers(low, high, count)


SHAPES = {  # examples of the chunks, batch size, lanes, window
    "lanes that do not divide the batch": (chunks(40), 96, 5, 100),
    "windows smaller than a batch's part": (chunks(37), 128, 4, 16),
    "one lane, one window": (chunks(3), 10, 1, 10**9),
    "one chunk": (np.array([224]), 7, 64, 5),
    "more lanes than places": (chunks(3, high=100), 3, 64, 2048),
    "chunks larger than windows": (chunks(30), 64, 64, 7),
    "a batch of all": (np.array([3, 0, 4]), 7, 2, 3),
    "one example": (np.array([1]), 1, 64, 2048),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_has_no_repeats_and_each_chunk_is_needed_as_long_as_it_says(shape):
    counts, batch_size, lanes, window = SHAPES[shape]
    order = Windows(counts, batch_size, 1, lanes, window)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * order.batches, (epoch + 1) * order.batches):
            example, chunk, last = order.located(step, np.arange(batch_size))[step]
            assert ((bounds[chunk] <= example) & (example < bounds[chunk + 1])).all()
            assert (last >= step).all()
            assert (last < (epoch + 1) * order.batches).all()
            seen.append(example)
        epochs.append(np.concatenate(seen))
        assert len(np.unique(epochs[-1])) == counts.sum() // batch_size * batch_size
        assert epochs[-1].min() >= 0
        assert epochs[-1].max() < counts.sum()
    if len(epochs[0]) > 20:
        assert (epochs[0] != epochs[1]).mean() > 0.8
    if len(epochs[0]) < counts.sum() - 3:  # what the first epoch left out, the second had
        assert not set(range(counts.sum())) - set(epochs[0]) <= set(range(counts.sum())) - set(epochs[1])


def test_any_number_of_hosts_gives_the_same_batches():
    order, again = (Windows(chunks(50), 48, 5, 6, 64) for _ in range(2))
    for step in (0, 1, order.batches - 1, order.batches, 5 * order.batches + 3):
        batch = order.at(step, np.arange(48))
        for hosts in (1, 2, 3, 4, 8):
            slices = np.arange(48).reshape(hosts, -1)
            assert np.concatenate([again.at(step, places) for places in slices]).tolist() == batch.tolist()


PINNED = {  # (chunks, examples of each, batch size, seed, lanes, window, first step): CRC-32 of 20 batches
    (41, 100, 64, 0, 4, 128, 0): 564928650,
    (41, 100, 64, 2**32 - 1, 64, 2048, 60): 629483089,
    (1, 1000, 10, 5, 3, 50, 10**9): 1870751378,
    (1_600_000, 250, 512, 12345, 64, 2048, 781_240): 3705393484,
}


@pytest.mark.parametrize("key", PINNED)
def test_the_order_is_as_recorded(key):
    count, length, batch_size, seed, lanes, window, start = key
    order = Windows(np.full(count, length), batch_size, seed, lanes, window)
    found = np.concatenate([order.at(step, np.arange(batch_size)) for step in range(start, start + 20)])
    assert zlib.crc32(found.astype("<i8").tobytes()) == PINNED[key]


def test_the_first_batches_are_as_recorded():
    order = Windows(np.array([4, 4, 4, 4]), 4, 0, 2, 4)
    assert [order.at(step, np.arange(4)).tolist() for step in range(5)] == [
        [0, 3, 13, 15],
        [2, 1, 8, 10],
        [4, 6, 12, 14],
        [5, 7, 9, 11],
        [12, 2, 1, 0],
    ]


def test_batches_that_are_looked_up_together_are_those_that_come_alone():
    order = Windows(chunks(50), 48, 5, 6, 64)
    for start in (0, 17, order.batches - 2, 3 * order.batches + 5):
        together = order.located(start, np.arange(16, 32))
        assert len(together) == min(512 // 16, order.batches - start % order.batches)
        for step, (number, _, _) in together.items():
            assert number.tolist() == order.at(step, np.arange(16, 32)).tolist()


def test_stand_ins_are_the_same_on_every_process_and_outside_their_batch():
    order = Windows(chunks(50), 48, 5, 6, 64)
    for step in (0, order.batches - 1):
        batch = set(order.at(step, np.arange(48)).tolist())
        for place, first in ((3, 0), (40, 32)):
            expected = [order.stand_in(step, place, tried) for tried in range(1, 8)]
            assert [Planned(order, first, 16).stand_in(step, place, tried) for tried in range(1, 8)] == expected
            assert len(set(expected) - batch) == 7


def test_a_table_of_400_million_examples_is_small():
    order = Windows(np.full(3_125_000, 128), 32768, 0, 256, 2048)
    tracemalloc.start()
    order.at(7, np.arange(64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_reads_are_even():
    """After the first windows are filled, a process needs about as many new chunks in every step, and each only once."""
    order = Windows(np.full(800, 100), 256, 3, 16, 1000)
    seen, needed = set(), []
    for step in range(order.batches):
        _, chunk, _ = order.located(step, np.arange(128))[step]  # the first of two hosts
        new = set(chunk.tolist()) - seen
        needed.append(len(new))
        seen |= new
    filled = list(itertools.islice(needed, 20, order.batches - 60))
    assert max(sum(filled[i : i + 5]) for i in range(len(filled) - 5)) < 2.2 * 5 * np.mean(filled)
    assert 380 < len(seen) < 420  # of 800 chunks
