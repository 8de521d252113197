"""CLIP's loss: symmetric softmax cross-entropy over the global batch (2103.00020; METHODS A.1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Axis = str | tuple[str, ...] | None


def cosines(x: Float[Array, "b e"], y: Float[Array, "b e"], axis: Axis) -> tuple[Float[Array, "b B"], Bool[Array, "b B"]]:
    """x of this device against y of all devices, and which of them are the rows' own pairs."""
    first = 0
    if axis is not None:
        first = jax.lax.axis_index(axis) * len(y)
        y = jax.lax.all_gather(y, axis, tiled=True)
    # float32 products whatever the default: on a TPU that is one bfloat16 pass, which costs CLIP's loss its fourth digit.
    cos = jnp.einsum("ie,je->ij", x, y, precision=jax.lax.Precision.HIGHEST)
    return cos, jnp.arange(len(y))[None] == first + jnp.arange(len(x))[:, None]


def mean(x: Float[Array, "..."], axis: Axis) -> Float[Array, ""]:
    """The mean over all devices' entries."""
    return x.mean() if axis is None else jax.lax.pmean(x.mean(), axis)


def clip_loss(
    zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], scale: Float[Array, ""], *, axis: Axis = None
) -> Float[Array, ""]:
    """Mean of both directions over the global batch, of unit vectors and the logit scale t.

    Under `shard_map` over `axis`, b is the local batch and the result is the same on every device; outside, axis is None.
    """

    def direction(x: Array, y: Array) -> Array:
        cos, own = cosines(x, y, axis)
        # log(1 + sum_{j != i} exp(s_ij - s_ii)): the diagonal leaves before the exponent, so a small loss keeps its digits.
        others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, scale * cos), axis=1)
        return mean(jax.nn.softplus(others - scale * (x * y).sum(1)), axis)

    return (direction(zimg, ztxt) + direction(ztxt, zimg)) / 2


def accuracies(zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], *, axis: Axis = None) -> dict[str, Float[Array, ""]]:
    """The share of pictures whose own text is the nearest in the global batch, and of texts whose own picture is."""

    def direction(x: Array, y: Array) -> Array:
        cos, own = cosines(x, y, axis)
        best = jnp.where(own, -jnp.inf, cos).max(1)
        return mean((jnp.where(own, cos, 0).sum(1) > best).astype(jnp.float32), axis)

    zimg, ztxt = jax.lax.stop_gradient((zimg, ztxt))
    return {"image_to_text_accuracy": direction(zimg, ztxt), "text_to_image_accuracy": direction(ztxt, zimg)}
