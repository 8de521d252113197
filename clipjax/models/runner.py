"""How a tower's layers are run: chunk by chunk, scanned or unrolled, on one device or a mesh; what the backward pass recomputes.

A batch is [n, p, ...] here: n chunks of p rows each, run one after the other.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from clipjax.models.recompute import run_layers

# Tokens of a device in one chunk, unless model.part says otherwise: enough to fill a matrix unit. A layer's recomputed
# activations, many times the size of its input, exist for one chunk at a time.
DEFAULT_PART = 4096
FULL_WEIGHTS, HIDDEN = "full weights", "hidden"  # names of values: gathered weights are never kept, MLPs' hidden units by `mlp`
REMAT_POLICIES = {  # config.Model.remat -> what the backward pass keeps; it recomputes the rest
    "none": jax.checkpoint_policies.save_anything_except_these_names(FULL_WEIGHTS),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names(HIDDEN),
    "full": jax.checkpoint_policies.nothing_saveable,
}
CHUNKED_POLICIES = ("dots", "mlp", "full")  # those that recompute: a batch is run in chunks

LAYERS, TABLE = "blocks", "tokens"  # attributes of a tower: its layers, its table of token embeddings
Gather = Callable[[nnx.State], nnx.State] | None  # sharded weights, of one layer -> full weights; None: they are full already
Constrain = Callable[[Array], Array]  # activations [p, t, d] -> the same, sharded as the rows of the batch
Body = Callable[..., Any]  # runs part of a tower: (Gather, Constrain, weights, *trees of arrays [n, p, ...]) -> such a tree
# Runs a body: (body, the path of its weights in a tower, weights, *trees). LAYERS is the path of all layers' stacked weights.
RunPart = Callable[..., Any]


def run_on_one_device(body: Body, path: str, weights: nnx.State, *x: Any) -> Any:
    """Runs a part of a tower where every device has its full weights."""
    return body(None, lambda x: x, weights, *x)


LookUp = Callable[[Array, Array], Array]  # (table [v, d], ids [b, t]) -> the table's rows [b, t, d]


def look_up(table: Float[Array, "v d"], ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The rows `ids` of a table that every device has in full."""
    return jnp.take(table, ids, axis=0)


@dataclass(frozen=True)
class Placement:
    """How a batch's rows and a tower's weights are sharded; clipjax.placement makes one for a mesh."""

    devices: int = 1  # over which the rows of arrays [b, ...] are sharded
    run: RunPart = run_on_one_device
    look_up: LookUp = look_up


ONE_DEVICE = Placement()


@dataclass(frozen=True)
class Runner:
    """Runs a tower's layers."""

    remat: str = "none"  # a key of REMAT_POLICIES
    unroll: int = 1  # layers per iteration of the scan
    part: int = DEFAULT_PART  # the most tokens of a device in one chunk
    placement: Placement = ONE_DEVICE

    def to_chunks(self, x: Shaped[Array, "b ..."], tokens: int) -> Shaped[Array, "n p ..."]:
        """A batch in chunks. On each device a chunk has at most `part` tokens; an example has `tokens`.

        Where nothing is recomputed, chunks would save nothing: the batch is one. Where chunks do not divide a device's rows,
        copies of its last row fill the last chunk.
        """
        devices = self.placement.devices
        rows = len(x) // devices
        n = chunk_count(rows, max(1, self.part // tokens)) if self.remat in CHUNKED_POLICIES else 1
        if missing := -rows % n:
            x = x.reshape(devices, rows, *x.shape[1:])
            last = jnp.broadcast_to(x[:, -1:], (devices, missing, *x.shape[2:]))
            x = jnp.concatenate([x, last], axis=1).reshape(-1, *x.shape[2:])
        return einops.rearrange(x, "(d n p) ... -> n (d p) ...", d=devices, n=n)

    def from_chunks(self, x: Any, count: int) -> Any:
        """Arrays [n, p, ...], or a tree of them, back to [b, ...]. b is `count`: what filled the last chunk is left out."""
        devices = self.placement.devices

        def of_array(x: Array) -> Array:
            x = einops.rearrange(x, "n (d p) ... -> (d n p) ...", d=devices)
            if len(x) == count:
                return x
            return x.reshape(devices, -1, *x.shape[1:])[:, : count // devices].reshape(count, *x.shape[1:])

        return jax.tree.map(of_array, x)

    def map_chunks(self, fn: Callable[..., Any], *x: Any) -> Any:
        """`fn` on one chunk after the other: from trees of arrays [n, p, ...] to a tree of arrays [n, p, ...]."""
        n = len(jax.tree.leaves(x)[0])
        if self.remat in CHUNKED_POLICIES:
            fn = jax.checkpoint(fn, prevent_cse=n == 1)  # what is around the layers costs little to make again
        if n == 1:
            return jax.tree.map(lambda y: y[None], fn(*jax.tree.map(lambda x: x[0], x)))
        return jax.lax.map(lambda chunk: fn(*chunk), x)

    def around_layers(self, method: Callable[..., Any], tower: nnx.Module, *x: Any) -> Any:
        """`method(tower, *chunk)` on one chunk after the other. It may use the weights of all but layers and table."""
        graphdef, others, weights = nnx.split(tower, lambda path, _: path[0] in (LAYERS, TABLE), ...)

        def body(gather: Gather, constrain: Constrain, weights: nnx.State, *x: Any) -> Any:
            def part(weights: nnx.State, *x: Any) -> Any:
                full = checkpoint_name(gather(weights), FULL_WEIGHTS) if gather else weights
                return self.map_chunks(functools.partial(method, nnx.merge(graphdef, others, full)), *x)

            return (jax.checkpoint(part, policy=REMAT_POLICIES[self.remat]) if gather else part)(weights, *x)

        return self.placement.run(body, "", weights, *x)

    def layers(
        self, blocks: nnx.Module, x: Float[Array, "n p t d"], *context: Array | None, locked: int = 0
    ) -> Float[Array, "n p t d"]:
        """x through every layer of a stacked Block. Each layer also gets `context`, arrays [n, p, ...]. The first `locked`
        layers, and what is below them, get no gradient, so they have no backward pass.
        """
        graphdef, stacked = nnx.split(blocks)

        def body(gather: Gather, constrain: Constrain, stacked: nnx.State, x: Array, *context: Array | None) -> Array:
            if locked:
                first = jax.tree.map(lambda w: jax.lax.stop_gradient(w[:locked]), stacked)
                x = jax.lax.stop_gradient(self._run(graphdef, gather, constrain, first, jax.lax.stop_gradient(x), context))
                stacked = jax.tree.map(lambda w: w[locked:], stacked)
            return self._run(graphdef, gather, constrain, stacked, x, context)

        return self.placement.run(body, LAYERS, stacked, x, *context)

    def _run(
        self, graphdef: nnx.GraphDef, gather: Gather, constrain: Constrain, stacked: nnx.State, x: Array, context: tuple
    ) -> Array:
        """x through all layers of `stacked`."""
        block = functools.partial(_run_block, graphdef, constrain)
        if self.remat in CHUNKED_POLICIES:
            policy = REMAT_POLICIES[self.remat]
            return run_layers(block, gather or (lambda weights: weights), policy, self.unroll, stacked, x, context)

        def layer(x: Array, weights: nnx.State) -> tuple[Array, None]:
            full = checkpoint_name(gather(weights), FULL_WEIGHTS) if gather else weights
            return block(full, x[0], *jax.tree.map(lambda c: c[0], context))[None], None

        return self._scan(layer, x, stacked, checkpoint=gather is not None)

    def _scan(self, layer: Callable[..., tuple[Array, None]], x: Array, stacked: nnx.State, checkpoint: bool) -> Array:
        """x through `layer`, once with each layer's weights."""
        depth = len(jax.tree.leaves(stacked)[0])
        unrolled = self.unroll >= depth
        if checkpoint:
            layer = jax.checkpoint(layer, prevent_cse=unrolled, policy=REMAT_POLICIES[self.remat])
        if not unrolled:
            return jax.lax.scan(layer, x, stacked, unroll=self.unroll)[0]
        for i in range(depth):  # not a scan with unroll=depth: it would still stack what the backward pass keeps
            x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], stacked))
        return x


def chunk_count(rows: int, most: int) -> int:
    """In how many chunks of at most `most` rows to run `rows`: as few as can be, or up to twice that where these divide them."""
    fewest = -(-rows // most)
    return next((n for n in range(fewest, 2 * fewest + 1) if rows % n == 0), fewest)


def _run_block(graphdef: nnx.GraphDef, constrain: Constrain, weights: nnx.State, x: Array, *context: Array | None) -> Array:
    return constrain(nnx.merge(graphdef, weights)(x, *context))
