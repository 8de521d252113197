"""Embeddings of a full dataset, computed on all devices batch by batch. They stay on the devices that computed them."""

import collections
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clipjax import config, distributed, preemption
from clipjax.data.bar import bar
from clipjax.models.clip import Params, bind
from clipjax.placement import make_placement
from clipjax.sharding import BATCH, batch_devices, over_rows, to_global

Features = Literal["embedding", "tower"]
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


class CachedBatches:
    """Batches of equal shape that can be iterated over several times. Small datasets are read once and kept in memory.

    Each batch holds `image` uint8 [b, s, s, 3] or `text` int32 [b, t]. It also holds `index`, the number of the example in the
    source, or `label`, its class, or both, as its user needs: int32 [b], -1 for padding.
    """

    def __init__(
        self, read: Callable[[], Iterable[Batch]], count: int, name: str, unit: str, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """`read` reads the `count` batches anew each time. `name` is the dataset's, `unit` what it counts: images, captions."""
        self._read, self._count, self._cache_bytes = read, count, cache_bytes
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

    def __init__(self, model: config.Model, mesh: Mesh, batch_size: int, features: Features = "embedding") -> None:
        """`features` of images: the embedding, or what the tower gives before its projection."""
        super().__init__(model, mesh, batch_size)
        self.features: Features = features
        rows, placement = over_rows(mesh), make_placement(mesh, model.dtype)

        def image(params: Params, x: Array) -> Array:
            clip = bind(model, params)
            return clip.encode_image(x, placement=placement) if features == "embedding" else clip.image_features(x, placement)

        self._towers = {
            "image": jax.jit(image, out_shardings=rows),
            "text": jax.jit(lambda params, x: bind(model, params).encode_text(x, placement), out_shardings=rows),
        }
        stacked = NamedSharding(mesh, P(None, BATCH))
        self._allocate = jax.jit(self._empty, static_argnums=0, out_shardings=stacked)
        self._write = jax.jit(_write, donate_argnums=0, out_shardings=stacked)

    def stream(self, params: Params, batches: CachedBatches) -> Iterator[tuple[Float[Array, "b e"], dict[str, Array]]]:
        """The unit vectors, float32, of one batch after another, each with the other arrays of its batch, all global."""

        def encode(batch: dict[str, Array]) -> Array:
            (kind,) = self._towers.keys() & batch.keys()
            return self._towers[kind](params, batch.pop(kind))

        yield from self.map_batches(batches, encode)

    def embed(self, params: Params, batches: CachedBatches) -> Embeddings:
        """The unit vectors of all batches, sharded over the devices. Each batch is written in place as it is computed."""
        result = self._allocate(len(batches))
        for i, (z, rest) in enumerate(self.stream(params, batches)):
            result = self._write(result, Embeddings(z, rest["index"]), i)
        return result

    def _empty(self, n: int) -> Embeddings:
        shape = n, self.batch_size
        return Embeddings(jnp.zeros((*shape, self.model.embed_dim)), jnp.full(shape, -1, jnp.int32))


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


def to_host(x: Array) -> np.ndarray:
    """A global array as numpy, on every process."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
