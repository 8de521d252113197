"""What the primitives share: their options, the product, and which entries of a tile count."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipjax.losses.pairwise.axes import Axis
from clipjax.losses.pairwise.geometry import TilePairs
from clipjax.losses.pairwise.tiles import Travel, choose

KeptPairs = Literal["all", "off_diagonal", "distinct", "same"]
Scalar = Float[Array, ""] | float
Mask = Bool[Array, "r c"] | None  # None: every entry
Ids = tuple[Int[Array, "b ..."], Int[Array, "c ..."]]  # one id of each row and column, or several
X3 = "bfloat16x3"  # a dtype of operands by name: float32, multiplied in three passes
# Rows and columns of a tile. A GPU starts kernels anew for each tile, so there a tile has more work.
TILE, GPU_TILE = 512, 2048


@dataclass(frozen=True)
class PairwiseOptions:
    """What is fixed when a program is traced."""

    axis: Axis
    tile: int
    travel: Travel
    dtype: jnp.dtype  # of the products' operands
    precision: jax.lax.Precision | jax.lax.DotAlgorithmPreset | None  # of the products
    keep: KeptPairs = "all"
    columns: bool = True  # whether columns are reduced too
    y_gradient: bool = True  # whether y has a gradient
    own: bool = True  # whether each row has a pair of its own among the columns


def make_options(
    x: Array, y: Array, axis: Axis, tile: int | None, travel: Travel | None, dtype: jax.typing.DTypeLike, **kw: Any
) -> PairwiseOptions:
    """Raises ValueError for shapes that do not fit. `tile` None: as this platform likes it."""
    if x.shape[1] != y.shape[1] or (kw.get("own", True) and len(y) % len(x)):
        raise ValueError(f"x {x.shape} and y {y.shape}: widths must be equal, and len(y) a multiple of len(x)")
    operands, gpu = jnp.dtype(jnp.float32 if dtype == X3 else dtype), _platform() == "gpu"
    tile = tile or (GPU_TILE if gpu else TILE)
    return PairwiseOptions(axis, tile, choose(travel, len(y), y.shape[1], axis), operands, _precision(dtype, gpu), **kw)


def _platform() -> str:
    """Of the devices that the program is traced for: those of shard_map's mesh, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _precision(dtype: jax.typing.DTypeLike, gpu: bool) -> jax.lax.Precision | jax.lax.DotAlgorithmPreset | None:
    if dtype == X3:  # HIGH: three bfloat16 passes on a TPU, float32 on a CPU
        return jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if gpu else jax.lax.Precision.HIGH
    # Full precision for float32. The default on a TPU is one bfloat16 pass, with which CLIP's loss is wrong in the 4th digit.
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def dot(a: Array, b: Array, contract: tuple[int, int], options: PairwiseOptions) -> Float[Array, "m n"]:
    """A product with float32 sums. `contract`: the axis of each operand that is summed over."""
    a, b, dims = a.astype(options.dtype), b.astype(options.dtype), (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, options.precision, jnp.float32)


def masks(keep: KeptPairs, row_ids: Array | None, col_ids: Array | None, pairs: TilePairs, own: bool = True) -> tuple[Mask, Mask]:
    """Which entries are kept, and with ids which are positives other than the own pair (None without ids).

    `own`: whether the rows have own pairs at all.
    """
    same = None if row_ids is None or col_ids is None else equal_ids(row_ids, col_ids)
    others = ~pairs.own if own else None
    different = None if same is None else ~same
    if different is not None and any(ids is not None and ids.ndim > 1 for ids in (row_ids, col_ids)):
        different = both(different, others)  # the own pair, too, of a row without any id
    positive = None if same is None else both(same, ~pairs.own if own else None)
    rule = {"all": None, "off_diagonal": others, "distinct": different, "same": positive}[keep]
    return both(rule, pairs.real), None if positive is None else both(positive, pairs.real)


def equal_ids(rows: Int[Array, "r ..."], cols: Int[Array, "c ..."]) -> Bool[Array, "r c"]:
    """Whether a row and a column have an id in common. Where they have several each, -1 is none, and equals nothing."""
    if rows.ndim == cols.ndim == 1:
        return rows[:, None] == cols[None]
    rows, cols = rows.reshape(len(rows), -1).T, cols.reshape(len(cols), -1).T
    rows = jnp.where(rows < 0, -2, rows)
    return (rows[:, None, :, None] == cols[None, :, None]).any((0, 1))


def both(a: Mask, b: Mask) -> Mask:
    """The entries that are in both masks."""
    return a if b is None else b if a is None else a & b


def only(mask: Mask, values: Array, other: float) -> Array:
    """`values` where the mask holds, else `other`."""
    return values if mask is None else jnp.where(mask, values, other)
