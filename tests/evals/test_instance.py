from types import SimpleNamespace

import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError, Data
from clipjax.data.source import Record
from clipjax.evals.encoder import Encoder
from clipjax.evals.instance import InstanceEvaluation, Shown, _class_of
from tests.evals.tiny import MODEL, TOKENIZER, Stored, mesh_of

NAMES = ("recall@1", "recall@5", "recall@10", "mean_average_precision")


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def measured(z, classes, gallery=None, readable=None):
    """The results on these vectors; `gallery`: those that are searched, and their classes."""
    every = np.ones(len(z), bool) if readable is None else np.array(readable)
    vectors = {"queries": (z, every)}
    shown = Shown(SimpleNamespace(name="queries"), tuple(map(str, range(len(z)))), tuple(classes))
    other = None
    if gallery is not None:
        y, of = gallery
        vectors["gallery"] = y, np.ones(len(y), bool)
        other = Shown(SimpleNamespace(name="gallery"), tuple(map(str, range(len(y)))), tuple(of))
    evaluation = InstanceEvaluation(None, shown, other)
    evaluation._vectors = lambda params, shown: vectors[shown.batches.name]
    return evaluation.run({})


def definition(z, classes):
    """Recalls and average precisions, query by query, without ties."""
    found = []
    for i, row in enumerate(z @ z.T):
        order = [j for j in np.argsort(-row) if j != i]
        hits = np.array([classes[j] == classes[i] for j in order])
        precision = (np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean()
        found.append([hits[:1].any(), hits[:5].any(), hits[:10].any(), precision])
    return np.mean(found, 0)


def test_recalls_and_precision_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    classes = rng.permutation(np.repeat(list("abcdefghij"), 4))
    z = unit(rng.normal(size=(40, 8)) + rng.normal(size=(10, 8))[[ord(c) - 97 for c in classes]])
    results = measured(z, classes)
    assert results.metrics.keys() == set(NAMES) == set(config.Instance.metrics)
    np.testing.assert_allclose([results.metrics[name] for name in NAMES], definition(z, classes), rtol=1e-12)
    assert 0.2 < results.metrics["mean_average_precision"] < 0.9
    (examples,) = results.examples
    assert all(results.metrics[name] == examples.values[name].mean() for name in NAMES)


def test_a_collapsed_model_scores_chance():
    found = measured(np.repeat(unit(np.ones((1, 4))), 20, 0), ["a", "b"] * 10).metrics
    assert found["recall@1"] == pytest.approx(9 / 19)
    random = np.random.default_rng(0).permuted(np.tile(np.arange(19) < 9, (20_000, 1)), axis=1)
    precision = np.mean([(np.cumsum(hits) / np.arange(1, 20))[hits].mean() for hits in random])
    assert found["mean_average_precision"] == pytest.approx(precision, abs=2e-3)


def test_who_is_a_query_and_who_is_searched():
    """`b` is alone, the last has no class, and the second `a` can't be read."""
    z = unit(np.array([[1, 0, 0], [1, 0.1, 0], [0.9, 0, 0.1], [1, 0, 0.01], [0, 1, 0]]))
    (examples,) = measured(z, ["a", "a", "a", "b", None], readable=[True, False, True, True, True]).examples
    assert examples.values["recall@1"][[0, 2]].tolist() == [0, 0]  # `b` is nearer to both than they are to each other
    assert np.isnan(examples.values["recall@1"]).tolist() == [False, True, False, True, True]
    assert examples.values["mean_average_precision"][[0, 2]].tolist() == [0.5, 0.5]
    with pytest.raises(ConfigError, match="none of its images can be read that has another"):
        measured(z, ["a", "a", "b", "c", None], readable=[False, True, True, True, True])


def test_a_class_without_a_name_is_its_number():
    source = Stored([Record(b"", (), str(i), label) for i, label in enumerate([0, 5, 5, -1])])
    source.classnames = ("fox",)
    assert [_class_of(source, record) for record in source.records] == ["fox", "5", "5", None]


def test_a_gallery_is_searched_in_place_of_the_other_images():
    z = np.eye(3, dtype=np.float32)
    results = measured(z, ["a", "b", "x"], gallery=(z[[1, 0, 2]], ["b", "a", "c"]))
    assert results.metrics == dict.fromkeys(NAMES, 1)
    assert np.isnan(results.examples[0].values["recall@1"]).tolist() == [False, False, True]
    swapped = measured(z, ["a", "b", "x"], gallery=(z, ["b", "a", "c"])).metrics
    assert swapped["recall@1"] < 1 / 3


def test_of_a_dataset(tsv, params, caplog):
    """Without labels the captions are the classes: the first and the last image are of one, and the fifth can't be read."""
    encoder, data = Encoder(MODEL, mesh_of("1"), 4), Data(spec=f"tsv:{tsv}/pairs.tsv", workers=1)
    evaluation = InstanceEvaluation.prepare(encoder, TOKENIZER, data, config.Instance())
    assert "8 of 10 images have no other of their class to find" in caplog.text
    values = evaluation.run(params).examples[0].values["mean_average_precision"]
    assert np.flatnonzero(~np.isnan(values)).tolist() == [0, 9]
    (tsv / "others.tsv").write_text("filepath\ttitle\n1.png\then\n2.png\towl\n")
    with pytest.raises(ConfigError, match=r"no image has another of its class to find: name the field of the classes"):
        InstanceEvaluation.prepare(encoder, TOKENIZER, data, config.Instance(gallery=f"tsv:{tsv}/others.tsv"))
    with pytest.raises(ConfigError, match="gallery = 'nothing:"):
        config.Instance(gallery="nothing:x")
