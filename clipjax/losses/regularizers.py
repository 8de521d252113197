"""Regularizers of the geometry of unit vectors, over the global batch.

Under `shard_map` over `axis`, b is the local batch and the result is the same on every device; outside, axis is None.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.batch import log_mean_exp, mean, outer, size
from clipjax.losses.pairwise import Axis, pairwise_logsumexp


def uniformity(z: Float[Array, "b e"], *, axis: Axis = None, t: float = 2.0) -> Float[Array, ""]:
    """log of the mean over all pairs i != j of exp(-t |z_i - z_j|^2) (2005.10242): 0 when all are one point.

    Raises ValueError for a batch of one.
    """
    # A pair counts once in its row and once in its column. So the gradient for the rows' side is half of the gradient, and the
    # product for the other side is not needed. Hence twice the value, less the value without gradient.
    half = _log_mean_pair(z, jax.lax.stop_gradient(z), axis, t, "uniformity", y_gradient=False)
    return 2 * half - jax.lax.stop_gradient(half)


def cross_uniformity(
    zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], *, axis: Axis = None, t: float = 2.0
) -> Float[Array, ""]:
    """log of the mean over all i != j of exp(-t |x_i - y_j|^2), of images x and texts y (2405.18570).

    The minimum is -4 t: each tower's vectors are one point, and the two points are opposite. Raises ValueError for a batch of one
    pair.
    """
    return _log_mean_pair(zimg, ztxt, axis, t, "cross_uniformity")


def _log_mean_pair(x: Array, y: Array, axis: Axis, t: float, name: str, y_gradient: bool = True) -> Float[Array, ""]:
    n = size(x, axis)
    if n < 2:
        raise ValueError(f"{name} needs two or more in the global batch: one has no other")
    # |x - y|^2 = 2 - 2 cos on the sphere: a log-sum-exp at scale 2 t
    found = pairwise_logsumexp(x, y, 2 * t, axis=axis, keep="off_diagonal", columns=False, y_gradient=y_gradient)
    return log_mean_exp(found.rows - jnp.log(n - 1.0) - 2 * t, axis)


def alignment(zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], *, axis: Axis = None) -> Float[Array, ""]:
    """Mean of |x_i - y_i|^2 (2005.10242)."""
    return mean(((zimg - ztxt) ** 2).sum(1), axis)


def preserved(
    z: Float[Array, "b e"], start: Float[Array, "b e"], *, axis: Axis = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(mean over the batch and the coordinates of (z - start)^2, mean over the batch of 1 - z_i . start_i).

    `start` has no gradient. Of unit vectors the first is 2 / e times the second, to rounding: the first keeps its digits where
    the vectors have hardly moved.
    """
    start = jax.lax.stop_gradient(start)
    return mean(jnp.square(z - start).mean(1), axis), mean(1 - (z * start).sum(1), axis)


def cyclip(
    zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], *, axis: Axis = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """CyCLIP's (in-modal, cross-modal) terms: B times the mean square of X X^T - Y Y^T and of S - S^T, S = X Y^T (2205.14459).

    With U = X + Y and V = X - Y these are (U V^T +- V U^T) / 2, so both come from three e x e matrices, U^T U, V^T V and U^T V:
    |.|^2 = (<U^T U, V^T V> +- <U^T V, V^T U>) / 2. V is small when the towers agree. From the Gram matrices of X and Y the
    result would be a small difference of large sums, which loses digits.
    """
    u, v = zimg + ztxt, zimg - ztxt
    between = outer(u, v, axis)
    same, crossed = (outer(u, u, axis) * outer(v, v, axis)).sum(), (between * between.T).sum()
    half = size(zimg, axis) / 2
    return half * (same + crossed), half * (same - crossed)


def barlow(x: Float[Array, "b e"], y: Float[Array, "b e"], off: float, scale: float, *, axis: Axis = None) -> Float[Array, ""]:
    """Barlow Twins (2103.03230): `scale` times the squared distance from the identity of the correlations [e, e] of x and y.

    They are over the global batch; those off the diagonal have the weight `off`. A coordinate that is constant has none.
    """

    def standardised(z: Array) -> Array:
        z = z - mean(z, axis)[None]
        return z * jax.lax.rsqrt(jnp.maximum(mean(z * z, axis), 1e-12))[None]

    correlations = outer(standardised(x), standardised(y), axis)
    own = jnp.eye(len(correlations), dtype=bool)
    return scale * (jnp.where(own, 1, off) * jnp.square(correlations - own)).sum()
