"""Losses of nested prefixes of the embeddings (Matryoshka, 2205.13147)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.batch import add_up


def prefix(z: Float[Array, "... e"], width: int) -> Float[Array, "... m"]:
    """The first `width` coordinates, normalised: a slice of a unit vector is not a unit vector."""
    z = z[..., :width]
    return z * jax.lax.rsqrt(jnp.maximum((z * z).sum(-1, keepdims=True), 1e-24))


def matryoshka(
    loss: Callable[..., Float[Array, ""]],
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "c e"],
    prefixes: Sequence[int],
    *args: Any,
    **kw: Any,
) -> Float[Array, ""]:
    """The sum over `prefixes` m of `loss(image, text, *args, **kw)` of the first m coordinates, normalised."""
    return add_up(loss(prefix(zimg, m), prefix(ztxt, m), *args, **kw) for m in prefixes)
