"""Cross-entropy towards the softmax of a teacher's cosines, of every row and every column."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.pairwise.axes import Axis, vary
from clipjax.losses.pairwise.geometry import TilePairs
from clipjax.losses.pairwise.operands import PairwiseOptions, Scalar, both, dot, make_options, only
from clipjax.losses.pairwise.partials import LogSumExp, Partial, finite, log_sum_exp
from clipjax.losses.pairwise.tiles import Travel, sweep

# The largest logit, and the log of the sum of exp(logit - largest). They stay apart: their sum would be rounded too coarsely for
# the gradient, where a row's two softmaxes, each of sum 1, almost cancel.
Lse = tuple[Float[Array, " n"], Float[Array, " n"]]
RowsAndColumns = tuple[Float[Array, " b"], Float[Array, " b"]]


class DistillationSide(NamedTuple):
    """Rows or columns in the forward pass."""

    z: Float[Array, "n d"]
    teacher: Float[Array, "n f"]
    own: Float[Array, " n"]  # cosine of the own pair
    teacher_own: Float[Array, " n"]


class DistillationGradientSide(NamedTuple):
    """Rows or columns in the backward pass."""

    z: Float[Array, "n d"]
    teacher: Float[Array, "n f"]
    lse: Lse  # of all the student's logits
    teacher_lse: Lse  # of all the teacher's
    own: Float[Array, " n"]  # softmax of the own pair, the student's less the teacher's
    ct: Float[Array, " n"]  # cotangent of the cross-entropy


def pairwise_cross_entropy(
    x: Float[Array, "b d"],
    y: Float[Array, "b d"],
    scale: Scalar,
    teacher_x: Float[Array, "b f"],
    teacher_y: Float[Array, "b f"],
    teacher_scale: Scalar,
    *,
    axis: Axis = None,
    tile: int | None = None,
    travel: Travel | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> RowsAndColumns:
    """-sum_j softmax_j(teacher_scale teacher_cos_ij) log softmax_j(scale cos_ij) of every row, and the same of every column.

    The teacher has no gradient.
    """
    options = make_options(x, y, axis, tile, travel, dtype)
    teacher = jax.lax.stop_gradient((teacher_x, teacher_y, jnp.float32(teacher_scale)))
    return _cross_entropy(options, *vary((x, y, jnp.float32(scale), *teacher), axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    options: PairwiseOptions, x: Array, y: Array, scale: Array, tx: Array, ty: Array, teacher_scale: Array
) -> RowsAndColumns:
    return _cross_entropy_fwd(options, x, y, scale, tx, ty, teacher_scale)[0]


def _sides(options: PairwiseOptions, x: Array, y: Array, tx: Array, ty: Array) -> tuple[DistillationSide, DistillationSide]:
    own = (x * y).sum(1), (tx * ty).sum(1)
    x, tx, y, ty = (z.astype(options.dtype) for z in (x, tx, y, ty))
    return DistillationSide(x, tx, *own), DistillationSide(y, ty, *own)


def _cross_entropy_fwd(
    options: PairwiseOptions, x: Array, y: Array, scale: Array, tx: Array, ty: Array, teacher_scale: Array
) -> tuple[RowsAndColumns, tuple[Any, ...]]:
    """The own pair stays apart, so that a small loss and a small gradient keep their digits."""

    def tile(r: DistillationSide, c: DistillationSide, pairs: TilePairs) -> tuple[Partial, Partial]:
        cos = dot(r.z, c.z, (1, 1), options)
        others = both(~pairs.own, pairs.real)
        logits = only(others, scale * cos, -jnp.inf)
        teacher = only(others, teacher_scale * dot(r.teacher, c.teacher, (1, 1), options), -jnp.inf)

        def along(axis: int, own: Array) -> Partial:
            positive_gap = only(others, own - cos, 0)  # 0 for the own pair, whatever the rounding
            return Partial((), (), (log_sum_exp(logits, axis), log_sum_exp(teacher, axis, positive_gap)))

        return along(1, r.own[:, None]), along(0, c.own[None])

    rows, cols = _sides(options, x, y, tx, ty)
    found = sweep(tile, rows, cols, axis=options.axis, tile=options.tile, travel=options.travel)

    def value(side: Partial) -> tuple[Array, tuple[Lse, Lse, Array]]:
        of_student, (teacher_m, (teacher_total, positive_gap)) = side.lse
        excess, lse = with_own(of_student, scale * rows.own)
        teacher_excess, teacher_lse = with_own((teacher_m, (teacher_total,)), teacher_scale * rows.teacher_own)
        # How much less than the own pair the teacher's targets have on average.
        gap = positive_gap * jnp.exp(finite(teacher_m) - teacher_lse[0] - teacher_lse[1])
        return excess + scale * gap, (lse, teacher_lse, jnp.expm1(-excess) - jnp.expm1(-teacher_excess))

    def with_own(others: LogSumExp, own: Array) -> tuple[Array, Lse]:
        """-log of the own pair's softmax, and the log-sum-exp of all logits."""
        m, (total,) = others
        top = jnp.maximum(m, own)
        lse = top, jnp.log(total * jnp.exp(m - top) + jnp.exp(own - top))
        return jax.nn.softplus(finite(m) + jnp.log(total) - own), lse

    of_rows, of_cols = value(found[0]), value(found[1])
    return (of_rows[0], of_cols[0]), (x, y, scale, tx, ty, teacher_scale, of_rows[1], of_cols[1])


def _cross_entropy_bwd(options: PairwiseOptions, residuals: tuple[Any, ...], ct: RowsAndColumns) -> tuple[Array, ...]:
    x, y, scale, tx, ty, teacher_scale, of_rows, of_cols = residuals

    def tile(r: DistillationGradientSide, c: DistillationGradientSide, pairs: TilePairs) -> tuple[Partial, Partial]:
        cos = dot(r.z, c.z, (1, 1), options)
        logits, teacher = scale * cos, teacher_scale * dot(r.teacher, c.teacher, (1, 1), options)

        def softmax(logits: Array, lse: Lse) -> Array:
            return jnp.exp(logits - lse[0] - lse[1])

        def of_side(lse: Lse, teacher_lse: Lse, own: Array, ct: Array) -> Array:
            return ct * jnp.where(pairs.own, own, softmax(logits, lse) - softmax(teacher, teacher_lse))

        of_rows = jax.tree.map(lambda v: v[:, None], r[2:])
        of_cols = jax.tree.map(lambda v: v[None], c[2:])
        g = only(pairs.real, of_side(*of_rows) + of_side(*of_cols), 0)  # the gradient for scale * cos
        return Partial((dot(g, c.z, (1, 0), options), (g * cos).sum(1))), Partial((dot(g, r.z, (0, 0), options),))

    rows, cols = _sides(options, x, y, tx, ty)
    rows = DistillationGradientSide(rows.z, rows.teacher, *of_rows, ct=ct[0])
    cols = DistillationGradientSide(cols.z, cols.teacher, *of_cols, ct=ct[1])
    found = sweep(tile, rows, cols, axis=options.axis, tile=options.tile, travel=options.travel)
    (dx, d_scale), (dy,) = found[0].total, found[1].total
    zeros = (jnp.zeros_like(a) for a in (tx, ty, teacher_scale))
    return (scale * dx).astype(x.dtype), (scale * dy).astype(y.dtype), d_scale.sum(), *zeros


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
