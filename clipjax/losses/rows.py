"""The inputs and the result of a term of the objective."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from clipjax.config.term import Pairs, pairs_of
from clipjax.losses.batch import add_up
from clipjax.losses.pairwise import Axis
from clipjax.losses.ranking import Ranked, summary

Logged = dict[str, Float[Array, ""]]
Memory = dict[str, Float[Array, " b"]]  # names as in clipjax.train.memory
OneOrMore = Float[Array, "b e"] | Float[Array, "b n e"]  # of one view (caption) an example, or of each of n


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadRows:
    """A head's unit vectors of the rows, of width w; None for a side that the head has not."""

    image: OneOrMore | None = None
    text: OneOrMore | None = None
    image_predicted: OneOrMore | None = None  # the same behind the head's predictor; None: it has none
    text_predicted: OneOrMore | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """What the objective needs beside the rows: the same on every device."""

    head_scales: dict[str, Float[Array, ""]] = field(default_factory=dict)  # of the heads that learn a scale of their own
    key: Key[Array, ""] | None = None  # of this step; None where no term draws


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The objective's inputs from a batch. Row i of every array but `classes` is one example.

    Under `shard_map`, b is this device's shard of the global batch.
    """

    image: OneOrMore  # unit vectors of the image, or of each of its V views
    text: OneOrMore  # unit vectors of the caption, or of each of K
    ids: Int[Array, " b"] | None = None  # examples of equal id are no negatives of each other
    teacher: tuple[Float[Array, "b f"], Float[Array, "b f"]] | None = None  # a teacher's unit vectors of image and caption
    memory: Memory = field(default_factory=dict)  # the example memory of these rows
    caption: tuple[Float[Array, " b"], Int[Array, " b"]] | None = None  # sum of -log p over the captions' tokens; their number
    heads: dict[str, HeadRows] = field(default_factory=dict)  # by name
    labels: Int[Array, "b l"] | None = None  # classes of each example; -1: none
    classes: Float[Array, "c d"] | None = None  # this device's rows of the matrix of class vectors, not normalised
    shared: Shared = field(default_factory=Shared)


class TermResult(NamedTuple):
    """A term over the global batch, without its weight. All but `memory` is the same on every device."""

    value: Float[Array, ""]
    ranking: Logged = {}  # accuracies and cosines (`ranking.summary`), if the pass over all pairs gives them
    memory: Memory = {}  # the new example memory of the rows


# (term, rows, scale, bias, axis). `term` is the object of the config class; `scale` and `bias` are the model's own, float32 [],
# and bias is None for a model without one; `axis` are the mesh axes that the global batch is sharded over, or None.
TermFunction = Callable[[Any, Rows, Any, Any, Axis], TermResult]
PairLoss = Callable[[Any, Rows, Any, Any, Axis], Ranked]  # the same, but of one pair: rows.image and rows.text are [b, e]
HeadLoss = Callable[[Any, Rows, Any, Any, Axis], tuple[Array, Logged]]  # the same, but of one head: see `over_heads`


def over_pairs(loss: PairLoss) -> TermFunction:
    """A term from a loss of two sets of vectors: the mean over the pairs that the term takes, and over its heads.

    So are the accuracies and cosines of the pairs of an image and a text, if the loss gives them.
    """

    @functools.wraps(loss)
    def of_head(term: Any, rows: Rows, scale: Any, bias: Any, axis: Axis) -> tuple[Array, Logged]:
        def of_pair(image: Float[Array, "b e"], text: OneOrMore) -> tuple[Array, Logged]:
            value, ranking = loss(term, dataclasses.replace(rows, image=image, text=text), scale, bias, axis)
            return value, {} if ranking is None else summary(ranking, axis)

        if getattr(term, "negatives", "") == "captions":  # all captions at once
            return mean_over(lambda image: of_pair(image, rows.text), rows.image)
        return mean_over_pairs(of_pair, getattr(term, "sides", "image-text"), rows)

    return over_heads(of_head)


def over_heads(loss: HeadLoss) -> TermFunction:
    """A term from a loss of the images and texts that it takes, all at once, of one head: the mean over the heads that it names.

    The scale is the term's own fixed one, else the head's where it learns one, else the model's. Accuracies and cosines of a head
    bear its name.
    """

    @functools.wraps(loss)
    def of_term(term: Any, rows: Rows, scale: Any, bias: Any, axis: Axis) -> TermResult:
        if not isinstance(term, Pairs):
            return TermResult(*loss(term, rows, scale, bias, axis))
        values, logged = [], {}
        for head in term.heads:
            own = rows if head is None else rows.heads[head]
            taken = dataclasses.replace(rows, image=in_places(own.image, term.images), text=in_places(own.text, term.texts))
            learned = rows.shared.head_scales.get(head or "", scale)
            used = learned if term.temperature is None else jnp.float32(1 / term.temperature)
            value, ranking = loss(term, taken, used, bias, axis)
            values.append(value)
            logged |= {f"{head}_{name}" if head else name: x for name, x in ranking.items()}
        return TermResult(values[0] if len(values) == 1 else add_up(values) / len(values), logged)

    return of_term


def in_places(z: OneOrMore | None, places: tuple[int, ...] | None) -> Any:
    """The vectors in these places, [b, e] for one, else [b, n, e]; `z` itself for None."""
    if z is None or places is None or z.ndim == 2:
        return z
    return z[:, places[0]] if len(places) == 1 else jnp.stack([z[:, place] for place in places], 1)


def vectors_of(z: OneOrMore | None) -> list[Float[Array, "b e"]]:
    """The vectors of each view (caption); none for None."""
    return [] if z is None else [z] if z.ndim == 2 else [z[:, i] for i in range(z.shape[1])]


def main(z: OneOrMore) -> Float[Array, "b e"]:
    """The vectors of the first view (caption)."""
    return z if z.ndim == 2 else z[:, 0]


def mean_over(fn: Callable[[Array], Any], z: OneOrMore) -> Any:
    """`fn(z)` for vectors [b, e]. For [b, n, e] the mean of `fn` over the n.

    They run one after the other: memory and compile time are those of one.
    """
    if z.ndim == 2:
        return fn(z)
    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(fn, jnp.moveaxis(z, 1, 0)))


def mean_over_pairs(fn: Callable[[Array, Array], tuple[Array, Logged]], sides: str, rows: Rows) -> tuple[Array, Logged]:
    """The mean of `fn(x, y) -> (value, logged)` over the pairs of views and captions that `sides` means, one after the other.

    `logged` is the mean over those of a view and a caption; empty if there are none.
    """
    if sides == "image-text" and rows.image.ndim == 2:
        return mean_over(functools.partial(fn, rows.image), rows.text)
    views, captions = vectors_of(rows.image), vectors_of(rows.text)
    pairs = np.array(pairs_of(sides, len(views), len(captions)))
    z = jnp.stack(views + captions)
    values, logged = jax.lax.map(lambda pair: fn(z[pair[0]], z[pair[1]]), jnp.asarray(pairs))
    crossed = (pairs[:, 0] < len(views)) & (pairs[:, 1] >= len(views))
    return values.mean(), {k: x[crossed].mean() for k, x in logged.items()} if crossed.any() else {}
