"""SogCLR: the contrastive objective over the whole data set from small batches (2202.12387, 2305.11965; METHODS A.11)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.batch import mean, size
from clipjax.losses.pairwise import Axis, pairwise_logsumexp

Both = tuple[Float[Array, " b"], Float[Array, " b"]]  # of pictures, of texts
UNSEEN = -jnp.inf  # log u of an example before its first visit


def sogclr_loss(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    scale: Float[Array, ""] | Both,
    log_u: Both,
    gamma: Float[Array, ""] | float,
    *,
    axis: Axis = None,
    rho: float = 0.0,
) -> tuple[Float[Array, ""], Both]:
    """Half the mean over pictures and over texts of tau_i (log u_i + rho), and the moved log u.

    u_i <- (1 - gamma) u_i + gamma g_i, g_i the mean over j != i of exp((cos_ij - cos_ii) / tau_i); on the first visit, where
    log u is `UNSEEN`, u_i = g_i. All of it in logarithms: at tau = 0.01 g spans 170 powers of ten. The gradient by the embeddings
    is that of tau_i g_i / u_i with u held, the one by tau_i A.11's log u_i + rho - sum_j w_ij h_ij / (tau_i (B - 1)); with
    gamma = 1 both are those of the value. `scale` is 1 / tau, one number (GCL, SogCLR) or one for each picture and each text
    (RGCL, iSogCLR, where `rho` > 0 keeps tau from growing). Raises ValueError for a batch of one pair.
    """
    n = size(zimg, axis)
    if n < 2:
        raise ValueError("sogclr_loss needs two pairs or more in the global batch: one has no negatives")
    scales = scale if isinstance(scale, tuple) else (scale, scale)
    own = (zimg * ztxt).sum(1)
    found = pairwise_logsumexp(zimg, ztxt, *scales, axis=axis, keep="off_diagonal")

    def side(lse: Array, scale: Array, log_u: Array) -> tuple[Array, Array]:
        log_g = lse - scale * own - jnp.log(n - 1.0)
        held = jax.lax.stop_gradient(log_g)
        moved = jnp.logaddexp(jnp.log1p(-gamma) + log_u, jnp.log(gamma) + held)
        moved = jnp.where(log_u == UNSEEN, held, moved)
        ratio = jnp.exp(log_g - moved)  # g / u, whose gradient stands in for that of log u
        return (moved + rho + ratio - jax.lax.stop_gradient(ratio)) / scale, moved

    log_u = jax.lax.stop_gradient(log_u)
    (rows, new_rows), (cols, new_cols) = map(side, (found.rows, found.cols), scales, log_u)
    return mean(rows + cols, axis) / 2, (new_rows, new_cols)
