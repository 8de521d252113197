"""Embeddings of a whole source, computed on all devices batch by batch and left where they were computed."""

import collections
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from clipjax import config
from clipjax.models.clip import Params, bind
from clipjax.sharding import BATCH, batch_devices, over_rows, to_global

Batch = dict[str, np.ndarray]  # this process's rows
Metrics = dict[str, float | None]  # None where a metric does not exist
KEEP = 256 * 2**20  # bytes of batches that are worth keeping in host memory between two evaluations
PATIENCE = 5.0  # seconds before a progress line is shown
AHEAD = 2  # batches given to the devices before the first must be done: bounds memory, keeps the devices busy


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of n batches of b, and what each is of. On a mesh, b is divided over the devices and nothing moves."""

    z: Float[Array, "n b e"]
    index: Int[Array, "n b"]  # of the example in its source; -1: padding

    def rows(self) -> tuple[Float[Array, "nb e"], Int[Array, " nb"]]:
        return self.z.reshape(-1, self.z.shape[-1]), self.index.reshape(-1)


class Batches:
    """Equal batches that can be gone through again and again; kept in memory where they are small.

    Each holds `image` uint8 [b, s, s, 3] or `text` int32 [b, t], and of `index` and `label` (int32 [b], -1 for padding) what
    its user needs: the number of the example in the source, and its class.
    """

    def __init__(self, read: Callable[[], Iterable[Batch]], count: int, name: str, keep: int = KEEP) -> None:
        self._read, self._count, self._keep = read, count, keep
        self._kept: list[Batch] | None = None
        self.name = name  # for the progress line

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


class Encoder:
    """Both towers, compiled for global batches on a mesh. The weights are an argument, so that training compiles them once."""

    def __init__(self, model: config.Model, mesh: Mesh, batch_size: int) -> None:
        """`batch_size` is over all devices, and rounded up to a multiple of them."""
        devices = batch_devices(mesh)
        self.model = model
        self.mesh = mesh
        self.batch_size = -(-batch_size // devices) * devices
        rows = over_rows(mesh)
        self._towers = {
            "image": jax.jit(lambda params, x: bind(model, params).encode_image(x), out_shardings=rows),
            "text": jax.jit(lambda params, x: bind(model, params).encode_text(x), out_shardings=rows),
        }
        stacked = NamedSharding(mesh, P(None, BATCH))
        self._stack = jax.jit(lambda *xs: jax.tree.map(lambda *x: jnp.stack(x), *xs), out_shardings=stacked)

    @property
    def local_rows(self) -> slice:
        """This process's rows of a global batch."""
        n = self.batch_size // jax.process_count()
        return slice(jax.process_index() * n, (jax.process_index() + 1) * n)

    def stream(self, params: Params, batches: Batches) -> Iterator[tuple[Float[Array, "b e"], dict[str, Array]]]:
        """The unit vectors, float32, of one batch after another, each with the rest of its batch, as global arrays."""
        running: collections.deque[Array] = collections.deque()
        for batch in progress(batches, self.batch_size):
            rest = to_global(batch, self.mesh)
            (kind,) = self._towers.keys() & rest.keys()
            z = self._towers[kind](params, rest.pop(kind))
            running.append(z)
            if len(running) > AHEAD:
                running.popleft().block_until_ready()
            yield z, rest

    def embed(self, params: Params, batches: Batches) -> Embeddings:
        """All of them, sharded over the devices."""
        return self._stack(*(Embeddings(z, rest["index"]) for z, rest in self.stream(params, batches)))


def progress(batches: Batches, batch_size: int) -> Iterator[Batch]:
    """A line on stderr with rate and time left, from the first process, once it has taken some seconds."""
    live = sys.stderr.isatty()
    quiet = jax.process_index() != 0
    pace = dict(delay=PATIENCE, mininterval=0.5 if live else 30, leave=not live, disable=quiet)
    with tqdm(desc=batches.name, total=len(batches) * batch_size, unit=" examples", unit_scale=True, **pace) as bar:
        for batch in batches:
            yield batch
            bar.update(batch_size)


def to_host(x: Array) -> np.ndarray:
    """A global array as numpy, on every process."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
