import pickle
import zlib

import numpy as np
import pytest

from clipjax.config import ConfigError, Data
from clipjax.data.source import Fetched, Record, Source
from clipjax.data.sources import open_source
from clipjax.data.split import Share, parse_split


class Numbers(Source):
    """n examples without images in chunks of given sizes."""

    name, fields, version = "numbers", {"caption": "text"}, "v"

    def __init__(self, sizes):
        super().__init__()
        self.sizes = np.array(sizes)

    def __len__(self):
        return int(self.sizes.sum())

    def _record(self, i):
        return Record(b"x", (f"number {i}",), f"key-{i}")

    def chunks(self):
        return self.sizes

    def fetch(self, chunk):
        return Fetched(int(self.sizes[:chunk].sum()), 1)

    def record_in(self, fetched, chunk, j):
        assert 0 <= j < self.sizes[chunk]
        return self._record(fetched.content + j)


@pytest.mark.parametrize("sizes", [[7], [1000], [64, 64, 64], [1] * 300, [63, 2, 500, 1, 64, 1, 1, 1, 129]])
@pytest.mark.parametrize(("first", "last"), [(0, 95), (0, 100), (30, 60), (95, 100)])
def test_a_share_is_the_examples_of_a_range_of_buckets(sizes, first, last):
    source = Numbers(sizes)
    expected = [i for i in range(len(source)) if first <= zlib.crc32(f"key-{i}".encode()) % 100 < last]
    if not expected:
        with pytest.raises(ConfigError, match=r"no example of numbers is in this range; widen it"):
            Share(source, first, last, "numbers/train#0-1")
        return
    share = pickle.loads(pickle.dumps(Share(source, first, last, "numbers/train#a-b")))
    assert len(share) == len(expected)
    keys = [f"key-{i}" for i in expected]
    assert [share.record(i).key for i in range(len(share))] == keys
    assert [record.key for record in share.texts()] == keys
    assert [share.text(i).key for i in range(len(share))] == keys
    assert share.text(0).image == b""
    in_chunks = [
        share.record_in(share.fetch(chunk), chunk, j).key for chunk, size in enumerate(share.chunks()) for j in range(size)
    ]
    assert in_chunks == keys
    assert (share.chunks() > 0).all()
    assert share.buckets().tolist() == [zlib.crc32(key.encode()) % 100 for key in keys]
    assert (share.name, share.version, share.fields) == ("numbers/train#a-b", f"v#{first}-{last}", source.fields)


class Many(Numbers):
    def buckets(self):
        return np.random.default_rng(0).integers(0, 100, len(self), np.uint8)


def test_a_large_share_needs_little_memory_and_finds_its_examples():
    source = Many([1000] * 9_500)
    share = Share(source, 0, 95, "many")
    chosen = np.flatnonzero(source.buckets() < 95)
    assert len(share) == len(chosen)
    some = np.random.default_rng(1).integers(0, len(share), 500).tolist()
    assert [share.record(i).captions[0] for i in some] == [f"number {i}" for i in chosen[some]]
    assert share.chunks().tolist() == np.bincount(chosen // 1000).tolist()
    assert len(pickle.dumps(share)) < len(source) * 0.3


def test_disjoint_ranges_share_no_example(images_tsv, emoji_dataset):
    for spec in (f"tsv:{images_tsv}", "emoji"):
        parts = [open_source(Data(spec=spec, split=f"train#{a}-{b}")) for a, b in ((0, 50), (50, 90), (90, 100))]
        keys = [{record.key for record in part.texts()} for part in parts]
        whole = open_source(Data(spec=spec))
        assert sum(map(len, keys)) == len(set().union(*keys)) == len(whole)
        assert {record.key for record in whole.texts()} == set().union(*keys)
        assert parts[0].name == f"{spec}/train#0-50"
        assert parts[0].classnames == whole.classnames
    assert len(parts[0]) + len(parts[1]) > len(parts[2])
    half = open_source(Data(spec="emoji", split="train[:50%]"))
    share = open_source(Data(spec="emoji", split="train[:50%]#0-95"))
    assert {r.key for r in share.texts()} <= {r.key for r in half.texts()}
    assert 0 < len(share) < len(half)


@pytest.mark.parametrize(
    "split", ["train#", "#0-95", "train#95", "train#5-5", "train#9-5", "train#0-101", "train#a-b", "train#0-9#5-6"]
)
def test_what_is_no_range_is_refused(split):
    with pytest.raises(
        ConfigError, match=rf"^data.split = '{split}': must be NAME or NAME#A-B with 0 <= A < B <= 100: train#0-95"
    ):
        parse_split(split)


def test_other_splits_are_the_sources_own():
    assert parse_split("train[:50%]") == ("train[:50%]", None)
    assert parse_split("train[:50%]#10-30") == ("train[:50%]", (10, 30))
