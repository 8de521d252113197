"""Columns that are gathered: one all-gather, then one reduce-scatter. Meanwhile all columns are on every device."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from clipjax.losses.pairwise.axes import Axis, device_count
from clipjax.losses.pairwise.partials import LogSumExp, Partial, finite


def gather_columns(cols: Any, axis: Axis) -> Any:
    """[c, ...] of each of n devices -> [n c, ...] on all of them."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), cols)


def scatter_columns(found: Partial, axis: Axis) -> Partial:
    """What all columns [n c, ...] got on each device -> what this device's columns [c, ...] got on all devices."""

    def by_device(x: Array) -> Array:  # [n c, ...] -> [n, c, ...]: what n devices found for the same columns
        return jax.lax.all_to_all(x, axis, 0, 0, tiled=True).reshape(device_count(axis), -1, *x.shape[1:])

    def reduce_lse(m: Array, sums: tuple[Array, ...]) -> LogSumExp:
        m, sums = jax.tree.map(by_device, (m, sums))
        best = m.max(0)
        factor = jnp.exp(m - finite(best)[None])
        return best, tuple((factor * s).sum(0) for s in sums)

    return Partial(
        jax.tree.map(lambda x: jax.lax.psum_scatter(x, axis, tiled=True), found.total),
        jax.tree.map(lambda x: by_device(x).max(0), found.best),
        tuple(reduce_lse(m, sums) for m, sums in found.lse),
    )
