"""log sum exp of every row and every column of the matrix of cosines, which is never in memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.losses.pairwise.axes import Axis, vary
from clipjax.losses.pairwise.geometry import TilePairs
from clipjax.losses.pairwise.operands import Ids, KeptPairs, PairwiseOptions, dot, make_options, masks, only
from clipjax.losses.pairwise.partials import Partial, finite, log_sum_exp
from clipjax.losses.pairwise.tiles import Travel, sweep


class Reduced(NamedTuple):
    """This device's rows and columns, each reduced over all of the other side."""

    rows: Float[Array, " b"]  # log of the sum over kept j of exp(row_scale_i cos_ij); -inf where nothing is kept
    cols: Float[Array, " c"] | None  # the same for columns, with col_scale_j. With columns=False the fields of columns are None
    row_max: Float[Array, " b"]  # the largest kept cosine, no gradient; NaN where the scale is 0
    col_max: Float[Array, " c"] | None
    row_positive: Float[Array, " b"] | None  # with ids: the sum of cos_ij over equal ids other than the own pair
    col_positive: Float[Array, " c"] | None

    @property
    def sides(self) -> tuple[Float[Array, " b"], Float[Array, " c"]]:
        """`rows` and `cols`."""
        assert self.cols is not None, "columns=False leaves no columns"
        return self.rows, self.cols

    @property
    def maxima(self) -> tuple[Float[Array, " b"], Float[Array, " c"]]:
        """`row_max` and `col_max`."""
        assert self.col_max is not None, "columns=False leaves no columns"
        return self.row_max, self.col_max

    @property
    def positives(self) -> tuple[Float[Array, " b"], Float[Array, " c"]]:
        """`row_positive` and `col_positive`."""
        assert self.row_positive is not None, "without ids there are no positives"
        assert self.col_positive is not None, "columns=False leaves no columns"
        return self.row_positive, self.col_positive


class ScaledSide(NamedTuple):
    """Rows or columns in the forward pass."""

    z: Float[Array, "n d"]
    scale: Float[Array, " n"]
    ids: Int[Array, "n ..."] | None


class GradientSide(NamedTuple):
    """Rows or columns in the backward pass: also the results of the forward pass, and their cotangents."""

    z: Float[Array, "n d"]
    scale: Float[Array, " n"]
    ids: Int[Array, "n ..."] | None
    lse: Float[Array, " n"]
    ct: Float[Array, " n"]
    positive_ct: Float[Array, " n"] | Any  # None without ids


def pairwise_logsumexp(
    x: Float[Array, "b d"],
    y: Float[Array, "c d"],
    row_scale: Float[Array, "*b"] | float,
    col_scale: Float[Array, "*c"] | None = None,
    *,
    axis: Axis = None,
    keep: KeptPairs = "all",
    ids: Ids | None = None,
    columns: bool = True,
    y_gradient: bool = True,
    own: bool = True,
    tile: int | None = None,
    travel: Travel | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Reduced:
    """log sum exp(scale cos) over the kept pairs of every row and every column; one product serves both.

    A scale is a number >= 0, or one for each row (column). Without `col_scale`, `row_scale` is a number and serves both. `keep`:
    "all" pairs, all but the own one ("off_diagonal"), those whose `ids` (of rows, of columns) differ ("distinct"), or those
    whose ids are equal, but for the own one ("same"). Of several ids, [b, l] and [c, m], any two may be equal, and -1 is none:
    l m comparisons a pair. c may be a multiple K b: then the columns j K to j K + K - 1 belong to row j, and the first of them
    makes its own pair. `own=False`: no pair is the own one, and c is any number. `columns=False` leaves the columns' half out.
    `y_gradient=False` treats y as a constant, which saves a product. `travel`: how columns get to the other devices, in a
    "ring" or by a "gather" (clipjax.losses.pairwise.tiles); None chooses by size.
    """
    if col_scale is None and jnp.ndim(row_scale):
        raise ValueError("row_scale is one number for each row: give col_scale too")
    if keep in ("distinct", "same") and ids is None:
        raise ValueError(f"keep={keep!r} needs ids")
    if keep == "off_diagonal" and not own:
        raise ValueError("keep='off_diagonal' leaves out own pairs, and own=False has none: keep='all'")
    options = make_options(x, y, axis, tile, travel, dtype, keep=keep, columns=columns, y_gradient=y_gradient, own=own)
    scales = (row_scale, len(x)), (row_scale if col_scale is None else col_scale, len(y))
    rows, cols = (jnp.broadcast_to(jnp.asarray(s, jnp.float32), n) for s, n in scales)
    return _logsumexp(options, *vary((x, y, rows, cols, ids), axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logsumexp(options: PairwiseOptions, x: Array, y: Array, row_scale: Array, col_scale: Array, ids: Ids | None) -> Reduced:
    return _logsumexp_fwd(options, x, y, row_scale, col_scale, ids)[0]


def _sides(
    options: PairwiseOptions, x: Array, y: Array, row_scale: Array, col_scale: Array, ids: Ids | None
) -> tuple[ScaledSide, ScaledSide]:
    x_ids, y_ids = ids or (None, None)
    return ScaledSide(x.astype(options.dtype), row_scale, x_ids), ScaledSide(y.astype(options.dtype), col_scale, y_ids)


def _logsumexp_fwd(
    options: PairwiseOptions, x: Array, y: Array, row_scale: Array, col_scale: Array, ids: Ids | None
) -> tuple[Reduced, tuple]:
    def tile(r: ScaledSide, c: ScaledSide, pairs: TilePairs) -> tuple[Partial, Partial]:
        cos = dot(r.z, c.z, (1, 1), options)
        kept, positive = masks(options.keep, r.ids, c.ids, pairs, options.own)
        positives = None if positive is None else jnp.where(positive, cos, 0)

        def along(axis: int, scale: Array) -> Partial:
            lse = log_sum_exp(only(kept, scale * cos, -jnp.inf), axis)
            return Partial(() if positives is None else (positives.sum(axis),), (), (lse,))

        return along(1, r.scale[:, None]), along(0, c.scale[None]) if options.columns else Partial()

    rows, cols = _sides(options, x, y, row_scale, col_scale, ids)
    found = sweep(tile, rows, cols, axis=options.axis, tile=options.tile, travel=options.travel)

    def reduced(side: Partial, scale: Array, z: Array) -> tuple[Array, Array, Array | None]:
        ((m, (total,)),) = side.lse
        visible = 0 * z.sum(1)  # NaN for an infinite vector: it must not look like a row without kept pairs
        return finite(m) + jnp.log(total) + visible, m / scale, side.total[0] if side.total else None

    lse, best, positive = reduced(found[0], row_scale, x)
    of_cols = reduced(found[1], col_scale, y) if options.columns else (None, None, None)
    if not options.columns:  # an infinite column must be visible too; here it has no output of its own
        lse = lse + 0 * y.sum()
    out = Reduced(lse, of_cols[0], best, of_cols[1], positive, of_cols[2])
    return out, (x, y, row_scale, col_scale, ids, out.rows, out.cols)


def _logsumexp_bwd(options: PairwiseOptions, residuals: tuple, ct: Reduced) -> tuple[Array, Array, Array, Array, None]:
    x, y, row_scale, col_scale, ids, row_lse, col_lse = residuals

    def tile(r: GradientSide, c: ScaledSide | GradientSide, pairs: TilePairs) -> tuple[Partial, Partial]:
        cos = dot(r.z, c.z, (1, 1), options)
        kept, positive = masks(options.keep, r.ids, c.ids, pairs, options.own)

        def weights(scale: Array, lse: Array, ct: Array) -> Array:  # the softmax of each row (column), times its cotangent
            return only(kept, ct * jnp.exp(scale * cos - lse), 0)

        row_weights = weights(r.scale[:, None], r.lse[:, None], r.ct[:, None])
        g = r.scale[:, None] * row_weights  # the gradient for the cosines
        col_weights = None
        if isinstance(c, GradientSide):
            col_weights = weights(c.scale[None], c.lse[None], c.ct[None])
            g += c.scale[None] * col_weights
        if positive is not None:
            positive_ct = r.positive_ct[:, None] + (c.positive_ct[None] if isinstance(c, GradientSide) else 0)
            g += jnp.where(positive, positive_ct, 0)
        to_y = (dot(g, r.z, (0, 0), options),) if options.y_gradient else ()
        to_col_scale = () if col_weights is None else ((col_weights * cos).sum(0),)
        return Partial((dot(g, c.z, (1, 0), options), (row_weights * cos).sum(1))), Partial((*to_y, *to_col_scale))

    rows, cols = _sides(options, x, y, row_scale, col_scale, ids)
    rows = GradientSide(*rows, finite(row_lse), ct.rows, ct.row_positive)
    if options.columns:
        cols = GradientSide(*cols, finite(col_lse), ct.sides[1], ct.col_positive)
    found = sweep(tile, rows, cols, axis=options.axis, tile=options.tile, travel=options.travel)
    dx, d_row = found[0].total
    to_columns = list(found[1].total)
    dy = to_columns.pop(0) if options.y_gradient else jnp.zeros_like(y)
    d_col = to_columns.pop(0) if options.columns else jnp.zeros_like(col_scale)
    return dx.astype(x.dtype), dy.astype(y.dtype), d_row, d_col, None


_logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)
