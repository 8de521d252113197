"""Bootstrap intervals of means over queries, and of the difference of two runs on the same queries.

Queries are drawn with replacement, those of one group together: the captions of an image are no independent evidence. An interval
is between the 2.5 % and 97.5 % quantiles of the mean over the draws (Efron and Tibshirani 1993, chapter 13). Two runs are drawn
together, query by query: what is hard for both cancels, so the interval of their difference is several times shorter than one of
independent draws.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

DRAWS = 10_000
LEVEL = 0.95
CHUNK = 2**22  # counts that are held at a time

Values = Float[np.ndarray, " n"]  # of n queries; NaN: the query does not count
Draws = Float[np.ndarray, " d"]  # the mean, in each of d draws


class Interval(NamedTuple):
    low: float
    high: float


def seed_of(name: str) -> int:
    """A seed for the draws of a dataset: the same on every machine, another for each dataset."""
    return zlib.crc32(name.encode())


def draw_means(
    columns: Sequence[Values], groups: Sequence[str] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> list[Draws]:
    """The mean of each column in each draw. All columns are of the same queries, and are drawn together.

    A draw takes as many groups as there are. Its mean is over the queries of these groups, so large groups weigh more.
    Raises ValueError where a column has no query that counts.
    """
    values = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
    counted = ~np.isnan(values)
    if not counted.any(axis=0).all():
        raise ValueError("none of the queries counts")
    rows = np.concatenate([np.where(counted, values, 0.0), counted], axis=1)
    if groups is not None:
        _, of = np.unique(np.asarray(groups), return_inverse=True)
        rows = np.stack([np.bincount(of, weights=column) for column in rows.T], axis=1)
    # Groups with equal rows are interchangeable: only how many of each kind are drawn matters. Hits have few kinds.
    kinds, times = np.unique(rows, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // len(kinds))
    sums = []
    for start in range(0, draws, step):
        taken = rng.multinomial(len(rows), times / len(rows), size=min(step, draws - start))
        sums.append(taken @ kinds)
    total, queries = np.split(np.concatenate(sums), 2, axis=1)
    with np.errstate(invalid="ignore"):  # a draw without a query that counts has no mean, and no place in the quantiles
        return list((total / queries).T)


def interval(draws: Draws) -> Interval:
    """The middle 95 % of the draws."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return Interval(float(low), float(high))


def ci95(values: Values, groups: Sequence[str] | None = None, *, seed: int = 0) -> Interval | None:
    """The interval of the mean of a metric over its queries; None where no query counts."""
    if np.isnan(values).all():
        return None
    return interval(draw_means([values], groups, seed=seed)[0])
