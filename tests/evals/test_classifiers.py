"""Classifiers of vectors against scikit-learn's, plain numpy and least squares."""

import numpy as np
import pytest

from clipjax.evals import classifiers
from clipjax.evals.classifiers import expected_right
from tests.evals.tiny import mesh_of


def unit(x):
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def rows():
    """60 unit vectors of three overlapping classes of different sizes, and 20 queries."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.choice(3, 80, p=[0.5, 0.3, 0.2]))
    x = unit(rng.normal(size=(3, 8))[labels] + 1.5 * rng.normal(size=(80, 8)))
    order = rng.permutation(80)
    x, labels = x[order], labels[order].astype(np.int32)
    return x[:60], labels[:60], x[60:], labels[60:]


def test_equal_scores_share_the_hit():
    scores = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 2.0]])
    np.testing.assert_allclose(expected_right(scores, np.array([0, 1, 2, 1])), [1, 1 / 2, 1 / 3, 0])
    np.testing.assert_array_equal(expected_right(np.full((2, 3), np.nan), np.array([0, 2])), 0)  # a fit that has diverged


@pytest.mark.slow
def test_softmax_regression_is_scikit_learns_on_its_digits():
    """Two thirds of the digits, as unit vectors, are learned from."""
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, labels = unit(digits.data)[order], digits.target[order].astype(np.int32)
    fit = classifiers.SoftmaxRegression(x[:1200], labels[:1200], 10, mesh_of("1"))
    for c, published in ((0.316, 0.9246), (1.0, 0.9414), (100.0, 0.9765)):
        with threadpool_limits(1):  # more only wait for each other
            wanted = LogisticRegression(C=c, max_iter=10_000, tol=1e-7).fit(np.float64(x[:1200]), labels[:1200])
        assert wanted.score(x[1200:], labels[1200:]) == pytest.approx(published, abs=5e-5)
        weights = fit(c)
        scores = x[1200:] @ weights[:-1] + weights[-1]
        assert expected_right(scores, labels[1200:]).mean() == wanted.score(x[1200:], labels[1200:])


def test_linear_probe_takes_the_best_c_and_learns_from_all_rows(rows):
    x, labels, queries, wanted = rows
    cs = (1e-4, 1.0, 1.0)
    probe = classifiers.linear_probe(x, labels, 3, mesh_of("8"), cs)
    assert len(probe.validation) == 3
    assert probe.c == cs[int(np.argmax(probe.validation))] == 1.0
    again = classifiers.SoftmaxRegression(x, labels, 3, mesh_of("1"))(1.0)
    np.testing.assert_allclose(probe.scores(queries), queries @ again[:-1] + again[-1], atol=5e-3)
    assert expected_right(probe.scores(queries), wanted).mean() > 0.5
    gradient = np.exp(x @ again[:-1] + again[-1])
    gradient = gradient / gradient.sum(1, keepdims=True) - np.eye(3)[labels]
    assert np.abs(x.T @ gradient + again[:-1]).max() < 1e-3  # where |W|^2 / 2 + sum of cross entropies is flat


@pytest.mark.parametrize("devices", ["1", "8"])
def test_neighbours_vote_by_their_cosines(rows, devices):
    x, labels, queries, _ = rows
    ks = (1, 7, 500)
    found = classifiers.neighbours(x, labels, 3, queries, ks, mesh_of(devices))
    cosines = np.float64(queries) @ np.float64(x).T
    for k, votes in zip(ks, found, strict=True):
        nearest = np.argsort(-cosines, axis=1)[:, :k]
        weight = np.exp(np.take_along_axis(cosines, nearest, 1) / 0.07)
        want = np.stack([(weight * (labels[nearest] == j)).sum(1) for j in range(3)], axis=1)
        np.testing.assert_allclose(votes, want / want.max(1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_neighbours_that_are_equally_near_share_the_places(rows):
    """Of a collapsed model every row is as near: a class's vote is its share of the rows, in any order of them."""
    _, labels, _, _ = rows
    same = np.ones((60, 4), np.float32) / 2
    (votes,) = classifiers.neighbours(same, labels, 3, same[:2], (10,), mesh_of("1"))
    counts = np.bincount(labels)
    np.testing.assert_allclose(votes, [counts / counts.max()] * 2, rtol=1e-6)


@pytest.mark.parametrize(("n", "e"), [(12, 30), (30, 12)])
def test_both_forms_of_ridge_are_one_solution(n, e):
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(n, e)), rng.normal(size=(n, 3))
    one, other = classifiers.primal(x, targets, 0.5), classifiers.dual(x, targets, 0.5)
    assert np.abs(one - other).max() < 1e-10
    rows = np.concatenate([x, np.sqrt(0.5) * np.eye(e)])  # least squares of more rows: no normal equations
    np.testing.assert_allclose(one, np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((e, 3))]))[0], atol=1e-10)


@pytest.mark.parametrize("n", [6, 40])
def test_few_shot_scores_are_a_ridge_on_whitened_rows(rows, n):
    x, labels, queries, _ = (a[:n].astype(np.float64) if a.ndim > 1 else a[:n] for a in rows)
    mean, std = x.mean(0), x.std(0) + 1e-5
    a = np.concatenate([(x - mean) / std, np.full((len(x), 1), 100.0)], 1)
    w = np.linalg.inv(a.T @ a + 1024 * np.eye(9)) @ a.T @ np.where(np.eye(3)[labels] > 0, 1, -1)
    want = np.concatenate([(queries - mean) / std, np.full((len(queries), 1), 100.0)], 1) @ w
    np.testing.assert_allclose(classifiers.few_shot_scores(x, labels, 3, queries), want, atol=1e-8)


def test_few_shots_are_drawn_class_by_class():
    labels = np.array([0, 1, 0, 1, 1, 0, 2])
    drawn = classifiers.few_shots(labels, 4, 2, seed=1)
    rng = np.random.default_rng(1)
    want = [*rng.permutation([0, 2, 5])[:2], *rng.permutation([1, 3, 4])[:2], 6]
    assert drawn.tolist() == want
