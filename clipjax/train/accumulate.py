"""The exact gradient of a loss over the full batch, in the memory of one micro-batch: two passes (GradCache, 2101.06983).

The mean of the micro-batches' losses is another objective: each pair would have fewer negatives. Here the towers first run on
every micro-batch, and only its embeddings are kept. The loss is computed once, from all embeddings. Then the towers run on each
micro-batch again, and the embeddings' gradient goes back through them. Random keys belong to examples, so both passes draw
the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax.placement import Towers
from clipjax.sharding import BATCH

Tree = Any  # of arrays
Part = Callable[[Tree], Tree]  # params -> those that `Encode` reads
Encode = Callable[[Tree, Tree], Tree]  # (part of params, rows) -> embeddings
Loss = Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]  # (params, embeddings, rows) -> (value, aux)
ValueAndGrad = Callable[[Tree, Tree], tuple[tuple[jax.Array, Tree], Tree]]  # (params, rows) -> ((value, aux), gradient)


def value_and_grad(encode: Encode, loss: Loss, mesh: Mesh, towers: Towers, micro_batches: int, part: Part) -> ValueAndGrad:
    """`(params, rows) -> ((value, aux), gradient)` of `loss(params, encode(part(params), rows), rows) -> (value, aux)`.

    `rows` are arrays [B, ...] sharded over the devices of the batch. `encode` maps examples one by one: row i of its result
    depends on row i of `rows` alone, so it may be called with any part of them. If `towers.axes` is not empty, it is called in a
    shard_map with a device's own rows, else with the global ones.
    With one micro-batch this is the plain gradient. With more, which must divide the rows of a device, activations of
    B / micro_batches examples exist at a time, and the towers' forward pass runs twice.
    """
    if micro_batches > 1:
        return TwoPasses(encode, loss, mesh, towers, np.arange(micro_batches, dtype=np.int32), part)
    encode_batch = over_devices(
        lambda params, rows: encode(towers.full(params), rows), mesh, towers, (towers.specs, P(BATCH)), P(BATCH)
    )
    return jax.value_and_grad(lambda params, rows: loss(params, encode_batch(part(params), rows), rows), has_aux=True)


def over_devices(
    fn: Callable[..., Tree], mesh: Mesh, towers: Towers, in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Tree]:
    """`fn` in a shard_map, on each device's own rows, if `towers.axes` names mesh axes; else `fn` itself, on the global rows."""
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs) if towers.axes else fn


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as a function is
class TwoPasses:
    """`value_and_grad` with micro-batches. Each has the same number of rows of every device, so no row changes its device."""

    encode: Encode
    loss: Loss
    mesh: Mesh
    towers: Towers
    indices: Any  # int32, of the micro-batches: 0, 1, ...
    part: Part

    def __call__(self, params: Tree, rows: Tree) -> tuple[tuple[jax.Array, Tree], Tree]:
        specs = self.towers.specs
        read, place = jax.vjp(self.part, params)
        z = over_devices(self.forward, self.mesh, self.towers, (specs, P(BATCH)), P(BATCH))(read, rows)
        # The loss reads scale and bias directly, so `grads` is their full gradient. The towers add none to it.
        value, (grads, dz) = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)(params, z, rows)
        backward = over_devices(self.backward, self.mesh, self.towers, (specs, P(BATCH), P(BATCH)), specs)
        return value, jax.tree.map(jnp.add, grads, *place(backward(read, rows, dz)))

    def forward(self, params: Tree, rows: Tree) -> Tree:
        """Embeddings of all rows [b, ...], micro-batch by micro-batch."""
        full = self.towers.full(params)
        stacked = jax.lax.map(lambda j: self.encode(full, self.take(rows, j)), self.indices)
        return jax.tree.map(self.join, stacked)

    def backward(self, params: Tree, rows: Tree, dz: Tree) -> Tree:
        """The gradient of params from that of the embeddings [b, ...], summed over micro-batches and then over devices."""
        full, sum_over_devices = jax.vjp(self.towers.full, params)

        def add(grads: Tree, j: jax.Array) -> tuple[Tree, None]:
            _, pullback = jax.vjp(lambda p: self.encode(p, self.take(rows, j)), full)
            return jax.tree.map(jnp.add, grads, pullback(self.take(dz, j))[0]), None

        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, full), self.indices)
        return sum_over_devices(grads)[0]

    def take(self, rows: Tree, j: jax.Array) -> Tree:
        """The j-th micro-batch: arrays [b, ...] -> [b / micro_batches, ...]."""
        devices, n = self.towers.placement.devices, len(self.indices)

        def of_array(x: jax.Array) -> jax.Array:
            parts = x.reshape(devices, n, -1, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(parts, j, 1, keepdims=False).reshape(-1, *x.shape[1:])

        return jax.tree.map(of_array, rows)

    def join(self, x: jax.Array) -> jax.Array:
        """All micro-batches [n, b / n, ...] as one batch [b, ...], its rows in the original order."""
        devices, n = self.towers.placement.devices, len(self.indices)
        return x.reshape(n, devices, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
