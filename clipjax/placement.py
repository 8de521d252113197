"""How the towers lie on a mesh: whose rows a device sees, and where a layer's weights are made whole."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax.losses import token_nll
from clipjax.losses.pairwise.tiles import vary
from clipjax.models.layers import WHEREVER, Body, Placement, Seen
from clipjax.sharding import AUTO, AXES, BATCH, batch_devices, keystr, over_rows, spec


@dataclass(frozen=True)
class Towers:
    """How a training step runs them."""

    place: Placement  # how what they are given lies
    axes: tuple[str, ...] = ()  # that they are mapped over, so that each device gives them its own rows; (): the global ones
    token_nll: Callable[..., jax.Array] = token_nll  # of states [n, d], words [v, d] and targets [n], as they lie


def towers(mesh: Mesh, dtype: str) -> Towers:
    """A device that has all weights adds up its own gradients, in float32, and they are summed over the devices once; left to
    the compiler they are summed in the dtype of the products, and after every part. Where weights are divided a device's own
    sum would be a whole copy.
    """
    if not divides_weights(mesh):
        return Towers(WHEREVER, BATCH)
    return Towers(placement(mesh, dtype), token_nll=token_nll_on(mesh))


def token_nll_on(mesh: Mesh) -> Callable[..., jax.Array]:
    """`token_nll` of global arrays on a mesh: states and targets over the devices of the batch, words over `tensor`."""

    def of_global(states: jax.Array, words: jax.Array, targets: jax.Array) -> jax.Array:
        axis = "tensor" if len(words) % mesh.shape["tensor"] == 0 else None  # else every device has all of them
        fn = functools.partial(token_nll, axis=axis)
        return jax.shard_map(fn, mesh=mesh, in_specs=(P(BATCH), P(axis), P(BATCH)), out_specs=P(BATCH))(states, words, targets)

    return of_global


def divides_weights(mesh: Mesh) -> bool:
    return mesh.shape["fsdp"] > 1 or mesh.shape["tensor"] > 1


def placement(mesh: Mesh, dtype: str) -> Placement:
    """How towers of global arrays lie on a mesh.

    Where weights are divided the compiler, left to itself, split activations over their width in every layer, and summed
    attention scores over devices, rather than gather the layer's weights. With fsdp alone the layers are therefore mapped over
    the devices: each gathers a layer's kernels in `dtype`, in which they are multiplied, once for all parts of its batch, and
    sums and scatters their gradients once. With tensor it is the compiler that places them, told where activations and whole
    kernels lie.
    """
    devices = batch_devices(mesh)
    if not divides_weights(mesh):
        return Placement(devices)

    def places(weights: nnx.State, prefix: str = "", **other: int) -> Any:
        """The specs of weights, on a mesh of other sizes where told."""
        sizes = AbstractMesh(tuple((dict(mesh.shape) | other).values()), AXES, axis_types=AUTO)
        return jax.tree_util.tree_map_with_path(lambda path, x: spec(prefix + keystr(path[:-1]), x.shape, sizes), weights)

    def lighter(weights: nnx.State) -> nnx.State:  # what travels; keystr without nnx's `value`
        light = jnp.dtype(dtype)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(light) if keystr(path[:-1]).endswith("kernel") else x, weights
        )

    def alike(weights: nnx.State, others: nnx.State) -> nnx.State:
        return jax.tree.map(lambda x, y: x.astype(y.dtype), weights, others)

    def compiled(body: Body, stacked: nnx.State, x: jax.Array, seen: Seen) -> jax.Array:
        def gather(weights: nnx.State) -> nnx.State:
            where = jax.tree.map(lambda p: NamedSharding(mesh, p), places(weights, fsdp=1))
            return alike(jax.lax.with_sharding_constraint(lighter(weights), where), weights)

        return body(gather, lambda x: jax.lax.with_sharding_constraint(x, over_rows(mesh)), stacked, x, seen)

    def mapped(body: Body, stacked: nnx.State, x: jax.Array, seen: Seen) -> jax.Array:
        divided = places(stacked, "tower/blocks/")

        def on_device(stacked: nnx.State, x: jax.Array, seen: Seen) -> jax.Array:
            def gather(weights: nnx.State) -> nnx.State:
                def one(x: jax.Array, where: P) -> jax.Array:  # axes of `where` count the layers' too
                    axes = [i - 1 for i, name in enumerate(where) if name == "fsdp"]
                    return jax.lax.all_gather(x, "fsdp", axis=axes[0], tiled=True) if axes else x

                return alike(jax.tree.map(one, lighter(weights), divided), weights)

            return body(gather, lambda x: x, vary(stacked, BATCH), x, seen)

        rows = P(None, BATCH)
        return jax.shard_map(on_device, mesh=mesh, in_specs=(divided, rows, rows), out_specs=rows)(stacked, x, seen)

    return Placement(devices, mapped if mesh.shape["tensor"] == 1 else compiled)
