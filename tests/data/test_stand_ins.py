"""Which example stands in for a bad one, or for one that data.filter leaves out: a rule of seed, step and place."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Data, Filter, Part
from clipjax.data.faults import BAD_IMAGE, FAULTS, NO_CAPTION, NO_IMAGE, UNREAD
from clipjax.data.ordering.mixture import Mixture
from clipjax.data.ordering.order import Random
from clipjax.data.pipeline import train_batches
from clipjax.data.source import Record, Source
from clipjax.status import CertainFailure

BATCH = 12
BAD = {3: UNREAD, 10: NO_IMAGE, 11: NO_CAPTION, 12: BAD_IMAGE, 40: UNREAD, 41: BAD_IMAGE, 59: UNREAD}


class Grey(Source):
    """`n` images, number i as grey as i + `shade`, some of which are bad, and some wide."""

    fields = {}

    def __init__(self, n=60, bad=BAD, wide=(), shade=0, name="grey"):
        super().__init__()
        self.n, self.bad, self.wide, self.shade, self.name = n, bad, wide, shade, name

    def __len__(self):
        return self.n

    def _record(self, i):
        fault = self.bad.get(i)
        if fault == UNREAD:
            raise ConnectionError("cut")
        file = io.BytesIO()
        size = (16, 4) if i in self.wide else (4, 4)
        Image.new("RGB", size, (i + self.shade,) * 3).save(file, "png")
        stored = {NO_IMAGE: b"", BAD_IMAGE: file.getvalue()[:30]}.get(fault, file.getvalue())
        return Record(stored, () if fault == NO_CAPTION else (f"number {i}",), f"key {i}", number=i / 10)


@pytest.fixture
def batches(tokenizer):
    def make(source, steps, start=0, size=BATCH, host=0, hosts=1, **fields):
        data = Data(**({"spec": "emoji", "workers": 2} | fields))
        settings = dict(image_size=4, batch_size=size, seed=5, start_step=start, process_index=host, process_count=hosts)
        with train_batches(source, tokenizer, data, **settings) as stream:
            return list(itertools.islice(stream, steps))

    return make


def shown(batch):
    """The examples whose images are in a batch."""
    return batch["image"][:, 0, 0, 0].astype(int).tolist()


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_stand_in_is_the_example_at_the_same_place_of_the_next_batch(batches):
    source, order = Grey(), Random(60, BATCH, 5)
    for step, batch in enumerate(batches(source, 7)):  # more than an epoch, of five batches
        assert batch["index"].tolist() == order.at(step, np.arange(BATCH)).tolist()
        for place, (number, used) in enumerate(zip(batch["index"].tolist(), shown(batch), strict=True)):
            epoch, first = divmod(step, 5)
            later = [order.one(epoch * 5 + (first + ahead) % 5, place) for ahead in range(5)]
            assert used == next(candidate for candidate in later if candidate not in BAD)
            assert FAULTS[batch["fault"][place] - 1] == BAD[number] if number in BAD else batch["fault"][place] == 0
            assert batch["fault_index"][place] == (number if number in BAD else -1)
        assert batch["replaced"].tolist() == [number in BAD for number in batch["index"].tolist()]
        assert len(set(shown(batch))) == BATCH  # none is its own negative
        assert not batch["filtered"].any()


def test_all_other_batches_of_the_epoch_are_tried_in_turn():
    order = Random(60, BATCH, 5)
    others = [order.one(5 + batch, 4) for batch in (3, 4, 0, 1)]  # of the second epoch, after its batch 2
    assert [order.stand_in(7, 4, tried) for tried in range(1, 5)] == others


def test_it_is_the_same_for_any_hosts_and_workers_and_after_a_resume(batches):
    source = Grey(wide=range(20, 30))
    fields = dict(filter=Filter(max_aspect=2.0))
    whole = batches(source, 6, **fields)
    assert sum(batch["replaced"].sum() for batch in whole) > 5
    assert sum(batch["filtered"].sum() for batch in whole) > 5
    for hosts in (2, 3, 4):
        shares = [batches(source, 6, host=host, hosts=hosts, **fields) for host in range(hosts)]
        steps = zip(*shares, strict=True)
        assert_equal([{name: np.concatenate([b[name] for b in step]) for name in step[0]} for step in steps], whole)
    for start in range(1, 6):
        assert_equal(batches(source, 1, start, **fields), whole[start : start + 1])
    assert_equal(batches(source, 6, workers=5, **fields), whole)


def test_in_a_mixture_it_is_of_the_same_part(batches):
    parts = [Grey(40, {1: UNREAD, 2: NO_IMAGE}, name="dark"), Grey(40, {7: BAD_IMAGE}, shade=100, name="bright")]
    sources = (Part(spec="emoji"), Part(spec="emoji"))
    for batch in batches(Mixture(parts, Data(sources=sources)), 9, spec="", sources=sources):
        assert [used // 100 for used in shown(batch)] == [number // 40 for number in batch["index"].tolist()]
        assert len(set(shown(batch))) == BATCH
        assert [i for i in batch["fault_index"].tolist() if i >= 0] == [i for i in batch["index"].tolist() if i in (1, 2, 47)]


def test_where_a_batch_is_an_epoch_there_is_none_outside(batches):
    (batch,) = batches(Grey(12), 1)
    bad = [i for i in batch["index"].tolist() if i in BAD]
    assert sorted(bad) == [3, 10, 11]
    assert sorted(set(shown(batch))) == sorted(set(batch["index"].tolist()) - BAD.keys())


def test_all_other_batches_are_looked_through_before_a_run_is_ended(batches):
    """Two batches, so each place has one other; where both are bad, those of other places stand in."""
    bad = dict.fromkeys(range(0, 24, 2), UNREAD)
    for batch in batches(Grey(24, bad), 20):
        assert not set(shown(batch)) & bad.keys()
        own = set(batch["index"].tolist())
        outside = [used for used, is_bad in zip(shown(batch), batch["replaced"], strict=True) if is_bad and used not in own]
        assert len(outside) == batch["replaced"].sum()


def test_only_what_an_example_is_itself_is_counted(batches):
    """Half are filtered, and many stand-ins are tried: none counts as bad or filtered for the place where it is tried."""
    bad = dict.fromkeys(range(0, 60, 4), BAD_IMAGE)
    found = batches(Grey(60, bad, wide=range(1, 60, 2)), 10, filter=Filter(max_aspect=2.0))
    for batch in found:
        assert batch["replaced"].tolist() == [i in bad for i in batch["index"].tolist()]
        assert batch["filtered"].tolist() == [i % 2 == 1 for i in batch["index"].tolist()]
        assert not set(shown(batch)) & (bad.keys() | set(range(1, 60, 2)))


def test_a_filter_that_keeps_next_to_nothing_ends_the_run_soon(batches):
    with pytest.raises(CertainFailure, match=r"data\.filter: 61 examples of grey are left out, one after the other; loosen it"):
        batches(Grey(bad={}), 1, filter=Filter(min_side=5))


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (Filter(min_side=4), range(30)),
        (Filter(max_aspect=4.0), range(30)),
        (Filter(max_aspect=3.99), range(10, 30)),
        (Filter(min_characters=9), range(10, 30)),  # `number 10`
        (Filter(max_characters=8), range(10)),
        (Filter(min_characters=9, max_aspect=1.0), range(10, 30)),
        (Filter(number="score", at_least=1.5), range(15, 30)),
    ],
)
def test_each_bound_is_inclusive(batches, wanted, kept):
    found = batches(Grey(30, {}, wide=range(10)), 6, size=5, filter=wanted)
    assert {used for batch in found for used in shown(batch)} == set(kept)
    assert {i for batch in found for i in batch["index"][batch["filtered"]].tolist()} == set(range(30)) - set(kept)
    assert not any(batch["replaced"].any() for batch in found)


def test_warnings_are_bounded_by_kind(caplog):
    source = Grey()
    for i in range(200):
        source.warn(f"key {i % 100}", "has no image")
        source.warn(f"key {i % 3}", "can't be read: Timeout: slow")
    said = [record.getMessage() for record in caplog.records]
    assert sum("has no image" in line for line in said) == 6
    assert said[-1] == "grey: further examples are only counted: has no image"
    assert sum("can't be read: Timeout: slow" in line for line in said) == 3


def test_worker_processes_do_the_same_and_share_the_warnings(batches, capfd):
    source = Grey(bad=dict.fromkeys(range(0, 60, 2), UNREAD))
    found = batches(source, 6, workers=2, worker_kind="processes")
    lines = [line for line in capfd.readouterr().err.splitlines() if "is replaced by another" in line]
    assert 2 <= len(lines) <= 2 * (5 // 2 + 1)
    assert_equal(found, batches(source, 6))
