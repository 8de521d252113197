"""Clusters of embeddings, as labels: Lloyd's k-means on unit vectors, with the cosine as similarity.

The rows stay in their file and are read chunk by chunk, over this machine's devices. Each device has all centroids and the sums
of their rows: 8 C e bytes for C clusters of width e.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from clipjax.config import ConfigError, require
from clipjax.data.bar import bar
from clipjax.data.vectors import TEACHER, keyed_arrays
from clipjax.files import local_path

Side = Literal["image", "text", "both"]
CHUNK = 8192  # rows of a device that are compared at once,
TILE = 4096  # with so many centroids
ROUNDS = 50  # at most
STILL = 1000  # it ends where no more than one row in so many changes its cluster
SPREAD = 16384  # clusters, at most, that k-means++ starts; more start at random rows
IN_FLIGHT = 2  # chunks that the devices may compute at a time


@dataclass(frozen=True)
class Clusters:
    """n rows in C clusters."""

    label: Int[np.ndarray, "n l"]  # int32: the l nearest clusters of each row, the nearest first
    centroid: Float[np.ndarray, "c e"]  # float32 unit vectors
    cosine: float  # of a row and its centroid, the mean
    rounds: int

    def __str__(self) -> str:
        sizes = np.bincount(self.label[:, 0], minlength=len(self.centroid))
        spread = f"{sizes.min():,} to {sizes.max():,} rows each, median {np.median(sizes):,.0f}"
        empty = f"; {(sizes == 0).sum():,} are nobody's nearest" if (sizes == 0).any() else ""
        counts = f"{len(self.label):,} rows in {len(sizes):,} clusters after {self.rounds} rounds"
        return f"{counts}: {spread}; mean cosine with the centroid {self.cosine:.3f}{empty}"


@dataclass(frozen=True)
class Rows:
    """Unit vectors of a file. With several sides a row is all of them, so that a cosine is the mean of theirs."""

    sides: tuple[np.ndarray, ...]
    name: str

    def __len__(self) -> int:
        return len(self.sides[0])

    def read(self, numbers: slice | np.ndarray) -> Float[np.ndarray, "r e"]:
        parts = [np.asarray(side[numbers], np.float32) for side in self.sides]
        z = np.concatenate([_unit(part) for part in parts], 1) / np.sqrt(np.float32(len(parts)))
        if not np.isfinite(z).all():
            raise ConfigError(f"{self.name}: has vectors that are not finite; write it with an earlier checkpoint, RUN@STEP")
        return z


def cluster(path: str, classes: int, nearest: int, side: Side, seed: int) -> tuple[Clusters, np.ndarray]:
    """The clusters of an .npz that `clipjax embed` wrote, and its keys. Raises ConfigError where it is something else, and where
    it has fewer rows than classes."""
    name = f"EMB.npz = {path!r}"
    wanted = ("image", "text") if side == "both" else (side,)
    arrays, keys = keyed_arrays(local_path("EMB.npz", path).expanduser(), name, wanted, TEACHER)
    require(classes <= len(keys), "--classes", classes, f"must be at most the {len(keys):,} rows of {path}")
    require(nearest <= classes, "--nearest", nearest, f"must be at most --classes, {classes}")
    require(seed >= 0, "--seed", seed, "must not be negative")
    return kmeans(Rows(tuple(arrays.values()), name), classes, nearest, seed), keys


def kmeans(rows: Rows, classes: int, nearest: int = 1, seed: int = 0) -> Clusters:
    """Lloyd's rounds, until hardly a row changes its cluster. A cluster without rows gets one of those farthest from theirs.
    Shows its progress."""
    centroids, label, rounds, moved = _start(rows, classes, seed), np.full(len(rows), -1), 0, len(rows)
    empty = np.arange(classes)
    while rounds < ROUNDS and moved and (len(empty) or moved > len(rows) // STILL):
        rounds += 1
        sums, cosines, numbers = _pass(rows, centroids, 1, f"round {rounds}")
        moved, label = int((numbers[:, 0] != label).sum()), numbers[:, 0]
        centroids, empty = _unit(sums[:, :-1]), np.flatnonzero(sums[:, -1] == 0)
        if len(empty):
            centroids[empty] = rows.read(np.sort(np.argpartition(cosines[:, 0], len(empty) - 1)[: len(empty)]))
    _, cosines, numbers = _pass(rows, centroids, nearest, "labels")
    return Clusters(numbers, centroids, float(cosines[:, 0].mean(dtype=np.float64)), rounds)


def _unit(z: Float[np.ndarray, "r e"]) -> Float[np.ndarray, "r e"]:
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _start(rows: Rows, classes: int, seed: int) -> Float[np.ndarray, "c e"]:
    """Rows to start from: by k-means++ on a sample, or random ones where there are many classes."""
    count = classes if classes > SPREAD else min(len(rows), 10 * classes + 10_000)
    sample = rows.read(np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False)))
    return sample if classes > SPREAD else sample[np.asarray(_far_apart(sample, classes, jax.random.key(seed)))]


@functools.partial(jax.jit, static_argnames="count")
def _far_apart(sample: Float[Array, "r e"], count: int, key: Array) -> Int[Array, " count"]:
    """k-means++: row after row, each with a chance in proportion to its squared distance from the nearest chosen before it."""

    def add(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, cosine = state
        row = jax.random.categorical(jax.random.fold_in(key, i), jnp.log(jnp.maximum(1 - cosine, 0)))
        return chosen.at[i].set(row), jnp.maximum(cosine, sample @ sample[row])

    none = jnp.zeros(count, jnp.int32), jnp.full(len(sample), -1.0)
    return jax.lax.fori_loop(0, count, add, none)[0]


def _pass(
    rows: Rows, centroids: Float[np.ndarray, "c e"], nearest: int, what: str
) -> tuple[Float[np.ndarray, "c e1"], Float[np.ndarray, "n l"], Int[np.ndarray, "n l"]]:
    """The sum and, last, the number of the rows of each centroid; the cosines and numbers of each row's nearest centroids."""
    mesh = Mesh(np.array(jax.local_devices()), ("rows",))
    on_rows, replicated = (NamedSharding(mesh, spec) for spec in (P("rows"), P()))
    tiles, found = jax.device_put(_tiles(centroids), replicated), []
    sums = jax.device_put(np.zeros((len(centroids), centroids.shape[1] + 1), np.float32), replicated)
    size = min(CHUNK * mesh.size, -(-len(rows) // mesh.size) * mesh.size)
    with bar(f"{rows.name}: {what}", len(rows), "rows") as shown:
        for chunk, count in _chunks(rows, size):
            sums, *best = _compare(sums, jax.device_put(chunk, on_rows), count, tiles, nearest, mesh)
            found.append(best)
            jax.block_until_ready(found[-IN_FLIGHT:][0])
            shown.update(count)
    cosines, numbers = (np.concatenate([np.asarray(x) for x in parts])[: len(rows)] for parts in zip(*found, strict=True))
    return np.asarray(sums), cosines, numbers


def _chunks(rows: Rows, size: int) -> Iterator[tuple[Float[np.ndarray, "size e"], int]]:
    """All rows in chunks of this size, the last padded, and how many of each are rows."""
    for start in range(0, len(rows), size):
        part = rows.read(slice(start, start + size))
        yield np.pad(part, ((0, size - len(part)), (0, 0))), len(part)


def _tiles(centroids: Float[np.ndarray, "c e"]) -> Float[np.ndarray, "t k e"]:
    """The centroids in tiles of equal size, the last padded."""
    size = min(TILE, len(centroids))
    return np.pad(centroids, ((0, -len(centroids) % size), (0, 0))).reshape(-1, size, centroids.shape[1])


@functools.partial(jax.jit, static_argnames=("nearest", "mesh"), donate_argnames="sums")
def _compare(
    sums: Float[Array, "c e1"], chunk: Float[Array, "r e"], count: Array, tiles: Float[Array, "t k e"], nearest: int, mesh: Mesh
) -> tuple[Float[Array, "c e1"], Float[Array, "r l"], Int[Array, "r l"]]:
    """As `_pass`, of a chunk of which `count` are rows. No device holds the cosines with more than a tile."""

    def local(x: Array, count: Array, tiles: Array) -> tuple[Array, Array, Array]:
        def join(best: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            number = i * tiles.shape[1] + jnp.arange(tiles.shape[1])
            cosines = jnp.matmul(x, tiles[i].T, precision=jax.lax.Precision.HIGHEST)
            cosines = jnp.concatenate([best[0], jnp.where(number < len(sums), cosines, -jnp.inf)], 1)
            numbers = jnp.concatenate([best[1], jnp.broadcast_to(number, (len(x), len(number)))], 1)
            top, at = jax.lax.top_k(cosines, nearest)
            return (top, jnp.take_along_axis(numbers, at, 1)), None

        none = jnp.full((len(x), nearest), -jnp.inf), jnp.zeros((len(x), nearest), jnp.int32)
        none = jax.tree.map(lambda y: jax.lax.pcast(y, "rows", to="varying"), none)
        (cosines, numbers), _ = jax.lax.scan(join, none, jnp.arange(len(tiles)))
        real = jax.lax.axis_index("rows") * len(x) + jnp.arange(len(x)) < count
        own = jnp.where(real, numbers[:, 0], len(sums))  # padding is nobody's, and dropped
        added = jnp.zeros_like(x, shape=sums.shape).at[own].add(jnp.pad(x, ((0, 0), (0, 1)), constant_values=1), mode="drop")
        return jax.lax.psum(added, "rows"), cosines, numbers

    specs = P("rows"), P(), P()
    on_shards = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P("rows"), P("rows")))
    added, cosines, numbers = on_shards(chunk, count, tiles)
    return sums + added, cosines, numbers
