"""The exact gradient of a loss over the whole batch, in the memory of one micro-batch: two passes (GradCache, 2101.06983).

The mean of the micro-batches' losses is another objective: each pair would have fewer negatives. Here the towers first run on
every micro-batch, and only its embeddings are kept. The loss is computed once, from all embeddings. Then the towers run on each
micro-batch again, and the embeddings' gradient goes back through them. Randomness belongs to the example, so both passes draw the
same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax.placement import Towers
from clipjax.sharding import BATCH

Tree = Any  # of arrays
Encode = Callable[[Tree, Tree], Tree]  # (params, rows) -> embeddings
Loss = Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]  # (params, embeddings, rows) -> (value, aux)
ValueAndGrad = Callable[[Tree, Tree], tuple[tuple[jax.Array, Tree], Tree]]  # (params, rows) -> ((value, aux), gradient)


def value_and_grad(encode: Encode, loss: Loss, mesh: Mesh, towers: Towers, micro_batches: int) -> ValueAndGrad:
    """`(params, rows) -> ((value, aux), gradient)` of `loss(params, encode(params, rows), rows) -> (value, aux)`.

    `rows` are arrays [B, ...] sharded over the devices of the batch. `encode` maps examples one by one: row i of its result
    depends on row i of `rows` alone, so it may be given any part of them; `towers` says whether that is a device's own part.
    With one micro-batch this is the plain gradient. With more, which must divide the rows of a device, activations of
    B / micro_batches examples exist at a time, and the towers' forward pass runs twice.
    """
    if micro_batches > 1:
        return TwoPasses(encode, loss, mesh, towers, jnp.arange(micro_batches))
    mapped = over_devices(
        lambda params, rows: encode(jax.lax.pcast(params, towers.axes, to="varying"), rows),
        mesh,
        towers,
        (P(), P(BATCH)),
        P(BATCH),
    )
    return jax.value_and_grad(lambda params, rows: loss(params, mapped(params, rows), rows), has_aux=True)


def over_devices(
    fn: Callable[..., Tree], mesh: Mesh, towers: Towers, in_specs: tuple[P, ...], out_specs: P
) -> Callable[..., Tree]:
    """`fn` of each device's own rows, where the towers run so; else `fn` itself, of the global rows."""
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs) if towers.axes else fn


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as a function is
class TwoPasses:
    """`value_and_grad` with micro-batches. Each holds an equal share of every device's rows, so no row changes its device."""

    encode: Encode
    loss: Loss
    mesh: Mesh
    towers: Towers
    numbers: jax.Array  # of the micro-batches

    def __call__(self, params: Tree, rows: Tree) -> tuple[tuple[jax.Array, Tree], Tree]:
        z = over_devices(self.forward, self.mesh, self.towers, (P(), P(BATCH)), P(BATCH))(params, rows)
        # The loss reads scale and bias directly: their full gradient is here, and they get none from the towers.
        value, (grads, dz) = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)(params, z, rows)
        backward = over_devices(self.backward, self.mesh, self.towers, (P(), P(BATCH), P(BATCH)), P())
        return value, jax.tree.map(jnp.add, grads, backward(params, rows, dz))

    def forward(self, params: Tree, rows: Tree) -> Tree:
        """Embeddings of all rows [b, ...], micro-batch by micro-batch."""
        stacked = jax.lax.map(lambda j: self.encode(params, self.take(rows, j)), self.numbers)
        return jax.tree.map(self.join, stacked)

    def backward(self, params: Tree, rows: Tree, dz: Tree) -> Tree:
        """The gradient of params from that of the embeddings [b, ...], summed over micro-batches and then over devices."""
        own = jax.lax.pcast(params, self.towers.axes, to="varying")

        def add(grads: Tree, j: jax.Array) -> tuple[Tree, None]:
            _, pullback = jax.vjp(lambda p: self.encode(p, self.take(rows, j)), own)
            return jax.tree.map(jnp.add, grads, pullback(self.take(dz, j))[0]), None

        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, own), self.numbers)
        return jax.lax.psum(grads, self.towers.axes)

    def take(self, rows: Tree, j: jax.Array) -> Tree:
        """The j-th micro-batch: arrays [b, ...] -> [b / micro_batches, ...]."""
        devices, n = self.towers.placement.devices, len(self.numbers)

        def of_array(x: jax.Array) -> jax.Array:
            shares = x.reshape(devices, n, -1, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(shares, j, 1, keepdims=False).reshape(-1, *x.shape[1:])

        return jax.tree.map(of_array, rows)

    def join(self, x: jax.Array) -> jax.Array:
        """All micro-batches [n, b / n, ...] as one batch [b, ...], its rows in their first order."""
        return (
            x.reshape(len(self.numbers), self.towers.placement.devices, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
        )
