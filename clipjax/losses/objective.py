"""The configured terms, weighted and added up."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clipjax import config
from clipjax.losses.caption import caption_loss
from clipjax.losses.matryoshka import prefix
from clipjax.losses.pairwise import Axis
from clipjax.losses.ranking import Ranking, summary
from clipjax.losses.regularizers import alignment, cross_uniformity, cyclip, uniformity
from clipjax.losses.sigmoid import siglip_terms
from clipjax.losses.softmax import clip_terms, decoupled_terms, hard_negative_terms
from clipjax.losses.sogclr import sogclr_loss
from clipjax.losses.targets import cwcl_terms, distillation_loss, multi_positive_loss

Logged = dict[str, Float[Array, ""]]
Memory = dict[str, Float[Array, " b"]]  # names as in clipjax.train.memory
OfPairs = Callable[[Array, Array], tuple[Float[Array, ""], Ranking | None]]  # of pictures and as many texts, [b, e] both


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What the objective sees of a batch: this device's share of it under `shard_map`, row i of every array one example."""

    image: Float[Array, "b e"]  # unit vectors
    text: Float[Array, "b e"] | Float[Array, "b K e"]  # of the caption, or of each of K
    ids: Int[Array, " b"] | None = None  # equal for what must not be held against each other
    teacher: tuple[Float[Array, "b f"], Float[Array, "b f"]] | None = None  # a teacher's unit vectors of picture and caption
    memory: Memory = field(default_factory=dict)  # what a term remembers of these examples
    caption: tuple[Float[Array, " b"], Int[Array, " b"]] | None = None  # sum of -log p over the captions' tokens; their number


def objective(
    terms: tuple[config.Term, ...],
    rows: Rows,
    scale: Float[Array, ""],
    bias: Float[Array, ""] | None,
    *,
    axis: Axis = None,
) -> tuple[Float[Array, ""], Logged, Memory]:
    """The loss over the global batch; what is logged beside it: every term before its weight, and how well pairs are found; and
    what is remembered of the rows from now on.

    Of K captions, a multi-positive term takes all at once; every other term is the mean over them, each against the pictures. A
    term is logged as `{kind}_loss`, or `{kind}_{position}_loss` where there are several of its kind. Accuracies and cosines
    (`ranking.summary`) come from the first term whose pass over all pairs finds them; there is no pass for them alone. A term of
    weight 0 is not even traced.
    """
    traced = [(i, term) for i, term in enumerate(terms) if term.weight]
    kinds = Counter(term.kind for _, term in traced)
    values, found, memory = {}, {}, rows.memory
    for i, term in traced:
        name = f"{term.kind}_loss" if kinds[term.kind] == 1 else f"{term.kind}_{i}_loss"
        if isinstance(term, config.Sogclr | config.Isogclr):
            values[name], memory = _remembering(term, rows, scale, axis)
            continue
        values[name], seen = _term(term, rows, scale, bias, axis)
        found = found or seen
    loss = sum(term.weight * value for (_, term), value in zip(traced, values.values(), strict=True))
    return loss, values | found, memory


def _remembering(term: config.Sogclr | config.Isogclr, rows: Rows, scale: Array, axis: Axis) -> tuple[Float[Array, ""], Memory]:
    """The value of a term that remembers, and what. Of several captions it takes the main one."""
    text = rows.text if rows.text.ndim == 2 else rows.text[:, 0]
    scales, rho = jax.lax.stop_gradient(scale), 0.0  # by a learned scale its objective has no minimum
    if isinstance(term, config.Isogclr):
        scales, rho = tuple(1 / rows.memory[f"temperature_{side}"] for side in ("image", "text")), term.rho
    names = ("log_u_image", "log_u_text")
    past = tuple(rows.memory[name] for name in names)
    value, moved = sogclr_loss(rows.image, text, scales, past, term.gamma, axis=axis, rho=rho)
    return value, rows.memory | dict(zip(names, moved, strict=True))


def _term(term: config.Term, rows: Rows, scale: Array, bias: Array | None, axis: Axis) -> tuple[Float[Array, ""], Logged]:
    """The value of one term, and what its pass found."""
    if isinstance(term, config.MultiPositive):
        b, width = rows.image.shape
        texts = rows.text.reshape(-1, width)
        first = 0 if axis is None else jax.lax.axis_index(axis) * b
        ids = first + jnp.arange(b) if rows.ids is None else rows.ids
        return multi_positive_loss(rows.image, texts, scale, ids, jnp.repeat(ids, len(texts) // b), axis=axis), {}
    if isinstance(term, config.Caption):
        return caption_loss(*rows.caption, axis=axis), {}
    if isinstance(term, config.Uniformity):
        of = functools.partial(uniformity, axis=axis, t=term.t)
        return (of(rows.image) + _over_captions(of, rows.text)) / 2, {}

    def of_caption(text: Float[Array, "b e"]) -> tuple[Array, Logged]:
        value, ranking = _of_pairs(term, rows, scale, bias, axis)(rows.image, text)
        return value, {} if ranking is None else summary(ranking, axis)

    return _over_captions(of_caption, rows.text)


def _over_captions(fn: Callable[[Array], object], text: Array) -> object:
    """`fn` of the texts [b, e], or its mean over each of K; those one after the other, in one's memory and compile time."""
    if text.ndim == 2:
        return fn(text)
    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(fn, jnp.moveaxis(text, 1, 0)))


def _of_pairs(term: config.Term, rows: Rows, scale: Array, bias: Array | None, axis: Axis) -> OfPairs:
    """The equation of a term, with all that it needs beside the vectors."""
    kw = dict(scale=scale, axis=axis)
    match term:
        case config.Softmax():
            parts = dict(image_weight=term.image_weight, label_smoothing=term.label_smoothing, reduction=term.reduction)
            parts["dtype"] = term.dtype
            return _nested(functools.partial(clip_terms, **kw, **parts, ids=rows.ids), term.prefixes)
        case config.Sigmoid():
            return _nested(functools.partial(siglip_terms, **kw, bias=bias, ids=rows.ids, dtype=term.dtype), term.prefixes)
        case config.Decoupled():
            parts = dict(sigma=term.sigma, stop_gradient=term.stop_gradient)
            return _nested(functools.partial(decoupled_terms, **kw, **parts, ids=rows.ids), term.prefixes)
        case config.HardNegative():
            parts = dict(alpha=term.alpha, beta=term.beta, stop_gradient=term.stop_gradient)
            return _nested(functools.partial(hard_negative_terms, **kw, **parts, ids=rows.ids), term.prefixes)
        case config.Cwcl():
            return functools.partial(_cwcl, frozen=term.frozen, **kw)
        case config.Cyclip():
            return functools.partial(_cyclip, weights=(term.in_modal, term.cross_modal), axis=axis)
        case config.Distillation():
            return lambda x, y: (distillation_loss(x, y, scale, *rows.teacher, term.teacher_scale, axis=axis), None)
        case config.CrossUniformity():
            return lambda x, y: (cross_uniformity(x, y, axis=axis, t=term.t), None)
        case config.Alignment():
            return lambda x, y: (alignment(x, y, axis=axis), None)


def _nested(fn: OfPairs, prefixes: tuple[int, ...] | None) -> OfPairs:
    """The sum over prefixes, and what the pass over the widest of them found."""
    if prefixes is None:
        return fn

    def of_prefixes(x: Array, y: Array) -> tuple[Array, Ranking | None]:
        losses, rankings = zip(*(fn(prefix(x, m), prefix(y, m)) for m in prefixes), strict=True)
        return sum(losses), rankings[-1]

    return of_prefixes


def _cwcl(zimg: Array, ztxt: Array, scale: Array, frozen: str, axis: Axis) -> tuple[Array, Ranking]:
    if frozen == "image":
        return cwcl_terms(zimg, ztxt, scale, axis=axis)
    value, ranking = cwcl_terms(ztxt, zimg, scale, axis=axis)
    return value, Ranking(ranking.own, ranking.col_max, ranking.row_max)


def _cyclip(zimg: Array, ztxt: Array, weights: tuple[float, float], axis: Axis) -> tuple[Array, None]:
    return sum(weight * part for weight, part in zip(weights, cyclip(zimg, ztxt, axis=axis), strict=True)), None
