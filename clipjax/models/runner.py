"""How a tower's layers are run: chunk by chunk, scanned or unrolled, on one device or a mesh; what the backward pass recomputes.

A batch is [n, p, ...] here: n chunks of p rows each, run one after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

# Tokens of a device in one chunk: enough to fill a matrix unit. A layer's recomputed activations, many times the size of its
# input, exist for one chunk at a time.
CHUNK_TOKENS = 4096
FULL_WEIGHTS, HIDDEN = "full weights", "hidden"  # names of values: gathered weights are never kept, MLPs' hidden units by `mlp`
REMAT_POLICIES = {  # config.Model.remat -> what the backward pass keeps; it recomputes the rest
    "none": jax.checkpoint_policies.save_anything_except_these_names(FULL_WEIGHTS),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names(HIDDEN),
    "full": jax.checkpoint_policies.nothing_saveable,
}
CHUNKED_POLICIES = ("mlp", "full")  # those that recompute so much that a batch is run in chunks

Gather = Callable[[nnx.State], nnx.State] | None  # a layer's sharded weights -> its full weights; None: they are full already
Constrain = Callable[[Array], Array]  # activations [p, t, d] -> the same, sharded as the rows of the batch
Context = tuple[Array | None, ...]  # what each layer gets beside x, in chunks as x: masks, an image's tokens
Body = Callable[[Gather, Constrain, nnx.State, Array, Context], Array]  # runs all layers: stacked weights, x, context -> x
RunLayers = Callable[[Body, nnx.State, Array, Context], Array]  # runs a body on stacked weights and x [n, p, t, d]


def run_on_one_device(body: Body, stacked: nnx.State, x: Array, context: Context) -> Array:
    """Runs layers where every device has the full weights."""
    return body(None, lambda x: x, stacked, x, context)


@dataclass(frozen=True)
class Placement:
    """How a batch's rows and a tower's weights are sharded; clipjax.placement makes one for a mesh."""

    devices: int = 1  # over which the rows of arrays [b, ...] are sharded
    run: RunLayers = run_on_one_device


ONE_DEVICE = Placement()


@dataclass(frozen=True)
class Runner:
    """Runs a tower's layers."""

    remat: str = "none"  # a key of REMAT_POLICIES
    unroll: int = 1  # layers per iteration of the scan
    placement: Placement = ONE_DEVICE

    def to_chunks(self, x: Shaped[Array, "b ..."], tokens: int) -> Shaped[Array, "n p ..."]:
        """A batch in chunks. On each device a chunk has at most CHUNK_TOKENS tokens; an example has `tokens`.

        Policies that keep much save little by chunks: with them the batch is one chunk.
        """
        rows, n = len(x) // self.placement.devices, 1
        if self.remat in CHUNKED_POLICIES:
            n = next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * tokens <= CHUNK_TOKENS or n == rows))
        return einops.rearrange(x, "(d n p) ... -> n (d p) ...", d=self.placement.devices, n=n)

    def from_chunks(self, x: Any) -> Any:
        """Arrays [n, p, ...], or a tree of them, back to [b, ...]."""
        devices = self.placement.devices
        return jax.tree.map(lambda x: einops.rearrange(x, "n (d p) ... -> (d n p) ...", d=devices), x)

    def map_chunks(self, fn: Callable[..., Any], *x: Any) -> Any:
        """`fn` on one chunk after the other: from trees of arrays [n, p, ...] to a tree of arrays [n, p, ...]."""
        n = len(jax.tree.leaves(x)[0])
        if self.remat in CHUNKED_POLICIES:
            fn = jax.checkpoint(fn, prevent_cse=n == 1, policy=REMAT_POLICIES[self.remat])
        if n == 1:
            return jax.tree.map(lambda y: y[None], fn(*jax.tree.map(lambda x: x[0], x)))
        return jax.lax.map(lambda chunk: fn(*chunk), x)

    def layers(self, blocks: nnx.Module, x: Float[Array, "n p t d"], *context: Array | None) -> Float[Array, "n p t d"]:
        """x through every layer of a stacked Block. Each layer also gets `context`, arrays [n, p, ...]."""
        graphdef, stacked = nnx.split(blocks)

        def body(gather: Gather, constrain: Constrain, stacked: nnx.State, x: Array, context: Context) -> Array:
            def layer(x: Array, weights: nnx.State) -> tuple[Array, None]:
                full = checkpoint_name(gather(weights), FULL_WEIGHTS) if gather else weights
                return self.map_chunks(_block(graphdef, full, constrain), x, *context), None

            return self._scan(layer, x, stacked, checkpoint=self.remat != "none" or gather is not None)

        return self.placement.run(body, stacked, x, context)

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


def _block(graphdef: nnx.GraphDef, weights: nnx.State, constrain: Constrain) -> Callable[..., Array]:
    """One layer as a function of x and its context."""
    return lambda x, *context: constrain(nnx.merge(graphdef, weights)(x, *context))
