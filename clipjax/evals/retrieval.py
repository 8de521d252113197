"""Image-text retrieval: R@1, R@5, R@10 both ways, with any number of captions an image, by streamed ranks.

No device holds the matrix of similarities: rows stay where they are, columns go round the devices in a ring and are met in
chunks, so that memory is linear in the number of pictures and captions.
"""

import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clipjax import config
from clipjax.data.pipeline import eval_captions
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import CachedBatches, Embeddings, Encoder, Metrics
from clipjax.evals.inputs import caption_batches, image_batches
from clipjax.models.clip import Params
from clipjax.sharding import BATCH

KS = (1, 5, 10)
CHUNK = 1024  # columns met at once

# Cosines of equal vectors differ by the rounding of float32, with the batch and the tile they were computed in. What lies
# closer than this is a tie; otherwise duplicates would be ranked by noise, and differently on another number of devices.
TIE = 1e-6


class Retrieval:
    """An evaluation that is prepared once and run with any weights."""

    task: ClassVar[str] = "zeroshot_retrieval"

    def __init__(self, encoder: Encoder, images: CachedBatches, captions: CachedBatches) -> None:
        """The `index` of a caption is that of its picture."""
        self.encoder, self.images, self.captions = encoder, images, captions

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data) -> "Retrieval":
        """Of a dataset: every picture, and every caption of each."""
        source = open_source(data)
        captions = caption_batches(encoder, tokenizer, *eval_captions(source), source.name)
        return cls(encoder, image_batches(encoder, source, data), captions)

    @property
    def dataset(self) -> str:
        """SPEC/SPLIT, or the SPEC alone of what has no splits."""
        return self.images.name

    def run(self, params: Params) -> Metrics:
        images = self.encoder.embed(params, self.images)
        return recalls(images, self.encoder.embed(params, self.captions), self.encoder.mesh)


def recalls(images: Embeddings, texts: Embeddings, mesh: Mesh, chunk: int = CHUNK) -> Metrics:
    """R@K as CLIP_benchmark names them, each in [0, 1].

    `image_retrieval_recall@K` is text to image: the share of captions whose picture is among the K nearest.
    `text_retrieval_recall@K` is image to text: the share of pictures with any of their captions among the K nearest.
    The index of a caption is that of its picture. See `ranks` for ties.
    """
    found = zip(("image", "text"), jax.device_get(_hits(images, texts, mesh, chunk)), strict=True)
    return {
        f"{what}_retrieval_recall@{k}": float(hits / total)
        for what, (*at_k, total) in found
        for k, hits in zip(KS, at_k, strict=True)
    }


@functools.partial(jax.jit, static_argnames=("mesh", "chunk"))
def _hits(images: Embeddings, texts: Embeddings, mesh: Mesh, chunk: int) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
    """Of captions and of pictures: how many have rank at most 1, 5, 10, and any at all."""

    def count(queries: Embeddings, keys: Embeddings) -> Int[Array, " k"]:
        rank = ranks(*queries.rows(), *keys.rows(), BATCH, chunk)
        return jax.lax.psum(jnp.stack([(rank <= k).sum() for k in (*KS, jnp.finfo(rank).max)]), BATCH)

    def both(images: Embeddings, texts: Embeddings) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
        return count(texts, images), count(images, texts)

    rows = P(None, BATCH)
    return jax.shard_map(both, mesh=mesh, in_specs=(rows, rows), out_specs=P())(images, texts)


def ahead(cosines: Float[Array, "q k"], own: Float[Array, "q 1"]) -> Int[Array, "q k"]:
    """By how much others put a query's own key back, in halves of a rank: 2 where greater, 1 where equal.

    Whole numbers, because float32 stops counting at 2^24."""
    return 2 * (cosines > own + TIE) + (jnp.abs(cosines - own) <= TIE)


def ranks(
    queries: Float[Array, "q e"],
    query_ids: Int[Array, " q"],
    keys: Float[Array, "k e"],
    key_ids: Int[Array, " k"],
    axes: tuple[str, ...],
    chunk: int = CHUNK,
) -> Float[Array, " q"]:
    """The rank, from 1, of the nearest key with a query's id among the keys of other ids; inside `shard_map` over `axes`.

    `rank = 1 + #{greater} + #{equal} / 2` (METHODS D.7): deterministic, and a collapsed model, to which all keys look alike,
    gets half their number and not rank 1. Further keys of the query's own id neither help nor hurt. Padding has id -1; it, and
    a query without a key of its id (a caption whose picture can't be read), has rank infinity and is not counted.
    """
    chunk = min(chunk, len(keys))
    pad = -len(keys) % chunk
    tiles = jnp.pad(keys, ((0, pad), (0, 0))).reshape(-1, chunk, keys.shape[-1])
    tile_ids = jnp.pad(key_ids, (0, pad), constant_values=-1).reshape(-1, chunk)
    devices = jax.lax.axis_size(axes)
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def sweep(update: Callable[..., Array], start: Array) -> Array:
        """`start` updated by all keys: `update(state, cosines [q, chunk], own [q, chunk], other [q, chunk])`."""

        def tile(state: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
            z, ids = xs
            cosines = jnp.matmul(queries, z.T, precision=jax.lax.Precision.HIGHEST)
            real = (ids >= 0)[None, :]
            own: Bool[Array, "q chunk"] = (query_ids[:, None] == ids[None, :]) & real
            return update(state, cosines, own, ~own & real), None

        def hop(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
            state, *travellers = state
            state, _ = jax.lax.scan(tile, state, tuple(travellers))
            return (state, *(jax.lax.ppermute(x, axes, ring) for x in travellers)), None

        return jax.lax.scan(hop, (start, tiles, tile_ids), length=devices)[0][0]

    def nearest(best: Array, cosines: Array, own: Array, _: Array) -> Array:
        return jnp.maximum(best, jnp.where(own, cosines, -jnp.inf).max(1))

    nothing = jax.lax.pcast(jnp.full(len(queries), -jnp.inf), axes, to="varying")
    best = sweep(nearest, nothing)[:, None]

    def halves(count: Array, cosines: Array, _: Array, other: Array) -> Array:
        return count + jnp.where(other, ahead(cosines, best), 0).sum(1)

    ranked = 1 + sweep(halves, jnp.zeros_like(query_ids)) / 2
    return jnp.where(best[:, 0] > -jnp.inf, ranked, jnp.inf)
