import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.special import erfc

from clipjax.models.layers import activate

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


def test_gelu_of_bfloat16_is_jax_own():
    x = jnp.asarray(X, jnp.bfloat16)
    assert activate(x, "gelu").dtype == jnp.bfloat16
    np.testing.assert_array_equal(activate(x, "gelu"), jax.nn.gelu(x, approximate=False))
