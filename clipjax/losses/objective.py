"""The configured terms, weighted and added up."""

from jaxtyping import Array, Float

from clipjax.config import Softmax, Term
from clipjax.losses.sigmoid import siglip_loss
from clipjax.losses.softmax import Axis, accuracies, clip_loss


def objective(
    terms: tuple[Term, ...],
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    scale: Float[Array, ""],
    bias: Float[Array, ""] | None,
    *,
    axis: Axis = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss over the global batch, and what is logged beside it: every term before its weight, and the accuracies."""
    values = {}
    for term in terms:
        if term.weight:  # a term of weight 0 is not even traced
            if isinstance(term, Softmax):
                values[term.kind] = clip_loss(zimg, ztxt, scale, axis=axis)
            else:
                values[term.kind] = siglip_loss(zimg, ztxt, scale, bias, axis=axis)
    loss = sum(term.weight * values[term.kind] for term in terms if term.weight)
    logged = {f"{kind}_loss": value for kind, value in values.items()}
    return loss, logged | accuracies(zimg, ztxt, axis=axis)
