"""The inputs and the result of a term of the objective."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax.losses.pairwise import Axis
from clipjax.losses.ranking import Ranked, summary

Logged = dict[str, Float[Array, ""]]
Memory = dict[str, Float[Array, " b"]]  # names as in clipjax.train.memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The objective's inputs from a batch. Row i of every array is one example.

    Under `shard_map`, b is this device's shard of the global batch.
    """

    image: Float[Array, "b e"]  # unit vectors
    text: Float[Array, "b e"] | Float[Array, "b K e"]  # unit vectors of the caption, or of each of K
    ids: Int[Array, " b"] | None = None  # examples of equal id are no negatives of each other
    teacher: tuple[Float[Array, "b f"], Float[Array, "b f"]] | None = None  # a teacher's unit vectors of image and caption
    memory: Memory = field(default_factory=dict)  # the example memory of these rows
    caption: tuple[Float[Array, " b"], Int[Array, " b"]] | None = None  # sum of -log p over the captions' tokens; their number


class TermResult(NamedTuple):
    """A term over the global batch, without its weight. All but `memory` is the same on every device."""

    value: Float[Array, ""]
    ranking: Logged = {}  # accuracies and cosines (`ranking.summary`), if the pass over all pairs gives them
    memory: Memory = {}  # the new example memory of the rows


# (term, rows, scale, bias, axis). `term` is the object of the config class; `scale` and `bias` are the model's own, float32 [],
# and bias is None for a model without one; `axis` are the mesh axes that the global batch is sharded over, or None.
TermFunction = Callable[[Any, Rows, Any, Any, Axis], TermResult]
PairLoss = Callable[[Any, Rows, Any, Any, Axis], Ranked]  # the same, but of one caption an image: rows.text is [b, e]


def per_caption(loss: PairLoss) -> TermFunction:
    """A term from a loss of one caption: the means over an image's captions of the loss, and of accuracies and cosines if any."""

    @functools.wraps(loss)
    def of_term(term: Any, rows: Rows, scale: Any, bias: Any, axis: Axis) -> TermResult:
        def of_caption(text: Float[Array, "b e"]) -> tuple[Array, Logged]:
            value, ranking = loss(term, dataclasses.replace(rows, text=text), scale, bias, axis)
            return value, {} if ranking is None else summary(ranking, axis)

        return TermResult(*mean_over_captions(of_caption, rows.text))

    return of_term


def mean_over_captions(fn: Callable[[Array], Any], text: Float[Array, "b e"] | Float[Array, "b K e"]) -> Any:
    """`fn(text)` for texts [b, e]. For [b, K, e] the mean of `fn` over the K captions.

    They run one after the other: memory and compile time are those of one caption.
    """
    if text.ndim == 2:
        return fn(text)
    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(fn, jnp.moveaxis(text, 1, 0)))
