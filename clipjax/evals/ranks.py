"""Where each query's own keys stand among the keys of others, and how well the cosines of own pairs tell them from other pairs.

No device holds the matrix of similarities. The queries stay on their devices; the keys travel around the devices in a ring and
are compared tile by tile. Memory is linear in the number of queries and keys.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt

from clipjax.evals.encoder import Embeddings, to_host
from clipjax.evals.ties import expected_hits, nearer
from clipjax.sharding import BATCH

TILE = 1024  # keys that are compared at once
BINS = 4096  # of cosines from -1 to 1, for the AUC

Ids = Int[np.ndarray, " n"]  # by the number of a query or key; it owns the keys of the same id. -1: left out
Tiles = tuple[Float[Array, "n c e"], Int[Array, "n c"]]  # n tiles of c keys, and their ids
Tile = tuple[Float[Array, "c e"], Int[Array, " c"]]
State = TypeVar("State")


@dataclass(frozen=True)
class Ranks:
    """Of each of n queries, its nearest own key among the keys of others. Its further own keys change nothing."""

    greater: Int[np.ndarray, " n"]  # how many keys of others are nearer
    equal: Int[np.ndarray, " n"]  # how many are equally near
    own: Int[np.ndarray, " n"]  # how many own keys are: the nearest and its ties; 0: it has none, and is not counted

    def hits(self, k: int) -> Float[np.ndarray, " n"]:
        """Whether an own key is among the k nearest: `ties.expected_hits`. NaN: not counted."""
        return np.where(self.own > 0, expected_hits(self.greater, self.equal, self.own, k), np.nan)

    def rank(self) -> Float[np.ndarray, " n"]:
        """1 + #{greater} + #{equal} / 2. NaN: not counted."""
        return np.where(self.own > 0, 1 + self.greater + self.equal / 2, np.nan)


def ranks(queries: Embeddings, query_ids: Ids, keys: Embeddings, key_ids: Ids, mesh: Mesh, tile: int = TILE) -> Ranks:
    """The ranks of all queries by their number (`Embeddings.index`), on every process. A query without a vector isn't counted."""
    number = to_host(queries.index).reshape(-1)
    found = [to_host(x).reshape(-1) for x in _ranks(queries, query_ids, keys, key_ids, mesh, tile)]
    result = np.zeros((3, len(query_ids)), np.int64)
    result[:, number[number >= 0]] = np.stack(found)[:, number >= 0]
    return Ranks(*result)


def pair_auc(queries: Embeddings, query_ids: Ids, keys: Embeddings, key_ids: Ids, mesh: Mesh, tile: int = TILE) -> float | None:
    """The chance that the cosine of any own pair is above that of any other pair; one in the same of BINS bins counts half.

    None where there are no pairs of one of the two kinds.
    """
    own, other = to_host(_histograms(queries, query_ids, keys, key_ids, mesh, tile)).sum(0, dtype=np.float64)
    below = np.cumsum(other) - other
    pairs = own.sum() * other.sum()
    return float((own * (below + other / 2)).sum() / pairs) if pairs else None


@functools.partial(jax.jit, static_argnames=("mesh", "tile"))
def _ranks(
    queries: Embeddings, query_ids: Array, keys: Embeddings, key_ids: Array, mesh: Mesh, tile: int
) -> tuple[Int[Array, "n b"], ...]:
    """Greater, equal and own of each query's place."""

    def local(queries: Embeddings, keys: Embeddings) -> tuple[Int[Array, "n b"], ...]:
        found = counts(*queries.rows(), *keys.rows(), BATCH, tile)
        return tuple(x.reshape(queries.index.shape) for x in found)

    rows = P(None, BATCH)
    both = _with_ids(queries, query_ids), _with_ids(keys, key_ids)
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows)(*both)


@functools.partial(jax.jit, static_argnames=("mesh", "tile"))
def _histograms(
    queries: Embeddings, query_ids: Array, keys: Embeddings, key_ids: Array, mesh: Mesh, tile: int
) -> UInt[Array, "d 2 bins"]:
    """How many cosines of own pairs and of others are in each bin, on each of d devices: the sum may need more than 32 bits."""

    def local(queries: Embeddings, keys: Embeddings) -> UInt[Array, "1 2 bins"]:
        (z, ids), (y, key_ids) = queries.rows(), keys.rows()

        def add(histogram: UInt[Array, "2 bins"], tile: Tile) -> UInt[Array, "2 bins"]:
            cosines, own, other = compare(z, ids, tile)
            bins = jnp.clip(((cosines + 1) * (BINS / 2)).astype(jnp.int32), 0, BINS - 1)
            kind = jnp.where(own, 0, jnp.where(other & (ids >= 0)[:, None], 1, 2))  # 2: padding, which is dropped
            return histogram.at[kind, bins].add(1, mode="drop")

        none = jax.lax.pcast(jnp.zeros((2, BINS), jnp.uint32), BATCH, to="varying")
        return over_ring(add, none, tiles(y, key_ids, tile), BATCH)[None]

    rows = P(None, BATCH)
    both = _with_ids(queries, query_ids), _with_ids(keys, key_ids)
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=P(BATCH))(*both)


def _with_ids(embeddings: Embeddings, ids: Int[Array, " n"]) -> Embeddings:
    """The same vectors, each with its id in place of its number."""
    return Embeddings(embeddings.z, jnp.where(embeddings.index < 0, -1, ids[embeddings.index]).astype(jnp.int32))


def counts(
    queries: Float[Array, "q e"],
    query_ids: Int[Array, " q"],
    keys: Float[Array, "k e"],
    key_ids: Int[Array, " k"],
    axes: tuple[str, ...],
    tile: int = TILE,
) -> tuple[Int[Array, " q"], Int[Array, " q"], Int[Array, " q"]]:
    """`greater`, `equal` and `own` of `Ranks`, inside `shard_map` over `axes`. Padding has id -1, and no own keys."""
    parts = tiles(keys, key_ids, tile)

    def nearest(best: Float[Array, " q"], tile: Tile) -> Float[Array, " q"]:
        cosines, own, _ = compare(queries, query_ids, tile)
        return jnp.maximum(best, jnp.where(own, cosines, -jnp.inf).max(1))

    def count(state: Int[Array, "3 q"], tile: Tile) -> Int[Array, "3 q"]:
        cosines, own, other = compare(queries, query_ids, tile)
        greater, equal = nearer(cosines, best[:, None])
        return state + jnp.stack([(greater & other).sum(1), (equal & other).sum(1), (equal & own).sum(1)])

    none = jax.lax.pcast(jnp.full(len(queries), -jnp.inf), axes, to="varying")
    best = over_ring(nearest, none, parts, axes)
    greater, equal, own = over_ring(count, jnp.zeros_like(query_ids, shape=(3, len(queries))), parts, axes)
    return greater, equal, own


def tiles(keys: Float[Array, "k e"], key_ids: Int[Array, " k"], most: int) -> Tiles:
    """The keys in tiles of equal size, of `most` at most, the last padded."""
    size = min(most, len(keys))
    pad = -len(keys) % size
    rows = jnp.pad(keys, ((0, pad), (0, 0))).reshape(-1, size, keys.shape[-1])
    return rows, jnp.pad(key_ids, (0, pad), constant_values=-1).reshape(-1, size)


def compare(
    queries: Float[Array, "q e"], query_ids: Int[Array, " q"], tile: Tile
) -> tuple[Float[Array, "q c"], Bool[Array, "q c"], Bool[Array, "q c"]]:
    """The cosines of queries and keys, which pairs have the same id, and which have different ids. Padding is in neither."""
    keys, key_ids = tile
    cosines = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
    real = (key_ids >= 0)[None, :]
    own = (query_ids[:, None] == key_ids[None, :]) & real
    return cosines, own, ~own & real


def over_ring(update: Callable[[State, Tile], State], start: State, parts: Tiles, axes: tuple[str, ...]) -> State:
    """`start` after `state = update(state, tile)` for every tile of every device. The tiles travel in a ring of the devices."""
    devices = jax.lax.axis_size(axes)
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def hop(carry: tuple[State, Tiles], _: None) -> tuple[tuple[State, Tiles], None]:
        state, parts = carry
        state, _ = jax.lax.scan(lambda state, tile: (update(state, tile), None), state, parts)
        return (state, jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), parts)), None

    (state, _), _ = jax.lax.scan(hop, (start, parts), length=devices)
    return state
