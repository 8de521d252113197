"""Classification into classes whose vectors are divided over the devices: no device ever has all of them, or all logits.

A class is a row of a matrix [n c, d], of which each of n devices has c. Rows need not be unit vectors, and a row of zeros is no
class: it pads the matrix. Inside `shard_map` over `axis`, b is the local batch; outside, axis is None.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax import config
from clipjax.losses.batch import einsum, mean
from clipjax.losses.pairwise import Axis, pairwise_logsumexp
from clipjax.losses.pairwise.axes import device_index, vary
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.pairwise.partials import Partial
from clipjax.losses.pairwise.ring import go_round, rings_of
from clipjax.losses.rows import Rows, TermResult
from clipjax.models.layers import unit


def classify(term: config.Classify, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> TermResult:
    """The mean over the global batch, and over the V views (captions) of each example, of its loss towards its labels.

    With s = scale cos, N the classes that are none of the row's labels, and P those that are: `softmax` is the mean over P of
    log(1 + sum_N exp(s_n - s_p)) (2306.07952); `mlcd` is log(1 + sum_N exp(s_n)) + log(1 + sum_P exp(-s_p)) (2407.17331). A row
    without a label adds 0 to the sum and 1 to the count. `sampled`: the share of its classes that each device takes into N, drawn
    anew in each step. Sums over N are not scaled up by it.
    """
    classes, labels, key = rows.classes, rows.labels, rows.shared.key
    assert classes is not None  # Classify.check
    assert labels is not None
    z = getattr(rows if term.head is None else rows.heads[term.head], term.side)
    z = z.reshape(len(labels), -1, z.shape[-1])
    b, views, d = z.shape
    own: Any = own_cosines(axis, z, classes, labels)
    own = term.scale * own.reshape(b * views, -1)
    labels = jnp.repeat(labels, views, 0)
    vectors, numbers = classes, device_index(axis) * len(classes) + jnp.arange(len(classes))
    if term.draws:
        assert key is not None, "a sample needs the step's key"
        own_key, count = jax.random.fold_in(key, device_index(axis)), math.ceil(term.sampled * len(classes))
        chosen = jax.random.choice(own_key, len(classes), (count,), replace=False)
        vectors, numbers = vectors[chosen], numbers[chosen]
    # Rows of zeros get a number that is no class's. It is one more label of every example, so that they are no negatives.
    padding = jnp.full((b * views, 1), jnp.iinfo(jnp.int32).max)
    ids = jnp.concatenate([labels, padding], 1), jnp.where((vectors != 0).any(1), numbers, padding[0])
    x, options = z.reshape(-1, d), dict[str, Any](axis=axis, ids=ids, own=False, columns=False)
    found = pairwise_logsumexp(x, unit(vectors), term.scale, keep="distinct", **options)
    again = jnp.tril(labels[:, :, None] == labels[:, None], -1).any(2)
    named = (labels >= 0) & ~again  # a class counts once
    labelled = named.any(1)
    if term.loss == "mlcd":
        positive = jax.nn.logsumexp(-own, axis=1, where=named | ~labelled[:, None])
        losses = jax.nn.softplus(found.rows) + jax.nn.softplus(positive)
    else:
        each = jnp.where(named, jax.nn.softplus(found.rows[:, None] - own), 0)
        losses = each.sum(1) / jnp.maximum(named.sum(1), 1)
    return TermResult(mean(jnp.where(labelled, losses, 0), axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def own_cosines(axis: Axis, z: Float[Array, "b V d"], classes: Float[Array, "c d"], labels: Int[Array, "b l"]) -> Array:
    """Cosines [b, V, l] with the classes that the labels name; 0 for -1.

    The vectors and their labels go around all devices. Each adds the cosines with the classes that it has; in the backward pass,
    the gradients. So what a device holds does not grow with the number of devices.
    """

    def visit(found: Partial, source: Array | int, piece: tuple[Array, Array]) -> tuple[Partial, Partial]:
        return found, Partial((_cosines(piece[0], _rows(axis, classes, piece[1])[0]),))

    nothing = vary(Partial((jnp.zeros((*z.shape[:2], labels.shape[1])),)), axis)
    return go_round(rings_of(axis, device_index(axis)), visit, Partial(), (z, labels), nothing)[1].total[0]


def _own_cosines_bwd(axis: Axis, residuals: tuple[Array, ...], ct: Array) -> tuple[Array, Array, None]:
    def visit(found: Partial, source: Array | int, piece: tuple[Array, ...]) -> tuple[Partial, Partial]:
        rows, places = _rows(axis, classes, piece[1])
        to_z, to_rows = jax.vjp(_cosines, piece[0], rows)[1](piece[2])
        return Partial((found.total[0].at[places].add(to_rows, mode="drop"),)), Partial((to_z,))

    z, classes, labels = residuals
    start, nothing = Partial((jnp.zeros_like(classes),)), Partial((jnp.zeros_like(z),))
    found, of_piece = go_round(rings_of(axis, device_index(axis)), visit, start, (z, labels, ct), nothing)
    return of_piece.total[0], found.total[0], None


own_cosines.defvjp(lambda axis, *args: (own_cosines(axis, *args), args), _own_cosines_bwd)


def _cosines(z: Float[Array, "b V d"], rows: Float[Array, "b l d"]) -> Float[Array, "b V l"]:
    return einsum("bvd,bld->bvl", z, unit(rows))


def _rows(axis: Axis, classes: Array, labels: Array) -> tuple[Float[Array, "b l d"], Int[Array, "b l"]]:
    """The labels' rows that this device has, and where; zeros, and after the last one, for others."""
    at = labels - device_index(axis) * len(classes)
    places = jnp.where((labels >= 0) & (at >= 0) & (at < len(classes)), at, len(classes))
    return classes.at[places].get(mode="fill", fill_value=0), places
