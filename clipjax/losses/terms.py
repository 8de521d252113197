"""The terms of the objective: the equation of each config class, and what it costs.

Each function here calls an equation of this package with the numbers of its config class and the arrays of the batch. `TERMS` is
the one table. A new loss is a config class in clipjax.config.objective, an equation, and a row here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax import config
from clipjax.config.term import Binding
from clipjax.losses import flops, metric, views
from clipjax.losses.batch import add_up
from clipjax.losses.caption import caption_loss
from clipjax.losses.classify import classify
from clipjax.losses.matryoshka import prefix
from clipjax.losses.pairwise import Axis
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.ranking import Ranked, Ranking
from clipjax.losses.regularizers import alignment, cross_uniformity, cyclip, preserved, uniformity
from clipjax.losses.rows import PairLoss, Rows, TermResult, main, mean_over, over_heads, over_pairs
from clipjax.losses.sigmoid import siglip_terms
from clipjax.losses.softmax import clip_terms, decoupled_terms, hard_negative_terms
from clipjax.losses.sogclr import ImageAndText, sogclr_loss
from clipjax.losses.targets import cwcl_terms, distillation_loss, label_sets, multi_positive_loss


def _per_prefix(loss: PairLoss) -> PairLoss:
    """The sum over `term.prefixes` (Matryoshka, 2205.13147), and the ranking of the widest."""

    def of_prefixes(term: Any, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
        if term.prefixes is None:
            return loss(term, rows, scale, bias, axis)
        nested = [dataclasses.replace(rows, image=prefix(rows.image, m), text=prefix(rows.text, m)) for m in term.prefixes]
        values, rankings = zip(*(loss(term, inner, scale, bias, axis) for inner in nested), strict=True)
        return add_up(values), rankings[-1]

    return of_prefixes


def _softmax(term: config.Softmax, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    return clip_terms(
        rows.image,
        rows.text,
        scale,
        axis=axis,
        image_weight=term.image_weight,
        label_smoothing=term.label_smoothing,
        reduction=term.reduction,
        ids=rows.labels if term.negatives == "same" else rows.ids,
        keep="same" if term.negatives == "same" else "distinct",
        dtype=term.dtype,
    )


def _sigmoid(term: config.Sigmoid, rows: Rows, scale: Scalar, bias: Scalar, axis: Axis) -> Ranked:
    return siglip_terms(rows.image, rows.text, scale, bias, axis=axis, ids=rows.ids, dtype=term.dtype)


def _decoupled(term: config.Decoupled, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    return decoupled_terms(
        rows.image, rows.text, scale, axis=axis, sigma=term.sigma, stop_gradient=term.stop_gradient, ids=rows.ids
    )


def _hard_negative(term: config.HardNegative, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    return hard_negative_terms(
        rows.image, rows.text, scale, axis=axis, alpha=term.alpha, beta=term.beta, stop_gradient=term.stop_gradient, ids=rows.ids
    )


def _multi_positive(term: config.MultiPositive, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> TermResult:
    """Takes all captions at once, for each view."""
    b, width = len(rows.text), rows.text.shape[-1]
    texts = rows.text.reshape(-1, width)
    first = 0 if axis is None else jax.lax.axis_index(axis) * b
    ids = first + jnp.arange(b) if rows.ids is None else rows.ids

    def of_view(image: Float[Array, "b e"]) -> Array:
        return multi_positive_loss(image, texts, scale, ids, jnp.repeat(ids, len(texts) // b), axis=axis)

    return TermResult(mean_over(of_view, rows.image))


def _cwcl(term: config.Cwcl, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    if term.frozen == "image":
        return cwcl_terms(rows.image, rows.text, scale, axis=axis)
    value, ranking = cwcl_terms(rows.text, rows.image, scale, axis=axis)
    assert ranking is not None
    return value, Ranking(ranking.own, ranking.col_max, ranking.row_max)


def _cyclip(term: config.Cyclip, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    parts = cyclip(rows.image, rows.text, axis=axis)
    return add_up(weight * part for weight, part in zip((term.in_modal, term.cross_modal), parts, strict=True)), None


def _distillation(term: config.Distillation, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    if term.targets == "labels":
        assert rows.labels is not None  # Distillation.check
        assert term.classes is not None
        sets, some = label_sets(rows.labels, term.classes), (rows.labels >= 0).any(1)
        return distillation_loss(rows.image, rows.text, scale, sets, sets, term.teacher_scale, axis=axis, some=some), None
    assert rows.teacher is not None  # Distillation.check
    return distillation_loss(rows.image, rows.text, scale, rows.teacher[0], rows.teacher[1], term.teacher_scale, axis=axis), None


def _preserve(term: config.Preserve, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> TermResult:
    """Of several captions and views it takes the main ones, whose vectors the start's file has."""
    assert rows.teacher is not None  # Preserve.check
    sides = zip((main(rows.image), main(rows.text)), rows.teacher, strict=True)
    parts = [preserved(z, start, axis=axis) for z, start in sides]
    return TermResult(add_up(term.mse * mse + term.cosine * cosine for mse, cosine in parts) / 2)


def _sogclr(term: config.Sogclr, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> TermResult:
    scale = jax.lax.stop_gradient(scale)  # with a learned scale the loss has no minimum
    return _remembering(term.gamma, rows, scale, 0.0, axis)


def _isogclr(term: config.Isogclr, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> TermResult:
    temperatures = rows.memory["temperature_image"], rows.memory["temperature_text"]
    return _remembering(term.gamma, rows, (1 / temperatures[0], 1 / temperatures[1]), term.rho, axis)


def _remembering(gamma: float, rows: Rows, scale: Scalar | ImageAndText, rho: float, axis: Axis) -> TermResult:
    """SogCLR's value, and the updated averages. Of several captions and views it takes the main ones."""
    past = rows.memory["log_u_image"], rows.memory["log_u_text"]
    value, (image, text) = sogclr_loss(main(rows.image), main(rows.text), scale, past, gamma, axis=axis, rho=rho)
    return TermResult(value, memory={"log_u_image": image, "log_u_text": text})


def _uniformity(term: config.Uniformity, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> TermResult:
    """Of images and of texts on their own: the images' is computed once, not for each caption."""
    of = functools.partial(uniformity, axis=axis, t=term.t)
    return TermResult((mean_over(of, rows.image) + mean_over(of, rows.text)) / 2)


def _cross_uniformity(term: config.CrossUniformity, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    return cross_uniformity(rows.image, rows.text, axis=axis, t=term.t), None


def _alignment(term: config.Alignment, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    return alignment(rows.image, rows.text, axis=axis), None


def _caption(term: config.Caption, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> TermResult:
    assert rows.caption is not None  # Caption.check
    return TermResult(caption_loss(*rows.caption, axis=axis))


TERMS = {
    config.Softmax: Binding(over_pairs(_per_prefix(_softmax)), flops.of_prefixes),
    config.Sigmoid: Binding(over_pairs(_per_prefix(_sigmoid)), flops.of_sigmoid),
    config.Decoupled: Binding(over_pairs(_per_prefix(_decoupled)), flops.of_prefixes),
    config.HardNegative: Binding(over_pairs(_per_prefix(_hard_negative)), flops.of_hard_negative),
    config.MultiPositive: Binding(_multi_positive, flops.of_pairs),
    config.Cwcl: Binding(over_pairs(_cwcl), flops.of_cwcl),
    config.Cyclip: Binding(over_pairs(_cyclip), flops.of_cyclip),
    config.Distillation: Binding(over_pairs(_distillation), flops.of_distillation),
    config.Preserve: Binding(_preserve, flops.none),
    config.Sogclr: Binding(_sogclr, flops.of_main_caption),
    config.Isogclr: Binding(_isogclr, flops.of_main_caption),
    config.Uniformity: Binding(_uniformity, flops.of_uniformity),
    config.CrossUniformity: Binding(over_pairs(_cross_uniformity), flops.of_pairs),
    config.Alignment: Binding(over_pairs(_alignment), flops.none),
    config.Caption: Binding(_caption, flops.none),
    config.Repulsion: Binding(over_heads(metric.repulsion), flops.of_pairs),
    config.MannWhitney: Binding(over_pairs(metric.mann_whitney), flops.of_metric),
    config.MultiSimilarity: Binding(over_pairs(metric.multi_similarity), flops.of_pairs),
    config.Mixup: Binding(over_pairs(metric.mixup), flops.of_metric),
    config.Symile: Binding(over_heads(views.of_together), flops.of_together),
    config.MultiView: Binding(over_heads(views.of_together), flops.of_together),
    config.Barlow: Binding(over_pairs(views.of_barlow), flops.of_barlow),
    config.Siamese: Binding(views.of_siamese, flops.none),
    config.Swap: Binding(over_heads(views.of_swap), flops.of_swap),
    config.Classify: Binding(classify, flops.of_classify),
}
config.Term.bind(TERMS)  # fails here, at import, where a class of clipjax's own has no row
