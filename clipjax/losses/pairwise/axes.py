"""Mesh axes as a loss sees them, inside `shard_map` or, where the axis is None, without it."""

from typing import Any

import jax
from jaxtyping import Array

Axis = str | tuple[str, ...] | None  # the mesh axes that rows and columns are sharded over; None: one device has all of them


def names_of(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()


def device_count(axis: Axis) -> int:
    return 1 if axis is None else jax.lax.axis_size(axis)


def device_index(axis: Axis) -> Array | int:
    """This device's place along the axis."""
    return 0 if axis is None else jax.lax.axis_index(axis)


def varying_axes(*arrays: Array) -> set[str]:
    """The mesh axes over which any of them differs, as shard_map with check_vma=True knows."""
    return set().union(*(jax.typeof(x).mat.varying for x in arrays))


def vary(tree: Any, axis: Axis) -> Any:
    """Marks arrays as different on each device of `axis`, for shard_map's check. Their gradients are then summed over it."""

    def mark(x: Array) -> Array:
        missing = tuple(a for a in names_of(axis) if a not in jax.typeof(x).mat.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tree if axis is None else jax.tree.map(mark, tree)
