import math

import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.evals.ties import average_precision, expected_hits


def formula(greater, equal, own, k):
    m = k - greater
    if own == 0 or m <= 0:
        return 0
    return 1 if m > equal else 1 - math.comb(equal, m) / math.comb(own + equal, m)


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_expected_hits_equal_the_formula(array):
    cases = [(g, e, s) for g in (0, 1, 4, 9, 10, 30) for e in (0, 1, 2, 9, 500) for s in (0, 1, 2, 5)]
    greater, equal, own = (array(column) for column in np.array(cases).T)
    for k in (1, 5, 10):
        found = expected_hits(greater, equal, own, k)
        np.testing.assert_allclose(found, [formula(*case, k) for case in cases], atol=1e-12 if array is np.array else 2e-7)
        untied = (np.array(equal) == 0) & (np.array(own) > 0)
        np.testing.assert_array_equal(np.array(found)[untied], (np.array(greater) < k)[untied])


def test_of_one_own_key():
    np.testing.assert_allclose(expected_hits(np.array([0, 2, 5]), np.array([1, 9, 9]), 1, 5), [1, 0.3, 0])


def test_average_precision_is_the_mean_over_orders():
    rng = np.random.default_rng(0)
    scores, positive = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.0]), np.array([0, 1, 0, 1, 0, 1, 0, 1], bool)

    def draw():
        hits = positive[np.lexsort((rng.random(8), -scores))]
        return np.mean((np.cumsum(hits) / np.arange(1, 9))[hits])

    assert average_precision(scores, positive) == pytest.approx(np.mean([draw() for _ in range(20_000)]), abs=2e-3)
    assert average_precision(scores + 1e-8 * np.arange(8), positive) == average_precision(scores, positive)
    assert average_precision(np.array([4.0, 3, 2, 1]), np.array([True, False, True, False])) == (1 + 2 / 3) / 2
    assert average_precision(np.ones(10), np.arange(10) < 1) == pytest.approx(sum(1 / np.arange(1, 11)) / 10)
    assert math.isnan(average_precision(np.ones(3), np.zeros(3, bool)))


def test_very_many_scores_are_not_one_tie_because_each_is_close_to_the_next():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    positive = rng.random(400_000) < 0.02
    scores = rng.normal(0, 0.002, len(positive)) + 0.004 * positive
    assert np.quantile(-np.diff(-np.sort(-scores)), 0.9) < 1e-6
    assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores), abs=1e-4)
