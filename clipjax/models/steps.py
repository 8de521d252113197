"""Layers that take one token of each caption at a time, with the keys and values of the tokens before."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from clipjax.models.attention import Cache

# x [b, n, d] of the tokens at one position, the caches of all layers, the position, the mask, each layer's further arguments
# -> x after the last layer, and the caches with these tokens in them.
Step = Callable[[Array, Any, Array, Array, Any], tuple[Float[Array, "b n d"], Any]]


def unstack_layers(stacked: Any, unroll: int) -> Any:
    """A tree of all layers' arrays [L, ...]; where layers are unrolled, a list of each layer's trees. On a CPU, XLA would
    otherwise slice them again for every token.
    """
    depth = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)] if unroll >= depth else stacked


def make_layer_step(blocks: nnx.Module, unroll: int) -> Step:
    """A step through every layer of a stacked Block or DecoderBlock. It takes and gives trees as `unstack_layers` makes them."""
    graphdef, stacked = nnx.split(blocks)
    weights = unstack_layers(stacked, unroll)

    def step(x: Array, caches: Any, at: Array, mask: Array, context: Any) -> tuple[Array, Any]:
        def layer(x: Array, of_layer: tuple[nnx.State, Cache, Any]) -> tuple[Array, Cache]:
            weights, cache, context = of_layer
            block: Any = nnx.merge(graphdef, weights)
            return block.step(x, cache, at, mask, *context)

        if not isinstance(weights, list):
            x, new = jax.lax.scan(layer, x, (weights, caches, context), unroll=unroll)
            return x, _write(caches, new, at)
        written = []
        for of_layer in zip(weights, caches, context or [()] * len(weights), strict=True):
            x, new = layer(x, of_layer)
            written.append(_write(of_layer[1], new, at))
        return x, written

    return step


def _write(cache: Cache, new: Cache, at: Array) -> Cache:
    """The cache with a token's keys and values at position `at`."""
    keys, values = (jax.lax.dynamic_update_slice_in_dim(x, y, at, x.ndim - 2) for x, y in zip(cache, new, strict=True))
    return keys, values
