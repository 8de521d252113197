"""Losses of all views of an example at once: MV-InfoNCE and MV-DHEL (2507.06979)."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipjax.losses.batch import einsum, mean, size
from clipjax.losses.pairwise import Axis, pairwise_logsumexp
from clipjax.losses.pairwise.axes import device_index
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.pairwise.partials import finite


def multi_view_loss(
    views: Float[Array, "V b e"],
    scale: Scalar,
    *,
    form: Literal["infonce", "dhel"] = "dhel",
    axis: Axis = None,
    ids: Int[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Mean over the examples of log N_i - log P_i, where P_i is the sum over pairs of views l < m of exp(t u_il . u_im).

    "infonce": N_i is half the sum over l, and over all (j, m) but (i, l), of exp(t u_il . u_jm). Its least value is 0.
    "dhel": N_i is the product over l of the sum over j != i of exp(t u_il . u_jl): a view is contrasted with itself alone. It
    has no lower bound. Examples of equal `ids` are no negatives; one that this leaves without any counts as 0. Raises ValueError
    for one view, and with "dhel" for a batch of one example.
    """
    count, b = views.shape[:2]
    if count < 2 or (form == "dhel" and size(views[0], axis) < 2):
        raise ValueError(
            f"multi_view_loss({form!r}) of {count} views and {b} examples: give two views, to 'dhel' two examples"
        )
    ids = device_index(axis) * b + jnp.arange(b) if ids is None else ids
    first, second = np.triu_indices(count, 1)
    positives = jax.nn.logsumexp(scale * einsum("pbe,pbe->pb", views[first], views[second]), 0)

    def negatives(z: Array, ids: Array) -> Array:
        return pairwise_logsumexp(z, z, scale, axis=axis, keep="distinct", ids=(ids, ids), columns=False).rows

    if form == "infonce":  # log((2 P + the rest) / 2 P), which keeps the digits of a small loss
        rest = negatives(views.reshape(count * b, -1), jnp.tile(ids, count)).reshape(count, b)
        values = jax.nn.softplus(jax.nn.logsumexp(finite(rest), 0) - np.log(2) - positives)
    else:
        rest = jax.lax.map(lambda z: negatives(z, ids), views)
        values = finite(rest).sum(0) - positives
    return mean(jnp.where(rest[0] == -jnp.inf, 0, values), axis)
