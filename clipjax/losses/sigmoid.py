"""SigLIP's loss: a logistic regression on every pair of the global batch (2303.15343)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.losses.batch import size
from clipjax.losses.pairwise import Axis, pairwise_softplus
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.ranking import Ranked, Ranking, loss_alone


def siglip_terms(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    scale: Scalar,
    bias: Scalar,
    *,
    axis: Axis = None,
    ids: Int[Array, " b"] | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Ranked:
    """Sum over all pairs of softplus(-z_ij (t cos_ij + bias)), z = 1 on the diagonal and -1 off it, divided by the batch.

    Pairs of equal `ids` other than the own one are left out. Under `shard_map` over `axis`, b is the local batch and the loss
    is the same on every device; outside, axis is None. `dtype`: as of `clip_loss`; sums are float32.
    """
    both = None if ids is None else (ids, ids)
    total, row_max, col_max = pairwise_softplus(zimg, ztxt, scale, bias, axis=axis, ids=both, dtype=dtype)
    return total / size(zimg, axis), Ranking((zimg * ztxt).sum(1), row_max, col_max)


siglip_loss = loss_alone(siglip_terms)
