"""Losses of metric learning: CACR's repulsion, Mann-Whitney, and Multi-Similarity.

They take unit vectors and fixed scales: once all pairs are told apart, a larger scale makes each of them smaller, so a learned
one would have no limit. Under `shard_map` over `axis`, b is the local batch. Examples of equal `ids` are no negatives of each
other; a row that this leaves without negatives adds 0 to the sum and 1 to the count of the mean over the batch.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.batch import add_up, mean, occurrences, size
from clipjax.losses.pairwise import Axis, pairwise_logsumexp, pairwise_softplus
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.ranking import Ranked, Ranking
from clipjax.losses.softmax import Ids, reduce_negatives, unless_empty


def attraction(distances: Float[Array, "b p"], tau: float, *, axis: Axis = None) -> Float[Array, ""]:
    """CACR's mean of sum_k w_ik c_ik, c the squared distances of an example's positive pairs and w_i = softmax(tau c_i), held."""
    return mean((jax.lax.stop_gradient(jax.nn.softmax(tau * distances)) * distances).sum(1), axis)


def repulsion_terms(x: Float[Array, "b e"], y: Float[Array, "b e"], tau: float, *, axis: Axis = None, ids: Ids = None) -> Ranked:
    """Mean of (1 / tau) log sum_{j != i} exp(-tau c_ij) in both directions, c_ij = |x_i - y_j|^2 (2105.03746).

    Its gradient is CACR's, that of -sum_j w_ij c_ij with w_i = softmax_j(-tau c_i) held. The values differ by the entropy of w_i
    over tau.
    """
    found = reduce_negatives(x, y, 2 * tau, axis, ids)  # -tau c = 2 tau cos - 2 tau
    rows, cols = (unless_empty(lse, lambda lse: lse / tau - 2) for lse in found.sides)
    return mean(rows + cols, axis) / 2, Ranking((x * y).sum(1), *found.maxima)


def mann_whitney_terms(
    x: Float[Array, "b e"], y: Float[Array, "b e"], scale: Scalar, *, axis: Axis = None, ids: Ids = None
) -> Ranked:
    """Mean over i != j of softplus(t (cos_ij - cos_ii)) and of softplus(t (cos_ij - cos_jj)), half each, in a pass for each.

    An own cosine is one more coordinate: [x_i, -cos_ii] . [y_j, 1]. The sums have B ln 2 of the own pairs, which is taken off.
    """
    own, n = (x * y).sum(1), size(x, axis)
    less, one, both = -own[:, None], jnp.ones_like(own)[:, None], None if ids is None else (ids, ids)

    def against(of_x: Array, of_y: Array) -> tuple[Array, Array, Array]:
        sides = jnp.concatenate([x, of_x], 1), jnp.concatenate([y, of_y], 1)
        return pairwise_softplus(*sides, scale, 0.0, axis=axis, ids=both)

    rows, cols = against(less, one), against(one, less)
    pairs = n * (n - 1 if ids is None else mean(n - occurrences(ids, ids, axis), axis))
    value = (rows[0] + cols[0] - 2 * n * math.log(2)) / (2 * jnp.maximum(pairs, 1))
    return value, Ranking(own, rows[1] + own, cols[2] + own)


def soft_hinges(positive: Array, negative: Array, alpha: float, beta: float, offset: float) -> Array:
    """log(1 + sum_p e^{-alpha (cos_p - offset)}) / alpha + log(1 + sum_n e^{beta (cos_n - offset)}) / beta (1904.06627).

    `positive` and `negative` are the log-sum-exp of -alpha cos_p and of beta cos_n.
    """
    return jax.nn.softplus(positive + alpha * offset) / alpha + jax.nn.softplus(negative - beta * offset) / beta


def multi_similarity_terms(
    x: Float[Array, "b e"], y: Float[Array, "b e"], hinges: tuple[float, float, float], *, axis: Axis = None, ids: Ids = None
) -> Ranked:
    """Mean of the soft hinges of rows and of columns, without mining. Pairs of equal `ids` are positives. `hinges`: see there."""
    own, (alpha, beta, _) = (x * y).sum(1), hinges
    negatives, positives = reduce_negatives(x, y, beta, axis, ids), (-alpha * own, -alpha * own)
    if ids is not None:
        others = pairwise_logsumexp(-x, y, alpha, axis=axis, keep="same", ids=(ids, ids)).sides
        positives = tuple(map(jnp.logaddexp, positives, others))
    loss = add_up(soft_hinges(p, n, *hinges) for p, n in zip(positives, negatives.sides, strict=True))
    return mean(loss, axis) / 2, Ranking(own, *negatives.maxima)
