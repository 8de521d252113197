"""Keys that are equally near to a query: what a metric is worth on average over all orders of them.

So equal names, captions and images cost nothing and gain nothing, and a collapsed model, to which all keys are equal, scores
what chance does.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

# Cosines of equal vectors differ by the rounding of float32, which depends on the batch and the tile. Cosines closer than this
# are a tie. Otherwise noise would rank duplicates, and rank them differently on another number of devices.
TIE = 1e-6

Numbers = np.ndarray | jax.Array
Counts = Int[Numbers, "*q"]


def nearer(cosines: Float[Numbers, "*q k"], own: Float[Numbers, "*q 1"]) -> tuple[Bool[Numbers, "*q k"], Bool[Numbers, "*q k"]]:
    """Which keys are nearer to a query than its own key, and which are equally near; `own` is the cosine of its own key.

    Where one of the two is NaN the key is nearer: weights that have diverged find nothing."""
    return ~(cosines <= own + TIE), abs(cosines - own) <= TIE


def expected_hits(greater: Counts, equal: Counts, own: Counts | int, k: int) -> Float[Numbers, "*q"]:
    """The chance that one of a query's own keys is among the k nearest, when ties are in random order.

    `greater`: how many keys of others are nearer than the best own key, `equal`: how many are equally near; `own`: how many own
    keys are equally near, the best among them, or 0 for a query without any: it has no hit. Of m = k - greater places left,
    `1 - C(equal, m) / C(own + equal, m)`; of one own key that is m / (1 + equal). Without ties exactly 0 or 1. float64 of numpy
    arrays, float32 of JAX's.
    """
    xp = jnp if isinstance(greater, jax.Array) else np
    missed = xp.ones_like(greater / 1)
    for place in range(k):  # all places that are left go to others
        others = xp.maximum(equal - place, 0) / xp.maximum(own + equal - place, 1)
        missed = xp.where(place < k - greater, missed * others, missed)
    return xp.where(own > 0, 1 - missed, xp.zeros_like(missed))


def own_first(scores: Float[np.ndarray, "*q k"], own: Bool[np.ndarray, "*q k"]) -> Float[np.ndarray, "*q"]:
    """The chance that the key with a query's highest score is one of its own, where equal scores are in random order."""
    greater, equal = nearer(scores, np.where(own, scores, -np.inf).max(-1, keepdims=True))
    return np.asarray(expected_hits((greater & ~own).sum(-1), (equal & ~own).sum(-1), (equal & own).sum(-1), 1))


def average_precision(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """The mean over the positives of the precision at each, expected when ties are in random order; NaN without a positive.

    Of n tied keys, s of them positive, after `before` keys with `found` positives: place i of theirs holds a positive with
    chance s / n, and then found + 1 + (i - 1) (s - 1) / (n - 1) of before + i keys are positive (McSherry and Najork, ECIR 2008).
    """
    order = np.argsort(-scores, kind="stable")
    group = _groups(scores[order].astype(np.float64))
    n, s = np.bincount(group), np.bincount(group, positive[order])
    place = np.arange(len(scores)) - (np.cumsum(n) - n)[group]  # in its group, from 0
    found = (np.cumsum(s) - s)[group] + 1 + place * (s[group] - 1) / np.maximum(n[group] - 1, 1)
    precision = (s / n)[group] * found / np.arange(1, len(scores) + 1)
    return float(precision.sum() / s.sum()) if s.sum() else float("nan")


def _groups(falling: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The number of the tie that each of falling scores is in. Of very many scores each is close to the next, and yet the first
    of them is not close to the last: such a row is cut in pieces as wide as a tie."""
    row = np.cumsum(np.diff(falling, prepend=falling[:1]) < -TIE)
    first = falling[np.searchsorted(row, row)]
    piece = np.nan_to_num(np.floor((first - falling) / TIE))  # NaN are last, and are all in one tie
    return np.cumsum((np.diff(row, prepend=0) != 0) | (np.diff(piece, prepend=0) != 0))
