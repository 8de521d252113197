"""SigLIP's loss: a logistic regression on every pair of the global batch (2303.15343; METHODS A.6)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.softmax import Axis, cosines, mean


def siglip_loss(
    zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], scale: Float[Array, ""], bias: Float[Array, ""], *, axis: Axis = None
) -> Float[Array, ""]:
    """Sum over all pairs of softplus(-z_ij (t cos_ij + bias)), z = 1 on the diagonal and -1 off it, divided by the batch.

    Under `shard_map` over `axis`, b is the local batch and the result is the same on every device; outside, axis is None.
    """
    cos, own = cosines(zimg, ztxt, axis)
    logits = scale * cos + bias
    return mean(jax.nn.softplus(jnp.where(own, -logits, logits)).sum(1), axis)
