"""The softmax family: CLIP's loss and its variants. Each is an equation on the log-sum-exp of a row's and a column's negatives.

They take unit vectors and the logit scale t; s_ij = t cos_ij. Under `shard_map` over `axis`, b is the local batch and the loss is
the same on every device; outside, axis is None. `ids` [b]: examples of equal id are no negatives of each other. A row that this
leaves without negatives adds 0 to the sum and 1 to the count of the mean over the batch.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.losses.batch import einsum, log_mean_exp, mean, occurrences, size
from clipjax.losses.pairwise import Axis, Reduced, pairwise_logsumexp
from clipjax.losses.pairwise.axes import device_index
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.pairwise.partials import finite
from clipjax.losses.ranking import TIE, Ranked, Ranking, loss_alone

Ids = Int[Array, "b ..."] | None


def reduce_negatives(
    zimg: Array,
    ztxt: Array,
    scale: Scalar,
    axis: Axis,
    ids: Ids = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    keep: Literal["distinct", "same"] = "distinct",
) -> Reduced:
    """The log-sum-exp of every row and every column of the logits over its negatives: those of another id, or of the same.

    Of captions [b, K, e] the first is an image's own; the others are negatives of every image, and no columns of the result. One
    that is the first unchanged, as a single word that was to be shuffled, is no negative of its image.
    """
    k, both = 1 if ztxt.ndim == 2 else ztxt.shape[1], None if ids is None else (ids, ids)
    if k > 1:  # the primitive takes the first of K columns of a row for its own
        own = device_index(axis) * len(zimg) + jnp.arange(len(zimg)) if ids is None else ids
        unchanged = (ztxt * ztxt[:, :1]).sum(-1) > 1 - TIE
        both = own, jnp.where(unchanged, own[:, None], -1).reshape(-1)  # -1 equals none
        ztxt = ztxt.reshape(-1, ztxt.shape[-1])
    found = pairwise_logsumexp(zimg, ztxt, scale, axis=axis, keep="off_diagonal" if both is None else keep, ids=both, dtype=dtype)
    return found if k == 1 else found._replace(cols=found.sides[1][::k], col_max=found.maxima[1][::k], col_positive=None)


def clip_terms(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"] | Float[Array, "b K e"],
    scale: Scalar,
    *,
    axis: Axis = None,
    image_weight: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    ids: Ids = None,
    keep: Literal["distinct", "same"] = "distinct",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Ranked:
    """CLIP's symmetric cross-entropy (2103.00020). Of K captions the first is an image's own, the others negatives of all images.

    `image_weight`: the weight of the direction image -> text; both weights add up to 1 (ConVIRT's lambda, 2010.00747).
    `label_smoothing`: the part of the target that is spread evenly over a row's own pair and its negatives. `reduction="sum"` is
    twice the mean (ALIGN, 2102.05918). `keep`: the negatives have another id, or with "same" an id in common, of ids [b, l];
    label smoothing knows neither that nor several captions. `dtype`: of the operands of the products, float32 (six passes on a
    TPU), bfloat16x3 (three) or bfloat16; docs/losses.md has their errors.
    """
    own = (zimg * (ztxt if ztxt.ndim == 2 else ztxt[:, 0])).sum(1)
    found = reduce_negatives(zimg, ztxt, scale, axis, ids, dtype, keep)
    # log(1 + sum_{j != i} exp(s_ij - s_ii)): s_ii is subtracted before the exponential, so a small loss keeps its digits.
    rows, cols = (jax.nn.softplus(lse - scale * own) for lse in found.sides)
    if label_smoothing:  # adds eps (s_ii - mean of the row's logits). That mean needs only the sum of the other side
        n = size(zimg, axis)
        equal = jnp.zeros_like(own) if ids is None else occurrences(ids, ids, axis) - 1
        positives = (0, 0) if ids is None else found.positives

        def smoothed(x: Array, y: Array, positive: Array | int) -> Array:
            spread = (n * einsum("be,e->b", x, mean(y, axis)) - positive) / (n - equal)
            return jnp.where(n - equal > 1, label_smoothing * scale * (own - spread), 0)

        rows, cols = rows + smoothed(zimg, ztxt, positives[0]), cols + smoothed(ztxt, zimg, positives[1])
    loss = mean(image_weight * rows + (1 - image_weight) * cols, axis)
    return (2 if reduction == "sum" else 1) * loss, Ranking(own, *found.maxima)


def decoupled_terms(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    scale: Scalar,
    *,
    axis: Axis = None,
    sigma: float | None = None,
    stop_gradient: bool = False,
    ids: Ids = None,
) -> Ranked:
    """DCL, the mean of log sum_{j != i} exp(s_ij) - s_ii in both directions (2110.06848). It has no lower bound.

    With `sigma` DCLW: s_ii times w_i = 2 - B softmax_i(cos_ii / sigma), which `stop_gradient` treats as a constant. Raises
    ValueError for a batch of one pair.
    """
    _need_two(zimg, axis, "decoupled_loss")
    own = (zimg * ztxt).sum(1)
    weight = 1.0
    if sigma is not None:
        weight = 2 - jnp.exp(own / sigma - log_mean_exp(own / sigma, axis))
        weight = jax.lax.stop_gradient(weight) if stop_gradient else weight
    found = reduce_negatives(zimg, ztxt, scale, axis, ids)
    rows, cols = (unless_empty(lse, lambda lse: lse - weight * scale * own) for lse in found.sides)
    return mean(rows + cols, axis) / 2, Ranking(own, *found.maxima)


def hard_negative_terms(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    scale: Scalar,
    *,
    axis: Axis = None,
    alpha: float = 1.0,
    beta: float = 0.25,
    stop_gradient: bool = False,
    ids: Ids = None,
) -> Ranked:
    """HN-NCE: -log(e^{s_ii} / (alpha e^{s_ii} + sum_{j != i} w_ij e^{s_ij})) in both directions (2301.02280).

    The weights w_ij of a row, proportional to exp(beta s_ij), have mean 1; `stop_gradient` treats them as constants. alpha = 0
    is the decoupled form, which raises ValueError for a batch of one pair; alpha = 1, beta = 0 is CLIP's loss.
    """
    if not alpha:
        _need_two(zimg, axis, "hard_negative_loss with alpha = 0")
    own = (zimg * ztxt).sum(1)
    found = reduce_negatives(zimg, ztxt, (1 + beta) * scale, axis, ids)
    base = reduce_negatives(zimg, ztxt, beta * scale, axis, ids) if beta else None
    negatives = size(zimg, axis) - (1 if ids is None else occurrences(ids, ids, axis))

    def direction(lse: Array, base: Array | None) -> Array:
        def loss(lse: Array) -> Array:
            # log sum w e^s = LSE((1 + beta) s) - LSE(beta s) + log of the number of negatives
            total = lse if base is None else lse - finite(base) + jnp.log(jnp.maximum(negatives, 1))
            if stop_gradient:  # the softmax of w e^s is that of (1 + beta) s
                unweighted = lse / (1 + beta)
                total = unweighted + jax.lax.stop_gradient(total - unweighted)
            excess = total - scale * own
            return jax.nn.softplus(excess - math.log(alpha)) + math.log(alpha) if alpha else excess

        return unless_empty(lse, loss)

    rows, cols = map(direction, found.sides, (None, None) if base is None else base.sides)
    return mean(rows + cols, axis) / 2, Ranking(own, *found.maxima)


clip_loss = loss_alone(clip_terms)
decoupled_loss = loss_alone(decoupled_terms)
hard_negative_loss = loss_alone(hard_negative_terms)


def unless_empty(lse: Array, loss: Callable[[Array], Array]) -> Array:
    """`loss(lse)`, but 0 where nothing is kept.

    Masked before and after: else the branch that isn't taken has a gradient of NaN.
    """
    return jnp.where(lse == -jnp.inf, 0, loss(finite(lse)))


def _need_two(z: Array, axis: Axis, name: str) -> None:
    if size(z, axis) < 2:
        raise ValueError(f"{name} needs two pairs or more in the global batch: one has no negatives")
