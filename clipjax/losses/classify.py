"""Classification into classes whose vectors are divided over the devices: no device ever has all of them, or all logits.

A class is a row of a matrix [n c, d], of which each of n devices has c. Rows need not be unit vectors, and a row of zeros is no
class: it pads the matrix. Inside `shard_map` over `axis`, b is the local batch; outside, axis is None.
"""

import functools
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
    own = scale * own_cosines(z, classes, labels, axis).reshape(b * views, -1)
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


def own_cosines(
    z: Float[Array, "b V d"], classes: Float[Array, "c d"], labels: Int[Array, "b l"], axis: Axis
) -> Float[Array, "b V l"]:
    """Cosines with the classes that the labels name; 0 for -1.

    The vectors and their labels go around all devices. Each adds the cosines with the classes that it has; on the way of the
    backward pass, the gradients. So what a device holds does not grow with the number of devices.
    """
    return _own_cosines(axis, *vary((z, classes, labels), axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _own_cosines(axis: Axis, z: Array, classes: Array, labels: Array) -> Array:
    def visit(found: Partial, source: Array | int, piece: tuple[Array, Array]) -> tuple[Partial, Partial]:
        return found, Partial((_cosines(piece[0], _rows(classes, _places(classes, piece[1], axis))),))

    nothing = vary(Partial((jnp.zeros((*z.shape[:2], labels.shape[1])),)), axis)
    return go_round(rings_of(axis, device_index(axis)), visit, Partial(), (z, labels), nothing)[1].total[0]


def _own_cosines_bwd(axis: Axis, residuals: tuple[Array, ...], ct: Array) -> tuple[Array, Array, None]:
    z, classes, labels = residuals

    def visit(found: Partial, source: Array | int, piece: tuple[Array, ...]) -> tuple[Partial, Partial]:
        z, labels, ct = piece
        places = _places(classes, labels, axis)
        dz, to_rows = jax.vjp(_cosines, z, _rows(classes, places))[1](ct)
        return Partial((found.total[0].at[places].add(to_rows, mode="drop"),)), Partial((dz,))

    rings, nothing = rings_of(axis, device_index(axis)), Partial((jnp.zeros_like(z),))
    found, of_piece = go_round(rings, visit, Partial((jnp.zeros_like(classes),)), (z, labels, ct), nothing)
    return of_piece.total[0], found.total[0], None


_own_cosines.defvjp(lambda axis, *args: (_own_cosines(axis, *args), args), _own_cosines_bwd)


def _cosines(z: Float[Array, "b V d"], rows: Float[Array, "b l d"]) -> Float[Array, "b V l"]:
    return einsum("bvd,bld->bvl", z, unit(rows))


def _places(classes: Array, labels: Array, axis: Axis) -> Int[Array, "b l"]:
    """Where the labels' rows are on this device; after its last row for those that are on another."""
    at = labels - device_index(axis) * len(classes)
    return jnp.where((labels >= 0) & (at >= 0) & (at < len(classes)), at, len(classes))


def _rows(classes: Array, places: Array) -> Float[Array, "b l d"]:
    return classes.at[places].get(mode="fill", fill_value=0)


def _sample(count: int, share: float, key: Key[Array, ""] | None, axis: Axis) -> Int[Array, " m"]:
    """Different numbers below `count`, drawn on each device for itself."""
    assert key is not None, "a sample needs the step's key"
    own_key = jax.random.fold_in(key, device_index(axis))
    return jax.random.choice(own_key, count, (math.ceil(share * count),), replace=False)
