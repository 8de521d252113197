"""How the towers run on a mesh: on which rows of the batch, and where a layer's full weights come from.

There are three ways. A mesh takes the first row of this table whose axis has more than one device, else the row `data`.

| axis   | a training step gives the towers  | the layers run            | a layer's full weights    | gradients are summed      |
| ------ | --------------------------------- | ------------------------- | ------------------------- | ------------------------- |
| tensor | the global batch                  | under the compiler, with  | a sharding constraint     | by the compiler           |
|        |                                   | sharding constraints      |                           |                           |
| fsdp   | the global batch                  | in a shard_map around the | an all_gather, once for   | and scattered, layer by   |
|        |                                   | layers of a tower         | all chunks                | layer                     |
| data   | a device's rows, in a shard_map   | as on one device          | on every device           | once, in float32, after   |
|        | around both towers                |                           |                           | the last micro-batch      |

These are the reasons; the first two were measured.

- `data`, left to the compiler, summed gradients in the products' dtype, and after every micro-batch.
- `fsdp`, left to the compiler, sharded activations over their width in every layer, and summed attention scores over devices,
  instead of gathering the layer's weights.
- Where weights are sharded, a device cannot sum its own gradients first: that sum would be a full copy of the weights.

Evaluation and captions have no gradient: they always get the global batch. docs/towers.md has a diagram.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax.losses import token_nll
from clipjax.losses.pairwise.axes import vary
from clipjax.models.runner import ONE_DEVICE, Body, Context, Gather, Placement, RunLayers, run_on_one_device
from clipjax.sharding import AUTO, AXES, BATCH, batch_devices, keystr, over_rows, spec


class Way(NamedTuple):
    """A row of the table."""

    step_axes: tuple[str, ...]  # mesh axes of the shard_map around the towers in a training step; (): they get the global batch
    layers: Callable[[Mesh, str], RunLayers]  # how layers run on a mesh, with kernels multiplied in a dtype


WAYS = {
    "tensor": Way((), lambda mesh, dtype: functools.partial(_constrained, mesh, dtype)),
    "fsdp": Way((), lambda mesh, dtype: functools.partial(_mapped, mesh, dtype)),
    "data": Way(BATCH, lambda mesh, dtype: run_on_one_device),
}


def way(mesh: Mesh) -> Way:
    """The row of the table that holds for a mesh."""
    return WAYS[next((axis for axis in WAYS if mesh.shape[axis] > 1), "data")]


class Towers(NamedTuple):
    """How a training step runs the towers."""

    placement: Placement
    axes: tuple[str, ...]  # Way.step_axes
    # -log p of targets [n], from states [n, d] and words [v, d]: a device's own arrays, or global ones if axes = ().
    token_nll: Callable[..., jax.Array]


def towers(mesh: Mesh, dtype: str) -> Towers:
    """How a training step runs the towers on a mesh. `dtype`: of the towers' arithmetic."""
    axes = way(mesh).step_axes
    return Towers(ONE_DEVICE, axes, token_nll) if axes else Towers(make_placement(mesh, dtype), axes, token_nll_on(mesh))


def make_placement(mesh: Mesh, dtype: str) -> Placement:
    """How the towers run on global arrays on a mesh. `dtype`: of the towers' arithmetic."""
    return Placement(batch_devices(mesh), way(mesh).layers(mesh, dtype))


def token_nll_on(mesh: Mesh) -> Callable[..., jax.Array]:
    """`losses.token_nll` of global arrays on a mesh: states and targets sharded as the batch, words over `tensor`."""

    def global_token_nll(states: jax.Array, words: jax.Array, targets: jax.Array) -> jax.Array:
        axis = "tensor" if len(words) % mesh.shape["tensor"] == 0 else None  # else the words are replicated
        fn = functools.partial(token_nll, axis=axis)
        return jax.shard_map(fn, mesh=mesh, in_specs=(P(BATCH), P(axis), P(BATCH)), out_specs=P(BATCH))(states, words, targets)

    return global_token_nll


def _constrained(mesh: Mesh, dtype: str, body: Body, stacked: nnx.State, x: jax.Array, context: Context) -> jax.Array:
    """Runs layers on global arrays. Sharding constraints on activations and gathered weights guide the compiler."""

    def constrain(weights: nnx.State) -> nnx.State:
        gathered = jax.tree.map(lambda p: NamedSharding(mesh, p), _specs(weights, mesh, fsdp=1))
        return jax.lax.with_sharding_constraint(weights, gathered)

    return body(_gather(constrain, dtype), lambda x: jax.lax.with_sharding_constraint(x, over_rows(mesh)), stacked, x, context)


def _mapped(mesh: Mesh, dtype: str, body: Body, stacked: nnx.State, x: jax.Array, context: Context) -> jax.Array:
    """Runs layers in a shard_map over all devices, each of which gathers a layer's weights."""
    specs = _specs(stacked, mesh, prefix="tower/blocks/")

    def on_device(stacked: nnx.State, x: jax.Array, context: Context) -> jax.Array:
        gather = _gather(lambda weights: jax.tree.map(_all_gather, weights, specs), dtype)
        return body(gather, lambda x: x, vary(stacked, BATCH), x, context)

    rows = P(None, BATCH)
    return jax.shard_map(on_device, mesh=mesh, in_specs=(specs, rows, rows), out_specs=rows)(stacked, x, context)


def _gather(fetch: Callable[[nnx.State], nnx.State], dtype: str) -> Gather:
    """A layer's full weights by `fetch`. Kernels travel in `dtype`, in which they are multiplied."""
    return lambda weights: cast_like(fetch(cast_kernels(weights, dtype)), weights)


def _all_gather(x: jax.Array, stacked: P) -> jax.Array:
    """One layer's parameter, gathered over `fsdp`. `stacked`: the spec of the stacked parameter, which has one more axis."""
    axes = [i - 1 for i, name in enumerate(stacked) if name == "fsdp"]
    return jax.lax.all_gather(x, "fsdp", axis=axes[0], tiled=True) if axes else x


def _specs(weights: nnx.State, mesh: Mesh, prefix: str = "", **sizes: int) -> Any:
    """The PartitionSpecs of a tower's layers, on the mesh or, with `sizes`, on one with other sizes of these axes."""
    other = AbstractMesh(tuple((dict(mesh.shape) | sizes).values()), AXES, axis_types=AUTO)
    return jax.tree_util.tree_map_with_path(lambda path, x: spec(prefix + _name(path), x.shape, other), weights)


def cast_kernels(weights: Any, dtype: str) -> Any:
    """A tree of parameters, or an nnx.State, with all kernels in `dtype`."""

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x.astype(jnp.dtype(dtype)) if _name(path).endswith("kernel") else x

    return jax.tree_util.tree_map_with_path(cast, weights)


def cast_like(weights: nnx.State, others: nnx.State) -> nnx.State:
    """Each array in the dtype of the same array of `others`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), weights, others)


def _name(path: tuple) -> str:
    """The path of a parameter. In an nnx.State it has one more part, `value`."""
    return keystr(path).removesuffix("/value")
