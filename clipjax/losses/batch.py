"""Reductions over the global batch: its size, its means, and how often an id occurs in it.

Inside `shard_map` over `axis`, b is this device's shard of the batch; where axis is None, b is all of it. Every result without a
leading b is the same on every device.
"""

import functools
from collections.abc import Iterable
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.losses.pairwise.axes import Axis, device_count
from clipjax.losses.pairwise.partials import finite

# Full float32 products. The default on a TPU is one bfloat16 pass, with which CLIP's loss is wrong in the fourth digit.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def add_up(values: Iterable[Array]) -> Array:
    """The sum of the values. There must be at least one."""
    return cast(Array, sum(values))


def size(rows: Array, axis: Axis) -> int:
    """B, the number of rows on all devices."""
    return len(rows) * device_count(axis)


def mean(x: Float[Array, "b ..."], axis: Axis) -> Float[Array, "..."]:
    """The mean over the global batch."""
    return x.mean(0) if axis is None else jax.lax.pmean(x.mean(0), axis)


def outer(x: Float[Array, "b e"], y: Float[Array, "b f"], axis: Axis) -> Float[Array, "e f"]:
    """The mean over the global batch of x_i y_i^T."""
    local = einsum("be,bf->ef", x, y) / len(x)
    return local if axis is None else jax.lax.pmean(local, axis)


def log_mean_exp(x: Float[Array, " b"], axis: Axis) -> Float[Array, ""]:
    """log of the mean over the global batch of exp(x)."""
    top = jax.lax.stop_gradient(x.max())  # before pmax, which can't be differentiated
    top = finite(top if axis is None else jax.lax.pmax(top, axis))
    return top + jnp.log(mean(jnp.exp(x - top), axis))


def following(x: Float[Array, "b ..."], axis: Axis) -> Float[Array, "b ..."]:
    """Row i + 1 of the global batch for row i, and the first for the last: one row travels from each device."""
    first = x[:1]
    if axis is not None:
        n = device_count(axis)
        first = jax.lax.ppermute(first, axis, [(i, (i - 1) % n) for i in range(n)])
    return jnp.concatenate([x[1:], first])


def occurrences(ids: Int[Array, " b"], among: Int[Array, " c"], axis: Axis) -> Float[Array, " b"]:
    """How often each of `ids` occurs in `among` of all devices. `among` is gathered, 4 bytes each, and sorted."""
    among = jnp.sort(among if axis is None else jax.lax.all_gather(among, axis, tiled=True))
    first, last = (jnp.searchsorted(among, ids, side=side) for side in ("left", "right"))
    return (last - first).astype(jnp.float32)
