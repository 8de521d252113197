"""Image-text retrieval: R@1, R@5, R@10 both ways, with any number of captions an image, by streamed ranks.

No device holds the matrix of similarities: rows stay where they are, columns go round the devices in a ring and are met in
chunks, so that memory is linear in the number of pictures and captions.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clipjax.evals.embed import Batches, Embeddings, Encoder, Metrics
from clipjax.models.clip import Params
from clipjax.sharding import BATCH

KS = (1, 5, 10)
CHUNK = 1024  # columns met at once

# Cosines of equal vectors differ by the rounding of float32, with the batch and the tile they were computed in. What lies
# closer than this is a tie; otherwise duplicates would be ranked by noise, and differently on another number of devices.
TIE = 1e-6


class Retrieval:
    """An evaluation that is prepared once and run with any weights."""

    def __init__(self, encoder: Encoder, images: Batches, captions: Batches) -> None:
        """The `index` of a caption is that of its picture."""
        self.encoder, self.images, self.captions = encoder, images, captions

    def run(self, params: Params) -> Metrics:
        images = self.encoder.embed(params, self.images)
        return recalls(images, self.encoder.embed(params, self.captions), self.encoder.mesh)


def recalls(images: Embeddings, texts: Embeddings, mesh: Mesh, chunk: int = CHUNK) -> Metrics:
    """R@K as CLIP_benchmark names them, each in [0, 1].

    `image_retrieval_recall@K` is text to image: the share of captions whose picture is among the K nearest.
    `text_retrieval_recall@K` is image to text: the share of pictures with any of their captions among the K nearest.
    The index of a caption is that of its picture. See `ranks` for ties.
    """
    to_image, to_text = jax.device_get(_hits(images, texts, mesh, chunk))
    captions, pictures = to_image[-1], to_text[-1]
    return {f"image_retrieval_recall@{k}": float(hits / captions) for k, hits in zip(KS, to_image[:-1], strict=True)} | {
        f"text_retrieval_recall@{k}": float(hits / pictures) for k, hits in zip(KS, to_text[:-1], strict=True)
    }


@functools.partial(jax.jit, static_argnames=("mesh", "chunk"))
def _hits(images: Embeddings, texts: Embeddings, mesh: Mesh, chunk: int) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
    """For captions and for pictures: how many have rank at most 1, 5, 10, and how many there are."""

    def count(queries: Embeddings, keys: Embeddings) -> Int[Array, " k"]:
        (zq, idq), (zk, idk) = queries.rows(), keys.rows()
        rank = jnp.where(idq >= 0, ranks(zq, idq, zk, idk, BATCH, chunk), jnp.inf)
        return jax.lax.psum(jnp.stack([*((rank <= k).sum() for k in KS), (idq >= 0).sum()]), BATCH)

    def both(images: Embeddings, texts: Embeddings) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
        return count(texts, images), count(images, texts)

    rows = P(None, BATCH)
    return jax.shard_map(both, mesh=mesh, in_specs=(rows, rows), out_specs=P())(images, texts)


def ranks(
    queries: Float[Array, "q e"],
    query_ids: Int[Array, " q"],
    keys: Float[Array, "k e"],
    key_ids: Int[Array, " k"],
    axes: tuple[str, ...],
    chunk: int = CHUNK,
) -> Float[Array, " q"]:
    """The rank, from 1, of the nearest key with the query's id among the keys of other ids; inside `shard_map` over `axes`.

    `rank = 1 + #{greater} + #{equal} / 2` (METHODS D.7): deterministic, and a collapsed model, to which all keys look alike,
    gets half their number and not rank 1. Further keys of the query's own id neither help nor hurt. Keys with id -1 are
    padding; a query without a key of its id ranks behind all keys.
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
            own: Bool[Array, "q chunk"] = query_ids[:, None] == ids[None, :]
            return update(state, cosines, own, ~own & (ids >= 0)[None, :]), None

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
        # Whole numbers, because float32 stops counting at 2^24.
        ahead = 2 * (cosines > best + TIE) + (jnp.abs(cosines - best) <= TIE)
        return count + jnp.where(other, ahead, 0).sum(1)

    return 1 + sweep(halves, jnp.zeros_like(query_ids)) / 2
