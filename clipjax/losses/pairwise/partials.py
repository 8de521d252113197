"""What rows or columns have accumulated over some of their tiles, and how two such parts are merged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LogSumExp = tuple[Array, tuple[Array, ...]]  # m, the largest logit, and sums of terms exp(logit - m) * (...)


class Partial(NamedTuple):
    """What rows (or columns) have accumulated so far. Each field is a tuple of arrays with one entry a row (column)."""

    total: tuple[Array, ...] = ()  # sums
    best: tuple[Array, ...] = ()  # maxima
    lse: tuple[LogSumExp, ...] = ()


def merge(a: Partial, b: Partial) -> Partial:
    """Both parts as one. NaN and +inf propagate."""

    def merge_lse(a: LogSumExp, b: LogSumExp) -> LogSumExp:
        m = jnp.maximum(a[0], b[0])
        fa, fb = (jnp.exp(part[0] - finite(m)) for part in (a, b))
        return m, tuple(fa * x + fb * y for x, y in zip(a[1], b[1], strict=True))

    return Partial(
        jax.tree.map(jnp.add, a.total, b.total),
        jax.tree.map(jnp.maximum, a.best, b.best),
        tuple(merge_lse(x, y) for x, y in zip(a.lse, b.lse, strict=True)),
    )


def empty(shape: Partial) -> Partial:
    """A Partial before any tile, with the shapes and dtypes of `shape`."""

    def zeros(x: Array) -> Array:
        return jnp.zeros(x.shape, x.dtype)

    def least(x: Array) -> Array:
        return jnp.full(x.shape, -jnp.inf, x.dtype)

    lse = tuple((least(m), jax.tree.map(zeros, sums)) for m, sums in shape.lse)
    return Partial(jax.tree.map(zeros, shape.total), jax.tree.map(least, shape.best), lse)


def finite(m: Array) -> Array:
    """The largest logit, or 0 where there is none: -inf - -inf would be NaN."""
    return jnp.where(m == -jnp.inf, 0, m)


def log_sum_exp(logits: Float[Array, "r c"], axis: int, *factors: Float[Array, "r c"]) -> LogSumExp:
    """The entry of Partial.lse for one tile along an axis: sums of exp(logits - m), and of that times each factor."""
    m = logits.max(axis)
    e = jnp.exp(logits - jnp.expand_dims(finite(m), axis))
    return m, tuple(x.sum(axis) for x in (e, *(e * f for f in factors)))
