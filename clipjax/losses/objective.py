"""The configured terms, weighted and added up."""

from collections import Counter

from jaxtyping import Array, Float

from clipjax import config
from clipjax.losses.batch import add_up
from clipjax.losses.pairwise import Axis
from clipjax.losses.rows import Logged, Memory, Rows, TermResult


def objective(
    terms: tuple[config.Term, ...],
    rows: Rows,
    scale: Float[Array, ""],
    bias: Float[Array, ""] | None,
    *,
    axis: Axis = None,
) -> tuple[Float[Array, ""], Logged, Memory]:
    """The loss over the global batch, the values to log, and the new example memory of the rows.

    Every term is logged without its weight: as `{kind}_loss`, or `{kind}_{position}_loss` where there are several of its kind.
    Accuracies and cosines (`ranking.summary`) come from the first term whose pass over all pairs gives them; there is no
    extra pass for them. Of K captions, a multi-positive term takes all at once. Every other term is the mean over the captions,
    each against the images. A term of weight 0 is not traced.
    """
    traced = [(i, term) for i, term in enumerate(terms) if term.weight]
    kinds = Counter(term.kind for _, term in traced)
    values, ranking, memory = {}, {}, rows.memory
    for i, term in traced:
        result = term.implementation.function(term, rows, scale, bias, axis)
        if not isinstance(result, TermResult):
            raise TypeError(f"the function of {type(term).__name__} returned {type(result).__name__}: return a losses.TermResult")
        values[f"{term.kind}_loss" if kinds[term.kind] == 1 else f"{term.kind}_{i}_loss"] = result.value
        ranking = ranking or result.ranking
        memory = memory | result.memory
    loss = add_up(term.weight * value for (_, term), value in zip(traced, values.values(), strict=True))
    return loss, values | ranking, memory
