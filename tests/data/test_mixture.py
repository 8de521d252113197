"""Mixtures: exact counts in every batch, for every number of processes and from every step on."""

import io
import itertools
import pickle
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from clipjax.config import Augment, ConfigError, Data, Filter, Part, Retrieval
from clipjax.data.ordering.mixture import Mixture, batch_counts, part_names, spread
from clipjax.data.ordering.readers import training_order
from clipjax.data.pipeline import check_source, train_batches
from clipjax.data.sources import open_source
from tests.data.conftest import write_tsv
from tests.data.shards import write_tar
from tests.train import tiny

SIZES = {"red": 40, "green": 17, "blue": 25}  # 82 in all: three epochs are ten batches of 24
BATCH = 24


def png(channel, i):
    """A small image in one colour, whose value is 100 + i."""
    pixels = np.zeros((4 + i % 3, 5, 3), np.uint8)
    pixels[..., channel] = 100 + i
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """A tsv of red images, three tars of green ones and a parquet of blue ones; the caption of number i is `number i`."""
    folder = tmp_path_factory.mktemp("mixture")
    red, green, blue = ([png(channel, i) for i in range(size)] for channel, size in enumerate(SIZES.values()))
    for i, image in enumerate(red):
        (folder / f"{i}.png").write_bytes(image)
    write_tsv(folder, [(f"{i}.png", f"number {i}") for i in range(len(red))])
    for first in range(0, len(green), 7):
        members = [
            (f"{i:02}.{end}", content)
            for i in range(first, min(first + 7, len(green)))
            for end, content in (("png", green[i]), ("txt", f"number {i}".encode()))
        ]
        write_tar(folder / "tars" / f"{first:02}.tar", members)
    table = pa.table({"image": blue, "caption": [f"number {i}" for i in range(len(blue))]})
    parquet.write_table(table, folder / "blue.parquet", row_group_size=6)
    return {"red": f"tsv:{folder / 'pairs.tsv'}", "green": f"wds:{folder / 'tars'}", "blue": f"parquet:{folder / 'blue.parquet'}"}


@pytest.fixture
def mixture(specs):
    def make(order="random", repeats=(1.0, 2.0, 1.0), **fields):
        parts = tuple(Part(spec=spec, repeat=r) for spec, r in zip(specs.values(), repeats, strict=True))
        return Data(sources=parts, workers=2, order=order, lanes=4, window=10, **fields)

    return make


def batches(data, source, tokenizer, steps, start=0, **where):
    settings = dict(image_size=4, batch_size=BATCH, seed=3, start_step=start)
    with train_batches(source, tokenizer, data, **settings, **where) as stream:
        return list(itertools.islice(stream, steps))


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("order", ["random", "windows"])
def test_any_number_of_hosts_and_any_resume_gives_the_same_batches(mixture, tokenizer, order):
    data = mixture(order, augment=Augment(crop=0.5, flip=True))
    source, steps = open_source(data), 11
    whole = batches(data, source, tokenizer, steps)
    for hosts in (2, 3, 4, 8):
        shares = [batches(data, source, tokenizer, steps, process_index=i, process_count=hosts) for i in range(hosts)]
        joined = [{name: np.concatenate([b[name] for b in step]) for name in step[0]} for step in zip(*shares, strict=True)]
        assert_equal(joined, whole)
    for start in range(1, steps):
        assert_equal(batches(data, source, tokenizer, min(2, steps - start), start), whole[start : start + 2])


@pytest.mark.parametrize("order", ["random", "windows"])
def test_every_batch_has_exact_counts_and_no_example_twice(mixture, tokenizer, order):
    data = mixture(order)
    source = open_source(data)
    counts = batch_counts(data, list(SIZES.values()), BATCH).tolist()
    assert counts == [10, 8, 6]  # of 40, 34 and 25 in 99
    seen = []
    for batch in batches(data, source, tokenizer, 12):
        assert len(set(batch["index"].tolist())) == BATCH
        part = np.searchsorted(source.offsets, batch["index"], "right") - 1
        assert np.bincount(part).tolist() == counts
        assert batch["image"].reshape(BATCH, -1, 3).max(1).argmax(1).tolist() == part.tolist()
        assert batch["image"].max((1, 2, 3)).tolist() == (100 + batch["index"] - source.offsets[part]).tolist()
        seen.append(batch["index"])
    first = np.concatenate(seen[:4])
    assert sorted(first[first < 40]) == list(range(40))  # the first part has an epoch of four batches
    second = np.concatenate(seen[:2])
    assert len(set(second[(second >= 40) & (second < 57)])) == 16  # the second one of two, which leaves one example out


def test_the_order_of_a_mixture_is_as_recorded(mixture, tokenizer):
    recorded = {"random": 3489812220, "windows": 755378906}
    for order, crc in recorded.items():
        data = mixture(order)
        found = np.stack([batch["index"] for batch in batches(data, open_source(data), tokenizer, 12)])
        assert zlib.crc32(found.astype("<i4").tobytes()) == crc, order


@pytest.mark.parametrize("counts", [[10, 8, 6], [1, 23], [24], [5, 5, 5, 9], [80, 15, 1]])
def test_each_process_has_its_due_of_each_part(counts):
    part, own = spread(np.array(counts))
    for number, count in enumerate(counts):
        assert own[part == number].tolist() == list(range(count))
        for hosts in (1, 2, 3, 4, 8):
            assert all(abs((share == number).sum() - count / hosts) < 1.5 for share in np.split(part, hosts))


def test_parts_have_augmentations_and_filters_of_their_own(specs, tokenizer):
    red, green, _ = specs.values()
    plain, bright = Part(spec=red), Part(spec=green, augment=Augment(brightness=0.9), filter=Filter(min_side=5))
    data = Data(sources=(plain, bright), workers=2)
    source = open_source(data)
    found = batches(data, source, tokenizer, 20)
    part = np.stack([np.searchsorted(source.offsets, batch["index"], "right") - 1 for batch in found])
    largest = np.stack([batch["image"].max((1, 2, 3)) for batch in found])
    expected = np.stack([100 + batch["index"] - source.offsets[p] for batch, p in zip(found, part, strict=True)])
    assert (largest == expected)[part == 0].all()
    assert (largest == expected)[part == 1].mean() < 0.2
    filtered = np.stack([batch["filtered"] for batch in found])
    assert not filtered[part == 0].any()
    assert 0.2 < filtered[part == 1].mean() < 0.5  # a third is four pixels high


def test_a_mixture_is_read_like_one_source(mixture):
    data = mixture()
    source = open_source(data)
    assert isinstance(source, Mixture)
    assert len(source) == 82
    assert source.part_of(39) == (0, 39)
    assert source.part_of(40) == (1, 0)
    assert source.part_of(81) == (2, 24)
    assert source.record(57).captions == ("number 0",)
    assert [r.captions[0] for r in source.texts()] == [f"number {i}" for size in SIZES.values() for i in range(size)]
    assert source.text(41) == list(source.texts())[41]
    with pytest.raises(IndexError):
        source.record(82)


def weighted(*weights, sizes=None):
    parts = tuple(Part(spec=f"tsv:{i}.tsv", weight=w) for i, w in enumerate(weights))
    return Data(sources=parts), sizes or [10**6] * len(weights)


@pytest.mark.parametrize(
    ("weights", "batch_size", "expected"),
    [
        ((0.7, 0.3), 100, [70, 30]),
        ((7.0, 3.0), 333, [233, 100]),
        ((1.0, 1.0, 1.0), 8, [3, 3, 2]),
        ((1.0, 1.0, 98.0), 67, [1, 1, 65]),
    ],
)
def test_counts_are_in_proportion_to_the_weights(weights, batch_size, expected):
    assert batch_counts(*weighted(*weights), batch_size).tolist() == expected


def test_a_share_of_less_than_an_example_is_refused_with_the_smallest_batch():
    with pytest.raises(
        ConfigError, match=r"train.batch_size = 16: .*tsv:1.tsv in every batch: use at least 51, or raise its weight"
    ):
        batch_counts(*weighted(99.0, 1.0), 16)
    assert batch_counts(*weighted(99.0, 1.0), 51).tolist() == [50, 1]


def test_a_share_of_more_than_all_examples_is_refused(mixture):
    with pytest.raises(ConfigError, match=r"has 30 examples of tsv:1.tsv, which has only 20: lower its weight"):
        batch_counts(*weighted(0.7, 0.3, sizes=[1000, 20]), 100)
    data = mixture(repeats=(1.0, 50.0, 1.0))
    with pytest.raises(ConfigError, match="which has only 17"):
        check_source(open_source(data), data, BATCH)


def test_an_evaluation_on_the_mixture_itself_is_refused(mixture):
    with pytest.raises(ConfigError, match=r"evals.0.data = None: .*a mixture: name the examples to evaluate on"):
        tiny.run(data=mixture(), evals=(Retrieval(),))


def test_worker_processes_get_the_order(mixture):
    data = mixture()
    order = training_order(open_source(data), data, BATCH, 3, 0, 12)
    again = pickle.loads(pickle.dumps(order))
    assert [again.one(5, place) for place in range(BATCH)] == order.at(5, np.arange(BATCH)).tolist()


def test_the_names_of_parts_differ_and_say_what_they_are():
    specs = [
        "tsv:/data/art.tsv",
        "wds:gs://bucket/laion/{00000..01242}.tar",
        "tfds:coco_captions/2014:1.1.0",
        "emoji",
        "folder:/data/own pictures/",
        "csv:other/art.csv",
        "parquet:hf://datasets/pixel/train-*.parquet::/more.parquet",
    ]
    names = part_names(Data(sources=tuple(Part(spec=spec) for spec in specs)))
    assert names == ("art", "laion", "coco_captions", "emoji", "pictures", "art_2", "train-")
