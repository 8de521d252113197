"""Cross-entropies towards targets that are spread over several texts (pictures) of a row (column).

They take unit vectors and the logit scale t. Under `shard_map` over `axis`, b is the local batch and the loss the same on every
device; outside, axis is None.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipjax.losses.batch import einsum, mean, occurrences, outer
from clipjax.losses.pairwise import Axis, pairwise_cross_entropy, pairwise_logsumexp
from clipjax.losses.ranking import Ranked, Ranking, loss_alone
from clipjax.losses.softmax import others


def multi_positive_loss(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "c e"],
    scale: Float[Array, ""],
    image_ids: Int[Array, " b"],
    text_ids: Int[Array, " c"],
    *,
    axis: Axis = None,
) -> Float[Array, ""]:
    """Mean over pictures and texts, half each, of the cross-entropy towards all of the other side with the same id alike.

    c = K b: the texts i K to i K + K - 1 lie on the device of picture i (2406.18254; METHODS A.22). With an id of its own for
    every pair this is CLIP's loss, with all its digits. What no other side shares its id with adds 0, and is counted.
    """
    texts = len(ztxt) // len(zimg)
    found = pairwise_logsumexp(zimg, ztxt, scale, axis=axis, keep="off_diagonal", ids=(image_ids, text_ids))

    def direction(lse: Array, own: Array, same: Array, left: Bool[Array, " n"], positives: Array, count: Array) -> Array:
        """`left`: the own pair, of cosine `own`, is left out of `lse` and of the positives' sum."""
        excess = lse - scale * own  # all logits over the own one
        excess = jnp.where(left, jax.nn.softplus(excess), excess)
        behind = positives + jnp.where(left & same, own, 0) - count * own  # of the positives: 0 for a single own one
        return jnp.where(count > 0, excess - scale * behind / jnp.maximum(count, 1), 0 * excess)

    own = (zimg[:, None] * ztxt.reshape(len(zimg), texts, -1)).sum(-1).reshape(-1)
    same = (image_ids[:, None] == text_ids.reshape(-1, texts)).reshape(-1)
    first = jnp.arange(len(ztxt)) % texts == 0  # the primitive takes a picture's first text alone for its own
    counts = occurrences(image_ids, text_ids, axis), occurrences(text_ids, image_ids, axis)
    rows = direction(found.rows, own[::texts], same[::texts], first[::texts], found.row_positive, counts[0])
    cols = direction(found.cols, own, same, first, found.col_positive, counts[1])
    return (mean(rows, axis) + mean(cols, axis)) / 2


def cwcl_terms(
    zfrozen: Float[Array, "b e"], ztrained: Float[Array, "b e"], scale: Float[Array, ""], *, axis: Axis = None
) -> Ranked:
    """CWCL: targets w_ij = (1 + p_i.p_j) / 2 over their sum, towards the trained tower, plus plain cross-entropy back from it.

    p are the frozen tower's vectors, constants in the weights; the sum of both directions (2309.14580; METHODS A.12). The weights
    are linear in p_j, so sum_j w_ij s_ij needs no matrix, only the means of p_j, of q_j and of q_j p_j^T.
    """
    p = jax.lax.stop_gradient(zfrozen)
    own = (zfrozen * ztrained).sum(1)
    found = others(zfrozen, ztrained, scale, axis)
    weight = 1 + einsum("be,e->b", p, mean(p, axis))  # the mean of 2 w_ij over j: at least 2 / B, as p_i.p_i = 1
    weighted = einsum("be,ef,bf->b", zfrozen, outer(ztrained, p, axis), p) + einsum("be,e->b", zfrozen, mean(ztrained, axis))
    rows, cols = (jax.nn.softplus(lse - scale * own) for lse in (found.rows, found.cols))
    rows += scale * (own - weighted / weight)
    return mean(rows + cols, axis), Ranking(own, found.row_max, found.col_max)


cwcl_loss = loss_alone(cwcl_terms)


def distillation_loss(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    scale: Float[Array, ""],
    timg: Float[Array, "b f"],
    ttxt: Float[Array, "b f"],
    teacher_scale: Float[Array, ""] | float,
    *,
    axis: Axis = None,
) -> Float[Array, ""]:
    """Cross-entropy towards a teacher's softmax over the global batch, the mean of both directions (METHODS A.15).

    The teacher's unit vectors may have another width, and have no gradient.
    """
    rows, cols = pairwise_cross_entropy(zimg, ztxt, scale, timg, ttxt, teacher_scale, axis=axis)
    return mean(rows + cols, axis) / 2
