"""Devices that hold the same rows and columns, as those along the mesh axis `tensor`. Each takes a share of the columns."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from clipjax.losses.pairwise.axes import Axis, names_of, varying_axes
from clipjax.losses.pairwise.partials import LogSumExp, Partial, finite


def shared_axes(axis: Axis, *trees: Any) -> tuple[str, ...]:
    """The mesh axes whose devices all hold the same of `trees`, as shard_map with check_vma=True knows; without it, none."""
    names = () if axis is None else jax.sharding.get_abstract_mesh().manual_axes
    varying = {*names_of(axis)} | varying_axes(*jax.tree.leaves(trees))
    checked = (a for a in names if a in varying_axes(jax.lax.axis_index(a)))
    return tuple(a for a in checked if a not in varying and jax.lax.axis_size(a) > 1)


def own_share(cols: Any, share: int, sharers: int, first: Array | int) -> Any:
    """The `share` columns from number `first` on. The last share is padded with zeros."""
    padded = jax.tree.map(lambda x: pad(x, sharers * share), cols)
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, share), padded)


def merge_devices(found: Partial, axes: tuple[str, ...]) -> Partial:
    """What the sharers found for the same rows, merged, on each of them."""

    def merge_lse(m: Array, sums: tuple[Array, ...]) -> LogSumExp:
        best = jax.lax.pmax(m, axes)
        factor = jnp.exp(m - finite(best))
        return best, tuple(jax.lax.psum(factor * s, axes) for s in sums)

    return Partial(
        jax.tree.map(lambda x: jax.lax.psum(x, axes), found.total),
        jax.tree.map(lambda x: jax.lax.pmax(x, axes), found.best),
        tuple(merge_lse(m, sums) for m, sums in found.lse),
    )


def join_shares(found: Partial, axes: tuple[str, ...], columns: int) -> Partial:
    """What all `columns` have accumulated, on every sharer, from what each sharer has for its share."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True, to="invarying")[:columns], found)


def pad(x: Array, length: int) -> Array:
    """`x`, padded with zeros at the end to `length`."""
    return jnp.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1)) if length > len(x) else x
