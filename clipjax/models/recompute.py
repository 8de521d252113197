"""A stack of layers whose backward pass recomputes what a policy of jax.checkpoint does not keep.

Autodiff of a scan over layers around a loop over chunks copies a layer's input into the stack of all inputs, copies it out again,
fills the gradient's buffer with zeros and copies into it. Here chunks are read where they lie and written where they stay.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

Weights = Any  # a tree of arrays: [L, ...] of all layers, or without that axis of one
Gather = Callable[[Weights], Weights]  # sharded weights of one layer -> full ones
Layer = Callable[..., Array]  # (full weights, x [p, t, d], *context of these rows) -> [p, t, d]
Policy = Callable[..., Any]  # of jax.checkpoint: which values the backward pass finds again


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def run_layers(
    layer: Layer,
    gather: Gather,
    policy: Policy,
    unroll: int,
    stacked: Weights,
    x: Float[Array, "n p t d"],
    context: tuple[Any, ...],
) -> Float[Array, "n p t d"]:
    """x through all layers, one chunk [p, t, d] after the other. `context`: arrays [n, p, ...] or None, for every layer."""

    def one_layer(x: Array, weights: Weights) -> tuple[Array, None]:
        full = gather(weights)

        def one_chunk(i: Array, x: Array) -> Array:
            return _put(x, layer(full, *_take((x, *context), i)), i)

        return jax.lax.fori_loop(0, len(x), one_chunk, x), None

    return jax.lax.scan(one_layer, x, stacked, unroll=unroll)[0]


def _forward(
    layer: Layer, gather: Gather, policy: Policy, unroll: int, stacked: Weights, x: Array, context: tuple[Any, ...]
) -> tuple[Array, tuple[Any, ...]]:
    """The same, which also gives the inputs of all layers, [L + 1, n, p, t, d] with the last one's output, and what is kept."""
    depth = len(jax.tree.leaves(stacked)[0])
    chunk = functools.partial(_Chunk, layer, policy)

    def kept_of_one(weights: Weights, x: Array, context: tuple[Any, ...]) -> list[Array]:
        return chunk(gather(jax.tree.map(lambda w: w[0], weights)), *_take((x, context), 0)).kept

    shapes = jax.eval_shape(kept_of_one, stacked, x, context)
    kept = [_empty((depth, len(x), *k.shape), k.dtype, x) for k in shapes]
    inputs = _put(_empty((depth + 1, *x.shape), x.dtype, x), x, 0)

    def one_layer(carry: tuple[Array, list[Array]], of_layer: tuple[Array, Weights]) -> tuple[Any, None]:
        number, weights = of_layer
        full = gather(weights)

        def one_chunk(i: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
            inputs, kept = carry
            done = chunk(full, inputs[number, i], _take(context, i))
            kept = [_put(whole, part, number, i) for whole, part in zip(kept, done.kept, strict=True)]
            return _put(inputs, done.y, number + 1, i), kept

        return jax.lax.fori_loop(0, len(x), one_chunk, carry), None

    (inputs, kept), _ = jax.lax.scan(one_layer, (inputs, kept), (jnp.arange(depth), stacked), unroll=unroll)
    return inputs[-1], (stacked, inputs, kept, context)


def _backward(
    layer: Layer, gather: Gather, policy: Policy, unroll: int, of_forward: tuple[Any, ...], dx: Array
) -> tuple[Any, ...]:
    stacked, inputs, kept, context = of_forward

    def one_layer(carry: tuple[Array, Any], of_layer: tuple[Array, Weights]) -> tuple[tuple[Array, Any], Weights]:
        number, weights = of_layer
        full, to_shards = jax.vjp(gather, weights)

        def one_chunk(i: Array, carry: tuple[Array, Any, Weights]) -> tuple[Array, Any, Weights]:
            dx, dcontext, dfull = carry
            chunk = _Chunk(layer, policy, full, inputs[number, i], _take(context, i))
            of_weights, of_x, of_context = chunk.gradients([whole[number, i] for whole in kept], dx[i])
            dcontext = jax.tree.map(lambda whole, part: _put(whole, whole[i] + part, i), dcontext, of_context)
            return _put(dx, of_x, i), dcontext, jax.tree.map(jnp.add, dfull, of_weights)

        start = (*carry, jax.tree.map(jnp.zeros_like, full))
        dx, dcontext, dfull = jax.lax.fori_loop(0, inputs.shape[1], one_chunk, start)
        return (dx, dcontext), to_shards(dfull)[0]

    of_layers = jnp.arange(len(inputs) - 1), stacked
    start = dx, jax.tree.map(jnp.zeros_like, _differentiable(context))
    (dx, dcontext), dstacked = jax.lax.scan(one_layer, start, of_layers, reverse=True, unroll=unroll)
    return dstacked, dx, dcontext


run_layers.defvjp(_forward, _backward)


class _Chunk:
    """A layer's forward pass on one chunk, and its backward pass from what the policy keeps.

    The backward pass traces the forward pass again. What is kept takes the place of what that would make, which the compiler then
    leaves out.
    """

    def __init__(self, layer: Layer, policy: Policy, weights: Weights, x: Array, context: tuple[Any, ...]) -> None:
        def run(weights: Weights, x: Array, differentiable: tuple[Any, ...]) -> Array:
            return layer(weights, x, *(c if d is None else d for c, d in zip(context, differentiable, strict=True)))

        checkpointed = jax.checkpoint(run, policy=policy, prevent_cse=False)
        self.y, pullback = jax.vjp(checkpointed, weights, x, _differentiable(context))
        self._leaves, self._structure = jax.tree.flatten(pullback)
        given = [id(leaf) for leaf in jax.tree.leaves((weights, x, context))]
        self._at = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tracer) and id(leaf) not in given]

    @property
    def kept(self) -> list[Array]:
        """What the backward pass needs besides the arguments."""
        return [self._leaves[i] for i in self._at]

    def gradients(self, kept: list[Array], dy: Array) -> tuple[Weights, Array, Any]:
        """With respect to the weights, x and the differentiable context."""
        leaves = self._leaves.copy()
        for i, leaf in zip(self._at, kept, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(self._structure, leaves)(dy)


def _differentiable(context: tuple[Any, ...]) -> tuple[Any, ...]:
    """The context with None in place of masks."""
    return tuple(c if c is not None and jnp.issubdtype(c.dtype, jnp.inexact) else None for c in context)


def _take(trees: Any, i: int | Array) -> Any:
    """The i-th chunk of trees of arrays [n, ...]."""
    return jax.tree.map(lambda c: c[i], trees)


def _empty(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """An array that is written before it is read. In a shard_map it differs between the devices between which `like` does."""
    axes = tuple(jax.typeof(like).mat.varying)
    empty = jax.lax.empty(shape, dtype)
    return jax.lax.pcast(empty, axes, to="varying") if axes else empty


def _put(whole: Array, part: Array, *index: int | Array) -> Array:
    """`whole` with `part` at `whole[index]`. `.at[index].set` would read what is there: the index may be out of bounds."""
    indices = (*index, *[0] * part.ndim)
    return jax.lax.dynamic_update_slice(whole, jnp.expand_dims(part, range(len(index))), indices)
