"""How well each image and each text of the global batch finds its partner: a by-product of a loss's pass over all pairs."""

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.losses.batch import mean
from clipjax.losses.pairwise import Axis

TIE = 1e-6  # cosines this close are equal in float32. If an image's own text ties with another, it is not found
P = ParamSpec("P")


class Ranking(NamedTuple):
    """Cosines of this device's images and texts with those of the global batch."""

    own: Float[Array, " b"]  # cosine within the pair
    row_max: Float[Array, " b"]  # an image's largest cosine with another's text; -inf where there is none
    col_max: Float[Array, " b"]  # a text's largest cosine with another's image


Ranked = tuple[Float[Array, ""], Ranking | None]  # a loss, and what its pass over all pairs found; None: it has no such pass


def loss_alone(terms: Callable[P, Ranked]) -> Callable[P, Float[Array, ""]]:
    """`clip_terms` as `clip_loss`: the loss without the ranking."""

    @functools.wraps(terms)
    def loss(*args: P.args, **kw: P.kwargs) -> Float[Array, ""]:
        return terms(*args, **kw)[0]

    loss.__name__ = loss.__qualname__ = terms.__name__.replace("_terms", "_loss")
    return loss


def summary(ranking: Ranking, axis: Axis) -> dict[str, Float[Array, ""]]:
    """The share of images (texts) whose partner is nearest, the mean cosine of pairs, and of hardest negatives.

    Where ids leave an image or a text no negative, its partner is nearest, and its hardest negative counts as a cosine of -1.
    """
    own, rows, cols = jax.lax.stop_gradient(ranking)
    image_to_text, text_to_image = (mean((own > best + TIE).astype(jnp.float32), axis) for best in (rows, cols))
    return {
        "image_to_text_accuracy": image_to_text,
        "text_to_image_accuracy": text_to_image,
        "positive_cosine": mean(own, axis),
        "hardest_negative_cosine": mean(jnp.maximum(rows, -1) + jnp.maximum(cols, -1), axis) / 2,
    }
