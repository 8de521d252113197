"""Image-text retrieval: R@1, R@5 and R@10 in both directions, with any number of captions an image.

No device holds the matrix of similarities. The queries stay on their devices; the keys travel around the devices in a ring and
are compared tile by tile. Memory is linear in the number of images and captions.
"""

import functools
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clipjax import config
from clipjax.data.pipeline import eval_captions
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import CachedBatches, Embeddings, Encoder
from clipjax.evals.evaluation import Evaluation, Metrics, Results
from clipjax.evals.inputs import caption_batches, image_batches, require_captions
from clipjax.models.clip import Params
from clipjax.sharding import BATCH

KS = (1, 5, 10)
TILE = 1024  # keys that are compared at once

# Cosines of equal vectors differ by the rounding of float32, which depends on the batch and the tile. Cosines closer than this
# are a tie. Otherwise noise would rank duplicates, and rank them differently on another number of devices.
TIE = 1e-6

Tiles = tuple[Float[Array, "n c e"], Int[Array, "n c"]]  # n tiles of c keys, and their ids
Tile = tuple[Float[Array, "c e"], Int[Array, " c"]]


class RetrievalEvaluation(Evaluation):
    """Every image of a dataset against every caption."""

    def __init__(self, encoder: Encoder, images: CachedBatches, captions: CachedBatches) -> None:
        """The `index` of a caption is that of its image."""
        self.encoder, self.images, self.captions = encoder, images, captions
        self.dataset = images.name

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Retrieval) -> Self:
        source = open_source(data)
        require_captions(source, "retrieval")
        texts, owner = eval_captions(source, quiet=jax.process_index() > 0)
        require_captions(source, "retrieval", bool(texts))
        captions = caption_batches(encoder, tokenizer, texts, owner, source.name)
        return cls(encoder, image_batches(encoder, source, data), captions)

    def run(self, params: Params) -> Results:
        """The metrics of `recalls`."""
        images = self.encoder.embed(params, self.images)
        return Results(recalls(images, self.encoder.embed(params, self.captions), self.encoder.mesh))


def recalls(images: Embeddings, texts: Embeddings, mesh: Mesh, tile: int = TILE) -> Metrics:
    """R@K under CLIP_benchmark's names, each in [0, 1].

    `image_retrieval_recall@K` is text to image: the share of captions whose image is among the K nearest.
    `text_retrieval_recall@K` is image to text: the share of images with any of their captions among the K nearest.
    The index of a caption is that of its image. See `ranks` for ties.
    """
    found = zip(("image", "text"), jax.device_get(_hits(images, texts, mesh, tile)), strict=True)
    return {
        f"{what}_retrieval_recall@{k}": float(hits / total)
        for what, (*at_k, total) in found
        for k, hits in zip(KS, at_k, strict=True)
    }


@functools.partial(jax.jit, static_argnames=("mesh", "tile"))
def _hits(images: Embeddings, texts: Embeddings, mesh: Mesh, tile: int) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
    """For captions and for images: how many have rank at most 1, 5, 10, and how many have any rank."""

    def count(queries: Embeddings, keys: Embeddings) -> Int[Array, " k"]:
        rank = ranks(*queries.rows(), *keys.rows(), BATCH, tile)
        return jax.lax.psum(jnp.stack([(rank <= k).sum() for k in (*KS, jnp.finfo(rank.dtype).max)]), BATCH)

    def both(images: Embeddings, texts: Embeddings) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
        return count(texts, images), count(images, texts)

    rows = P(None, BATCH)
    return jax.shard_map(both, mesh=mesh, in_specs=(rows, rows), out_specs=P())(images, texts)


def half_ranks(cosines: Float[Array, "q k"], own: Float[Array, "q 1"]) -> Int[Array, "q k"]:
    """How many half ranks each key adds to the rank of a query's own key: 2 if its cosine is greater than `own`, 1 if equal.

    The counts are integers, because float32 stops counting at 2^24.
    """
    return 2 * (cosines > own + TIE) + (jnp.abs(cosines - own) <= TIE)


def ranks(
    queries: Float[Array, "q e"],
    query_ids: Int[Array, " q"],
    keys: Float[Array, "k e"],
    key_ids: Int[Array, " k"],
    axes: tuple[str, ...],
    tile: int = TILE,
) -> Float[Array, " q"]:
    """The rank, from 1, of the nearest key with a query's id among the keys of other ids; inside `shard_map` over `axes`.

    `rank = 1 + #{greater} + #{equal} / 2` is deterministic. A collapsed model, for which all keys are equal, gets half their
    number and not rank 1. Further keys of the query's own id change nothing. Padding has id -1. Padding, and a query without a
    key of its id (a caption whose image can't be read), have rank infinity and are not counted.
    """
    tiles = _tiles(keys, key_ids, min(tile, len(keys)))

    def nearest(best: Float[Array, " q"], tile: Tile) -> Float[Array, " q"]:
        cosines, own, _ = _compare(queries, query_ids, tile)
        return jnp.maximum(best, jnp.where(own, cosines, -jnp.inf).max(1))

    def count(halves: Int[Array, " q"], tile: Tile) -> Int[Array, " q"]:
        cosines, _, other = _compare(queries, query_ids, tile)
        return halves + jnp.where(other, half_ranks(cosines, best[:, None]), 0).sum(1)

    none = jax.lax.pcast(jnp.full(len(queries), -jnp.inf), axes, to="varying")
    best = _over_ring(nearest, none, tiles, axes)
    halves = _over_ring(count, jnp.zeros_like(query_ids), tiles, axes)
    return jnp.where(best > -jnp.inf, 1 + halves / 2, jnp.inf)


def _tiles(keys: Float[Array, "k e"], key_ids: Int[Array, " k"], size: int) -> Tiles:
    """The keys in tiles of `size`, the last padded."""
    pad = -len(keys) % size
    tiles = jnp.pad(keys, ((0, pad), (0, 0))).reshape(-1, size, keys.shape[-1])
    return tiles, jnp.pad(key_ids, (0, pad), constant_values=-1).reshape(-1, size)


def _compare(
    queries: Float[Array, "q e"], query_ids: Int[Array, " q"], tile: Tile
) -> tuple[Float[Array, "q c"], Bool[Array, "q c"], Bool[Array, "q c"]]:
    """The cosines of queries and keys, which pairs have the same id, and which have different ids. Padding is in neither."""
    keys, key_ids = tile
    cosines = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
    real = (key_ids >= 0)[None, :]
    own = (query_ids[:, None] == key_ids[None, :]) & real
    return cosines, own, ~own & real


def _over_ring(update: Callable[[Array, Tile], Array], start: Array, tiles: Tiles, axes: tuple[str, ...]) -> Array:
    """`start` after `state = update(state, tile)` for every tile of every device. The tiles travel in a ring of the devices."""
    devices = jax.lax.axis_size(axes)
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def hop(carry: tuple[Array, Tiles], _: None) -> tuple[tuple[Array, Tiles], None]:
        state, tiles = carry
        state, _ = jax.lax.scan(lambda state, tile: (update(state, tile), None), state, tiles)
        return (state, jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), tiles)), None

    (state, _), _ = jax.lax.scan(hop, (start, tiles), length=devices)
    return state
