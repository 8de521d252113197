"""Intervals: coverage, pairing, groups, and queries that do not count."""

import numpy as np
import pytest

from clipjax.evals.bootstrap import Column, draw_means, interval


def draw(*columns, groups=None, **how):
    """The draws of columns of the same queries."""
    groups = range(len(columns[0])) if groups is None else groups
    return draw_means([Column(np.asarray(values, float), [str(g) for g in groups]) for values in columns], **how)


def two_runs(rng, n):
    """Hits of two runs at queries whose difficulty they share. In expectation the second hits 5 % more."""
    easy = rng.beta(2, 1, n)
    a = rng.random(n) < 0.9 * easy
    b = np.where(rng.random(n) < 0.7, a, rng.random(n) < 0.9 * easy) + (rng.random(n) < 0.05) * ~a
    return a.astype(float), np.minimum(b, 1).astype(float)


def test_coverage_of_the_paired_interval():
    """Of 1,000 simulations with 1,000 draws each, the true difference is inside 93 to 97 %."""
    rng = np.random.default_rng(0)
    big = two_runs(rng, 4_000_000)
    truth = big[1].mean() - big[0].mean()
    inside = 0
    for seed in range(1000):
        a, b = draw(*two_runs(rng, 300), draws=1000, seed=seed)
        low, high = interval(b - a)
        inside += low <= truth <= high
    assert 930 <= inside <= 970


def test_coverage_with_groups():
    """Five captions of an image that share its difficulty: drawn alone, their interval would be too short."""
    rng = np.random.default_rng(1)
    owner = np.repeat(np.arange(120), 5)
    inside, alone = 0, 0
    for seed in range(1000):
        values = (rng.random(600) < np.repeat(rng.uniform(0.2, 1.0, 120), 5)).astype(float)
        for groups in (owner, None):
            low, high = interval(draw(values, groups=groups, draws=1000, seed=seed)[0])
            hit = low <= 0.6 <= high
            inside, alone = inside + hit * (groups is not None), alone + hit * (groups is None)
    assert 930 <= inside <= 970
    assert alone < 900


def test_pairing_shortens_the_interval():
    rng = np.random.default_rng(2)
    a, b = two_runs(rng, 363)
    paired = interval(np.subtract(*draw(b, a)))
    alone = interval(draw(b, seed=1)[0] - draw(a, seed=2)[0])
    assert np.ptp(paired) < 0.7 * np.ptp(alone)


def test_a_run_against_itself_differs_by_nothing():
    values = np.random.default_rng(3).random(50)
    a, b = draw(values, values)
    assert interval(b - a) == (0, 0)


def test_the_interval_of_a_share_is_that_of_the_binomial():
    values = np.repeat([1.0, 0.0], [70, 30])
    low, high = interval(draw(values)[0])
    assert low == pytest.approx(0.61, abs=0.011)
    assert high == pytest.approx(0.79, abs=0.011)
    assert interval(draw(values)[0]) == (low, high)  # the seed is fixed


def test_draws_equal_those_of_single_groups():
    """Equal rows are counted and not drawn one by one: the same distribution as the plain way."""
    rng = np.random.default_rng(4)
    values, groups = rng.integers(0, 3, 60) / 2, rng.integers(0, 20, 60).astype(str)
    draws = draw(values, groups=groups)[0]
    names = np.unique(groups)
    plain = [np.concatenate([values[groups == g] for g in rng.choice(names, len(names))]).mean() for _ in range(4000)]
    assert draws.mean() == pytest.approx(np.mean(plain), abs=0.005)
    assert draws.std() == pytest.approx(np.std(plain), rel=0.06)


def test_what_does_not_count_is_left_out():
    values = np.array([1.0, 0.0, np.nan, np.nan, 1.0])
    assert np.nanmean(draw(values)[0]) == pytest.approx(2 / 3, abs=0.01)
    with pytest.raises(ValueError, match="none of the queries counts"):
        draw(np.full(3, np.nan))


def test_two_directions_of_the_same_images_are_drawn_together():
    """The mean of a metric over images and of the same one over their captions, twice each, is as sure as the one alone."""
    hits, images = np.random.default_rng(5).integers(0, 2, 80).astype(float), [str(i) for i in range(80)]
    captions = Column(hits.repeat(2), np.repeat(images, 2).tolist())
    one, other = draw_means([Column(hits, images), captions])
    np.testing.assert_allclose(one, other)
