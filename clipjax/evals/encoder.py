"""Embeddings of a whole source, computed on all devices batch by batch and left where they were computed."""

import collections
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from clipjax import config, distributed, preemption
from clipjax.models.clip import Params, bind
from clipjax.placement import placement
from clipjax.sharding import BATCH, batch_devices, over_rows, to_global

Batch = dict[str, np.ndarray]  # this process's rows
Metrics = dict[str, float | list[float] | None]  # None where a metric does not exist; a list is a curve
KEEP = 256 * 2**20  # bytes of batches that are worth keeping in host memory between two evaluations
PATIENCE = 5.0  # seconds before a progress line is shown
IN_FLIGHT = 2  # batches given to the devices before the first must be done: bounds memory, keeps the devices busy


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of n batches of b, and what each is of. On a mesh, b is divided over the devices and nothing moves."""

    z: Float[Array, "n b e"]
    index: Int[Array, "n b"]  # of the example in its source; -1: padding

    def rows(self) -> tuple[Float[Array, "nb e"], Int[Array, " nb"]]:
        return self.z.reshape(-1, self.z.shape[-1]), self.index.reshape(-1)


class Rereadable:
    """Equal batches that can be gone through again and again; kept in memory where they are small.

    Each holds `image` uint8 [b, s, s, 3] or `text` int32 [b, t], and of `index` and `label` (int32 [b], -1 for padding) what
    its user needs: the number of the example in the source, and its class.
    """

    def __init__(self, read: Callable[[], Iterable[Batch]], count: int, name: str, unit: str, keep: int = KEEP) -> None:
        """`read` gives `count` batches anew each time; they hold the `unit` (pictures, captions) of `name`, a dataset."""
        self._read, self._count, self._keep = read, count, keep
        self._kept: list[Batch] | None = None
        self.name, self.unit = name, unit

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        seen: list[Batch] = []
        size = 0
        for batch in self._read():
            size += sum(x.nbytes for x in batch.values())
            if size <= self._keep:
                seen.append(batch)
            else:
                seen.clear()
            yield batch
        if size <= self._keep:
            self._kept = seen


class Batched:
    """A model at work on one global batch of a source after the other."""

    def __init__(self, model: config.Model, mesh: Mesh, batch_size: int) -> None:
        """`batch_size` is over all devices, and rounded up to a multiple of them."""
        devices = batch_devices(mesh)
        self.model = model
        self.mesh = mesh
        self.batch_size = -(-batch_size // devices) * devices

    def batches(self, total: int) -> int:
        """How many batches `total` examples fill, the last perhaps in part."""
        return -(-total // self.batch_size)

    def rows(self, total: int) -> Iterator[tuple[Int[np.ndarray, " b"], Bool[np.ndarray, " b"]]]:
        """Of each batch of `total` examples this process's share: their numbers, and which are real. Padding repeats the last."""
        n = self.batch_size // jax.process_count()
        for start in range(jax.process_index() * n, self.batches(total) * self.batch_size, self.batch_size):
            numbers = np.arange(start, start + n)
            yield np.minimum(numbers, total - 1), numbers < total

    def work(self, batches: Rereadable, fn: Callable[[dict[str, Array]], Any]) -> Iterator[tuple[Any, dict[str, Array]]]:
        """What `fn` makes of one global batch after another, each with the batch. Raises Preempted during a training run that is
        told to stop: it waits for no evaluation.
        """
        running: collections.deque[Any] = collections.deque()
        for batch in progress(batches, self.batch_size):
            preemption.check()
            distributed.alive()
            given = to_global(batch, self.mesh)
            made = fn(given)
            running.append(made)
            if len(running) > IN_FLIGHT:
                jax.block_until_ready(running.popleft())
            yield made, given


class Encoder(Batched):
    """Both towers, compiled for global batches on a mesh. The weights are an argument, so that training compiles them once."""

    def __init__(self, model: config.Model, mesh: Mesh, batch_size: int) -> None:
        super().__init__(model, mesh, batch_size)
        rows, place = over_rows(mesh), placement(mesh, model.dtype)
        self._towers = {
            "image": jax.jit(lambda params, x: bind(model, params).encode_image(x, place=place), out_shardings=rows),
            "text": jax.jit(lambda params, x: bind(model, params).encode_text(x, place), out_shardings=rows),
        }
        stacked = NamedSharding(mesh, P(None, BATCH))
        self._room = jax.jit(self._empty, static_argnums=0, out_shardings=stacked)
        self._put = jax.jit(_put, donate_argnums=0, out_shardings=stacked)

    def stream(self, params: Params, batches: Rereadable) -> Iterator[tuple[Float[Array, "b e"], dict[str, Array]]]:
        """The unit vectors, float32, of one batch after another, each with the rest of its batch, as global arrays."""

        def encode(batch: dict[str, Array]) -> Array:
            (kind,) = self._towers.keys() & batch.keys()
            return self._towers[kind](params, batch.pop(kind))

        yield from self.work(batches, encode)

    def embed(self, params: Params, batches: Rereadable) -> Embeddings:
        """All of them, sharded over the devices; each batch is written into its place as it comes."""
        whole = self._room(len(batches))
        for i, (z, rest) in enumerate(self.stream(params, batches)):
            whole = self._put(whole, Embeddings(z, rest["index"]), i)
        return whole

    def _empty(self, n: int) -> Embeddings:
        shape = n, self.batch_size
        return Embeddings(jnp.zeros((*shape, self.model.embed_dim)), jnp.full(shape, -1, jnp.int32))


def _put(whole: Embeddings, batch: Embeddings, i: int) -> Embeddings:
    return jax.tree.map(lambda all_of_them, x: all_of_them.at[i].set(x), whole, batch)


def progress(batches: Rereadable, batch_size: int) -> Iterator[Batch]:
    """A line on stderr with rate and time left, from the first process, once it has taken some seconds."""
    live = sys.stderr.isatty()
    quiet = jax.process_index() != 0
    pace = dict(delay=PATIENCE, mininterval=0.5 if live else 30, leave=not live, disable=quiet)
    total, unit = len(batches) * batch_size, f" {batches.unit}"
    with tqdm(desc=batches.name, total=total, unit=unit, unit_scale=True, **pace) as bar:
        for batch in batches:
            yield batch
            bar.update(batch_size)


def to_host(x: Array) -> np.ndarray:
    """A global array as numpy, on every process."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
