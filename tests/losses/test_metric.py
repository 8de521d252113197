"""Repulsion, Mann-Whitney, Multi-Similarity and the mixtures against float64, and what each of them must be in special cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import config, losses
from clipjax.config import ConfigError, MannWhitney, Mixup, MultiSimilarity, Repulsion
from clipjax.losses import Rows, Shared, batch, metric, objective, pairwise
from tests.losses import reference as ref
from tests.losses.meshes import axis_of, pulled

B, WIDTH, T = 16, 6, 1 / 0.07
IDS = np.int32([0, 1, 1, 3, 4, 5, 6, 7, 8, 1, 10, 11, 4, 13, 14, 15])
SHARE = np.float64(np.float32(np.r_[1, 0, 0.5, np.random.default_rng(0).uniform(size=B - 3)]))
OWN, SAME = np.eye(B, dtype=bool), IDS[:, None] == IDS[None]
HINGES = (2.0, 50.0, 0.5)

# The definitions, each of x's direction alone. Complex numbers pass through, so that `ref.gradients` differentiates them.


def following(z):
    return np.roll(z, -1, 0)


def repulsion(x, y, tau, left_out):
    kept = ~left_out
    some, c = kept.any(1), 2 - 2 * x @ y.T
    return (ref.logsumexp(-tau * c[some], kept[some]) / tau).sum() / len(x)


def mann_whitney(x, y, t, left_out):
    s = x @ y.T
    return ref.softplus(t * (s - np.diag(s)[:, None]))[~left_out].mean()


def hinges(positive, negative, a, b, offset):
    """Of logarithms of sums, which may be -inf."""
    logs = ((positive + a * offset, a), (negative - b * offset, b))
    return sum(np.where(np.isneginf(s.real), 0, ref.softplus(np.where(np.isneginf(s.real), 0, s))) / t for s, t in logs)


def multi_similarity(x, y, a, b, offset, same):
    s = x @ y.T
    return hinges(ref.logsumexp(-a * s, same), ref.logsumexp(b * s, ~same), a, b, offset).mean()


def mixed(z, share):
    return ref.unit_rows(share[:, None] * z + (1 - share)[:, None] * following(z))


def metrix(x, y, a, b, offset, share):
    s = (x * mixed(y, share)).sum(1)
    with np.errstate(divide="ignore"):
        return hinges(np.log(share) - a * s, np.log1p(-share) + b * s, a, b, offset).mean()


def m3col(x, y, t, share):
    n = len(x)
    s = t * mixed(x, share) @ y.T
    targets = np.diag(share)
    targets[np.arange(n), np.roll(np.arange(n), -1)] += 1 - share
    np.testing.assert_allclose(targets.sum(1), 1)
    rows, cols = ((p * (ref.logsumexp(z)[:, None] - z)).sum() / n for p, z in ((targets, s), (targets.T, s.T)))
    return (rows + cols) / 2


def attraction(distances, tau):
    return (ref.softmax(np.real(tau * distances)) * distances).sum(1).mean()


def two_ways(direction, x, y, *args):
    return (direction(x, y, *args) + direction(y, x, *args)) / 2


def wanted(x, y):
    """With two captions where the term takes all, and with equal ids where it heeds them."""
    z = following(y)  # the second caption
    near = np.stack([((x - y) ** 2).sum(1), ((x - z) ** 2).sum(1)], 1)
    return [
        1.5 * attraction(near, 3.0) + 0.5 * np.mean([two_ways(repulsion, x, text, 2.0, SAME) for text in (y, z)]),
        two_ways(mann_whitney, x, y, T, SAME),
        two_ways(multi_similarity, x, y, *HINGES, SAME),
        two_ways(multi_similarity, x, y, *HINGES, OWN) + 0.4 * two_ways(metrix, x, y, *HINGES, SHARE),
        two_ways(m3col, x, y, 10.0, SHARE),
    ]


@functools.cache
def wanted_of_random_pairs():
    """The values, and for each [2, B, WIDTH] its gradients: all of them by one complex step for each number."""
    z = np.complex128(ref.random_pairs(B, WIDTH))
    slopes = np.empty((len(wanted(*z)), *z.shape))
    for at in np.ndindex(z.shape):
        step = np.zeros(z.shape, np.complex128)
        step[at] = 1j * ref.STEP
        slopes[(slice(None), *at)] = np.imag(wanted(*(z + step))) / ref.STEP
    return np.real(wanted(*z)), slopes


def found(x, y, ids, share, axis=None):
    """The values of `wanted` by the terms, with given shares in place of drawn ones."""

    def value(term, text=y, ids=ids):
        fn = term.implementation.function
        return fn(term, Rows(x, text, ids), jnp.float32(3.0), None, axis).value  # 3: of the model, which no term is to take

    cacr = Repulsion(alpha=1.5, beta=0.5, tau_positive=3.0, tau_negative=2.0)
    plain = value(cacr, jnp.stack([y, batch.following(y, axis)], 1)), value(MannWhitney()), value(MultiSimilarity())
    drawn, metric.draw_shares = metric.draw_shares, lambda *_: share
    try:
        return [*plain, value(MultiSimilarity(mix=0.4), ids=None), value(Mixup())]
    finally:
        metric.draw_shares = drawn


@pytest.mark.parametrize(
    ("shape", "tile", "travel", "way"),
    [(None, 5, None, "outside"), ((4, 1), 3, "gather", "outside, unchecked"), ((2, 4), 1, "ring", "inside")],
)
def test_values_and_gradients_on_every_mesh(shape, tile, travel, way, monkeypatch):
    for primitive in (pairwise.pairwise_logsumexp, pairwise.pairwise_softplus):
        monkeypatch.setitem(primitive.__kwdefaults__, "tile", tile)
        monkeypatch.setitem(primitive.__kwdefaults__, "travel", travel)
    run = pulled(lambda *args: found(*args, axis=axis_of(shape)), shape, way)
    values, slopes = wanted_of_random_pairs()
    args = [jnp.float32(z) for z in ref.random_pairs(B, WIDTH)]
    for k in range(len(values)):  # the gradient of each, by the cotangents of the one program
        cotangents = [jnp.float32(i == k) for i in range(len(values))]
        got, grads = run(args, cotangents, (jnp.asarray(IDS), jnp.float32(SHARE)))
        for g, w in zip(grads, slopes[k], strict=True):
            np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max(), rtol=0, err_msg=str(k))
    np.testing.assert_allclose(got, values, rtol=1e-6, atol=1e-6)


def test_mann_whitney_keeps_the_digits_of_a_small_gradient():
    """Where all own pairs are found: they have no part in the sums, which would drown the rest."""
    x, y = (
        np.float64(np.float32(ref.unit_rows(np.eye(B) + noise)))
        for noise in 0.05 * np.random.default_rng(0).normal(size=(2, B, B))
    )
    got = jax.jit(jax.grad(lambda x: total(MannWhitney(), x, jnp.float32(y))))(jnp.float32(x))
    want = ref.gradients(lambda x: two_ways(mann_whitney, x, y, T, OWN), x)[0]
    assert 1e-9 < np.abs(want).max() < 1e-5
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.fixture(scope="module")
def golden():
    x, y = ref.fixture(4, 3)
    i, j = np.arange(4.0)[:, None], np.arange(3.0)[None]
    z = x + 0.9 * np.sin(0.5 + 7 * i + j + 0.3 * i * j)
    return [jnp.float32(ref.unit_rows(a)) for a in (x, y, z)]


def total(term, image, text, scale=3.0, **kw):
    return objective((term,), Rows(image, text, **kw), jnp.asarray(scale, jnp.float32), None)[0]


def test_golden_values(golden, monkeypatch):
    monkeypatch.setattr(metric, "draw_shares", lambda *_: jnp.float32([1, 0.7, 0.4, 0.9]))

    @jax.jit
    def values(x, y, z):
        def log_sums(tau):  # its derivative is -sum w c, the value of CACR's repulsion
            term = Repulsion(alpha=0.0)
            object.__setattr__(term, "tau_negative", tau)  # traced
            return tau * total(term, x, y)

        free, weighted = jax.value_and_grad(log_sums)(1.0)
        metrix = total(MultiSimilarity(mix=1.0), x, y) - total(MultiSimilarity(), x, y)
        return [
            (free, (-0.7820409258 - 0.6418364232) / 2),
            (weighted, (-1.5825288456 - 1.3147442430) / 2),
            (total(Repulsion(beta=0.0), x, y) + weighted, -0.9240024644),
            (total(Repulsion(beta=0.0), x, jnp.stack([y, z], 1)), 0.6866584022),
            (total(MannWhitney(temperature=1.0), x, y), 0.3845425859),
            (total(MannWhitney(), x, y), 0.3832788022),
            (total(MultiSimilarity(), x, y), 0.3656085367),
            (metrix, 0.4804886005),  # of texts mixed 0.4657491189
            (total(Mixup(mix="image"), x, y), 3.5356086559),
            (total(Mixup(mix="text"), x, y), 2.9326913043),
            (total(Mixup(), x, y), 3.2341499801),
        ]

    np.testing.assert_allclose(*np.transpose(values(*golden)), rtol=1e-6)


def test_what_they_are_in_special_cases(golden):
    key, terms = jax.random.key(0), (Repulsion(), MannWhitney(), MultiSimilarity(mix=0.4), Mixup())

    @jax.jit
    def values(x, y, z):
        shared = Shared(key=key)
        by_scale = [jax.grad(lambda t, term=term: total(term, x, y, t, shared=shared))(3.0) for term in terms]
        learned = Mixup(share=0.0, temperature=None)
        pairs = [
            (total(learned, x, y, 10.0, shared=shared), losses.clip_loss(x, y, 10.0)),
            (total(Repulsion(beta=0.0, tau_positive=7.0), x, y), losses.alignment(x, y)),
            # views, captions, and both: one softmax over all positive pairs of an example
            (total(Repulsion(beta=0.0), jnp.stack([y, z], 1), x), total(Repulsion(beta=0.0), x, jnp.stack([y, z], 1))),
            (total(Repulsion(sides="text-text"), x, jnp.stack([y, z], 1)), total(Repulsion(), y, z)),
        ]
        _, ranking = metric.mann_whitney(MannWhitney(), Rows(x, y), jnp.float32(T), None, None)
        two_logs, bound = total(MultiSimilarity(alpha=1.0, beta=1.0, offset=0.0), x, y), total(MannWhitney(), x, y)
        soft = jax.grad(lambda x: total(Repulsion(alpha=0.0, tau_negative=1e-3), x, y))(x)
        return by_scale, pairs, ranking, two_logs, bound, soft

    by_scale, pairs, ranking, two_logs, bound, soft = values(*golden)
    assert not np.any(by_scale)  # none has a gradient for the model's scale
    np.testing.assert_allclose(*np.transpose(pairs), rtol=1e-6)
    x, y = (np.float64(z) for z in golden[:2])
    own, s = (x * y).sum(1), x @ y.T
    away = [np.where(np.eye(4) > 0, -np.inf, a) for a in (s, s.T)]
    np.testing.assert_allclose(two_logs, np.mean([np.log1p(np.exp(-own)) + np.log1p(np.exp(a).sum(1)) for a in away]), rtol=1e-6)
    assert bound >= np.log(2) * np.mean([(a > own[:, None]).sum() / 12 for a in away]) > 0  # negatives above their own pair
    np.testing.assert_allclose(soft, 2 / 3 / 4 * (y.sum(0)[None] - y), rtol=0, atol=1e-3)  # all negatives weigh alike: -mean c
    for got, want in zip(ranking, (own, away[0].max(1), away[0].max(0)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_shares_follow_the_distribution_and_not_the_mesh():
    key, n = jax.random.key(3), 4096

    def draw(z, key, part=0.5, axis=None):
        return metric.draw_shares(Rows(z, z, shared=Shared(key=key)), 0.15, part, axis)

    shares, every, none = jax.jit(lambda z: [draw(z, key, part) for part in (0.5, 1.0, 0.0)])(jnp.zeros(n))
    assert abs((shares != every).mean() - 0.5 * (every != 1).mean()) < 0.03  # Beta(0.15, 0.15) itself is often 1 in float32
    assert abs(every.mean() - 0.5) < 0.03
    assert abs(every.var() - 1 / (4 * 1.3)) < 0.01  # of Beta(c, c): 1 / (4 (2 c + 1))
    run = pulled(lambda z, key: draw(z, key, axis=axis_of((2, 4))) + 0 * z, (2, 4), "inside")
    np.testing.assert_allclose(run((jnp.zeros(n),), jnp.zeros(n), (key,))[0], shares, rtol=1e-5)
    assert np.all(none == 1)


@pytest.mark.parametrize("kind", [Repulsion, MultiSimilarity])
def test_a_temperature_is_refused_where_it_would_do_nothing(kind):
    with pytest.raises(ConfigError, match=r"objective.0.temperature = 0.1: .*scales"):
        kind(temperature=0.1).check("objective.0", config.Model(), config.Data(spec="emoji"))
