"""What holds for every loss: golden values and closed forms in float32, invariances, and unusual batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import losses
from tests.losses import reference as ref
from tests.losses.meshes import axis_of, pulled
from tests.losses.test_reference import GOLDEN, IDS, XR, YR

T = 1 / 0.07
KINDS = {  # by the names of test_reference.GOLDEN, of vectors that need not be of length 1: only their directions count
    "clip": lambda x, y: losses.clip_loss(x, y, T),
    "clip image to text": lambda x, y: losses.clip_loss(x, y, T, image_weight=1.0),
    "clip text to image": lambda x, y: losses.clip_loss(x, y, T, image_weight=0.0),
    "clip at 100": lambda x, y: losses.clip_loss(x, y, 100.0),
    "label smoothing": lambda x, y: losses.clip_loss(x, y, T, label_smoothing=0.1),
    "ALIGN": lambda x, y: losses.clip_loss(x, y, T, label_smoothing=0.1, reduction="sum"),
    "ConVIRT": lambda x, y: losses.clip_loss(x, y, 10.0, image_weight=0.75),
    "DCL": lambda x, y: losses.decoupled_loss(x, y, T),
    "DCLW": lambda x, y: losses.decoupled_loss(x, y, T, sigma=0.5),
    "SigLIP": lambda x, y: losses.siglip_loss(x, y, 10.0, -10.0),
    "uniformity of X": lambda x, y: losses.uniformity(x),
    "uniformity of Y": lambda x, y: losses.uniformity(y),
    "cross-uniformity": losses.cross_uniformity,
    "alignment": losses.alignment,
    "hard negatives": lambda x, y: losses.hard_negative_loss(x, y, T),
    "hard negatives, beta 0": lambda x, y: losses.hard_negative_loss(x, y, T, beta=0.0),
    "hard negatives, decoupled": lambda x, y: losses.hard_negative_loss(x, y, T, alpha=0.0),
    "CWCL": lambda x, y: losses.cwcl_loss(x, y, T),
    "several positives": lambda x, y: losses.multi_positive_loss(x, y, T, jnp.int32(IDS), jnp.int32(IDS)),
    "CyCLIP in-modal": lambda x, y: losses.cyclip(x, y)[0],
    "CyCLIP cross-modal": lambda x, y: losses.cyclip(x, y)[1],
}
SYMMETRIC = KINDS.keys() - {"clip image to text", "clip text to image", "ConVIRT", "uniformity of X", "uniformity of Y", "CWCL"}
ORDERED = {"several positives"}  # whose ids do not move with the pairs here


@functools.cache
def every_loss():
    """x, y of any length -> the losses of their directions, compiled once for 4 pairs of 3 numbers."""
    return jax.jit(
        lambda x, y: {k: fn(*(z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))) for k, fn in KINDS.items()}
    )


def test_golden_values():
    got = every_loss()(jnp.float32(XR), jnp.float32(YR))
    for name, value in got.items():
        want = GOLDEN[name][1]
        assert abs(value - want) <= 1e-5 * max(abs(want), 1e-2), name
    prefixes = jax.jit(lambda x, y: [losses.matryoshka(losses.clip_loss, x, y, m, T) for m in ((2,), (2, 3))])
    got = prefixes(*(jnp.float32(z) for z in (XR, YR)))
    np.testing.assert_allclose(got, [GOLDEN["Matryoshka, 2"][1], GOLDEN["Matryoshka, 2 and 3"][1]], rtol=1e-5)
    zeros = (jnp.zeros(4), jnp.zeros(4))
    x, y = (jnp.float32(ref.unit_rows(z)) for z in (XR, YR))
    np.testing.assert_allclose(losses.sogclr_loss(x, y, T, zeros, 1.0)[0], -0.3765952118, rtol=1e-5)


def test_invariances():
    """Of pairs turned together, in another order, of other lengths, and with the towers exchanged."""
    x, y = jnp.float32(XR), jnp.float32(YR)
    want = every_loss()(x, y)
    turn = jnp.float32(np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])
    order, lengths = jnp.array([2, 0, 3, 1]), jnp.array([[0.1], [3.0], [20.0], [1.0]])
    changed = {
        "turned": (every_loss()(x @ turn, y @ turn), KINDS.keys()),
        "in another order": (every_loss()(x[order], y[order]), KINDS.keys() - ORDERED),
        "of other lengths": (every_loss()(lengths * x, y / lengths), KINDS.keys()),
        "exchanged": (every_loss()(y, x), SYMMETRIC),
    }
    for change, (got, kinds) in changed.items():
        for kind in kinds:
            assert abs(got[kind] - want[kind]) <= 2e-5 * max(abs(want[kind]), 1e-2), f"{kind} {change}"
    assert abs(got["ConVIRT"] - want["ConVIRT"]) > 0.01  # which the exchange is to change


def test_the_larger_fixture():
    x, y = (jnp.float32(ref.unit_rows(z)) for z in ref.fixture(64, 16))
    fns = (
        (lambda x, y: losses.clip_loss(x, y, T), 0.09090551604803836),
        (lambda x, y: losses.clip_loss(x, y, 100.0), 0.031232094642624997),
        (lambda x, y: losses.siglip_loss(x, y, 10.0, -10.0), 2.0865084092372848),
        (lambda x, y: losses.uniformity(x), -3.640678872044303),
        (lambda x, y: losses.uniformity(y), -3.6191786745848917),
        (losses.cross_uniformity, -3.614247799017325),
        (losses.alignment, 0.3767886513816),
    )
    got = jax.jit(lambda x, y: [fn(x, y) for fn, _ in fns])(x, y)
    np.testing.assert_allclose(got, [want for _, want in fns], rtol=2e-5)


def test_closed_forms():
    n = 256
    same, eye = jnp.zeros((n, n)).at[:, 0].set(1), jnp.eye(n)
    separated = jnp.eye(n, 2 * n), jnp.eye(n, 2 * n, n)  # every cosine 0
    triangle = jnp.array([[1, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], jnp.float32)
    bias = jnp.float32(-np.log(n - 1))

    @jax.jit
    def values(same, eye, separated):
        return {
            "all equal": (losses.clip_loss(same, same, 100.0), np.log(n)),
            "all equal, sigmoid": (losses.siglip_loss(same, same, 10.0, -10.0), n * np.log(2)),
            "all equal, decoupled": (losses.decoupled_loss(same, same, 10.0), np.log(n - 1)),
            "all equal, uniformity": (losses.uniformity(same) + 1, 1),
            "towers opposite": (losses.cross_uniformity(same, -same), -8),
            "orthonormal": (losses.clip_loss(eye, eye, T), 1.593304e-4),  # the form lse - s_ii fails this
            "orthogonal, sigmoid": (losses.siglip_loss(*separated, 10.0, -10.0), 10.011622),
            "balanced bias": (1 + jax.grad(lambda b: losses.siglip_loss(*separated, 10.0, b))(bias), 1),
            "simplex": (losses.uniformity(triangle), -6),
        }

    for name, (got, want) in values(same, eye, separated).items():
        assert abs(got - want) <= 1e-5 * max(abs(want), 1e-4), f"{name}: {got} for {want}"


def test_one_pair():
    """CLIP's loss is 0, and so are its gradients; what compares different pairs is refused before anything runs."""
    x, y = jnp.float32([[0.6, 0.8]]), jnp.float32([[1.0, 0.0]])
    for shape in (None, (1, 1)):
        axis = axis_of(shape)
        value, grads = pulled(lambda x, y, t, a=axis: losses.clip_loss(x, y, t, axis=a), shape)((x, y, 14.3), jnp.float32(1))
        assert value == 0
        assert all(not np.any(g) for g in grads)
        ids = jnp.zeros(1, jnp.int32)
        for fn in (
            lambda x, y, a=axis: losses.uniformity(x, axis=a),
            lambda x, y, a=axis: losses.cross_uniformity(x, y, axis=a),
            lambda x, y, a=axis: losses.decoupled_loss(x, y, 14.3, axis=a),
            lambda x, y, a=axis: losses.decoupled_loss(x, y, 14.3, axis=a, sigma=0.5),
            lambda x, y, a=axis: losses.hard_negative_loss(x, y, 14.3, axis=a, alpha=0.0),
        ):
            with pytest.raises(ValueError, match="two"):
                jax.eval_shape(pulled(fn, shape), (x, y), jnp.float32(1))
        np.testing.assert_allclose(losses.hard_negative_loss(x, y, 10.0), 0)
        np.testing.assert_allclose(losses.multi_positive_loss(x, y, 10.0, ids, ids), 0, atol=1e-6)
        np.testing.assert_allclose(losses.siglip_loss(x, y, 10.0, -7.0), np.log1p(np.exp(1.0)), rtol=1e-6)


def test_one_pair_a_device_is_no_batch_of_one():
    x, _ = ref.random_pairs(8, 4)
    run = pulled(lambda x: losses.uniformity(x, axis=axis_of((8, 1))), (8, 1))
    np.testing.assert_allclose(run((jnp.float32(x),), jnp.float32(1))[0], ref.uniformity(x), rtol=1e-5)


@functools.cache
def several():
    """Losses of 6 pairs with given ids: `f(x, y, ids, log_u) -> {name: loss}`."""

    def values(x, y, ids, log_u):
        ones = jnp.eye(6)
        return {
            "clip": losses.clip_loss(x, y, T, ids=ids),
            "clip, smoothed": losses.clip_loss(x, y, T, ids=ids, label_smoothing=0.1),
            "siglip": losses.siglip_loss(x, y, T, -3.0, ids=ids),
            "decoupled": losses.decoupled_loss(x, y, T, ids=ids),
            "DCLW": losses.decoupled_loss(x, y, T, sigma=0.5, ids=ids),
            "hard negatives": losses.hard_negative_loss(x, y, T, ids=ids),
            "hard negatives, decoupled": losses.hard_negative_loss(x, y, T, alpha=0.0, ids=ids),
            "several positives": losses.multi_positive_loss(x, y, T, ids, ids),
            "CWCL": losses.cwcl_loss(x, y, T),
            "distillation": losses.distillation_loss(x, y, T, ones, ones, 5.0),
            "preserved": losses.preserved(x, ones[:, :4])[0] + losses.preserved(y, ones[:, :4])[1],
            "SogCLR": losses.sogclr_loss(x, y, T, (log_u, log_u), 0.5)[0],
            "uniformity": losses.uniformity(x) + losses.uniformity(y),
            "cross-uniformity": losses.cross_uniformity(x, y),
            "alignment": losses.alignment(x, y),
            "CyCLIP in-modal": losses.cyclip(x, y)[0],
            "CyCLIP cross-modal": losses.cyclip(x, y)[1],
        }

    return jax.jit(values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_shows_in_every_loss(bad):
    """Even of a pair with no negatives, and even where infinity looks like the best of embeddings: its own pair's cosine is
    +inf and all its others -inf."""
    rng = np.random.default_rng(0)
    x, y = (np.float32(ref.unit_rows(rng.normal(size=(6, 4)))) for _ in range(2))
    flattering = np.abs(x), np.abs(y)
    for z in flattering:
        z[np.arange(6) != 2, 0] *= -np.sign(bad) if np.isinf(bad) else 1
        z[2, 0] *= np.sign(bad) if np.isinf(bad) else 1
    for ids in (np.arange(6), np.zeros(6), np.array([0, 0, 1, 1, 2, 3])):
        for a, b in ((x, y), flattering):
            for side in (0, 1):
                pair = [a.copy(), b.copy()]
                pair[side][2, 0] = bad
                got = several()(*pair, np.int32(ids), jnp.zeros(6))
                hidden = {name: float(value) for name, value in got.items() if np.isfinite(value)}
                assert not hidden, f"{bad} in {('image', 'text')[side]}, ids {ids}"


def test_the_same_id_for_all_leaves_nothing_to_tell_apart():
    """Every row is empty: 0 and counted, as the sum of no terms; only SigLIP's own pairs are left."""
    x, y = (jnp.float32(z) for z in ref.random_pairs(6, 4))
    got = several()(x, y, jnp.zeros(6, jnp.int32), jnp.zeros(6))
    for name in ("clip", "clip, smoothed", "decoupled", "DCLW", "hard negatives", "hard negatives, decoupled"):
        assert got[name] == 0, name
    want = np.log1p(np.exp(-(T * (np.float64(x) * np.float64(y)).sum(1) - 3))).mean()
    np.testing.assert_allclose(got["siglip"], want, rtol=1e-5)
