"""The configured terms, weighted and added up."""

import dataclasses
from collections import Counter

from jaxtyping import Array, Float

from clipjax import config
from clipjax.losses.batch import add_up
from clipjax.losses.pairwise import Axis
from clipjax.losses.rows import Logged, Memory, Rows, Shared, TermResult


def objective(
    terms: tuple[config.Term, ...],
    rows: Rows,
    scale: Float[Array, ""],
    bias: Float[Array, ""] | None,
    shared: Shared | None = None,
    *,
    axis: Axis = None,
) -> tuple[Float[Array, ""], Logged, Memory]:
    """The loss over the global batch, the values to log, and the new example memory of the rows.

    Every term is logged without its weight: as `{kind}_loss`, or `{kind}_{position}_loss` where there are several of its kind.
    Accuracies and cosines (`ranking.summary`) come from the first term whose pass over all pairs gives them, for the model's own
    projection and for each head; there is no extra pass for them. Most terms are a mean over pairs of a view and a caption
    (`rows.over_pairs`); the others take all at once. A term of weight 0 is not traced. `shared` becomes `rows.shared`: apart, as
    shard_map does not divide it.
    """
    rows = rows if shared is None else dataclasses.replace(rows, shared=shared)
    traced = [(i, term) for i, term in enumerate(terms) if term.weight]
    kinds = Counter(term.kind for _, term in traced)
    values, ranking, memory = {}, {}, rows.memory
    for i, term in traced:
        result = term.implementation.function(term, rows, scale, bias, axis)
        if not isinstance(result, TermResult):
            raise TypeError(f"the function of {type(term).__name__} returned {type(result).__name__}: return a losses.TermResult")
        values[f"{term.kind}_loss" if kinds[term.kind] == 1 else f"{term.kind}_{i}_loss"] = result.value
        ranking = result.ranking | ranking
        memory = memory | result.memory
    loss = add_up(term.weight * value for (_, term), value in zip(traced, values.values(), strict=True))
    return loss, values | ranking, memory
