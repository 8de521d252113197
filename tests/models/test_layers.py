import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.special import erfc

from clipjax.models.layers import LayerNorm, Scope, activate

X = np.linspace(-6, 6, 4096)
CDF, DENSITY = erfc(-X / np.sqrt(2)) / 2, np.exp(-(X**2) / 2) / np.sqrt(2 * np.pi)


def gelu(x):
    """In a shard_map over the eight devices, as the towers are in training."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    return jax.shard_map(lambda x: activate(x, "gelu"), mesh=mesh, in_specs=rows, out_specs=rows)(x)


def slope(fn):
    return jax.grad(lambda x: fn(x).sum())


@pytest.mark.parametrize(
    ("fn", "expected"),
    [(gelu, X * CDF), (slope(gelu), CDF + X * DENSITY), (slope(slope(gelu)), (2 - X**2) * DENSITY)],
    ids=["value", "slope", "curvature"],
)
def test_gelu_is_exact_where_each_device_has_its_own_rows(fn, expected):
    np.testing.assert_allclose(jax.jit(fn)(jnp.asarray(X, jnp.float32)), expected, atol=5e-7)


@pytest.mark.parametrize(("fn", "expected"), [(gelu, X * CDF), (slope(gelu), CDF + X * DENSITY)], ids=["value", "slope"])
def test_gelu_of_bfloat16_is_rounded_once(fn, expected):
    x = jnp.asarray(X, jnp.bfloat16)
    expected = np.interp(np.float64(x), X, expected)  # x is not X, but rounded
    assert fn(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(jax.jit(fn)(x)), expected, rtol=2**-8, atol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mean", [0, 1, 30])
def test_statistics_of_a_layer_norm(dtype, mean):
    """Values and gradients are those of float64 on the same numbers. 30 standard deviations from zero, too."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(mean + rng.standard_normal((64, 768)), dtype)
    norm = LayerNorm(Scope(jax.random.key(0), jnp.dtype(dtype)), 768, 1e-6)
    dy = jnp.asarray(rng.standard_normal(x.shape), dtype)
    y, pull = jax.vjp(norm, x)
    exact, g = np.float64(x), np.float64(dy)
    exact = exact - exact.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-6)
    exact /= deviation
    gradient = (g - g.mean(-1, keepdims=True) - exact * (g * exact).mean(-1, keepdims=True)) / deviation
    # The last digit of the result, and of a float32 sum of squares: some 2^-24 mean^2.
    unit = 2**-8 if dtype == "bfloat16" else 1e-6 + 2e-7 * mean
    for got, want in ((y, exact), (pull(dy)[0], gradient)):
        np.testing.assert_allclose(np.float64(got), want, rtol=unit, atol=unit / 4 * np.abs(want).max())
