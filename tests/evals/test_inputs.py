import dataclasses

import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError, Data
from clipjax.data.sources import open_source
from clipjax.evals.encoder import Encoder
from clipjax.evals.inputs import caption_batches, eval_data, image_batches, prompt_batches, with_classes
from tests.evals.tiny import LENGTH, MODEL, TOKENIZER, WORDS, mesh_of


@pytest.fixture(scope="module")
def encoder():
    return Encoder(MODEL, mesh_of("1"), 4)


@pytest.fixture(scope="module")
def data(tsv):
    return Data(spec=f"tsv:{tsv}/pairs.tsv", workers=1)


def test_what_training_and_evaluation_share():
    run = config.Run(data=Data(spec="tfds:coco", image_field="image", text_field="captions/text", resize="crop"))
    assert eval_data(run, "tfds:coco", "test") == dataclasses.replace(run.data, split="test")
    other = eval_data(run, "emoji", "test")
    assert (other.spec, other.split, other.resize) == ("emoji", "test", "crop")
    assert other.image_field is other.text_field is None


def test_images_in_order_without_what_cannot_be_read(encoder, data, images, caplog):
    batches = image_batches(encoder, open_source(data), data)
    found = list(batches)
    assert len(found) == len(batches) == 3
    assert {b["image"].shape for b in found} == {(4, 8, 8, 3)}
    index = np.concatenate([b["index"] for b in found])
    assert index.tolist() == [0, 1, 2, 3, -1, 5, 6, 7, 8, 9, -1, -1]
    assert index.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in found])[5], images[5])
    assert "1 of 10 images can't be read and are left out" in caplog.text


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


def test_classes_of_a_dataset_without_labels(tsv, data, encoder):
    source, names = with_classes(open_source(data), str(tsv / "names.txt"))
    assert names == tuple(WORDS)
    labels = np.concatenate([b["label"] for b in image_batches(encoder, source, data)])
    assert labels.tolist() == [0, 1, 2, 3, -1, 5, 6, 7, 8, 0, -1, -1]
    with pytest.raises(ConfigError, match=r"classnames = None: tsv:.* has none of its own: give a file"):
        with_classes(open_source(data), None)
    (tsv / "few.txt").write_text("\n".join(WORDS[2:]) + "\n")
    with pytest.raises(ConfigError, match=r"2 captions of tsv:.* are no class name: add 'fox number 0', 'fox number 1'"):
        with_classes(open_source(data), str(tsv / "few.txt"))


def test_classes_of_a_dataset_with_labels(tsv, data):
    source = open_source(data)
    source.classnames = ("a", "b", "c")
    assert with_classes(source, None) == (source, ("a", "b", "c"))
    (tsv / "three.txt").write_text("fox\nhen\nowl\n")
    assert with_classes(source, str(tsv / "three.txt")) == (source, ("fox", "hen", "owl"))
    with pytest.raises(ConfigError, match=r"classnames = '.*names.txt': names 11 classes, but tsv:.* has 3: write"):
        with_classes(source, str(tsv / "names.txt"))
