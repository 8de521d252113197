"""softplus over every pair: what SigLIP adds up, with its gradient from the same pass."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.pairwise.axes import Axis, vary
from clipjax.losses.pairwise.geometry import TilePairs
from clipjax.losses.pairwise.operands import TILE, Ids, PairwiseOptions, Side, dot, make_options, masks, only, sides
from clipjax.losses.pairwise.partials import Partial
from clipjax.losses.pairwise.tiles import Travel, sweep


def pairwise_softplus(
    x: Float[Array, "b d"],
    y: Float[Array, "b d"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    axis: Axis = None,
    ids: Ids | None = None,
    tile: int = TILE,
    travel: Travel | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Float[Array, ""], Float[Array, " b"], Float[Array, " b"]]:
    """The sum over all pairs of the global batch of softplus(-z (scale cos + bias)), z = 1 for the own pair, else -1; and the
    largest cosine of each row and each column with another's (no gradient). The sum is the same on every device.

    Pairs of equal `ids` other than the own one are left out. Value and gradient come from one pass over the tiles.
    """
    options = make_options(x, y, axis, tile, travel, dtype)
    total, row_max, col_max = _softplus(options, *vary((x, y, jnp.float32(scale), jnp.float32(bias), ids), axis))
    return total if axis is None else jax.lax.psum(total, axis), row_max, col_max


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softplus(
    options: PairwiseOptions, x: Array, y: Array, scale: Array, bias: Array, ids: Ids | None
) -> tuple[Array, Array, Array]:
    return _softplus_pass(options, x, y, scale, bias, ids, gradient=False)[0]


def _softplus_pass(
    options: PairwiseOptions, x: Array, y: Array, scale: Array, bias: Array, ids: Ids | None, gradient: bool = True
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    """This device's rows' share of the sum, and with `gradient` that of the sum by x, y, scale and bias."""

    def tile(r: Side, c: Side, pairs: TilePairs) -> tuple[Partial, Partial]:
        cos = dot(r.z, c.z, (1, 1), options.dtype)
        sign = jnp.where(pairs.own, -1, 1)
        logits = sign * (scale * cos + bias)
        rule, _ = masks("all" if ids is None else "distinct", r, c, pairs)
        kept = None if rule is None else rule | pairs.own
        e = jnp.exp(-jnp.abs(logits))  # serves softplus and its derivative
        # softplus of -inf is 0, but an infinite vector must not pass for a perfect one: 0 * inf is NaN
        values = only(kept, jnp.maximum(logits, 0) + jnp.log1p(e) + 0 * cos, 0)
        others = jnp.where(~pairs.own if kept is None else kept & ~pairs.own, cos, -jnp.inf)
        sums, to_y = (values.sum(1),), ()
        if gradient:
            g = only(kept, sign * jnp.where(logits >= 0, 1, e) / (1 + e), 0)
            sums += (dot(g, c.z, (1, 0), options.dtype), (g * cos).sum(1), g.sum(1))
            to_y = (dot(g, r.z, (0, 0), options.dtype),)
        return Partial(sums, (others.max(1),)), Partial(to_y, (others.max(0),))

    rows, cols = sides(options, x, y, None, None, ids)
    found = sweep(tile, rows, cols, axis=options.axis, tile=options.tile, travel=options.travel)
    total, *by_row = found[0].total
    # Rows are added up before their sums are: a CPU else takes a small tile's entries one by one, and loses the fifth digit.
    total, *of_scalars = jax.lax.optimization_barrier((total, *by_row[1:]))
    out = total.sum(), found[0].best[0], found[1].best[0]
    if not gradient:
        return out, ()
    d_scale, d_bias = (g.sum() for g in of_scalars)
    return out, ((scale * by_row[0]).astype(x.dtype), (scale * found[1].total[0]).astype(y.dtype), d_scale, d_bias)


def _softplus_bwd(
    options: PairwiseOptions, gradients: tuple[Array, ...], ct: tuple[Array, Array, Array]
) -> tuple[Array | None, ...]:
    # The sum is only ever used added up over all devices, so its cotangent is the same on each: no need to send it along.
    return *(ct[0].astype(g.dtype) * g for g in gradients), None


_softplus.defvjp(_softplus_pass, _softplus_bwd)
