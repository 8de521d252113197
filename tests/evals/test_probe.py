import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.source import Record
from clipjax.evals.labels import Labelled, shared_classes
from clipjax.evals.probe import LabelledImages, ProbeEvaluation, open_splits
from tests.evals.tiny import SIZE, Stored, image_batches


def labelled(labels):
    n = len(labels)
    return Labelled(tuple(f"k{i}" for i in range(n)), ("",) * n, np.asarray(labels, np.int32))


def images_of(encoder, labels, seed):
    """Noise in three colours, by label; an image without one is noise."""
    rng, tints = np.random.default_rng(seed), np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [0, 0, 0]])
    images = (rng.integers(0, 56, (len(labels), SIZE, SIZE, 3)) + tints[labels][:, None, None]).astype(np.uint8)
    batches = image_batches(images, encoder, index=np.arange(len(labels), dtype=np.int32))
    return LabelledImages(encoder, batches, labelled(labels))


def test_classes_that_are_far_apart_are_told_apart_by_every_probe(params, encoder):
    train, test = images_of(encoder, [0, 1, 2, -1] * 8, 0), images_of(encoder, [2, -1, 1, 0], 1)
    results = ProbeEvaluation(train, test, 3, ("linear", "knn", "fewshot")).run(params)
    metrics = results.metrics
    assert (metrics["train_images"], metrics["test_images"], metrics["classes"]) == (24, 3, 3)
    assert metrics["linear_acc1"] == metrics["knn_acc1@10"] == metrics["fewshot_acc1@5"] == 1
    assert metrics["linear_validation_acc1"] == max(metrics["linear_validation_acc1_by_c"]) == 1
    (examples,) = results.examples
    assert examples.keys == ["k0", "k2", "k3"]
    assert {name: values.mean() for name, values in examples.values.items()} == {
        name: value for name, value in metrics.items() if "acc1" in name and "validation" not in name
    }


def test_a_method_can_be_left_out_and_a_class_that_was_never_seen_is_wrong(params, encoder):
    train, test = images_of(encoder, [0, 1] * 5, 0), images_of(encoder, [0, 2], 1)
    metrics = ProbeEvaluation(train, test, 3, ("fewshot",)).run(params).metrics
    assert metrics["fewshot_acc1@5"] == 1 / 2
    assert not any("knn" in name or "linear" in name for name in metrics)
    with pytest.raises(ConfigError, match="has 2 labelled images that can be read, and needs 10"):
        ProbeEvaluation(test, train, 3, ("knn",)).run(params)


def source(name, *records, classnames=None):
    stored = Stored([Record(b"", tuple(captions), f"{i}", label) for i, (label, *captions) in enumerate(records)])
    stored.name, stored.version, stored.classnames = name, name, classnames
    return stored


def test_labels_are_numbers_where_both_splits_name_them_the_same():
    names = ("dog", "dog", "cat")  # two classes may have one name
    one, other = (source("s", (1,), (2,), (-1,), classnames=names), source("t", (1,), classnames=names))
    classes, (train, test) = shared_classes([one, other], None)
    assert (classes, train.labels.tolist(), test.labels.tolist()) == (3, [1, 2, -1], [1])
    assert train.keys == ("0", "1", "2")


def test_labels_are_matched_by_name_where_splits_number_them_differently():
    one, other = (
        source("s", (0,), (1,), classnames=("owl", "ant")),
        source("t", (0,), (1,), (2,), classnames=("ant", "bee", "owl")),
    )
    classes, (train, test) = shared_classes([one, other], None)
    assert (classes, train.labels.tolist(), test.labels.tolist()) == (3, [2, 0], [0, 1, 2])


def test_a_pattern_takes_the_class_from_the_main_caption():
    pattern = "(light|dark) skin"
    one = source("s", (0, "a hand: light skin", "dark skin"), (0, "dark skin"), (0, "light skin, dark skin"), (0, "light"), (0,))
    classes, (train, test) = shared_classes([one, source("t", (5, "dark skin and dark skin"))], pattern)
    assert (classes, train.labels.tolist(), test.labels.tolist()) == (2, [1, 0, -1, -1, -1], [0])
    assert train.captions == ("a hand: light skin", "dark skin", "light skin, dark skin", "light", "")


@pytest.mark.parametrize(
    ("train", "test", "pattern", "message"),
    [
        ([(-1, "a")], [(0, "a")], None, r"^data\.spec = 's': no example has a label: name the field .*--label-pattern"),
        ([(0, "a")], [(1, "b")], None, r"^data\.spec = 't': no example has a class that occurs in s: name the field"),
        ([(0, "a")], [(1, "b")], "(", r"^label_pattern = '\(': is no regular expression: missing \)"),
    ],
)
def test_examples_without_a_common_class_are_refused(train, test, pattern, message):
    with pytest.raises(ConfigError, match=message):
        shared_classes([source("s", *train), source("t", *test)], pattern)


@pytest.mark.parametrize(("train", "test", "twice"), [("train", "test", "10 of the 10"), ("train", "train#0-50", "6 of the 6")])
def test_the_examples_that_are_tested_are_not_learned_from(tsv, train, test, twice):
    """A table has no splits, whatever they are called, only shares."""
    splits = open_splits(config.Data(spec=f"tsv:{tsv / 'pairs.tsv'}", split=test), train)
    with pytest.raises(ConfigError, match=f"{twice} examples of .* are among them"):
        shared_classes([source for source, _ in splits], "fox|hen")


def test_shares_are_apart(tsv):
    splits = open_splits(config.Data(spec=f"tsv:{tsv / 'pairs.tsv'}", split="test#50-100"), "train#0-50")
    _, (train, test) = shared_classes([source for source, _ in splits], "(number)")
    assert len(train.keys) + len(test.keys) == 10
    assert not set(train.keys) & set(test.keys)


def test_keys_that_count_the_examples_of_each_split_are_not_the_same_examples():
    one, other = source("s", (0,), (1,)), source("t", (0,), (1,))
    assert shared_classes([one, other], None)[0] == 2
    other.version = one.version
    with pytest.raises(ConfigError, match=r"^train = 's': 2 of the 2 examples of t are among them, and classifiers would be"):
        shared_classes([one, other], None)


def test_unknown_methods_are_refused():
    with pytest.raises(ConfigError, match=r"^evals\.Probe\.methods = \(\): name some of linear, knn, fewshot"):
        config.Probe(methods=())
