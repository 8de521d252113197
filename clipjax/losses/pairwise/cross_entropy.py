"""Cross-entropy against the softmax of a teacher's cosines, row by row and column by column."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.pairwise.axes import Axis, vary
from clipjax.losses.pairwise.geometry import TilePairs
from clipjax.losses.pairwise.operands import TILE, PairwiseOptions, both, dot, make_options, only
from clipjax.losses.pairwise.partials import Partial, finite, log_sum_exp
from clipjax.losses.pairwise.tiles import Travel, sweep

# The largest logit, and the log of the sum of exp(logit - largest). Added up they would lose the digits by which a row's two
# softmaxes, each of sum 1, cancel in the gradient.
Lse = tuple[Float[Array, " n"], Float[Array, " n"]]


class Taught(NamedTuple):
    """Rows or columns as they meet under a teacher."""

    z: Float[Array, "n d"]
    teacher: Float[Array, "n f"]
    own: Float[Array, " n"]  # cosine of the own pair
    lse: Lse | None = None  # for the gradient: of all the student's logits,
    teacher_lse: Lse | None = None  # of all the teacher's,
    ct: Float[Array, " n"] | None = None  # and the cotangent


def pairwise_cross_entropy(
    x: Float[Array, "b d"],
    y: Float[Array, "b d"],
    scale: Float[Array, ""],
    teacher_x: Float[Array, "b f"],
    teacher_y: Float[Array, "b f"],
    teacher_scale: Float[Array, ""],
    *,
    axis: Axis = None,
    tile: int = TILE,
    travel: Travel | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """-sum_j softmax_j(teacher_scale teacher_cos_ij) log softmax_j(scale cos_ij) of every row, and the same of every column.

    There is no gradient to the teacher.
    """
    options = make_options(x, y, axis, tile, travel, dtype)
    teacher = jax.lax.stop_gradient((teacher_x, teacher_y, jnp.float32(teacher_scale)))
    return _cross_entropy(options, *vary((x, y, jnp.float32(scale), *teacher), axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    options: PairwiseOptions, x: Array, y: Array, scale: Array, tx: Array, ty: Array, teacher_scale: Array
) -> tuple[Array, Array]:
    return _cross_entropy_fwd(options, x, y, scale, tx, ty, teacher_scale)[0]


def _taught(options: PairwiseOptions, x: Array, y: Array, tx: Array, ty: Array) -> tuple[Taught, Taught]:
    own = (x * y).sum(1)
    return tuple(Taught(z.astype(options.dtype), t.astype(options.dtype), own) for z, t in ((x, tx), (y, ty)))


def _cross_entropy_fwd(
    options: PairwiseOptions, x: Array, y: Array, scale: Array, tx: Array, ty: Array, teacher_scale: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    def tile(r: Taught, c: Taught, pairs: TilePairs) -> tuple[Partial, Partial]:
        cos = dot(r.z, c.z, (1, 1), options.dtype)
        others = both(~pairs.own, pairs.real)
        logits = jnp.where(others, scale * cos, -jnp.inf)
        teacher = only(pairs.real, teacher_scale * dot(r.teacher, c.teacher, (1, 1), options.dtype), -jnp.inf)

        def along(axis: int, own: Array) -> Partial:
            behind = jnp.where(others, own - cos, 0)  # 0 for the own pair, whatever the rounding
            return Partial((), (), (log_sum_exp(logits, axis), log_sum_exp(teacher, axis, behind)))

        return along(1, r.own[:, None]), along(0, c.own[None])

    rows, cols = _taught(options, x, y, tx, ty)
    found = sweep(tile, rows, cols, axis=options.axis, tile=options.tile, travel=options.travel)

    def value(side: Partial) -> tuple[Array, Lse, Lse]:
        (m, (total,)), (teacher_m, (teacher_total, behind)) = side.lse
        own = scale * rows.own
        # log sum_j exp(s_ij) - s_ii, and what the teacher's targets lie behind the own pair: small losses keep their digits.
        excess = jax.nn.softplus(finite(m) + jnp.log(total) - own)
        top = jnp.maximum(m, own)
        lse = top, jnp.log(total * jnp.exp(m - top) + jnp.exp(own - top))
        return excess + scale * behind / teacher_total, lse, (teacher_m, jnp.log(teacher_total))

    of_rows, of_cols = map(value, found)
    return (of_rows[0], of_cols[0]), (x, y, scale, tx, ty, teacher_scale, *of_rows[1:], *of_cols[1:])


def _cross_entropy_bwd(options: PairwiseOptions, kept: tuple[Array, ...], ct: tuple[Array, Array]) -> tuple[Array, ...]:
    x, y, scale, tx, ty, teacher_scale, *lse = kept

    def tile(r: Taught, c: Taught, pairs: TilePairs) -> tuple[Partial, Partial]:
        cos = dot(r.z, c.z, (1, 1), options.dtype)
        logits, teacher = scale * cos, teacher_scale * dot(r.teacher, c.teacher, (1, 1), options.dtype)
        sides = (jax.tree.map(lambda v: v[:, None], r[3:]), jax.tree.map(lambda v: v[None], c[3:]))

        def softmax(logits: Array, lse: Lse) -> Array:
            return jnp.exp(logits - lse[0] - lse[1])

        g = sum(ct * (softmax(logits, lse) - softmax(teacher, teacher_lse)) for lse, teacher_lse, ct in sides)
        g = only(pairs.real, g, 0)
        return Partial((dot(g, c.z, (1, 0), options.dtype), (g * cos).sum(1))), Partial((dot(g, r.z, (0, 0), options.dtype),))

    rows, cols = _taught(options, x, y, tx, ty)
    rows, cols = Taught(*rows[:3], *lse[:2], ct[0]), Taught(*cols[:3], *lse[2:], ct[1])
    found = sweep(tile, rows, cols, axis=options.axis, tile=options.tile, travel=options.travel)
    (dx, d_scale), (dy,) = found[0].total, found[1].total
    zeros = (jnp.zeros_like(a) for a in (tx, ty, teacher_scale))
    return (scale * dx).astype(x.dtype), (scale * dy).astype(y.dtype), d_scale.sum(), *zeros


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
