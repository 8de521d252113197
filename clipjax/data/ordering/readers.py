"""In which order a process trains on a source's examples, and how it reads them: `data.order` and `data.sources` in effect."""

from collections.abc import Callable
from typing import cast

import numpy as np

from clipjax import config
from clipjax.data.ordering.chunks import ChunkReader
from clipjax.data.ordering.mixture import Mixed, Mixture, batch_counts, spread
from clipjax.data.ordering.order import Order, Planned, Random
from clipjax.data.ordering.windows import Windows
from clipjax.data.source import Record, Source


def training_order(source: Source, data: config.Data, batch_size: int, seed: int, first: int, count: int) -> Order:
    """The order of a run. This process has the `count` places of every global batch from `first` on.

    Raises ConfigError for shares of a mixture that a batch can't have (`batch_counts`)."""
    if not isinstance(source, Mixture):
        return Planned(_order(source, data, batch_size, seed), first, count)
    counts = batch_counts(data, [len(s) for s in source.sources], batch_size)
    part, own = spread(counts)
    orders: list[Order] = []
    for number, (one, share) in enumerate(zip(source.sources, counts.tolist(), strict=True)):
        places = own[first : first + count][part[first : first + count] == number]  # consecutive: `spread` keeps their order
        own_seed = int(np.random.SeedSequence([seed, 5, number]).generate_state(1)[0])  # the same source twice: two orders
        orders.append(Planned(_order(one, data, share, own_seed), int(places[0]) if len(places) else 0, len(places)))
    return Mixed(orders, source.offsets, part, own)


def _order(source: Source, data: config.Data, share: int, seed: int) -> Order:
    if data.order == "random":
        return Random(len(source), share, seed)
    return Windows(source.chunks(), share, seed, data.lanes, data.window)


class Direct:
    """Reads each example by itself."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __call__(self, step: int, place: int, number: int) -> Record:
        return self._source.read(number)

    def close(self) -> None:
        """Nothing is open."""


class MixedReader:
    """Reads each example of a mixture by the reader of its part."""

    def __init__(self, order: Mixed, readers: "list[Direct | ChunkReader]") -> None:
        self._order, self._readers = order, readers

    def __call__(self, step: int, place: int, number: int) -> Record:
        part = int(self._order.part[place])
        return self._readers[part](step, int(self._order.own[place]), number - self._order.offsets[part])

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def training_reader(source: Source, order: Order, batch_of_step: Callable[[int], int]) -> "Direct | ChunkReader | MixedReader":
    """What reads a process's examples of `order` (`training_order`). `batch_of_step(k)`: the k-th batch that it needs."""
    if isinstance(order, Mixed):
        assert isinstance(source, Mixture)
        return MixedReader(order, [_reader(s, o, batch_of_step) for s, o in zip(source.sources, order.orders, strict=True)])
    return _reader(source, order, batch_of_step)


def _reader(source: Source, order: Order, batch_of_step: Callable[[int], int]) -> "Direct | ChunkReader":
    planned = cast(Planned[Windows], order)  # `training_order` makes no others here
    return ChunkReader(source, planned, batch_of_step) if isinstance(planned.order, Windows) else Direct(source)
