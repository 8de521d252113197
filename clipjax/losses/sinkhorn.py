"""Cross-entropies towards balanced assignments of the rows to the columns, which Sinkhorn's algorithm finds (2006.09882)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.batch import einsum, mean
from clipjax.losses.pairwise import Axis, pairwise_cross_entropy, pairwise_logsumexp
from clipjax.losses.pairwise.operands import Scalar


def column_offsets(x: Float[Array, "b e"], y: Float[Array, "b e"], epsilon: float, rounds: int, axis: Axis) -> Float[Array, " b"]:
    """g of the columns: the softmax over j of (x_i . y_j + g_j) / epsilon are the assignments after so many rounds.

    A round makes the sums of all columns equal, and then those of all rows. An offset is one more coordinate of the vectors, so
    each half is a log-sum-exp of all pairs, which are never in memory.
    """

    def balanced(x: Array, y: Array, offset: Array) -> Array:
        """The offset of each row x that makes its sum 1."""
        sides = jnp.c_[x, jnp.ones(len(x))], jnp.c_[y, offset]
        return -epsilon * pairwise_logsumexp(*sides, 1 / epsilon, axis=axis, columns=False).rows

    start = balanced(y, x, jnp.zeros(len(x)))
    return jax.lax.fori_loop(1, rounds, lambda _, g: balanced(y, x, balanced(x, y, g)), start)


def swap_loss(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    scale: Scalar,
    timg: Float[Array, "b e"],
    ttxt: Float[Array, "b e"],
    *,
    axis: Axis = None,
    epsilon: float = 0.05,
    rounds: int = 3,
) -> Float[Array, ""]:
    """SwALIP (2305.08675): images are assigned to the texts of the batch, and texts to its images; the mean of both directions.

    The targets are the assignments of another pair of views, timg and ttxt, which have no gradient.
    """
    x, y = jax.lax.stop_gradient((timg, ttxt))
    of_texts, of_images = column_offsets(x, y, epsilon, rounds, axis), column_offsets(y, x, epsilon, rounds, axis)
    one = jnp.ones(len(x))
    teacher = jnp.c_[x, one, of_images], jnp.c_[y, of_texts, one]  # a row's own offset leaves its softmax as it is
    rows, cols = pairwise_cross_entropy(zimg, ztxt, scale, *teacher, 1 / epsilon, axis=axis)
    return mean(rows + cols, axis) / 2


def prototype_loss(
    x: Float[Array, "b e"],
    y: Float[Array, "b e"],
    prototypes: Float[Array, "k e"],
    scale: Scalar,
    *,
    axis: Axis = None,
    epsilon: float = 0.05,
    rounds: int = 3,
) -> Float[Array, ""]:
    """SwAV (2006.09882): x learns y's assignments to the prototypes, and y those of x; the mean of both.

    `prototypes`: all of them on every device, unit vectors. [b, k] is in memory.
    """
    cosines = [einsum("be,ke->bk", z, prototypes) for z in (x, y)]
    targets = [_assignments(jax.lax.stop_gradient(cos) / epsilon, rounds, axis) for cos in cosines]
    found = [-(q * jax.nn.log_softmax(scale * cos)).sum(1) for q, cos in zip(targets, reversed(cosines), strict=True)]
    return mean(found[0] + found[1], axis) / 2


def _assignments(logits: Float[Array, "b k"], rounds: int, axis: Axis) -> Float[Array, "b k"]:
    """Rows of sum 1, whose sums over the global batch are nearly equal."""

    def balanced(_: Array, logits: Array) -> Array:
        top = logits.max(0) if axis is None else jax.lax.pmax(logits.max(0), axis)
        total = jnp.exp(logits - top[None]).sum(0)
        total = total if axis is None else jax.lax.psum(total, axis)
        return jax.nn.log_softmax(logits - (top + jnp.log(total))[None])

    return jnp.exp(jax.lax.fori_loop(0, rounds, balanced, logits))
