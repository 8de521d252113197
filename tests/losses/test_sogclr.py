"""SogCLR's loss, its moving averages and the gradients by vectors and temperatures, against float64 (2202.12387, 2305.11965)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.losses import decoupled_loss, pairwise_logsumexp, sogclr_loss
from tests.losses import reference as ref
from tests.losses.meshes import axis_of, pulled
from tests.losses.test_pairwise import close

ROWS, WIDTH = 16, 6


def check(shape, way, rows, *, per_example: bool):
    """With one temperature, or with one for each image and each text."""
    rng = np.random.default_rng(3)
    x, y = ref.random_pairs(rows, WIDTH)
    rho = 2.0 if per_example else 0.0

    def loss(x, y, row, col, log_u, gamma):
        return sogclr_loss(x, y, (row, col) if per_example else row, log_u, gamma, axis=axis_of(shape), rho=rho)

    run = pulled(loss, shape, way)
    zeros = jnp.zeros(rows)
    for scale, gamma in ((1.0, 0.3), (14.3, 1.0), (14.3, 0.25), (100.0, 0.8)):
        scales = [np.float64(np.float32(scale * rng.uniform(0.5, 1, rows))) for _ in range(2)] if per_example else [scale] * 2
        # averages as they are between g of a good and of a bad pair; some examples are seen for the first time
        log_u = [np.where(np.arange(rows) % 5 == 0, -np.inf, np.float32(rng.normal(size=rows) - scale / 10)) for _ in range(2)]
        args = [jnp.float32(a) for a in (x, y, *scales)]
        states = tuple(jnp.float32(u) for u in log_u)
        (value, new), grads = run(args, (jnp.float32(1), (zeros, zeros)), (states, jnp.float32(gamma)))
        want, want_new = ref.sogclr(x, y, *scales, log_u, gamma, rho)
        case = f"scale {scale}, gamma {gamma}"
        assert abs(value - want) <= 1e-5 * max(abs(want), 1e-2), case
        for got, u in zip(new, want_new, strict=True):
            close(got, u, scale, case)
        by_vectors = ref.gradients(lambda x, y, s=scales, u=log_u, g=gamma: ref.sogclr_surrogate(x, y, *s, u, g), x, y)
        for got, w in zip(grads[:2], by_vectors, strict=True):
            close(got, w, scale, case)
        by_tau, terms = (np.array(a) for a in ref.by_temperature(x, y, *scales, log_u, gamma, rho))
        by_scale, terms = (-a / np.stack(np.broadcast_arrays(*scales)).reshape(2, -1) ** 2 for a in (by_tau, -terms))
        if per_example:
            for got, w, most in zip(grads[2:], by_scale, terms, strict=True):
                assert np.all(np.abs(got - w) <= (5e-5 if scale == 100 else 1e-5) * most.max()), case
        else:
            assert abs(grads[2] - by_scale.sum()) <= 1e-5 * terms.sum(), case
            assert grads[3] == 0


@pytest.mark.parametrize(
    ("shape", "way", "tile", "per_example"),
    [(None, "outside", 5, False), (None, "outside", 5, True), ((2, 4), "outside", 512, False), ((2, 4), "inside", 512, True)],
)
def test_sogclr(shape, way, tile, per_example, monkeypatch):
    monkeypatch.setitem(pairwise_logsumexp.__kwdefaults__, "tile", tile)
    monkeypatch.setitem(pairwise_logsumexp.__kwdefaults__, "travel", None if shape is None else "ring")
    check(shape, way, ROWS, per_example=per_example)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "way", "per_example"),
    [
        ((1, 1), "outside", True),
        ((1, 1), "inside", False),
        ((2, 1), "inside", True),
        ((2, 1), "outside, unchecked", False),
        ((4, 1), "outside, unchecked", True),
        ((4, 1), "outside", False),
        ((8, 1), "outside", True),
        ((8, 1), "inside", False),
        ((2, 4), "inside", True),
        ((2, 4), "outside, unchecked", False),
    ],
)
def test_sogclr_on_meshes(shape, way, per_example, monkeypatch):
    monkeypatch.setitem(pairwise_logsumexp.__kwdefaults__, "tile", 3)
    check(shape, way, 48, per_example=per_example)


def test_the_limits_of_gamma():
    """gamma = 1 is DCL, gamma = 0 moves nothing, and vectors that are all equal have g = 1."""
    x, y = (jnp.float32(z) for z in ref.random_pairs(ROWS, WIDTH))
    log_u = tuple(jnp.linspace(-1, 1, ROWS) for _ in range(2))
    loss = jax.jit(lambda g: sogclr_loss(x, y, 5.0, log_u, g))
    np.testing.assert_allclose(5 * loss(1.0)[0], decoupled_loss(x, y, 5.0) - np.log(ROWS - 1), rtol=1e-5)
    assert not np.any(jax.grad(lambda u: sogclr_loss(x, y, 5.0, (u, u), 0.5)[0])(log_u[0]))  # a state is not differentiated
    for got, kept in zip(loss(0.0)[1], log_u, strict=True):
        np.testing.assert_allclose(got, kept, atol=1e-6)
    same = jnp.zeros((ROWS, WIDTH)).at[:, 0].set(1)
    unseen = (jnp.full(ROWS, -jnp.inf),) * 2
    value, new = jax.jit(lambda z: sogclr_loss(z, z, 100.0, unseen, 0.1))(same)
    np.testing.assert_allclose([value, *new[0], *new[1]], 0, atol=1e-5)
