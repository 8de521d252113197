"""Losses of an example's mixture with the next of the global batch, a random partner as the data are shuffled.

`share` [b] is the part of the example itself. Under `shard_map` over `axis`, b is the local batch; the mesh changes nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from clipjax.losses.batch import following, mean
from clipjax.losses.matryoshka import prefix
from clipjax.losses.metric import soft_hinges
from clipjax.losses.pairwise import Axis, pairwise_logsumexp
from clipjax.losses.pairwise.axes import device_index
from clipjax.losses.pairwise.operands import Scalar


def draw_shares(key: Key[Array, ""], b: int, concentration: float, mixed: float, axis: Axis) -> Float[Array, " b"]:
    """From Beta(concentration, concentration) for a part `mixed` of the examples, 1 for the others; by place in the batch."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, device_index(axis) * b + jnp.arange(b))
    shares = jax.vmap(lambda k: jax.random.beta(k, concentration, concentration))(keys)
    return jnp.where(jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 1), mixed))(keys), shares, 1)


def mix(z: Float[Array, "b e"], share: Float[Array, " b"], axis: Axis) -> Float[Array, "b e"]:
    """unit(share_i z_i + (1 - share_i) z_{i+1})."""
    return prefix(share[:, None] * z + (1 - share)[:, None] * following(z, axis), z.shape[1])


def mixup_loss(
    x: Float[Array, "b e"], y: Float[Array, "b e"], scale: Scalar, share: Float[Array, " b"], *, axis: Axis = None
) -> Float[Array, ""]:
    """M3CoL: x_i is mixed with x_{i+1}; its target is y_i by share_i and y_{i+1} by the rest (2409.17777).

    Half over rows and half over columns, whose targets are the same matrix. With share = 1 it is CLIP's loss, and as exact.
    """
    x, rest = mix(x, share, axis), 1 - share
    own, after = scale * (x * y).sum(1), scale * (x * following(y, axis)).sum(1)
    found = pairwise_logsumexp(x, y, scale, axis=axis, keep="off_diagonal")
    rows, cols = (jax.nn.softplus(lse - own) for lse in found.sides)  # the log-sum-exp of all logits, less the own one
    return mean(rows + share * cols + rest * (own + following(cols + own, axis) - 2 * after), axis) / 2


def mixed_hinges(
    x: Float[Array, "b e"], y: Float[Array, "b e"], hinges: tuple[float, float, float], share: Float[Array, " b"], axis: Axis
) -> Float[Array, ""]:
    """Metrix: soft hinges of x with mixed y and of y with mixed x; a mixture is positive by its share, negative by the rest."""

    def direction(z: Array, other: Array) -> Array:
        cos, (alpha, beta, _) = (z * mix(other, share, axis)).sum(1), hinges
        return soft_hinges(jnp.log(share) - alpha * cos, jnp.log1p(-share) + beta * cos, *hinges)

    return mean(direction(x, y) + direction(y, x), axis) / 2
