"""The gradient of a loss over the whole batch in the memory of a part of it, exactly: two passes (2101.06983; METHODS E.1).

The mean of micro-batches' losses is another objective: each pair would meet fewer negatives. Here the towers first see every
micro-batch and keep nothing but its embeddings; the loss sees all of those at once; then the towers see each micro-batch again
and go back from the embeddings' gradient. What is random belongs to the example, so both passes draw the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax.placement import Towers
from clipjax.sharding import BATCH

Tree = Any  # of arrays


def value_and_grad(
    encode: Callable[[Tree, Tree], Tree],
    loss: Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]],
    mesh: Mesh,
    towers: Towers,
    parts: int,
) -> Callable[[Tree, Tree], tuple[tuple[jax.Array, Tree], Tree]]:
    """`(params, rows) -> ((value, aux), gradient)` of `loss(params, encode(params, rows), rows) -> (value, aux)`.

    `encode` maps examples one by one: row i of its arrays depends on row i of `rows` (arrays [B, ...] over the devices of the
    batch) alone, so it may be given a part of them; `towers` says whether a device's own. With `parts` > 1, which must divide
    the rows of a device, they hold the activations of B / parts examples at a time, for one more forward pass; with 1 this is
    the plain gradient.
    """
    axes, devices = towers.axes, towers.place.devices

    def on_own(fn: Callable[..., Tree], in_specs: tuple[P, ...], out_specs: P) -> Callable[..., Tree]:
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs) if axes else fn

    if parts == 1:
        mapped = on_own(lambda params, rows: encode(jax.lax.pcast(params, axes, to="varying"), rows), (P(), P(BATCH)), P(BATCH))
        return jax.value_and_grad(lambda params, rows: loss(params, mapped(params, rows), rows), has_aux=True)
    numbers = jnp.arange(parts)

    def part(rows: Tree, j: jax.Array) -> Tree:
        """The j-th share of every device's rows [b, ...], where they lie: [b / parts, ...]."""

        def take(x: jax.Array) -> jax.Array:
            own = x.reshape(devices, parts, -1, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(own, j, 1, keepdims=False).reshape(-1, *x.shape[1:])

        return jax.tree.map(take, rows)

    def whole(taken: Tree) -> Tree:
        """Every share [parts, b / parts, ...] back in its rows' places: [b, ...]."""

        def put(x: jax.Array) -> jax.Array:
            return x.reshape(parts, devices, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])

        return jax.tree.map(put, taken)

    def forward(params: Tree, rows: Tree) -> Tree:
        return whole(jax.lax.map(lambda j: encode(params, part(rows, j)), numbers))

    def backward(params: Tree, rows: Tree, dz: Tree) -> Tree:
        own = jax.lax.pcast(params, axes, to="varying")

        def add(grads: Tree, j: jax.Array) -> tuple[Tree, None]:
            _, pullback = jax.vjp(lambda p: encode(p, part(rows, j)), own)
            return jax.tree.map(jnp.add, grads, pullback(part(dz, j))[0]), None

        return jax.lax.psum(jax.lax.scan(add, jax.tree.map(jnp.zeros_like, own), numbers)[0], axes)

    def two_passes(params: Tree, rows: Tree) -> tuple[tuple[jax.Array, Tree], Tree]:
        z = on_own(forward, (P(), P(BATCH)), P(BATCH))(params, rows)
        # What the loss itself reads of params, scale and bias, has its whole gradient here and none from the towers.
        value, (grads, dz) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, z, rows)
        return value, jax.tree.map(jnp.add, grads, on_own(backward, (P(), P(BATCH), P(BATCH)), P())(params, rows, dz))

    return two_passes
