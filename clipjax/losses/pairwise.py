"""The streamed primitives: reductions over all pairs of the global batch, exact, in memory linear in the local batch.

Each works on this device's shards of two sets of unit vectors, inside `shard_map` over `axis`, or on everything where axis is
None. Values and gradients are those of the dense matrix of cosines, which never exists: tiles are made, reduced and dropped
(clipjax.losses.tiles), and made again for the gradient (METHODS E.6). Operands are float32 at the highest precision, or
bfloat16 with float32 accumulation where `dtype` says so.

Differentiate outside `shard_map` in either mode, or inside it with check_vma=True. Inside it with check_vma=False a gradient is
wrong, here as for every function whose result is the same on all devices (METHODS 0.3), and can't be told apart.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipjax.losses.tiles import Axis, Meeting, Partial, Travel, choose, finite, log_sum_exp, sweep, vary

Keep = Literal["all", "off_diagonal", "distinct"]
Mask = Bool[Array, "r c"] | None
Ids = tuple[Int[Array, " b"], Int[Array, " c"]]
TILE = 512  # rows and columns of a tile


class Reduced(NamedTuple):
    """This device's rows and columns, each reduced over the whole other side."""

    rows: Float[Array, " b"]  # log of the sum over kept j of exp(row_scale_i cos_ij); -inf where nothing is kept
    cols: Float[Array, " c"] | None  # the same down the columns, with col_scale_j
    row_max: Float[Array, " b"]  # the largest kept cosine, no gradient; NaN where the scale is 0
    col_max: Float[Array, " c"] | None
    row_positive: Float[Array, " b"] | None  # with ids: the sum of cos_ij over equal ids other than the own pair
    col_positive: Float[Array, " c"] | None


class Side(NamedTuple):
    """Rows or columns as they meet."""

    z: Float[Array, "n d"]
    scale: Float[Array, " n"]
    ids: Int[Array, " n"] | None = None
    lse: Float[Array, " n"] | None = None  # for the gradient: what they were reduced to,
    ct: Float[Array, " n"] | None = None  # its cotangent,
    positive_ct: Float[Array, " n"] | None = None  # and that of their positives


@dataclass(frozen=True)
class Plan:
    """What is fixed when a program is traced."""

    axis: Axis
    tile: int
    travel: Travel
    dtype: jnp.dtype
    keep: Keep = "all"
    columns: bool = True
    y_gradient: bool = True


def pairwise_logsumexp(
    x: Float[Array, "b d"],
    y: Float[Array, "c d"],
    row_scale: Float[Array, "*b"],
    col_scale: Float[Array, "*c"] | None = None,
    *,
    axis: Axis = None,
    keep: Keep = "all",
    ids: Ids | None = None,
    columns: bool = True,
    y_gradient: bool = True,
    tile: int = TILE,
    travel: Travel | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Reduced:
    """log sum exp(scale cos) over the kept pairs of every row and every column; one product serves both.

    A scale is a number >= 0 or one for each row (column); without `col_scale`, `row_scale` is a number and serves both. Kept
    are all pairs, all but the own one, or those whose `ids` (of rows, of columns) differ. c may be K b: then the columns j K to
    j K + K - 1 belong to row j, and the first of them makes its own pair. `columns=False` leaves the columns' half out.
    `y_gradient=False` treats y as a constant, which saves a product. `travel`: see clipjax.losses.tiles; None chooses by size.
    """
    if col_scale is None and jnp.ndim(row_scale):
        raise ValueError("row_scale is one number for each row: give col_scale too")
    if keep == "distinct" and ids is None:
        raise ValueError("keep='distinct' needs ids")
    plan = _plan(x, y, axis, tile, travel, dtype, keep=keep, columns=columns, y_gradient=y_gradient)
    scales = (row_scale, len(x)), (row_scale if col_scale is None else col_scale, len(y))
    rows, cols = (jnp.broadcast_to(jnp.asarray(s, jnp.float32), n) for s, n in scales)
    return _logsumexp(plan, *vary((x, y, rows, cols, ids), axis))


def _plan(x: Array, y: Array, axis: Axis, tile: int, travel: Travel | None, dtype: jax.typing.DTypeLike, **kw: object) -> Plan:
    if x.shape[1] != y.shape[1] or len(y) % len(x):
        raise ValueError(f"x {x.shape} and y {y.shape}: as many numbers a row, and y a multiple of x's rows")
    return Plan(axis, tile, choose(travel, len(y), y.shape[1], axis), jnp.dtype(dtype), **kw)


def _dot(a: Array, b: Array, contract: tuple[int, int], dtype: jnp.dtype) -> Float[Array, "m n"]:
    """A product with float32 sums."""
    # float32 operands: at full precision whatever the default, which on a TPU is one bfloat16 pass and costs CLIP its 4th digit.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dims, precision, jnp.float32)


def _masks(keep: Keep, r: Side, c: Side, where: Meeting) -> tuple[Mask, Mask]:
    """Which entries are kept, and with ids which are positives other than the own pair. None: all of them, or no ids."""
    same = None if r.ids is None else r.ids[:, None] == c.ids[None]
    rule = {"all": None, "off_diagonal": ~where.own, "distinct": None if same is None else ~same}[keep]
    positive = None if same is None else same & ~where.own
    return _both(rule, where.real), None if positive is None else _both(positive, where.real)


def _both(a: Mask, b: Mask) -> Mask:
    return a if b is None else b if a is None else a & b


def _only(mask: Mask, values: Array, other: float) -> Array:
    return values if mask is None else jnp.where(mask, values, other)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logsumexp(plan: Plan, x: Array, y: Array, row_scale: Array, col_scale: Array, ids: Ids | None) -> Reduced:
    return _logsumexp_fwd(plan, x, y, row_scale, col_scale, ids)[0]


def _sides(plan: Plan, x: Array, y: Array, row_scale: Array, col_scale: Array, ids: Ids | None) -> tuple[Side, Side]:
    x_ids, y_ids = ids or (None, None)
    return Side(x.astype(plan.dtype), row_scale, x_ids), Side(y.astype(plan.dtype), col_scale, y_ids)


def _logsumexp_fwd(plan: Plan, x: Array, y: Array, row_scale: Array, col_scale: Array, ids: Ids | None) -> tuple[Reduced, tuple]:
    def tile(r: Side, c: Side, where: Meeting) -> tuple[Partial, Partial]:
        cos = _dot(r.z, c.z, (1, 1), plan.dtype)
        kept, positive = _masks(plan.keep, r, c, where)
        positives = None if positive is None else jnp.where(positive, cos, 0)

        def along(axis: int, scale: Array) -> Partial:
            lse = log_sum_exp(_only(kept, scale * cos, -jnp.inf), axis)
            return Partial(() if positives is None else (positives.sum(axis),), (), (lse,))

        return along(1, r.scale[:, None]), along(0, c.scale[None]) if plan.columns else Partial()

    rows, cols = _sides(plan, x, y, row_scale, col_scale, ids)
    found = sweep(tile, rows, cols, axis=plan.axis, tile=plan.tile, travel=plan.travel)

    def reduced(side: Partial, scale: Array) -> tuple[Array, Array, Array | None]:
        ((m, (total,)),) = side.lse
        return finite(m) + jnp.log(total), m / scale, side.total[0] if side.total else None

    of_rows, of_cols = reduced(found[0], row_scale), reduced(found[1], col_scale) if plan.columns else (None,) * 3
    out = Reduced(*(z for pair in zip(of_rows, of_cols, strict=True) for z in pair))
    return out, (x, y, row_scale, col_scale, ids, out.rows, out.cols)


def _logsumexp_bwd(plan: Plan, kept_values: tuple, ct: Reduced) -> tuple[Array, Array, Array, Array, None]:
    x, y, row_scale, col_scale, ids, row_lse, col_lse = kept_values

    def tile(r: Side, c: Side, where: Meeting) -> tuple[Partial, Partial]:
        cos = _dot(r.z, c.z, (1, 1), plan.dtype)
        kept, positive = _masks(plan.keep, r, c, where)

        def weights(scale: Array, lse: Array, ct: Array) -> Array:  # the softmax of each row (column), times its cotangent
            return _only(kept, ct * jnp.exp(scale * cos - lse), 0)

        row_w = weights(r.scale[:, None], r.lse[:, None], r.ct[:, None])
        g = r.scale[:, None] * row_w  # of the cosines
        if plan.columns:
            col_w = weights(c.scale[None], c.lse[None], c.ct[None])
            g += c.scale[None] * col_w
        if positive is not None:
            g += jnp.where(positive, r.positive_ct[:, None] + (c.positive_ct[None] if plan.columns else 0), 0)
        to_y = (_dot(g, r.z, (0, 0), plan.dtype),) if plan.y_gradient else ()
        to_col_scale = ((col_w * cos).sum(0),) if plan.columns else ()
        return Partial((_dot(g, c.z, (1, 0), plan.dtype), (row_w * cos).sum(1))), Partial((*to_y, *to_col_scale))

    rows, cols = _sides(plan, x, y, row_scale, col_scale, ids)
    rows = rows._replace(lse=finite(row_lse), ct=ct.rows, positive_ct=ct.row_positive)
    if plan.columns:
        cols = cols._replace(lse=finite(col_lse), ct=ct.cols, positive_ct=ct.col_positive)
    found = sweep(tile, rows, cols, axis=plan.axis, tile=plan.tile, travel=plan.travel)
    dx, d_row = found[0].total
    to_columns = list(found[1].total)
    dy = to_columns.pop(0) if plan.y_gradient else jnp.zeros_like(y)
    d_col = to_columns.pop(0) if plan.columns else jnp.zeros_like(col_scale)
    return dx.astype(x.dtype), dy.astype(y.dtype), d_row, d_col, None


_logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)
