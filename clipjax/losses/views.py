"""Losses and terms of several views, or modalities, of an example at once, over the global batch. All vectors are unit vectors.

Under `shard_map` over `axis`, b is the local batch and the result is the same on every device; outside, axis is None.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipjax import config
from clipjax.losses.batch import add_up, einsum, following, log_mean_exp, mean
from clipjax.losses.pairwise import Axis, pairwise_cross_entropy, pairwise_logsumexp
from clipjax.losses.pairwise.axes import device_index
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.pairwise.partials import finite
from clipjax.losses.ranking import Ranked
from clipjax.losses.regularizers import alignment, barlow
from clipjax.losses.rows import HeadRows, Logged, Rows, TermResult, mean_over_pairs, over_pairs, vectors_of
from clipjax.models.layers import unit

Form = Literal["infonce", "dhel"]
Pair = tuple[Float[Array, "b e"], Float[Array, "b e"]]


def symile_loss(modalities: Float[Array, "M b e"], scale: Scalar, *, axis: Axis = None) -> Float[Array, ""]:
    """Mean over the modalities a of the cross-entropy of t <a_i, b_i, c_i> among t <a_i, b_j, c_{j+1}>, j != i (2411.01053).

    <a, b, c> is the sum over the coordinates of a b c. The paper shuffles b and c; here the n-th of the others is shifted by n
    examples, whatever the mesh. Of two modalities it is CLIP's loss.
    """

    def of_anchor(order: Array) -> Array:
        anchor, *others = modalities[order]
        own = scale * (anchor * jnp.stack(others).prod(0)).sum(1)
        for n in range(1, len(others)):
            others[n:] = [following(z, axis) for z in others[n:]]
        columns = jnp.stack(others).prod(0)  # so that a pass over all pairs does
        found = pairwise_logsumexp(anchor, columns, scale, axis=axis, keep="off_diagonal", columns=False)
        return mean(jax.nn.softplus(found.rows - own), axis)

    m = len(modalities)
    return jax.lax.map(of_anchor, jnp.array([[a, *(n for n in range(m) if n != a)] for a in range(m)])).mean()


def multi_view_loss(
    views: Float[Array, "V b e"], scale: Scalar, form: Form = "dhel", *, axis: Axis = None, ids: Int[Array, " b"] | None = None
) -> Float[Array, ""]:
    """Mean over i of log N_i - log P_i, with P_i the sum over views l < m of exp(t u_il . u_im) (2507.06979).

    "infonce": N_i is half the sum over l, and over (j, m) other than (i, l), of exp(t u_il . u_jm), so the value is at least 0.
    "dhel": N_i is the product over l of the sums over j != i of exp(t u_il . u_jl); there is no lower bound. Equal `ids` are no
    negatives; an example without any counts as 0.
    """
    count, b = views.shape[:2]
    ids = device_index(axis) * b + jnp.arange(b) if ids is None else ids
    first, second = np.triu_indices(count, 1)
    positives = jax.nn.logsumexp(scale * einsum("pbe,pbe->pb", views[first], views[second]), 0)

    def negatives(z: Array) -> Array:  # an infonce's rows are all views of all examples
        n = jnp.tile(ids, len(z) // b)
        return pairwise_logsumexp(z, z, scale, axis=axis, keep="distinct", ids=(n, n), columns=False).rows

    if form == "infonce":  # log(1 + rest / 2 P): a small loss keeps its digits
        rest = negatives(views.reshape(count * b, -1)).reshape(count, b)
        values = jax.nn.softplus(jax.nn.logsumexp(finite(rest), 0) - np.log(2) - positives)
    else:
        rest = jax.lax.map(negatives, views)
        values = finite(rest).sum(0) - positives
    return mean(jnp.where(rest[0] == -jnp.inf, 0, values), axis)


def column_offsets(x: Float[Array, "b e"], y: Float[Array, "b e"], epsilon: float, rounds: int, axis: Axis) -> Float[Array, " b"]:
    """g: the softmax over j of (x_i . y_j + g_j) / epsilon are Sinkhorn's assignments of rows to columns after so many rounds.

    A round makes the sums of the columns equal, then those of the rows. An offset is one more coordinate, so each is one pass.
    """

    def balanced(x: Array, y: Array, offset: Array) -> Array:
        """Offsets of the rows x that make their sums 1."""
        sides = jnp.c_[x, jnp.ones(len(x))], jnp.c_[y, offset]
        return -epsilon * pairwise_logsumexp(*sides, 1 / epsilon, axis=axis, columns=False).rows

    start = balanced(y, x, jnp.zeros(len(x)))
    return jax.lax.fori_loop(1, rounds, lambda _, g: balanced(y, x, balanced(x, y, g)), start)


def swap_loss(pair: Pair, scale: Scalar, other: Pair, epsilon: float, rounds: int, *, axis: Axis = None) -> Float[Array, ""]:
    """SwALIP (2305.08675): the mean of images towards their assignments to the batch's texts, and of texts to its images.

    The assignments are those of another pair, which has no gradient.
    """
    x, y = jax.lax.stop_gradient(other)
    of_y, of_x, one = *(column_offsets(*sides, epsilon, rounds, axis) for sides in ((x, y), (y, x))), jnp.ones(len(x))
    teacher = jnp.c_[x, one, of_x], jnp.c_[y, of_y, one]  # a row's own offset leaves its softmax as it is
    rows, cols = pairwise_cross_entropy(*pair, scale, *teacher, 1 / epsilon, axis=axis)
    return mean(rows + cols, axis) / 2


def prototype_loss(
    pair: Pair, scale: Scalar, prototypes: Float[Array, "k e"], epsilon: float, rounds: int, *, axis: Axis = None
) -> Float[Array, ""]:
    """SwAV (2006.09882): the mean of x towards y's assignments to all prototypes, and of y towards those of x.

    `prototypes`: this device's, of any length; those of zeros are none. [b, all prototypes] is in memory.
    """
    vectors = prototypes if axis is None else jax.lax.all_gather(prototypes, axis, tiled=True)
    bias = jnp.where((vectors != 0).any(1), 0, -1e9)[None]

    def balanced(_: Array, logits: Array) -> Array:
        of_columns = jax.vmap(lambda column: log_mean_exp(column, axis), 1)(logits)
        return jax.nn.log_softmax(logits - of_columns[None] + bias)

    cosines = [einsum("be,ke->bk", z, unit(vectors)) for z in pair]
    targets = [jnp.exp(jax.lax.fori_loop(0, rounds, balanced, jax.lax.stop_gradient(c) / epsilon)) for c in cosines]
    found = [(q * jax.nn.log_softmax(scale * c + bias)).sum(1) for q, c in zip(targets, cosines[::-1], strict=True)]
    return -mean(found[0] + found[1], axis) / 2


def of_together(term: Any, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> tuple[Array, Logged]:
    """Symile or MultiView of all views, and then all captions, that the term takes."""
    views, captions = vectors_of(rows.image), vectors_of(rows.text)
    z = jnp.stack({"image-image": views, "text-text": captions}.get(term.sides, views + captions))
    if isinstance(term, config.Symile):
        return symile_loss(z, scale, axis=axis), {}
    return multi_view_loss(z, scale, term.form, axis=axis, ids=rows.ids), {}


def of_barlow(term: config.Barlow, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    return barlow(rows.image, rows.text, term.off, term.scale, axis=axis), None


def of_siamese(term: config.Siamese, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> TermResult:
    """A head's vectors, and beside each what its predictor makes of it."""
    heads = {n: HeadRows(_beside(h.image, h.image_predicted), _beside(h.text, h.text_predicted)) for n, h in rows.heads.items()}
    return over_pairs(_predicted)(term, dataclasses.replace(rows, heads=heads), scale, bias, axis)


def _predicted(term: config.Siamese, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    (x, x_predicted), (y, y_predicted) = jnp.split(rows.image, 2, 1), jnp.split(rows.text, 2, 1)
    parts = (x_predicted, y), (y_predicted, x)
    return add_up(alignment(z, jax.lax.stop_gradient(target), axis=axis) for z, target in parts) / 2, None


def of_swap(term: config.Swap, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> tuple[Array, Logged]:
    """To prototypes; or of each view and caption to each other, beside which stand the next view and the next caption."""

    def of_pair(x: Array, y: Array) -> tuple[Array, Logged]:
        if rows.classes is not None and term.prototypes:
            return prototype_loss((x, y), scale, rows.classes, term.epsilon, term.rounds, axis=axis), {}
        (x, next_x), (y, next_y) = jnp.split(x, 2, 1), jnp.split(y, 2, 1)
        return swap_loss((x, y), scale, (next_x, next_y), term.epsilon, term.rounds, axis=axis), {}

    sides = rows.image, rows.text
    image, text = sides if term.prototypes else (_beside(z, z if z.ndim == 2 else jnp.roll(z, -1, 1)) for z in sides)
    return mean_over_pairs(of_pair, term.sides, dataclasses.replace(rows, image=image, text=text))


def _beside(z: Any, other: Any) -> Any:
    return None if other is None else jnp.concatenate([z, other], -1)
