"""Cross-entropies towards targets that are spread over several texts (images) of a row (column).

They take unit vectors and the logit scale t. Under `shard_map` over `axis`, b is the local batch and the loss the same on every
device; outside, axis is None.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipjax.losses.batch import einsum, mean, occurrences, outer
from clipjax.losses.pairwise import Axis, pairwise_cross_entropy, pairwise_logsumexp
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.ranking import Ranked, Ranking, loss_alone
from clipjax.losses.softmax import reduce_negatives


def multi_positive_loss(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "c e"],
    scale: Scalar,
    image_ids: Int[Array, " b"],
    text_ids: Int[Array, " c"],
    *,
    axis: Axis = None,
) -> Float[Array, ""]:
    """Mean over images and texts, half each, of the cross-entropy towards all of the other side with the same id, in equal parts.

    c = K b: the texts i K to i K + K - 1 are on the device of image i (2406.18254). If all ids
    differ, this is CLIP's loss, and as exact. An image or text without a positive adds 0 to the sum and 1 to the count.
    """
    texts = len(ztxt) // len(zimg)
    found = pairwise_logsumexp(zimg, ztxt, scale, axis=axis, keep="off_diagonal", ids=(image_ids, text_ids))

    def direction(lse: Array, own: Array, same: Array, no_own: Bool[Array, " n"], positives: Array, count: Array) -> Array:
        """`no_own`: `lse` and the sum of positives are without the own pair, whose cosine is `own`."""
        excess = lse - scale * own  # the log-sum-exp of all logits, less the own one
        excess = jnp.where(no_own, jax.nn.softplus(excess), excess)
        positive_gap = positives + jnp.where(no_own & same, own, 0) - count * own  # 0 where the own pair is the only positive
        return jnp.where(count > 0, excess - scale * positive_gap / jnp.maximum(count, 1), 0 * excess)

    own = (zimg[:, None] * ztxt.reshape(len(zimg), texts, -1)).sum(-1).reshape(-1)
    same = (image_ids[:, None] == text_ids.reshape(-1, texts)).reshape(-1)
    first = jnp.arange(len(ztxt)) % texts == 0  # for the primitive, only the first text of an image makes its own pair
    counts = occurrences(image_ids, text_ids, axis), occurrences(text_ids, image_ids, axis)
    (row_lse, col_lse), positives = found.sides, found.positives
    rows = direction(row_lse, own[::texts], same[::texts], first[::texts], positives[0], counts[0])
    cols = direction(col_lse, own, same, first, positives[1], counts[1])
    return (mean(rows, axis) + mean(cols, axis)) / 2


def cwcl_terms(zfrozen: Float[Array, "b e"], ztrained: Float[Array, "b e"], scale: Scalar, *, axis: Axis = None) -> Ranked:
    """CWCL: targets w_ij = (1 + p_i.p_j) / 2 over their sum, towards the trained tower; plain cross-entropy the other way.

    p are the frozen tower's vectors, constants in the weights. The loss is the sum of both directions (2309.14580). The weights
    are linear in p_j, so sum_j w_ij s_ij needs no matrix, only the means of p_j, of q_j and of q_j p_j^T.
    """
    p = jax.lax.stop_gradient(zfrozen)
    own = (zfrozen * ztrained).sum(1)
    found = reduce_negatives(zfrozen, ztrained, scale, axis)
    weight = 1 + einsum("be,e->b", p, mean(p, axis))  # the mean of 2 w_ij over j: at least 2 / B, as p_i.p_i = 1
    weighted = einsum("be,ef,bf->b", zfrozen, outer(ztrained, p, axis), p) + einsum("be,e->b", zfrozen, mean(ztrained, axis))
    rows, cols = (jax.nn.softplus(lse - scale * own) for lse in found.sides)
    rows += scale * (own - weighted / weight)
    return mean(rows + cols, axis), Ranking(own, *found.maxima)


cwcl_loss = loss_alone(cwcl_terms)


def distillation_loss(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    scale: Scalar,
    timg: Float[Array, "b f"],
    ttxt: Float[Array, "b f"],
    teacher_scale: Scalar,
    *,
    axis: Axis = None,
    some: Bool[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Cross-entropy towards a teacher's softmax over the global batch, the mean of both directions.

    This is open_clip's DistillClipLoss. The teacher has a scale of its own and no gradient; its unit vectors may have another
    width. An example that is not among `some` adds 0 to the sum and 1 to the count.
    """
    rows, cols = pairwise_cross_entropy(zimg, ztxt, scale, timg, ttxt, teacher_scale, axis=axis)
    return mean(rows + cols if some is None else jnp.where(some, rows + cols, 0), axis) / 2


def label_sets(labels: Int[Array, "b l"], classes: int) -> Float[Array, "b classes"]:
    """Vectors whose cosine is s / sqrt(m n) where sets of m and n labels share s. Labels are in [0, classes); -1 is none, and
    an example of none has zeros.
    """
    sets = jax.nn.one_hot(labels, classes).max(1)
    return sets * jax.lax.rsqrt(jnp.maximum(sets.sum(1, keepdims=True), 1))
