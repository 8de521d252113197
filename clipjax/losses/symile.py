"""Symile's loss of three modalities or more, over the global batch (2411.01053)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.batch import following, mean
from clipjax.losses.pairwise import Axis, pairwise_logsumexp
from clipjax.losses.pairwise.operands import Scalar


def symile_loss(modalities: Sequence[Float[Array, "b e"]], scale: Scalar, *, axis: Axis = None) -> Float[Array, ""]:
    """Mean over the modalities a of the cross-entropy of t <a_i, b_i, c_i> among t <a_i, b_j, c_{j+1}>, j != i.

    <a, b, c> is the sum over the coordinates of a b c. So the products of the others' vectors are the columns of one pass
    for each modality. The paper shuffles b and c. Here they are shifted, by 0, 1, 2, ... examples: the batch is shuffled already,
    and the mesh does not change it. Of two modalities it is CLIP's loss.
    """

    def of_anchor(sides: tuple[Array, Array, Array]) -> Array:
        anchor, own, column = sides
        negatives = pairwise_logsumexp(anchor, column, scale, axis=axis, keep="off_diagonal", columns=False).rows
        return mean(jax.nn.softplus(negatives - scale * (anchor * own).sum(1)), axis)

    own, columns = [], []
    for m in range(len(modalities)):
        others = [z for k, z in enumerate(modalities) if k != m]
        own.append(_product(others))
        for n in range(1, len(others)):
            others[n:] = [following(z, axis) for z in others[n:]]
        columns.append(_product(others))
    return jax.lax.map(of_anchor, tuple(jnp.stack(zs) for zs in (list(modalities), own, columns))).mean()


def _product(vectors: Sequence[Array]) -> Array:
    return jnp.stack(list(vectors)).prod(0)
