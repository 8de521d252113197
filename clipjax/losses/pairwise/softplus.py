"""The sum of softplus over all pairs, for SigLIP, with its gradient from the same pass."""

import functools
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.losses.pairwise.axes import Axis, vary
from clipjax.losses.pairwise.geometry import TilePairs
from clipjax.losses.pairwise.operands import Ids, PairwiseOptions, Scalar, both, dot, make_options, masks, only
from clipjax.losses.pairwise.partials import Partial
from clipjax.losses.pairwise.tiles import Travel, sweep

Outputs = tuple[Float[Array, ""], Float[Array, " b"], Float[Array, " b"]]  # sum, largest cosine of a row, of a column


class Side(NamedTuple):
    """Rows or columns."""

    z: Float[Array, "n d"]
    ids: Int[Array, "n ..."] | None


def pairwise_softplus(
    x: Float[Array, "b d"],
    y: Float[Array, "b d"],
    scale: Scalar,
    bias: Scalar,
    *,
    axis: Axis = None,
    keep: Literal["all", "off_diagonal"] = "all",
    ids: Ids | None = None,
    tile: int | None = None,
    travel: Travel | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Outputs:
    """The sum over all pairs of the global batch of softplus(-z (scale cos + bias)), z = 1 for the own pair, else -1.

    Also the largest cosine of each row and each column with another's (no gradient). The sum is the same on every device. Pairs
    of equal `ids` other than the own one are left out, and that one with keep="off_diagonal". Value and gradient come from one
    pass over the tiles.
    """
    options = make_options(x, y, axis, tile, travel, dtype, keep=keep)
    args = vary((x, y, jnp.float32(scale), jnp.float32(bias), ids), axis)
    total, row_max, col_max = cast(Outputs, _softplus(options, *args))  # custom_vjp forgets the type
    return total if axis is None else jax.lax.psum(total, axis), row_max, col_max


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softplus(options: PairwiseOptions, x: Array, y: Array, scale: Array, bias: Array, ids: Ids | None) -> Outputs:
    return _softplus_pass(options, x, y, scale, bias, ids, gradient=False)[0]


def _softplus_pass(
    options: PairwiseOptions, x: Array, y: Array, scale: Array, bias: Array, ids: Ids | None, gradient: bool = True
) -> tuple[Outputs, tuple[Array, ...]]:
    """The sum over this device's rows; with `gradient`, also its gradient for x, y, scale and bias."""

    def tile(r: Side, c: Side, pairs: TilePairs) -> tuple[Partial, Partial]:
        cos = dot(r.z, c.z, (1, 1), options)
        sign = jnp.where(pairs.own, -1, 1)
        logits = sign * (scale * cos + bias)
        rule, _ = masks("all" if ids is None else "distinct", r.ids, c.ids, pairs)
        kept = None if rule is None else rule | pairs.own
        kept = kept if options.keep == "all" else both(kept, ~pairs.own)
        e = jnp.exp(-jnp.abs(logits))  # serves softplus and its derivative
        # softplus of -inf is 0, but an infinite vector must not look like a perfect one: 0 * inf is NaN
        values = only(kept, jnp.maximum(logits, 0) + jnp.log1p(e) + 0 * cos, 0)
        others = jnp.where(~pairs.own if kept is None else kept & ~pairs.own, cos, -jnp.inf)
        sums, to_y = (values.sum(1),), ()
        if gradient:
            g = only(kept, sign * jnp.where(logits >= 0, 1, e) / (1 + e), 0)
            sums += (dot(g, c.z, (1, 0), options), (g * cos).sum(1), g.sum(1))
            to_y = (dot(g, r.z, (0, 0), options),)
        return Partial(sums, (others.max(1),)), Partial(to_y, (others.max(0),))

    x_ids, y_ids = ids or (None, None)
    rows, cols = Side(x.astype(options.dtype), x_ids), Side(y.astype(options.dtype), y_ids)
    found = sweep(tile, rows, cols, axis=options.axis, tile=options.tile, travel=options.travel)
    total, *by_row = found[0].total
    # The barrier: each row is summed before the rows are. Without it a CPU adds a small tile's entries one by one, and loses the
    # fifth digit.
    total, *of_scalars = jax.lax.optimization_barrier((total, *by_row[1:]))
    out = total.sum(), found[0].best[0], found[1].best[0]
    if not gradient:
        return out, ()
    d_scale, d_bias = (g.sum() for g in of_scalars)
    return out, ((scale * by_row[0]).astype(x.dtype), (scale * found[1].total[0]).astype(y.dtype), d_scale, d_bias)


def _softplus_bwd(options: PairwiseOptions, gradients: tuple[Array, ...], ct: Outputs) -> tuple[Array | None, ...]:
    # This sum is used only after the psum over all devices, so its cotangent is the same on each: no transfer is needed.
    return *(ct[0].astype(g.dtype) * g for g in gradients), None


_softplus.defvjp(_softplus_pass, _softplus_bwd)
