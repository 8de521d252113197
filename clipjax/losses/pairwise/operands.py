"""What the primitives share: their operands, the product, and which entries of a tile count."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipjax.losses.pairwise.axes import Axis
from clipjax.losses.pairwise.geometry import TilePairs
from clipjax.losses.pairwise.tiles import Travel, choose

KeptPairs = Literal["all", "off_diagonal", "distinct"]
Mask = Bool[Array, "r c"] | None
Ids = tuple[Int[Array, " b"], Int[Array, " c"]]
TILE = 512  # rows and columns of a tile


class Side(NamedTuple):
    """Rows or columns as they meet."""

    z: Float[Array, "n d"]
    scale: Float[Array, " n"] | None
    ids: Int[Array, " n"] | None = None
    lse: Float[Array, " n"] | None = None  # for the gradient: what they were reduced to,
    ct: Float[Array, " n"] | None = None  # its cotangent,
    positive_ct: Float[Array, " n"] | None = None  # and that of their positives


@dataclass(frozen=True)
class PairwiseOptions:
    """What is fixed when a program is traced."""

    axis: Axis
    tile: int
    travel: Travel
    dtype: jnp.dtype
    keep: KeptPairs = "all"
    columns: bool = True
    y_gradient: bool = True


def make_options(
    x: Array, y: Array, axis: Axis, tile: int, travel: Travel | None, dtype: jax.typing.DTypeLike, **kw: object
) -> PairwiseOptions:
    if x.shape[1] != y.shape[1] or len(y) % len(x):
        raise ValueError(f"x {x.shape} and y {y.shape}: as many numbers a row, and y a multiple of x's rows")
    return PairwiseOptions(axis, tile, choose(travel, len(y), y.shape[1], axis), jnp.dtype(dtype), **kw)


def dot(a: Array, b: Array, contract: tuple[int, int], dtype: jnp.dtype) -> Float[Array, "m n"]:
    """A product with float32 sums."""
    # float32 operands: at full precision whatever the default, which on a TPU is one bfloat16 pass and costs CLIP its 4th digit.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dims, precision, jnp.float32)


def masks(keep: KeptPairs, r: Side, c: Side, pairs: TilePairs) -> tuple[Mask, Mask]:
    """Which entries are kept, and with ids which are positives other than the own pair. None: all of them, or no ids."""
    same = None if r.ids is None else r.ids[:, None] == c.ids[None]
    rule = {"all": None, "off_diagonal": ~pairs.own, "distinct": None if same is None else ~same}[keep]
    positive = None if same is None else same & ~pairs.own
    return both(rule, pairs.real), None if positive is None else both(positive, pairs.real)


def both(a: Mask, b: Mask) -> Mask:
    return a if b is None else b if a is None else a & b


def only(mask: Mask, values: Array, other: float) -> Array:
    return values if mask is None else jnp.where(mask, values, other)


def sides(
    options: PairwiseOptions, x: Array, y: Array, row_scale: Array | None, col_scale: Array | None, ids: Ids | None
) -> tuple[Side, Side]:
    x_ids, y_ids = ids or (None, None)
    return Side(x.astype(options.dtype), row_scale, x_ids), Side(y.astype(options.dtype), col_scale, y_ids)
