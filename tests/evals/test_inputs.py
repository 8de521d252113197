import dataclasses

import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError, Data
from clipjax.data.ordering.sequential import Sequential
from clipjax.data.pipeline import eval_batches
from clipjax.data.source import Record
from clipjax.data.sources import open_source
from clipjax.evals.encoder import Encoder
from clipjax.evals.inputs import (
    caption_batches,
    eval_data,
    image_batches,
    prompt_batches,
    require_captions,
)
from tests.evals.tiny import LENGTH, MODEL, TOKENIZER, mesh_of, stored


@pytest.fixture(scope="module")
def encoder():
    return Encoder(MODEL, mesh_of("1"), 4)


@pytest.fixture(scope="module")
def data(tsv):
    return Data(spec=f"tsv:{tsv}/pairs.tsv", workers=1)


def test_what_training_and_evaluation_share():
    run = config.Run(data=Data(spec="tfds:coco", image_field="image", text_field="captions/text", resize="crop"))
    assert eval_data(run.data, "tfds:coco", "test") == dataclasses.replace(run.data, split="test")
    other = eval_data(run.data, "emoji", "test")
    assert (other.spec, other.split, other.resize) == ("emoji", "test", "crop")
    assert other.image_field is other.text_field is None
    other = eval_data(run.data, "tfds:coco", "test", text_field="title", label_field="kind")
    assert (other.image_field, other.text_field, other.label_field) == ("image", "title", "kind")


def test_a_dataset_of_a_mixture_is_read_as_the_mixture_reads_it():
    parts = (config.Part(spec="tfds:coco", text_field="title", index="kept"), config.Part(spec="emoji"))
    run = config.Run(data=Data(sources=parts, resize="crop", filter=config.Filter(min_side=100)), evals=())
    expected = Data(spec="tfds:coco", split="test", text_field="title", index="kept", resize="crop")
    assert eval_data(run.data, "tfds:coco", "test") == expected
    assert eval_data(run.data, "tfds:other", "test") == dataclasses.replace(
        expected, spec="tfds:other", text_field=None, index=None
    )


def test_images_in_order_without_what_cannot_be_read(encoder, data, images, caplog):
    batches = image_batches(encoder, open_source(data), data)
    found = list(batches)
    assert len(found) == len(batches) == 3
    assert {b["image"].shape for b in found} == {(4, 8, 8, 3)}
    index = np.concatenate([b["index"] for b in found])
    assert index.tolist() == [0, 1, 2, 3, -1, 5, 6, 7, 8, 9, -1, -1]
    assert index.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in found])[5], images[5])
    assert "1 of 10 examples can't be used and are left out" in caplog.text


def test_copies_are_counted(encoder, data, tsv, caplog):
    source = stored(tsv, range(10))
    list(image_batches(encoder, source, data))
    assert "copies" not in caplog.text
    for i in (3, 7):
        source.records[i] = Record(source.records[0].image, ("b",), f"{i}.png", i)
    list(image_batches(encoder, source, data))
    assert "stored: 2 of 10 images are copies of others, to the pixel" in caplog.text


def test_captions_and_whose_they_are(encoder):
    batches = caption_batches(encoder, TOKENIZER, ["fox", "red fox", "hen", "owl", "ant"], [0, 0, 1, 2, 3], "x")
    tokens, index = (np.concatenate([b[k] for b in batches]) for k in ("text", "index"))
    assert index.tolist() == [0, 0, 1, 2, 3, -1, -1, -1]
    assert [TOKENIZER.decode(row) for row in tokens] == ["fox", "red fox", "hen", "owl", *["ant"] * 4]


def test_prompts_class_by_class(encoder):
    batches = prompt_batches(encoder, TOKENIZER, ["fox", "hen", "owl"], ("{c}", "my {c}", "a {c} a {c}"))
    assert len(batches) == len(list(batches)) == 3
    tokens, label = (np.concatenate([b[k] for b in batches]) for k in ("text", "label"))
    assert label.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 3
    assert [TOKENIZER.decode(row) for row in tokens[3:6]] == ["hen", "my hen", "a hen a hen"]


def test_truncation_is_counted(encoder, caplog):
    list(prompt_batches(encoder, TOKENIZER, ["fox", "x" * 100], ("{c}", "my {c}")))
    assert f"classes: 2 of 4 prompts were truncated to {LENGTH} tokens" in caplog.text


def test_an_image_without_a_caption_counts_where_none_is_needed(tsv, encoder, data):
    source = stored(tsv, range(10))
    source.records[6] = Record(source.records[6].image, (), "6.png", 6)

    def index(**more):
        return np.concatenate([b["index"] for b in image_batches(encoder, source, data, **more)]).tolist()

    assert index() == [0, 1, 2, 3, -1, 5, -1, 7, 8, 9, -1, -1]
    assert index(captioned=False) == [0, 1, 2, 3, -1, 5, 6, 7, 8, 9, -1, -1]
    source.captioned = False  # a source of images alone
    assert index() == index(captioned=False)
    with pytest.raises(ConfigError, match=r"'stored': it has images alone, and retrieval needs .* --text-field\); there are png"):
        require_captions(source, "retrieval")


def test_images_are_read_chunk_by_chunk(tsv, data):
    source = stored(tsv, range(10))
    for processes in (1, 2):
        seen = []
        for i in range(processes):
            source.fetched.clear()
            share = dict(image_size=8, batch_size=4, process_index=i, process_count=processes)
            with eval_batches(source, data, **share) as batches:
                seen += [n for batch in batches for n in batch["index"].tolist() if n >= 0]
            assert sorted(source.fetched) == [0, 1, 2, 3][: 4 if i == 0 else 3]
        assert sorted(seen) == list(range(10))


def test_a_chunk_is_fetched_once_and_dropped_with_its_last_example(tsv):
    source = stored(tsv, range(10))
    read = Sequential(source, np.arange(10))
    assert [read(n).key for n in (3, 0, 4, 1)] == ["3.png", "0.png", "4.png", "1.png"]
    assert source.fetched == [1, 0]
    assert sorted(read._fetched) == [0, 1]
    assert [read(n).key for n in (5, 2)] == ["5.png", "2.png"]
    assert not read._fetched


def test_a_chunk_that_cannot_be_fetched_fails_each_of_its_examples(tsv, data, encoder, monkeypatch, caplog):
    source = stored(tsv, range(10))
    fetch = source.fetch

    def failing(chunk):
        if chunk == 2:
            raise OSError("the server is away")
        return fetch(chunk)

    monkeypatch.setattr(source, "fetch", failing)
    index = np.concatenate([b["index"] for b in image_batches(encoder, source, data)])
    assert index.tolist() == [0, 1, 2, 3, -1, 5, -1, -1, -1, 9, -1, -1]
    assert "example number 7 is left out, because it can't be read: OSError: the server is away" in caplog.text
