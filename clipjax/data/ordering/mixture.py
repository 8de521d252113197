"""Several datasets as one: each has its share of every batch, exactly, an order of its own, and epochs of its own."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clipjax import config
from clipjax.config import ConfigError, require
from clipjax.data.ordering.order import Order
from clipjax.data.source import Record, Source


class Mixture(Source):
    """The examples of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Source], data: config.Data) -> None:
        """`sources`: opened, of `data.parts`."""
        super().__init__()
        self.sources, self.name = tuple(sources), data.name
        self.offsets = np.concatenate([[0], np.cumsum([len(source) for source in sources])])
        self.fields = {name: kind for source in sources for name, kind in source.fields.items()}
        self.classnames = sources[0].classnames if len({source.classnames for source in sources}) == 1 else None
        self.version = " + ".join(source.version for source in sources)
        self.captioned = all(source.captioned for source in sources)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def part_of(self, i: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.offsets, i, side="right")) - 1
        return part, i - int(self.offsets[part])

    def _record(self, i: int) -> Record:
        part, own = self.part_of(i)
        return self.sources[part].read(own)

    def text(self, i: int) -> Record:
        part, own = self.part_of(i)
        return self.sources[part].text(own)

    def texts(self) -> Iterator[Record]:
        return (record for source in self.sources for record in source.texts())


def part_names(data: config.Data) -> tuple[str, ...]:
    """A short name of each of `data.sources`, for the keys of metrics: from `tsv:/data/art.tsv`, `art`. No two are equal."""
    names: list[str] = []
    for part in data.sources:
        kind, _, rest = part.spec.partition(":")
        words = re.findall(r"[\w-]+", re.sub(r"\{[^}]*\}|\.\w+$", "", rest.partition("::")[0]))
        named = words[:1] if kind == "tfds" else [word for word in words if not word.isdigit()][-1:]
        name = base = (named or words[-1:] or [kind])[0]
        count = 1
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.append(name)
    return tuple(names)


def batch_counts(data: config.Data, sizes: Sequence[int], batch_size: int) -> np.ndarray:
    """int64, of each of `data.sources` the examples in every batch: in proportion to the weights, or to repeat x size, where
    `sizes` are the examples of each, and rounded so that the sum is right (largest remainder).

    Raises ConfigError where one would have none, or more than there are examples."""
    weights = np.array([part.weight or (part.repeat or 1.0) * n for part, n in zip(data.sources, sizes, strict=True)], np.float64)
    counts = _rounded(weights, batch_size)
    if (counts == 0).any():
        name = data.sources[int(counts.argmin())].spec
        smallest = next(size for size in range(batch_size + 1, 2**62) if _rounded(weights, size).all())
        remedy = f"is too small for an example of {name} in every batch: use at least {smallest:,}, or raise its weight"
        raise ConfigError(f"train.batch_size = {batch_size}: {remedy}")
    for part, count, n in zip(data.sources, counts.tolist(), sizes, strict=True):
        remedy = f"has {count:,} examples of {part.spec}, which has only {n:,}: lower its weight or repeat, or the batch size"
        require(count <= n, "train.batch_size", batch_size, remedy)
    return counts


def _rounded(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers with this sum, in proportion to the weights. Of equal remainders the first counts as the largest."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


@dataclass(frozen=True)
class Share:
    """A part of a mixture, and what a run sees of it."""

    name: str  # in the keys of metrics
    dataset: str  # SPEC/SPLIT
    examples: int
    count: int  # of them in every batch

    def epochs(self, batches: int) -> float:
        """How many times these batches hold each example, on average."""
        return batches * self.count / self.examples


def shares(source: Source, data: config.Data, batch_size: int) -> tuple[Share, ...]:
    """Of each of `data.sources`; of a single source, none. Raises ConfigError as `batch_counts`."""
    if not isinstance(source, Mixture):
        return ()
    sizes = [len(part) for part in source.sources]
    counts = batch_counts(data, sizes, batch_size).tolist()
    names = [part.name for part in source.sources]
    return tuple(itertools.starmap(Share, zip(part_names(data), names, sizes, counts, strict=True)))


def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [sum of counts] each: which part a place of the batch belongs to, and its place among those of the part. They are
    spread evenly: any run of places, so the share of any process, has of each part its due, to within an example or two."""
    part = np.repeat(np.arange(len(counts)), counts)
    own = np.concatenate([np.arange(count) for count in counts.tolist()])
    by_place = np.argsort((own + 0.5) / counts[part], kind="stable")
    return part[by_place], own[by_place]


class Mixed(Order):
    """The order of a mixture: at each place of a batch always the same part, in this part's own order.

    Each part has epochs of its own, as its own order says. `batches` is that many of the mixture as a whole."""

    def __init__(self, orders: Sequence[Order], offsets: np.ndarray, part: np.ndarray, own: np.ndarray) -> None:
        """`offsets`: of the parts in the mixture. `part` and `own`: of each place (`spread`)."""
        self.orders, self.offsets, self.part, self.own = tuple(orders), offsets.tolist(), part, own
        self.share = len(part)
        self.batches = max(1, self.offsets[-1] // self.share)

    def at(self, step: int, places: np.ndarray) -> np.ndarray:
        numbers = np.empty(places.shape, np.int64)
        for part, order in enumerate(self.orders):
            ours = self.part[places] == part
            numbers[ours] = self.offsets[part] + order.at(step, self.own[places[ours]])
        return numbers

    def one(self, step: int, place: int) -> int:
        part = int(self.part[place])
        return self.offsets[part] + self.orders[part].one(step, int(self.own[place]))

    def stand_in(self, step: int, place: int, tried: int) -> int:
        part = int(self.part[place])
        return self.offsets[part] + self.orders[part].stand_in(step, int(self.own[place]), tried)
