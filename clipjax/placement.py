"""How the towers run on a mesh: on which rows of the batch, and where the full weights of a part come from.

A part is one layer of a tower, or what is around its layers. The table of tokens is none: where it is sharded, no device ever has
all of it.

There are three ways. A mesh takes the first row of this table whose axis has more than one device, else the row `data`.

| axis   | a training step gives the towers  | their parts run           | a part's full weights     | gradients are summed      |
| ------ | --------------------------------- | ------------------------- | ------------------------- | ------------------------- |
| tensor | the global batch                  | under the compiler, with  | a sharding constraint     | by the compiler           |
|        |                                   | sharding constraints      |                           |                           |
| fsdp   | the global batch                  | in a shard_map around     | an all_gather, once for   | and scattered, part by    |
|        |                                   | each part                 | all chunks                | part                      |
| data   | a device's rows, in a shard_map   | as on one device          | on every device           | once, in float32, after   |
|        | around both towers                |                           |                           | the last micro-batch      |

With mesh.shard_optimizer the state shards its weights over `data`, too. In the way `data` a step first gathers them, and of the
summed gradients each device gets its share, which it updates alone.

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
from clipjax.models.runner import LAYERS, ONE_DEVICE, Body, Gather, LookUp, Placement, RunPart, look_up, run_on_one_device
from clipjax.sharding import AUTO, AXES, BATCH, REPLICATED, batch_devices, keystr, over_rows, spec


class Way(NamedTuple):
    """A row of the table."""

    step_axes: tuple[str, ...]  # mesh axes of the shard_map around the towers in a training step; (): they get the global batch
    parts: Callable[[Mesh, str], RunPart]  # how a tower's parts run on a mesh, with kernels multiplied in a dtype


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
    specs: Any  # PartitionSpecs of what the shard_map over `axes` gets of the parameters
    full: Callable[[Any], Any]  # these, in it -> a device's own full weights, whose gradients are summed in float32
    # -log p of targets [n], from states [n, d] and words [v, d]: a device's own arrays, or global ones if axes = ().
    token_nll: Callable[..., jax.Array]


def towers(mesh: Mesh, dtype: str, specs: Any = REPLICATED) -> Towers:
    """How a training step runs the towers on a mesh. `dtype`: of the towers' arithmetic. `specs`: of the parameters, a tree or a
    prefix of one, with `data` where that shards them.
    """
    axes = way(mesh).step_axes
    if not axes:
        return Towers(make_placement(mesh, dtype), axes, specs, lambda params: params, token_nll_on(mesh))
    return Towers(ONE_DEVICE, axes, specs, functools.partial(_full, specs, dtype), token_nll)


def _full(specs: Any, dtype: str, params: Any) -> Any:
    """A device's full weights, gathered from its shards over `data`. Kernels travel in `dtype`, in which they are multiplied.
    Gradients are summed in float32, and each device gets its shard.
    """

    def full(path: tuple, axes: P, below: Any) -> Any:
        if "data" not in axes:
            return vary(below, BATCH)
        travels = jnp.dtype(dtype) if keystr(path).endswith("kernel") else below.dtype
        return _gathered_over_data(tuple(axes).index("data"), travels, vary(below, BATCH))

    return jax.tree_util.tree_map_with_path(full, specs, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered_over_data(axis: int, dtype: jnp.dtype, shard: jax.Array) -> jax.Array:
    # Not all_gather(axis=axis): on TPUs its result has the axis outermost, before the layers', and each turn of the scan over
    # layers then collects its weights from all over the memory.
    shards = jnp.moveaxis(jax.lax.all_gather(shard.astype(dtype), "data"), 0, axis)
    return shards.reshape(*shard.shape[:axis], -1, *shard.shape[axis + 1 :]).astype(shard.dtype)


def _scattered_over_data(axis: int, dtype: jnp.dtype, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    shards = gradient.reshape(*gradient.shape[:axis], jax.lax.axis_size("data"), -1, *gradient.shape[axis + 1 :])
    return (jax.lax.psum_scatter(jnp.moveaxis(shards, axis, 0), "data"),)


_gathered_over_data.defvjp(lambda axis, dtype, shard: (_gathered_over_data(axis, dtype, shard), None), _scattered_over_data)


def make_placement(mesh: Mesh, dtype: str) -> Placement:
    """How the towers run on global arrays on a mesh. `dtype`: of the towers' arithmetic."""
    sharded = mesh.shape["fsdp"] > 1
    return Placement(batch_devices(mesh), way(mesh).parts(mesh, dtype), look_up_on(mesh) if sharded else look_up)


def look_up_on(mesh: Mesh) -> LookUp:
    """`runner.look_up` in a table sharded over `fsdp`. No device ever has the full table or its full gradient.

    Each device takes, from its columns of the table, the rows that any device of its group needs, and sends each device its own.
    What travels is a shard of the table, which comes as rows, and as many numbers as the result has.
    """

    def on_device(columns: jax.Array, ids: jax.Array) -> jax.Array:
        needed = jax.lax.all_gather(ids, "fsdp")
        found = jnp.take(columns, needed, axis=0)
        return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=found.ndim - 1, tiled=True)[0]

    def global_look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
        fn = jax.shard_map(on_device, mesh=mesh, in_specs=(P(None, "fsdp"), P(BATCH)), out_specs=P(BATCH))
        return fn(_with_columns(table, mesh), ids)[..., : table.shape[1]]

    return global_look_up


def token_nll_on(mesh: Mesh) -> Callable[..., jax.Array]:
    """`losses.token_nll` of global arrays: tokens sharded as the batch, words over `tensor`, their width over `fsdp`."""

    def global_token_nll(states: jax.Array, words: jax.Array, targets: jax.Array) -> jax.Array:
        axis = "tensor" if len(words) % mesh.shape["tensor"] == 0 else None  # else the words are replicated
        columns = "fsdp" if mesh.shape["fsdp"] > 1 else None
        fn = functools.partial(token_nll, axis=axis, columns=columns)
        specs = P(BATCH), P(axis, columns), P(BATCH)
        return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P(BATCH))(states, _with_columns(words, mesh), targets)

    return global_token_nll


def _with_columns(table: jax.Array, mesh: Mesh) -> jax.Array:
    """A table [v, d] with zeros after its columns, so that `fsdp` divides them."""
    missing = -table.shape[1] % mesh.shape["fsdp"]
    return jnp.pad(table, ((0, 0), (0, missing))) if missing else table


def _constrained(mesh: Mesh, dtype: str, body: Body, path: str, weights: nnx.State, *x: Any) -> Any:
    """Runs a part on global arrays. Sharding constraints on activations and gathered weights guide the compiler."""

    def constrain(weights: nnx.State) -> nnx.State:
        gathered = jax.tree.map(lambda p: NamedSharding(mesh, p), _specs(weights, mesh, fsdp=1))
        return jax.lax.with_sharding_constraint(weights, gathered)

    return body(_gather(constrain, dtype), lambda x: jax.lax.with_sharding_constraint(x, over_rows(mesh)), weights, *x)


def _mapped(mesh: Mesh, dtype: str, body: Body, path: str, weights: nnx.State, *x: Any) -> Any:
    """Runs a part in a shard_map over all devices, each of which gathers the weights: of layers, one layer's at a time."""
    specs, stacked = _specs(weights, mesh, f"tower/{path}/"), path == LAYERS

    def on_device(weights: nnx.State, *x: Any) -> Any:
        gather = _gather(lambda weights: jax.tree.map(functools.partial(_all_gather, stacked), weights, specs), dtype)
        return body(gather, lambda x: x, vary(weights, BATCH), *x)

    rows = P(None, BATCH)
    return jax.shard_map(on_device, mesh=mesh, in_specs=(specs, *[rows] * len(x)), out_specs=rows)(weights, *x)


def _gather(fetch: Callable[[nnx.State], nnx.State], dtype: str) -> Gather:
    """A layer's full weights by `fetch`. Kernels travel in `dtype`, in which they are multiplied."""
    return lambda weights: jax.tree.map(lambda x, own: x.astype(own.dtype), fetch(cast_kernels(weights, dtype)), weights)


def _all_gather(stacked: bool, x: jax.Array, axes: P) -> jax.Array:
    """A parameter, gathered over `fsdp`. `stacked`: x is one layer's, and `axes` are all layers', which have one more."""
    found = [i - stacked for i, name in enumerate(axes) if name == "fsdp"]
    return jax.lax.all_gather(x, "fsdp", axis=found[0], tiled=True) if found else x


def _specs(weights: nnx.State, mesh: Mesh, prefix: str = "", **sizes: int) -> Any:
    """The PartitionSpecs of a tower's layers, on the mesh or, with `sizes`, on one with other sizes of these axes."""
    other = AbstractMesh(tuple((dict(mesh.shape) | sizes).values()), AXES, axis_types=AUTO)
    return jax.tree_util.tree_map_with_path(lambda path, x: spec(prefix + _name(path), x.shape, other), weights)


def cast_kernels(weights: Any, dtype: str) -> Any:
    """A tree of parameters, or an nnx.State, with all kernels in `dtype`."""

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x.astype(jnp.dtype(dtype)) if _name(path).endswith("kernel") else x

    return jax.tree_util.tree_map_with_path(cast, weights)


def _name(path: tuple) -> str:
    """The path of a parameter. In an nnx.State it has one more part, `value`."""
    return keystr(path).removesuffix("/value")
