"""Clusters of embeddings, as labels: Lloyd's k-means on unit vectors, with the cosine as similarity. The rows stay in their file
and are compared with the centroids chunk by chunk, on this machine's devices, each of which has all centroids."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from clipjax.config import ConfigError, require
from clipjax.data.bar import bar
from clipjax.data.vectors import Use, keyed_arrays
from clipjax.files import local_path

COMPARED = 2**28  # cosines that a device has at once, 1 GiB
ROUNDS = 50  # at most
STILL = 1000  # it ends where no more than one row in so many changes its cluster
SPREAD = 4096  # clusters, at most, that k-means++ starts; more start at random rows

Sides = tuple[Float[np.ndarray, "n e"], ...]  # of a file: image, text or both


class Clusters(NamedTuple):
    label: Int[np.ndarray, "n l"]  # int32: the l nearest clusters of each row, the nearest first
    centroid: Float[np.ndarray, "c e"]  # float32 unit vectors
    cosine: float  # of a row and its centroid, the mean
    rounds: int


def cluster(path: str, classes: int, nearest: int, side: str, seed: int) -> tuple[Clusters, np.ndarray]:
    """Clusters of the `image`, `text` or `both` of a file of `clipjax embed`, and its keys. Raises ConfigError for another
    file, and where it has fewer rows than classes."""
    use = Use("EMB.npz", {name: name for name in ("image", "text") if side in (name, "both")})
    arrays, keys = keyed_arrays(local_path(use.field, path).expanduser(), f"{use.field} = {path!r}", use)
    require(classes <= len(keys), "--classes", classes, f"must be at most the {len(keys):,} rows of {path}")
    require(nearest <= classes, "--nearest", nearest, f"must be at most --classes, {classes}")
    require(seed >= 0, "--seed", seed, "must not be negative")
    return kmeans(tuple(arrays.values()), classes, nearest, seed), keys


def kmeans(sides: Sides, classes: int, nearest: int = 1, seed: int = 0) -> Clusters:
    """Lloyd's rounds, until hardly a row changes its cluster. A cluster without rows gets one of those farthest from theirs.
    Shows its progress. Raises ConfigError for vectors that are not finite."""
    n = len(sides[0])
    centroids, label, rounds, moved, empty = _start(sides, classes, seed), np.full(n, -1), 0, n, np.arange(classes)
    while rounds < ROUNDS and moved and (len(empty) or moved > n // STILL):
        rounds += 1
        sums, cosines, numbers = _pass(sides, centroids, 1, f"round {rounds}")
        moved, label = int((numbers[:, 0] != label).sum()), numbers[:, 0]
        centroids, empty = _unit(sums), np.flatnonzero(np.bincount(label, minlength=classes) == 0)
        if len(empty):
            centroids[empty] = _rows(sides, np.sort(np.argpartition(cosines[:, 0], len(empty) - 1)[: len(empty)]))
    _, cosines, numbers = _pass(sides, centroids, nearest, "labels")
    return Clusters(numbers, centroids, float(cosines[:, 0].mean(dtype=np.float64)), rounds)


def _rows(sides: Sides, numbers: slice | np.ndarray) -> Float[np.ndarray, "r e"]:
    """Unit vectors of all sides, one after the other: their cosine is the mean of the sides'."""
    z = np.concatenate([_unit(np.asarray(side[numbers], np.float32)) for side in sides], 1) / np.sqrt(np.float32(len(sides)))
    if not np.isfinite(z).all():
        raise ConfigError("EMB.npz: has vectors that are not finite; write it with an earlier checkpoint, RUN@STEP")
    return z


def _unit(z: Float[np.ndarray, "r e"]) -> Float[np.ndarray, "r e"]:
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _start(sides: Sides, classes: int, seed: int) -> Float[np.ndarray, "c e"]:
    """Rows to start from, by k-means++ on a sample: one after the other, each with a chance in proportion to its squared distance
    from the nearest before it. More than SPREAD are random rows."""
    rng, n = np.random.default_rng(seed), len(sides[0])
    count = classes if classes > SPREAD else min(n, 10 * classes + 10_000)
    sample = _rows(sides, np.sort(rng.choice(n, count, replace=False)))
    chosen, far = [*range(classes)] if classes > SPREAD else [int(rng.integers(count))], np.full(count, 2.0)
    while len(chosen) < classes:
        far = np.minimum(far, np.maximum(1 - sample @ sample[chosen[-1]], 1e-9))
        chosen.append(int(rng.choice(count, p=far / far.sum())))
    return sample[chosen]


def _pass(
    sides: Sides, centroids: Float[np.ndarray, "c e"], nearest: int, what: str
) -> tuple[Float[np.ndarray, "c e"], Float[np.ndarray, "n l"], Int[np.ndarray, "n l"]]:
    """The sum of the rows of each centroid; the cosines and numbers of each row's nearest centroids, the nearest first."""
    n, mesh = len(sides[0]), Mesh(np.array(jax.local_devices()), ("rows",))
    size = max(1, min(-(-n // mesh.size), COMPARED // len(centroids))) * mesh.size
    known, sums, found = jax.device_put(centroids, NamedSharding(mesh, P())), np.zeros_like(centroids), []
    with bar(f"clusters, {what}", n, "rows") as shown:
        for start in range(0, n, size):
            z = _rows(sides, slice(start, start + size))
            chunk = jax.device_put(np.pad(z, ((0, size - len(z)), (0, 0))), NamedSharding(mesh, P("rows")))
            cosines, numbers = (np.asarray(x)[: len(z)] for x in _nearest_of(nearest, mesh)(chunk, known))
            found.append((cosines, numbers))
            order = np.argsort(numbers[:, 0], kind="stable")
            number, first = np.unique(numbers[order, 0], return_index=True)
            sums[number] += np.add.reduceat(z[order], first)
            shown.update(len(z))
    cosines, numbers = map(np.concatenate, zip(*found, strict=True))
    return sums, cosines, numbers


@functools.cache
def _nearest_of(count: int, mesh: Mesh) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Of rows and centroids, the cosines and numbers of the `count` nearest. By shard_map: XLA gathers all rows of a top_k."""

    def best(x: Float[Array, "r e"], centroids: Float[Array, "c e"]) -> tuple[Array, Array]:
        return jax.lax.top_k(jnp.matmul(x, centroids.T, precision=jax.lax.Precision.HIGHEST), count)

    return jax.jit(jax.shard_map(best, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows")))
