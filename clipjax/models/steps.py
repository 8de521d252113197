"""Layers that take one token of each caption at a time, with what they keep of those before."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from clipjax.models.layers import Cache

# x [b, n, d] of the tokens at a position, all layers' caches, the position, what is visible, what else each layer sees -> x of
# the last layer, and the caches with these tokens in them.
Step = Callable[[Array, Any, Array, Array, Any], tuple[Float[Array, "b n d"], Any]]


def apart(stacked: Any, unroll: int) -> Any:
    """A tree of all layers' arrays [L, ...]; where layers are unrolled, a list of each layer's: on a CPU, XLA would cut them out
    again for every token.
    """
    depth = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)] if unroll >= depth else stacked


def stepper(blocks: nnx.Module, unroll: int) -> Step:
    """Takes tokens through every layer of a stacked Block or DecoderBlock; caches and what is seen are as `apart` gives them."""
    graphdef, stacked = nnx.split(blocks)
    weights = apart(stacked, unroll)

    def step(x: Array, caches: Any, at: Array, mask: Array, seen: Any) -> tuple[Array, Any]:
        def layer(x: Array, own: tuple[nnx.State, Cache, Any]) -> tuple[Array, Cache]:
            weights, cache, seen = own
            return nnx.merge(graphdef, weights).step(x, cache, at, mask, *seen)

        def put(cache: Cache, new: Cache) -> Cache:
            return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, at, x.ndim - 2) for x, y in zip(cache, new, strict=True))

        if not isinstance(weights, list):
            x, new = jax.lax.scan(layer, x, (weights, caches, seen), unroll=unroll)
            return x, put(caches, new)
        made = []
        for own in zip(weights, caches, seen or [()] * len(weights), strict=True):
            x, new = layer(x, own)
            made.append(put(own[1], new))
        return x, made

    return step
