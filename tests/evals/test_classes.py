import logging

import numpy as np
import pytest

from clipjax.config import ConfigError, Data
from clipjax.data.source import Record
from clipjax.data.sources import open_source
from clipjax.evals.classes import classes_of
from clipjax.evals.names.sets import class_sets, no_word, template_sets
from tests.evals.tiny import WORDS, Stored, stored

WNIDS = class_sets()["imagenet1k"].ids


def source_of(labels, names=None, name="stored", captions=()):
    source = Stored([Record(b"", captions, f"k{i}", label) for i, label in enumerate(labels)])
    source.classnames, source.name = names, name
    return source


def test_classes_of_a_dataset_without_labels(tsv):
    source = open_source(Data(spec=f"tsv:{tsv}/pairs.tsv", workers=1))
    classes = classes_of(source, str(tsv / "names.txt"))
    assert classes.names == tuple(WORDS)
    assert classes.labels.tolist() == [*range(9), 0]
    assert classes.keys == tuple(f"{i}.png" for i in range(10))
    with pytest.raises(ConfigError, match=r"classnames = None: tsv:.* has none of its own: give a set's name or a file"):
        classes_of(source, None)
    (tsv / "few.txt").write_text("\n".join(WORDS[2:]) + "\n")
    with pytest.raises(ConfigError, match=r"2 captions of tsv:.* are no class name: add 'fox number 0', 'fox number 1'"):
        classes_of(source, str(tsv / "few.txt"))


def test_classes_of_a_dataset_with_labels(tsv):
    source = source_of([0, 1, 2, 1], ("a", "b", "c"))
    assert classes_of(source, None).names == ("a", "b", "c")
    (tsv / "three.txt").write_text("fox\nhen\nowl\n")
    named = classes_of(source, str(tsv / "three.txt"))
    assert (named.names, named.labels.tolist()) == (("fox", "hen", "owl"), [0, 1, 2, 1])
    with pytest.raises(ConfigError, match=r"classnames = '.*names.txt': names 11 classes, but stored has 3: write"):
        classes_of(source, str(tsv / "names.txt"))


def test_numbers_as_labels_are_named_by_a_file_or_a_set(tsv):
    (tsv / "three.txt").write_text("fox\nhen\nowl\n")
    assert classes_of(stored(tsv, [0, 2, -1] * 3 + [1]), str(tsv / "three.txt")).labels.tolist() == [0, 2, -1] * 3 + [1]
    with pytest.raises(ConfigError, match=r"three.txt': names 3 classes, but stored has labels up to 3: write one name a line"):
        classes_of(stored(tsv, [0, 3] * 5), str(tsv / "three.txt"))
    with pytest.raises(ConfigError, match=r"data.spec = 'stored': has neither labels nor captions.*--label-field.*there are png"):
        classes_of(stored(tsv, [-1] * 10, captions=False), str(tsv / "three.txt"))
    assert classes_of(source_of([9, 0]), "svhn").names[:2] == ("zero", "one")


def test_missing_labels_are_told(caplog):
    classes_of(source_of([0, -1, 1, -1], ("fox", "hen")), None)
    assert "stored: 2 of 4 examples have no label and are left out" in caplog.text
    with pytest.raises(ConfigError, match=r"'stored': none of its 3 examples has a label: use a split with labels, or name"):
        classes_of(source_of([-1] * 3, ("fox", "hen")), None)


def test_wnids_become_words():
    classes = classes_of(source_of([0, 657, 999], WNIDS), None)
    assert [classes.names[i] for i in (0, 657, 744, 999)] == ["tench", "missile", "missile", "toilet paper"]
    assert classes.labels.tolist() == [0, 657, 999]
    assert classes.source == "imagenet1k"
    backwards = classes_of(source_of([0, 1], WNIDS[::-1]), None)  # some sets have an order of their own
    assert backwards.names[:2] == ("toilet paper", "corn cob")
    few = classes_of(source_of([1, 0], ("n02979186", "n01440764")), None)  # imagenette has ten
    assert few.names == ("cassette player", "tench")
    assert classes_of(source_of([1, 0], ("n02979186", "n01440764")), "imagenet1k").labels.tolist() == [0, 482]


@pytest.mark.parametrize(("letter", "first"), [("a", ("stingray", 6)), ("r", ("goldfish", 1))])
def test_subsets_are_scored_among_their_200_classes(letter, first, caplog):
    word, label = first
    classes = classes_of(source_of([label, 0], WNIDS, f"tfds:imagenet_{letter}/test"), None)
    assert len(classes.names) == 200
    assert classes.names[0] == word
    assert classes.labels.tolist() == [0, -1]  # the tench is in neither
    assert f"1 of 2 examples are of no class among the 200 of imagenet-{letter}" in caplog.text
    named = classes_of(source_of([label], WNIDS), f"imagenet-{letter}")
    assert (named.names, named.labels.tolist()) == (classes.names, [0])
    assert classes_of(source_of([3, 199]), f"imagenet-{letter}").labels.tolist() == [3, 199]  # labels of the 200 themselves


def test_ids_of_sun397_and_eurosat_become_words():
    paths = ("/j/jail/indoor", "/j/jail cell", "/a/apartment building/outdoor")  # as TFDS orders them
    assert classes_of(source_of([0], paths), None).names == ("jail indoor", "jail cell", "apartment building outdoor")
    folders = class_sets()["eurosat"].ids
    assert classes_of(source_of([0], folders), None).names[0] == "annual crop land"
    assert classes_of(source_of([0], ("Forest", "River")), None).names == ("Forest", "River")  # some of its words are no EuroSAT


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (tuple("0123456789"), "a number"),
        (("0.5", "-1", "2"), "a number"),
        (("/a/b", "/c/d e"), "a path"),
        (("images/0/cat", "images/1/dog"), "a path"),
        (("n99999999", "n99999998"), "an id"),
        (("class_1", "class_2"), "an id"),
        (("label 1", "label 2"), "an id"),
        (("a3f09c1d22", "b7e0aa0012"), "an id"),
    ],
)
def test_names_that_are_no_words_are_refused(names, what):
    match = (
        rf"classnames = None: the classes of stored are called .*, and {what} tells a text tower nothing: give a set's name or a"
    )
    with pytest.raises(ConfigError, match=match):
        classes_of(source_of([0, 1], names), None)


def test_numbers_that_come_with_templates_are_names():
    """CLIP_benchmark's MNIST: `a photo of the number: "7".`"""
    source = source_of([7, 1], tuple("0123456789"))
    source.templates = ('a photo of the number: "{c}".',)
    assert classes_of(source, None).names[7] == "7"


def test_the_remedy_names_what_may_fit():
    with pytest.raises(ConfigError, match=r"of 10 classes there are names for cifar10, eurosat, mnist, stl10, svhn$"):
        classes_of(source_of([0], tuple("0123456789")), None)


def test_names_of_the_sets_are_words(caplog):
    """But for MNIST's, which are digits on purpose."""
    assert [name for name, found in class_sets().items() if no_word(found.names)] == ["mnist"]
    with caplog.at_level(logging.WARNING):
        assert classes_of(source_of([1], tuple("0123456789")), "mnist").names == tuple("0123456789")
    assert not caplog.records


def test_the_sets_are_whole():
    counts = {name: len(found.names) for name, found in class_sets().items()}
    published = dict(imagenet1k=1000, cifar100=100, cars=196, sun397=397, food101=101, country211=211, fgvc_aircraft=100, dtd=47)
    assert counts | published == counts
    assert all(len(found.ids) in (0, len(found.names)) for found in class_sets().values())
    assert all("{c}" in template for found in template_sets().values() for template in found)
    assert class_sets().keys() - {f"imagenet-{x}" for x in "aor"} - {"caltech101_vtab"} <= template_sets().keys()
    assert np.unique(WNIDS).tolist() == list(WNIDS)


def test_several_labels_and_groups():
    source = Stored([Record(b"", (), f"k{i}", labels=labels) for i, labels in enumerate([(2, 0), (), (1,)])])
    source.classnames, source.multilabel = ("fox", "hen", "owl"), True
    classes = classes_of(source, None)
    assert classes.positive.tolist() == [[True, False, True], [False] * 3, [False, True, False]]
    assert (classes.labels.tolist(), classes.keys) == ([-1] * 3, ("k0", "k1", "k2"))
    source.classnames = ("fox", "hen")
    with pytest.raises(ConfigError, match=r"classnames = None: names 2 classes, but stored has labels up to 2"):
        classes_of(source, None)
    source.records = [Record(b"", (), "k")]
    with pytest.raises(ConfigError, match=r"data.spec = 'stored': no example has a label: use a split with labels"):
        classes_of(source, None)
    grouped = Stored([Record(b"", (), "k", 0, group=4), Record(b"", (), "l", 0)])
    grouped.classnames = ("fox",)
    assert classes_of(grouped, None).groups.tolist() == [4, -1]
    assert classes_of(source_of([0], ("fox",)), None).groups is None
