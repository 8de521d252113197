"""Metrics of classifications: scikit-learn's on scores without ties, and chance where all scores are equal."""

import itertools

import numpy as np
import pytest

from clipjax.evals import classification as c

N, CLASSES = 200, 7


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def scored(rng):
    """Scores that know the label of half of the examples, and labels in which one class never occurs."""
    labels = rng.integers(0, CLASSES - 1, N)
    scores = rng.normal(size=(N, CLASSES)) + np.eye(CLASSES)[labels]
    return scores, labels


@pytest.mark.slow  # the import of scikit-learn
def test_without_ties_they_are_those_of_scikit_learn(rng):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = scored(rng)
    predicted = scores.argmax(1)
    hit = np.float64(predicted == labels)
    occurring = dict(average="macro", labels=np.unique(labels))
    recall = metrics.recall_score(labels, predicted, **occurring)
    assert c.mean_per_class_recall(hit, labels) == pytest.approx(recall, abs=1e-12)
    f1 = metrics.f1_score(labels, predicted, **occurring)
    assert c.macro_f1(hit, labels, c.votes(scores).sum(0)) == pytest.approx(f1, abs=1e-12)
    groups = rng.integers(0, 4, N)
    worst = min(metrics.accuracy_score(labels[groups == g], predicted[groups == g]) for g in range(4))
    assert c.worst_group(hit, groups) == pytest.approx(worst, abs=1e-12)
    positive = rng.random((N, CLASSES)) < 0.2
    theirs = metrics.average_precision_score(positive, scores, average="macro")
    assert c.precision_per_class(scores, positive).mean() == pytest.approx(theirs, abs=1e-12)
    for row, truth in zip(scores[:20], positive[:20] | np.eye(CLASSES, dtype=bool)[labels[:20]], strict=True):
        chosen = np.isin(np.arange(CLASSES), np.argsort(row)[-truth.sum() :])
        assert c.jaccard(row, truth) == pytest.approx(metrics.jaccard_score(truth, chosen), abs=1e-12)


def test_known_values():
    labels = np.array([0, 0, 1, 1, 1])
    hit = np.array([1.0, 0, 1, 1, 0])
    assert c.mean_per_class_recall(hit, labels) == pytest.approx((1 / 2 + 2 / 3) / 2)
    predicted = np.array([1.0, 3, 1])  # class 2 is predicted once, and never occurs
    assert c.macro_f1(hit, labels, predicted) == pytest.approx((2 / 3 + 2 * 2 / 6) / 2)
    groups = np.array([4, 4, 9, 9, 7])
    assert c.worst_group(hit, groups) == 0
    assert c.worst_group(hit[:4], groups[:4]) == 0.5


def test_a_collapsed_model_scores_what_chance_does(rng):
    labels = np.repeat(np.arange(CLASSES), 10)
    equal = np.zeros((len(labels), CLASSES))
    hit = np.full(len(labels), 1 / CLASSES)
    assert c.macro_f1(hit, labels, c.votes(equal).sum(0)) == pytest.approx(1 / CLASSES)
    assert c.worst_group(hit, labels % 3) == pytest.approx(1 / CLASSES)


def test_ties_count_as_all_their_orders_do_on_average():
    scores, positive = np.array([3.0, 2, 2, 2, 1]), np.array([False, True, False, True, True])
    orders = [o for o in itertools.permutations(range(5)) if (np.diff(scores[list(o)]) <= 0).all()]
    assert len(orders) == 6
    jaccards, precisions = [], []
    for order in orders:
        shared = positive[list(order[:3])].sum()
        jaccards.append(shared / (6 - shared))
        found = positive[list(order)]
        precisions.append((found.cumsum() / np.arange(1, 6))[found].mean())
    assert c.jaccard(scores, positive) == pytest.approx(np.mean(jaccards))
    assert c.precision_per_class(scores[:, None], positive[:, None]) == pytest.approx(np.mean(precisions))
    assert np.isnan(c.jaccard(scores, np.zeros(5, bool)))


def test_a_class_without_positives_counts_as_zero(rng):
    scores = rng.normal(size=(20, 2))
    positive = np.stack([scores[:, 0] > 0, np.zeros(20, bool)], axis=1)
    assert c.precision_per_class(scores, positive).tolist() == [1, 0]
