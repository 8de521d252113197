"""Classification into classes whose vectors are divided over the devices: no device ever has all of them, or all logits.

A class is a row of a matrix [n c, d], of which each of n devices has c. Rows need not be unit vectors, and a row of zeros is no
class: it pads the matrix. Inside `shard_map` over `axis`, b is the local batch; outside, axis is None.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from clipjax.losses.batch import einsum, mean
from clipjax.losses.pairwise import Axis, pairwise_logsumexp
from clipjax.losses.pairwise.axes import device_index, vary
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.pairwise.partials import Partial
from clipjax.losses.pairwise.ring import go_round, rings_of
from clipjax.models.layers import unit


def class_loss(
    z: Float[Array, "b V d"],
    classes: Float[Array, "c d"],
    labels: Int[Array, "b l"],
    scale: Scalar,
    *,
    axis: Axis = None,
    form: Literal["softmax", "mlcd"] = "softmax",
    sampled: float = 1.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, ""]:
    """The mean over the global batch, and over V vectors of each example, of its loss towards its l labels; -1 is no label.

    With s = scale cos, N the classes that are none of the row's labels, and P those that are: `softmax` is the mean over P of
    log(1 + sum_N exp(s_n - s_p)) (2306.07952); `mlcd` is log(1 + sum_N exp(s_n)) + log(1 + sum_P exp(-s_p)) (2407.17331). A row
    without a label adds 0 to the sum and 1 to the count. `sampled`: the share of its classes that each device takes into N, drawn
    anew by `key`, which every device has. Sums over N are not scaled up by it.
    """
    b, views, d = z.shape
    own = scale * einsum("bvd,bld->bvl", z, unit(own_classes(classes, labels, axis))).reshape(b * views, -1)
    labels = jnp.repeat(labels, views, 0)
    vectors, numbers = classes, device_index(axis) * len(classes) + jnp.arange(len(classes))
    if sampled < 1:
        chosen = _sample(len(classes), sampled, key, axis)
        vectors, numbers = vectors[chosen], numbers[chosen]
    # Rows of zeros get a number that is no class's. It is one more label of every example, so that they are no negatives.
    padding = jnp.full((b * views, 1), jnp.iinfo(jnp.int32).max)
    ids = jnp.concatenate([labels, padding], 1), jnp.where((vectors != 0).any(1), numbers, padding[0])
    found = pairwise_logsumexp(
        z.reshape(-1, d), unit(vectors), scale, axis=axis, keep="distinct", ids=ids, own=False, columns=False
    )
    named = labels >= 0
    labelled = named.any(1)
    if form == "mlcd":
        positive = jax.nn.logsumexp(-own, axis=1, where=named | ~labelled[:, None])
        losses = jax.nn.softplus(found.rows) + jax.nn.softplus(positive)
    else:
        each = jnp.where(named, jax.nn.softplus(found.rows[:, None] - own), 0)
        losses = each.sum(1) / jnp.maximum(named.sum(1), 1)
    return mean(jnp.where(labelled, losses, 0), axis)


def own_classes(classes: Float[Array, "c d"], labels: Int[Array, "b l"], axis: Axis) -> Float[Array, "b l d"]:
    """The rows of the matrix that the labels name, zeros for -1.

    The labels go around all devices, and each adds the rows that it has: what a device holds does not grow with their number.
    """
    first = device_index(axis) * len(classes)

    def visit(found: Partial, source: Array | int, labels: Array) -> tuple[Partial, Partial]:
        here = (labels >= first) & (labels < first + len(classes))
        # Filled by the gather itself: a mask would be kept for the backward pass, as large as the result, for each hop.
        at = jnp.where(here, labels - first, len(classes))
        return found, Partial((classes.at[at].get(mode="fill", fill_value=0),))

    nothing = vary(Partial((jnp.zeros((*labels.shape, classes.shape[1]), classes.dtype),)), axis)
    rings = rings_of(axis, device_index(axis))
    return go_round(rings, visit, Partial(), vary(labels, axis), nothing)[1].total[0]


def _sample(count: int, share: float, key: Key[Array, ""] | None, axis: Axis) -> Int[Array, " m"]:
    """Different numbers below `count`, drawn on each device for itself."""
    assert key is not None, "a sample needs the step's key"
    own_key = jax.random.fold_in(key, device_index(axis))
    return jax.random.choice(own_key, count, (math.ceil(share * count),), replace=False)
