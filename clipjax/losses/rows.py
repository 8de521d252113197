"""What a term of the objective is given and gives back."""

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
    """What the objective sees of a batch. Row i of every array is one example.

    Under `shard_map`, b is this device's shard of the global batch.
    """

    image: Float[Array, "b e"]  # unit vectors
    text: Float[Array, "b e"] | Float[Array, "b K e"]  # unit vectors of the caption, or of each of K
    ids: Int[Array, " b"] | None = None  # examples of equal id are no negatives of each other
    teacher: tuple[Float[Array, "b f"], Float[Array, "b f"]] | None = None  # a teacher's unit vectors of image and caption
    memory: Memory = field(default_factory=dict)  # what a term remembers of these examples
    caption: tuple[Float[Array, " b"], Int[Array, " b"]] | None = None  # sum of -log p over the captions' tokens; their number


class TermResult(NamedTuple):
    """A term over the global batch, before its weight. The same on every device, but for `memory`."""

    value: Float[Array, ""]
    ranking: Logged = {}  # accuracies and cosines (`ranking.summary`), where the pass over all pairs finds them
    memory: Memory = {}  # what to remember of the rows from now on


# (term, rows, scale, bias, axis). `term` is the object of the config class; `scale` and `bias` are the model's own, float32 [],
# and bias is None for a model without one; `axis` are the mesh axes that the global batch is sharded over, or None.
TermFunction = Callable[[Any, Rows, Any, Any, Axis], TermResult]
PairLoss = Callable[[Any, Rows, Any, Any, Axis], Ranked]  # the same, but of one caption an image: rows.text is [b, e]


def per_caption(loss: PairLoss) -> TermFunction:
    """The mean of `loss` over the captions of an image, and of the accuracies and cosines of its ranking, if it gives one."""

    @functools.wraps(loss)
    def of_term(term: Any, rows: Rows, scale: Any, bias: Any, axis: Axis) -> TermResult:
        def of_caption(text: Float[Array, "b e"]) -> tuple[Array, Logged]:
            value, ranking = loss(term, dataclasses.replace(rows, text=text), scale, bias, axis)
            return value, {} if ranking is None else summary(ranking, axis)

        return TermResult(*mean_over_captions(of_caption, rows.text))

    return of_term


def mean_over_captions(fn: Callable[[Array], Any], text: Float[Array, "b e"] | Float[Array, "b K e"]) -> Any:
    """`fn(text)` of texts [b, e], or its mean over each of K: one after the other, in the memory and compile time of one."""
    if text.ndim == 2:
        return fn(text)
    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(fn, jnp.moveaxis(text, 1, 0)))
