"""Embeddings of a full dataset, computed on all devices batch by batch. They stay on the devices that computed them."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clipjax import config, distributed, preemption
from clipjax.data.bar import bar
from clipjax.evals.store import VECTORS, Store, checksum
from clipjax.models.clip import Params, bind
from clipjax.models.heads import Side
from clipjax.placement import make_placement
from clipjax.sharding import BATCH, batch_devices, over_rows, to_global

Features = Literal["embedding", "tower"] | tuple[str, ...]  # names of heads
Batch = dict[str, np.ndarray]  # this process's rows
CACHE_BYTES = 256 * 2**20  # if a dataset's batches need at most so much, they stay in host memory between evaluations
IN_FLIGHT = 2  # batches that the devices may compute at a time: bounds memory, and keeps the devices busy

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of n batches of b rows, and the example of each. On a mesh, axis b is sharded over the devices."""

    z: Float[Array, "n b e"]
    index: Int[Array, "n b"]  # of the example in its source; -1: padding

    def rows(self) -> tuple[Float[Array, "nb e"], Int[Array, " nb"]]:
        return self.z.reshape(-1, self.z.shape[-1]), self.index.reshape(-1)


@dataclass(frozen=True)
class Content:
    """What batches hold, row by row, and so how the vectors of it can be kept on disk: row i of all batches is item i."""

    total: int  # items; the rows after them are padding
    identity: Callable[[], dict[str, Any]]  # what decides the vectors beside the model, as JSON
    complete: Callable[[Iterable[Batch]], Iterator[Batch]]  # adds `index` or `label` to batches of `row` [b] and what is `kept`
    kept: tuple[str, ...] = ()  # arrays that only reading the items gives


class CachedBatches:
    """Batches of equal shape that can be iterated over several times. Small datasets are read once and kept in memory.

    Each batch holds `image` uint8 [b, s, s, 3] or `text` int32 [b, t]. It also holds `index`, the number of the example in the
    source, or `label`, its class, or both, as its user needs: int32 [b], -1 for padding.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Batch]],
        count: int,
        name: str,
        unit: str,
        cache_bytes: int = CACHE_BYTES,
        content: Content | None = None,
    ) -> None:
        """`read` reads the `count` batches anew each time. `name` is the dataset's, `unit` what it counts: images, captions."""
        self._read, self._count, self._cache_bytes, self.content = read, count, cache_bytes, content
        self._cache: list[Batch] | None = None
        self.name, self.unit = name, unit

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        if self._cache is not None:
            yield from self._cache
            return
        seen: list[Batch] = []
        size = 0
        for batch in self._read():
            size += sum(x.nbytes for x in batch.values())
            if size <= self._cache_bytes:
                seen.append(batch)
            else:
                seen.clear()
            yield batch
        if size <= self._cache_bytes:
            self._cache = seen


class BatchedModel:
    """A model that works on one global batch after another."""

    def __init__(self, model: config.Model, mesh: Mesh, batch_size: int) -> None:
        """`batch_size` is over all devices. It is rounded up to a multiple of their number."""
        devices = batch_devices(mesh)
        self.model = model
        self.mesh = mesh
        self.batch_size = -(-batch_size // devices) * devices
        self.usable: dict[str, tuple[int, int]] = {}  # by dataset: images that could be used when it was last read, and others

    def batch_count(self, total: int) -> int:
        """How many batches `total` examples fill. The last may be filled in part."""
        return -(-total // self.batch_size)

    def rows(self, total: int) -> Iterator[tuple[Int[np.ndarray, " b"], Bool[np.ndarray, " b"]]]:
        """This process's share of each batch of `total` examples: their numbers, and which are real. Padding repeats the last."""
        n = self.batch_size // jax.process_count()
        for start in range(jax.process_index() * n, self.batch_count(total) * self.batch_size, self.batch_size):
            numbers = np.arange(start, start + n)
            yield np.minimum(numbers, total - 1), numbers < total

    def map_batches(self, batches: CachedBatches, fn: Callable[[dict[str, Array]], T]) -> Iterator[tuple[T, dict[str, Array]]]:
        """`fn(batch)` of every global batch, each with its batch.

        Raises Preempted in a training run that is requested to stop: it does not wait for an evaluation.
        """
        running: collections.deque[T] = collections.deque()
        for batch in progress(batches, self.batch_size):
            preemption.check()
            distributed.report_progress()
            rows = to_global(batch, self.mesh)
            result = fn(rows)
            running.append(result)
            if len(running) > IN_FLIGHT:
                jax.block_until_ready(running.popleft())
            yield result, rows


class Encoder(BatchedModel):
    """Both towers, compiled for global batches on a mesh. The weights are an argument, so that training compiles them once."""

    def __init__(
        self, model: config.Model, mesh: Mesh, batch_size: int, features: Features = "embedding", store: Store | None = None
    ) -> None:
        """`features`: the embedding, what the tower gives before its projection, or heads' vectors as one, whose cosines are the
        mean of theirs. `store`: where vectors are kept.
        """
        super().__init__(model, mesh, batch_size)
        known = isinstance(features, tuple) or features in ("embedding", "tower")
        config.require(known, "features", features, "must be embedding or tower, or a tuple of heads' names")
        self.features: Features = features
        self.store = store
        self._weights: tuple[Params, str] | None = None  # the latest, and their checksum
        rows, placement = over_rows(mesh), make_placement(mesh, model.dtype)

        def encode(side: Side, params: Params, x: Array) -> Array:
            vectors = bind(model, params).vectors(side, x, placement, feature=features == "tower")
            if isinstance(features, str):
                return vectors.embedding if vectors.feature is None else vectors.feature
            for name in features:
                known = ", ".join(vectors.heads) or "no heads"
                config.require(name in vectors.heads, "--head", name, f"the {side} tower has {known}")
            return jnp.concatenate([vectors.heads[name] for name in features], axis=-1) / math.sqrt(len(features))

        self._towers = {side: jax.jit(functools.partial(encode, side), out_shardings=rows) for side in get_args(Side)}
        stacked = NamedSharding(mesh, P(None, BATCH))
        self._allocate = jax.jit(self._empty, static_argnums=(0, 1), out_shardings=stacked)
        self._write = jax.jit(_write, donate_argnums=0, out_shardings=stacked)

    def giving(self, features: Features) -> "Encoder":
        """This encoder, or one of other features with the same store."""
        if features == self.features:
            return self
        other = Encoder(self.model, self.mesh, self.batch_size, features, self.store)
        other.usable = self.usable
        return other

    def stream(self, params: Params, batches: CachedBatches) -> Iterator[tuple[Float[Array, "b e"], dict[str, Array]]]:
        """The unit vectors, float32, of one batch after another, each with the other arrays of its batch, all global."""
        content = batches.content
        if self.store is None or content is None:
            return self._encoded(params, batches)
        identity = self._identity(params, content)
        found = self.store.find(batches.name, identity)
        if distributed.total(int(found is not None)) < jax.process_count() or found is None:  # each has the rows of its own
            return self._kept(params, batches, content, self.store, identity)
        again = CachedBatches(lambda: content.complete(self._stored(found, content)), len(batches), batches.name, batches.unit, 0)
        return self.map_batches(again, lambda batch: batch.pop(VECTORS))

    def _encoded(self, params: Params, batches: CachedBatches) -> Iterator[tuple[Float[Array, "b e"], dict[str, Array]]]:
        def encode(batch: dict[str, Array]) -> Array:
            (kind,) = self._towers.keys() & batch.keys()
            return self._towers[kind](params, batch.pop(kind))

        return self.map_batches(batches, encode)

    def _identity(self, params: Params, content: Content) -> dict[str, Any]:
        """What decides the vectors of `content`, and which rows of them this process has."""
        processes = [jax.process_index(), jax.process_count(), self.batch_size] if jax.process_count() > 1 else None
        if self._weights is None or self._weights[0] is not params:
            self._weights = params, checksum(params, self.mesh)
        own = {"weights": self._weights[1], "model": dataclasses.asdict(self.model), "features": self.features}
        return {**own, "processes": processes, **content.identity()}

    def _kept(
        self, params: Params, batches: CachedBatches, content: Content, store: Store, identity: dict[str, Any]
    ) -> Iterator[tuple[Float[Array, "b e"], dict[str, Array]]]:
        """As `_encoded`; what it gives is also stored once all of it is there."""
        own = [int(real.sum()) for _, real in self.rows(content.total)]
        waiting: collections.deque[tuple[dict[str, Array], int]] = collections.deque()
        with store.writing(batches.name, identity, sum(own)) as write:

            def write_first() -> None:
                arrays, n = waiting.popleft()
                write({name: local_rows(x)[:n] for name, x in arrays.items()})

            for (z, rest), n in zip(self._encoded(params, batches), own, strict=True):
                waiting.append(({VECTORS: z, **{name: rest[name] for name in content.kept}}, n))
                yield z, rest
                if len(waiting) > IN_FLIGHT:  # the devices have the next batches already
                    write_first()
            while waiting:
                write_first()

    def _stored(self, table: np.ndarray, content: Content) -> Iterator[Batch]:
        """Batches of what `Store.find` found, in place of those that need a tower."""
        done = 0
        for numbers, real in self.rows(content.total):
            rows = np.zeros(len(real), table.dtype)
            n = int(real.sum())
            rows[:n] = table[done : done + n]
            done += n
            arrays = {name: np.ascontiguousarray(rows[name]) for name in (VECTORS, *content.kept)}
            yield {"row": np.where(real, numbers, -1).astype(np.int32), **arrays}

    def embed(self, params: Params, batches: CachedBatches) -> Embeddings:
        """The unit vectors of all batches, sharded over the devices. Each batch is written in place as it is computed."""
        result = None
        for i, (z, rest) in enumerate(self.stream(params, batches)):
            result = result or self._allocate(len(batches), z.shape[-1])
            result = self._write(result, Embeddings(z, rest["index"]), i)
        return result or self._allocate(0, self.model.embed_dim)

    def _empty(self, n: int, width: int) -> Embeddings:
        shape = n, self.batch_size
        return Embeddings(jnp.zeros((*shape, width)), jnp.full(shape, -1, jnp.int32))


def _write(into: Embeddings, batch: Embeddings, i: int) -> Embeddings:
    return jax.tree.map(lambda stacked, x: stacked.at[i].set(x), into, batch)


def progress(batches: CachedBatches, batch_size: int) -> Iterator[Batch]:
    """Yields the batches. After some seconds, the first process shows the rate and the time left on stderr: a terminal has one
    line that is redrawn, a log file a line every 30 s.
    """
    total = len(batches) * batch_size
    with bar(batches.name, total, batches.unit, quiet=jax.process_index() != 0) as shown:
        for batch in batches:
            yield batch
            shown.update(batch_size)


def local_rows(x: Array) -> np.ndarray:
    """This process's rows of a global array of rows."""
    if x.is_fully_addressable:
        return np.asarray(x)
    first = {shard.index[0].start: shard.data for shard in x.addressable_shards}  # copies of the same rows are alike
    return np.concatenate([np.asarray(first[start]) for start in sorted(first)])


def to_host(x: Array) -> np.ndarray:
    """A global array as numpy, on every process."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
