"""Bootstrap intervals of means over queries, and of the difference of two runs on the same queries.

Groups of queries are drawn with replacement: the captions of an image are no independent evidence, nor are an image's hits in
both directions of retrieval. An interval is between the 2.5 % and 97.5 % quantiles of a figure over the draws (Efron and
Tibshirani 1993, chapter 13). Two runs are drawn together, query by query: what is hard for both cancels, so the interval of their
difference is shorter than one of independent draws, the more the runs are alike.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

DRAWS = 10_000
LEVEL = 0.95
CHUNK = 2**22  # counts that are held at a time

Draws = Float[np.ndarray, " d"]  # a figure, in each of d draws


class Interval(NamedTuple):
    low: float
    high: float


class Column(NamedTuple):
    """What a metric is the mean of."""

    values: Float[np.ndarray, " n"]  # NaN: the query does not count
    groups: Sequence[str]  # of each query; queries of one group are drawn together


def seed_of(name: str) -> int:
    """A seed for the draws of a dataset: the same on every machine, another for each dataset."""
    return zlib.crc32(name.encode())


def draw_means(columns: Sequence[Column], *, draws: int = DRAWS, seed: int = 0) -> list[Draws]:
    """The mean of each column in each draw. Groups of the same name are drawn together over all columns.

    A draw takes as many groups as there are. Its mean is over the queries of these groups, so large groups weigh more. It is NaN
    where none of them counts. Raises ValueError where a column has no query that counts.
    """
    names, of = np.unique(np.concatenate([np.asarray(column.groups, str) for column in columns]), return_inverse=True)
    sums, counts = [], []
    for column, group in zip(columns, np.split(of, np.cumsum([len(c.values) for c in columns])[:-1]), strict=True):
        values = np.asarray(column.values, np.float64)
        counted = ~np.isnan(values)
        if not counted.any():
            raise ValueError("none of the queries counts")
        sums.append(np.bincount(group, np.where(counted, values, 0.0), len(names)))
        counts.append(np.bincount(group, counted, len(names)))
    total, queries = np.split(_draw_sums(np.stack([*sums, *counts], axis=1), draws, seed), 2, axis=1)
    with np.errstate(invalid="ignore"):
        return list((total / queries).T)


def _draw_sums(rows: Float[np.ndarray, "g m"], draws: int, seed: int) -> Float[np.ndarray, "d m"]:
    """The sum of g rows that are drawn with replacement. Equal rows are interchangeable: only how often each kind is drawn
    matters, and hits have few kinds."""
    kinds, times = np.unique(rows, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // len(kinds))
    sizes = [min(step, draws - start) for start in range(0, draws, step)]
    return np.concatenate([rng.multinomial(len(rows), times / len(rows), size) @ kinds for size in sizes])


def interval(draws: Draws) -> Interval:
    """The middle 95 % of the draws. Those without a mean have no place in it."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return Interval(float(low), float(high))
