"""Layers that are recomputed in the backward pass, against autodiff of the same layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.models.recompute import run_layers
from clipjax.models.runner import REMAT_POLICIES

DEPTH, CHUNKS, ROWS, TOKENS, WIDTH = 3, 2, 4, 5, 8


def layer(weights, x, mask, context, nothing):
    """It reads a mask without gradient, and a context with one."""
    assert nothing is None
    return x + jnp.where(mask[..., None], jnp.tanh(x @ weights["kernel"]) + weights["bias"][None, None], 0) * context[:, None]


def double(weights):
    return jax.tree.map(lambda w: 2 * w, weights)


def direct(stacked, x, mask, context):
    for i in range(DEPTH):
        weights = double(jax.tree.map(lambda w, i=i: w[i], stacked))
        x = jnp.stack([layer(weights, *chunk, None) for chunk in zip(x, mask, context, strict=True)])
    return x


@pytest.mark.parametrize(("policy", "unroll"), [("full", 1), ("full", DEPTH), ("dots", 1), ("dots", DEPTH)])
def test_values_and_gradients(policy, unroll):
    """`gather` doubles the weights, so its own gradient is seen."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    stacked = {"kernel": draw(DEPTH, WIDTH, WIDTH), "bias": draw(DEPTH, WIDTH)}
    x, context = draw(CHUNKS, ROWS, TOKENS, WIDTH), draw(CHUNKS, ROWS, WIDTH)
    mask = jnp.asarray(rng.random((CHUNKS, ROWS, TOKENS)) < 0.7)

    def recomputed(stacked, x, context):
        return run_layers(layer, double, REMAT_POLICIES[policy], unroll, stacked, x, (mask, context, None))

    want, pull = jax.vjp(lambda *a: direct(a[0], a[1], mask, a[2]), stacked, x, context)
    got, pull_got = jax.vjp(jax.jit(recomputed), stacked, x, context)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(recomputed(stacked, x, context), want, rtol=1e-5, atol=1e-6)
    dy = draw(*x.shape)
    for a, b in zip(jax.tree.leaves(pull_got(dy)), jax.tree.leaves(pull(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
