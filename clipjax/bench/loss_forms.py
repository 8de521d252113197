"""Two forms of each loss, streamed and dense, as programs of the global batch.

Forward and backward, float32 at the highest precision, with gradients of embeddings and scalars; the batch is sharded over all
devices. The dense form is the matrix of logits as one would write it, left to the compiler with the same shardings (for the
sigmoid as in big_vision, trainers/proj/image_text/siglip.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from clipjax import losses, sharding
from clipjax.losses.pairwise import tiles

SCALARS = {"softmax": (14.3,), "sigmoid": (10.0, -10.0), "cuaxu": (100.0,)}  # typical values of scale, and of bias
HIGHEST = jax.lax.Precision.HIGHEST


def streamed(loss: str, mesh: Mesh) -> Callable[..., Float[Array, ""]]:
    """clipjax's form, as a function of the global rows and the scalars."""
    axis = sharding.BATCH

    def cuaxu(x: Array, y: Array, scale: Array) -> Array:
        uniform = (losses.uniformity(x, axis=axis) + losses.uniformity(y, axis=axis)) / 2
        aligned = losses.alignment(x, y, axis=axis)
        return losses.clip_loss(x, y, scale, axis=axis) + uniform + aligned + losses.cross_uniformity(x, y, axis=axis)

    forms = {
        "softmax": lambda x, y, scale: losses.clip_loss(x, y, scale, axis=axis),
        "sigmoid": lambda x, y, scale, bias: losses.siglip_loss(x, y, scale, bias, axis=axis),
        "cuaxu": cuaxu,
    }
    return sharding.on_shards(forms[loss], mesh)


def dense(loss: str) -> Callable[..., Float[Array, ""]]:
    """The form with full matrices: one of the logits, and with more terms one for each."""

    def softmax(x: Array, y: Array, scale: Array) -> Array:
        s = scale * jnp.einsum("id,jd->ij", x, y, precision=HIGHEST)
        own = jnp.diagonal(s)
        return (jax.nn.logsumexp(s, 1) - own + jax.nn.logsumexp(s, 0) - own).mean() / 2

    def sigmoid(x: Array, y: Array, scale: Array, bias: Array) -> Array:
        s = scale * jnp.einsum("id,jd->ij", x, y, precision=HIGHEST) + bias
        return -jax.nn.log_sigmoid((2 * jnp.eye(len(x)) - 1) * s).sum(1).mean()

    def uniformity(x: Array, y: Array) -> Array:
        n = len(x)
        cos = jnp.einsum("id,jd->ij", x, y, precision=HIGHEST)
        return jax.nn.logsumexp(jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, 4 * cos - 4)) - jnp.log(n * (n - 1.0))

    def cuaxu(x: Array, y: Array, scale: Array) -> Array:
        aligned = ((x - y) ** 2).sum(1).mean()
        return softmax(x, y, scale) + (uniformity(x, x) + uniformity(y, y)) / 2 + aligned + uniformity(x, y)

    return {"softmax": softmax, "sigmoid": sigmoid, "cuaxu": cuaxu}[loss]


def lower(fn: Callable[..., Any], loss: str, batch: int, width: int, mesh: Mesh) -> jax.stages.Lowered:
    """The value and all gradients; each gradient is sharded like its argument."""
    rows, same = sharding.over_rows(mesh), sharding.replicated(mesh)
    scalars = len(SCALARS[loss])
    placed = (rows, rows, *[same] * scalars)
    shapes = [(batch, width)] * 2 + [()] * scalars
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s) for shape, s in zip(shapes, placed, strict=True)]
    both = jax.value_and_grad(fn, tuple(range(len(args))))
    return jax.jit(both, out_shardings=(same, placed)).lower(*args)


def inputs(loss: str, batch: int, width: int, mesh: Mesh) -> tuple[Array, ...]:
    """Random unit rows [batch, width] of both sides and the scalars, on the mesh."""

    def make() -> tuple[Array, ...]:
        z = jax.random.normal(jax.random.key(0), (2, batch, width))
        x, y = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        return x, y, *(jnp.float32(s) for s in SCALARS[loss])

    rows, same = sharding.over_rows(mesh), sharding.replicated(mesh)
    return jax.jit(make, out_shardings=(rows, rows, *[same] * len(SCALARS[loss])))()


@contextlib.contextmanager
def columns_travel(by: str) -> Iterator[None]:
    """While programs are traced, columns travel `by` ring, by gather, or (auto) as their size decides."""
    limit = tiles.GATHER
    tiles.GATHER = {"auto": limit, "ring": 0, "gather": float("inf")}[by]
    try:
        yield
    finally:
        tiles.GATHER = limit
