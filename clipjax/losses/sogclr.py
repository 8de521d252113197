"""SogCLR: the contrastive objective over the full dataset, from small batches (2202.12387, 2305.11965)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.batch import mean, size
from clipjax.losses.pairwise import Axis, pairwise_logsumexp
from clipjax.losses.pairwise.operands import Scalar

ImageAndText = tuple[Float[Array, " b"], Float[Array, " b"]]  # of images, of texts
UNSEEN = -jnp.inf  # log u of an example before its first visit


def sogclr_loss(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    scale: Scalar | ImageAndText,
    log_u: ImageAndText,
    gamma: Float[Array, ""] | float,
    *,
    axis: Axis = None,
    rho: float = 0.0,
) -> tuple[Float[Array, ""], ImageAndText]:
    """Half the mean over images and over texts of tau_i (log u_i + rho), and the updated log u.

    u_i <- (1 - gamma) u_i + gamma g_i. g_i is the mean over j != i of exp(h_ij / tau_i), h_ij = cos_ij - cos_ii. On the first
    visit, where log u is `UNSEEN`, u_i = g_i. All is in logarithms, because at tau = 0.01 g spans 170 powers of ten. The gradient
    for the embeddings is that of tau_i g_i / u_i with u constant. The gradient for tau_i is log u_i + rho - sum_j w_ij h_ij /
    (tau_i (B - 1)), w_ij = exp(h_ij / tau_i) / u_i (2305.11965). With gamma = 1 both are the gradients of the value. `scale` is
    1 / tau: one number (GCL, SogCLR), or one for each image and each text (RGCL, iSogCLR, where `rho` > 0 keeps tau from
    growing). Raises ValueError for a batch of one pair.
    """
    n = size(zimg, axis)
    if n < 2:
        raise ValueError("sogclr_loss needs two pairs or more in the global batch: one has no negatives")
    scales = scale if isinstance(scale, tuple) else (jnp.asarray(scale), jnp.asarray(scale))
    own = (zimg * ztxt).sum(1)
    found = pairwise_logsumexp(zimg, ztxt, *scales, axis=axis, keep="off_diagonal")

    def side(lse: Array, scale: Array, log_u: Array) -> tuple[Array, Array]:
        log_g = lse - scale * own - jnp.log(n - 1.0)
        value = jax.lax.stop_gradient(log_g)
        updated = jnp.logaddexp(jnp.log1p(-gamma) + log_u, jnp.log(gamma) + value)
        updated = jnp.where(log_u == UNSEEN, value, updated)
        ratio = jnp.exp(log_g - updated)  # g / u: its gradient is used in place of that of log u
        return (updated + rho + ratio - jax.lax.stop_gradient(ratio)) / scale, updated

    log_u = jax.lax.stop_gradient(log_u)
    (rows, new_rows), (cols, new_cols) = map(side, found.sides, scales, log_u)
    return mean(rows + cols, axis) / 2, (new_rows, new_cols)
