"""Repulsion, Mann-Whitney, Multi-Similarity and the mixtures against float64, and what each of them must be in special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import losses
from clipjax.losses import metric, mixup, pairwise
from tests.losses import reference as ref
from tests.losses.meshes import axis_of, pulled

B, WIDTH, T = 16, 6, 1 / 0.07
IDS = np.int32([0, 1, 1, 3, 4, 5, 6, 7, 8, 1, 10, 11, 4, 13, 14, 15])
SHARE = np.float64(np.float32(np.r_[1, 0, 0.5, np.random.default_rng(0).uniform(size=B - 3)]))
OWN = np.eye(B, dtype=bool)
SAME = IDS[:, None] == IDS[None]
HINGES = (2.0, 50.0, 0.5)

# The definitions, each of x's direction alone. Complex numbers pass through, so that `ref.gradients` differentiates them.


def cosines(x, y):
    return x @ y.T


def distances(x, y):
    return 2 - 2 * cosines(x, y)  # of unit vectors; off the sphere, where no gradient counts, as the primitive has it


def following(z):
    return np.roll(z, -1, 0)


def repulsion(x, y, tau, left_out):
    kept = ~left_out
    some = kept.any(1)
    return (ref.logsumexp(-tau * distances(x, y)[some], kept[some]) / tau).sum() / len(x)


def mann_whitney(x, y, t, left_out):
    s = cosines(x, y)
    return ref.softplus(t * (s - np.diag(s)[:, None]))[~left_out].mean()


def hinges(positive, negative, a, b, offset):
    """Of logarithms of sums, which may be -inf."""
    logs = ((np.asarray(positive) + a * offset, a), (np.asarray(negative) - b * offset, b))
    return sum(np.where(np.isneginf(s.real), 0, ref.softplus(np.where(np.isneginf(s.real), 0, s))) / t for s, t in logs)


def multi_similarity(x, y, a, b, offset, same):
    s = cosines(x, y)
    return hinges(ref.logsumexp(-a * s, same), ref.logsumexp(b * s, ~same), a, b, offset).mean()


def mix(z, share):
    return ref.unit_rows(share[:, None] * z + (1 - share)[:, None] * following(z))


def metrix(x, y, a, b, offset, share):
    s = (x * mix(y, share)).sum(1)
    with np.errstate(divide="ignore"):
        return hinges(np.log(share) - a * s, np.log1p(-share) + b * s, a, b, offset).mean()


def m3col(x, y, t, share):
    n = len(x)
    s = t * cosines(mix(x, share), y)
    targets = np.diag(share)
    np.add.at(targets, (np.arange(n), np.roll(np.arange(n), -1)), 1 - share)  # add: of one pair both targets are the own one
    np.testing.assert_allclose(targets.sum(1), 1)
    rows, cols = ((p * (ref.logsumexp(z)[:, None] - z)).sum() / n for p, z in ((targets, s), (targets.T, s.T)))
    return (rows + cols) / 2


def two_ways(direction, x, y, *args):
    return (direction(x, y, *args) + direction(y, x, *args)) / 2


def attraction(x, y, tau):
    """Of two positives, y and the next example's."""
    c = np.stack([((x - p) ** 2).sum(1) for p in (y, following(y))], 1)
    return (ref.softmax(np.real(tau * c)) * c).sum(1).mean()


def wanted(x, y):
    return [
        two_ways(repulsion, x, y, 2.0, OWN),
        two_ways(repulsion, x, y, 2.0, SAME),
        attraction(x, y, 3.0),
        two_ways(mann_whitney, x, y, T, OWN),
        two_ways(mann_whitney, x, y, T, SAME),
        two_ways(multi_similarity, x, y, *HINGES, OWN),
        two_ways(multi_similarity, x, y, *HINGES, SAME),
        two_ways(metrix, x, y, *HINGES, SHARE),
        m3col(x, y, 10.0, SHARE),
        m3col(y, x, 10.0, SHARE),
    ]


def found(x, y, ids, share, axis=None):
    near = jnp.stack([((x - p) ** 2).sum(1) for p in (y, losses.batch.following(y, axis))], 1)
    return [
        metric.repulsion_terms(x, y, 2.0, axis=axis)[0],
        metric.repulsion_terms(x, y, 2.0, axis=axis, ids=ids)[0],
        metric.attraction(near, 3.0, axis=axis),
        metric.mann_whitney_terms(x, y, T, axis=axis)[0],
        metric.mann_whitney_terms(x, y, T, axis=axis, ids=ids)[0],
        metric.multi_similarity_terms(x, y, HINGES, axis=axis)[0],
        metric.multi_similarity_terms(x, y, HINGES, axis=axis, ids=ids)[0],
        mixup.mixed_hinges(x, y, HINGES, share, axis),
        mixup.mixup_loss(x, y, 10.0, share, axis=axis),
        mixup.mixup_loss(y, x, 10.0, share, axis=axis),
    ]


@pytest.mark.parametrize(
    ("shape", "tile", "travel", "way"),
    [(None, 5, None, "outside"), ((4, 1), 3, "gather", "outside, unchecked"), ((2, 4), 1, "ring", "inside")],
)
def test_values_and_gradients_on_every_mesh(shape, tile, travel, way, monkeypatch):
    for primitive in (pairwise.pairwise_logsumexp, pairwise.pairwise_softplus):
        monkeypatch.setitem(primitive.__kwdefaults__, "tile", tile)
        monkeypatch.setitem(primitive.__kwdefaults__, "travel", travel)
    run = pulled(lambda *args: found(*args, axis=axis_of(shape)), shape, way)
    rest = (jnp.asarray(IDS), jnp.float32(SHARE))
    x, y = ref.random_pairs(B, WIDTH)
    want = wanted(x, y)
    for k in range(len(want)):  # the gradient of each, by the cotangents of the one program
        cotangents = [jnp.float32(i == k) for i in range(len(want))]
        got, grads = run((jnp.float32(x), jnp.float32(y)), cotangents, rest)
        for g, w in zip(grads, ref.gradients(lambda x, y, k=k: wanted(x, y)[k], x, y), strict=True):
            np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max(), rtol=0, err_msg=str(k))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def golden():
    x, y = ref.fixture(4, 3)
    i, j = np.arange(4.0)[:, None], np.arange(3.0)[None]
    z = x + 0.9 * np.sin(0.5 + 7 * i + j + 0.3 * i * j)
    return [jnp.float32(ref.unit_rows(a)) for a in (x, y, z)]


def test_golden_values(golden):
    @jax.jit
    def values(x, y, z):
        share = jnp.float32([1, 0.7, 0.4, 0.9])

        def near(*others):
            return metric.attraction(jnp.stack([((x - p) ** 2).sum(1) for p in others], 1), 1.0)

        free, weighted = jax.value_and_grad(lambda tau: tau * metric.repulsion_terms(x, y, tau)[0])(1.0)
        return [
            (free, (-0.7820409258 - 0.6418364232) / 2),
            (weighted, (-1.5825288456 - 1.3147442430) / 2),  # -sum w c is the derivative of log sum exp(-tau c) by tau
            (near(y) + weighted, -0.9240024644),
            (near(y, z), 0.6866584022),
            (metric.mann_whitney_terms(x, y, 1.0)[0], 0.3845425859),
            (metric.mann_whitney_terms(x, y, T)[0], 0.3832788022),
            (metric.multi_similarity_terms(x, y, HINGES)[0], 0.3656085367),
            (mixup.mixed_hinges(x, y, HINGES, share, None), 0.4804886005),  # of texts mixed 0.4657491189
            (mixup.mixup_loss(x, y, 10.0, share), 3.5356086559),
            (mixup.mixup_loss(y, x, 10.0, share), 2.9326913043),
        ]

    got, want = np.transpose(values(*golden))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_they_are_in_special_cases(golden):
    x, y, _ = golden
    np.testing.assert_allclose(mixup.mixup_loss(x, y, 10.0, jnp.ones(4)), losses.clip_loss(x, y, 10.0), rtol=1e-6)
    np.testing.assert_allclose(metric.attraction(((x - y) ** 2).sum(1)[:, None], 7.0), losses.alignment(x, y), rtol=1e-6)
    own, s = np.asarray((x * y).sum(1)), np.asarray(x @ y.T)
    away = np.where(np.eye(4) > 0, -np.inf, s)
    logs = [np.log1p(np.exp(-own)) + np.log1p(np.exp(a).sum(1)) for a in (away, away.T)]  # MLCD's two
    np.testing.assert_allclose(metric.multi_similarity_terms(x, y, (1.0, 1.0, 0.0))[0], np.mean(logs), rtol=1e-6)
    slope = jax.grad(lambda tau: tau * metric.repulsion_terms(x, y, tau)[0])(1e-4)
    np.testing.assert_allclose(slope, 2 * s[~np.eye(4, dtype=bool)].mean() - 2, rtol=1e-3)  # all weights equal: -mean c
    wrong = np.mean([(a > own[:, None]).sum() / 12 for a in (away, away.T)])  # share of negatives above their own pair
    assert metric.mann_whitney_terms(x, y, T)[0] >= np.log(2) * wrong > 0
    _, ranking = metric.mann_whitney_terms(x, y, T)
    for got, want in zip(ranking, (own, away.max(1), away.max(0)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_shares_follow_the_distribution_and_not_the_mesh():
    key, n = jax.random.key(3), 4096
    shares = np.asarray(mixup.draw_shares(key, n, 0.15, 0.5, None))
    drawn = shares[shares < 1 - 1e-6]
    assert abs((shares == 1).mean() - 0.5) < 0.15  # Beta(0.15, 0.15) itself is often 1 in float32
    all_drawn = np.asarray(mixup.draw_shares(key, n, 0.15, 1.0, None))
    assert abs(all_drawn.mean() - 0.5) < 0.03
    assert abs(all_drawn.var() - 1 / (4 * 1.3)) < 0.01  # of Beta(c, c): 1 / (4 (2 c + 1))
    assert len(np.unique(drawn)) > len(drawn) // 2
    run = pulled(lambda z, key: mixup.draw_shares(key, len(z), 0.15, 0.5, axis_of((2, 4))) + 0 * z, (2, 4), "inside")
    np.testing.assert_allclose(run((jnp.zeros(n),), jnp.zeros(n), (key,))[0], shares, rtol=1e-5)
    assert np.all(mixup.draw_shares(key, 8, 0.15, 0.0, None) == 1)
