"""The terms of metric learning: CACR's repulsion, Mann-Whitney, Multi-Similarity; and mixtures of two examples.

Each takes its config object and the vectors of one pair of sides (`rows.PairLoss`); `repulsion` takes all at once. Examples of
equal `ids` are no negatives of each other, except of mixtures; a row that this leaves without negatives adds 0 to the sum and 1
to the count of the mean over the batch. A mixture's partner is the next example of the global batch, a random one as the data
are shuffled.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax import config
from clipjax.config.term import pairs_of
from clipjax.losses.batch import add_up, following, mean, occurrences, size
from clipjax.losses.matryoshka import prefix
from clipjax.losses.pairwise import Axis, pairwise_logsumexp, pairwise_softplus
from clipjax.losses.pairwise.axes import device_index
from clipjax.losses.pairwise.operands import Scalar
from clipjax.losses.ranking import Ranked, Ranking, summary
from clipjax.losses.rows import Logged, Rows, mean_over_pairs, vectors_of
from clipjax.losses.softmax import reduce_negatives, unless_empty


def repulsion(term: config.Repulsion, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> tuple[Array, Logged]:
    """CACR (2105.03746): alpha times attraction and beta times repulsion, of squared distances c.

    Attraction: sum_k w_k c_k over an example's positive pairs, w = softmax(tau c). Repulsion: (1 / tau) log sum_j exp(-tau c_ij),
    j != i, which has the gradient of CACR's -sum_j w_j c_ij, w = softmax(-tau c_i), and adds w's entropy / tau. All w are held.
    """
    tau, (views, captions) = term.tau_negative, map(vectors_of, (rows.image, rows.text))
    z, pairs = views + captions, pairs_of(term.sides, len(views), len(captions))
    distances = jnp.stack([((z[i] - z[j]) ** 2).sum(1) for i, j in pairs], 1)
    weights = jax.lax.stop_gradient(jax.nn.softmax(term.tau_positive * distances))

    def repelled(x: Float[Array, "b e"], y: Float[Array, "b e"]) -> tuple[Array, Logged]:
        found = reduce_negatives(x, y, 2 * tau, axis, rows.ids)  # -tau c = 2 tau cos - 2 tau
        value = add_up(mean(unless_empty(lse, lambda lse: lse / tau - 2), axis) for lse in found.sides) / 2
        return value, summary(Ranking((x * y).sum(1), *found.maxima), axis)

    value, logged = mean_over_pairs(repelled, term.sides, rows)
    return term.alpha * mean((weights * distances).sum(1), axis) + term.beta * value, logged


def mann_whitney(term: config.MannWhitney, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    """Mean over i != j of softplus(t (cos_ij - cos_ii)) and of softplus(t (cos_ij - cos_jj)), half each (2510.00137).

    An own cosine is one more coordinate: [x_i, -cos_ii] . [y_j, 1].
    """
    own, n = (rows.image * rows.text).sum(1), size(rows.image, axis)
    one, ids = jnp.ones_like(own), None if rows.ids is None else (rows.ids, rows.ids)

    def against(x: Array, y: Array) -> tuple[Array, Array, Array]:
        x, y = (jnp.concatenate([z, more[:, None]], 1) for z, more in ((rows.image, x), (rows.text, y)))
        return pairwise_softplus(x, y, scale, 0.0, axis=axis, keep="off_diagonal", ids=ids)

    by_row, by_col = against(-own, one), against(one, -own)
    pairs = n * (n - 1 if rows.ids is None else mean(n - occurrences(rows.ids, rows.ids, axis), axis))
    value = (by_row[0] + by_col[0]) / (2 * jnp.maximum(pairs, 1))
    return value, Ranking(own, by_row[1] + own, by_col[2] + own)


def multi_similarity(term: config.MultiSimilarity, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    """log(1 + sum_p e^{-a (cos_p - offset)}) / a + log(1 + sum_n e^{b (cos_n - offset)}) / b, in both directions (1904.06627).

    There is no mining, and pairs of equal ids are positives. With `mix`, also Metrix's mixtures (2106.04990) of the other side:
    each is positive by its share and negative by the rest.
    """
    (x, y), own = (rows.image, rows.text), (rows.image * rows.text).sum(1)

    def hinges(positive: Array, negative: Array) -> Array:
        soft = jax.nn.softplus(positive + term.alpha * term.offset), jax.nn.softplus(negative - term.beta * term.offset)
        return mean(soft[0] / term.alpha + soft[1] / term.beta, axis) / 2

    negatives, positives = reduce_negatives(x, y, term.beta, axis, rows.ids), [-term.alpha * own] * 2
    if rows.ids is not None:
        others = pairwise_logsumexp(-x, y, term.alpha, axis=axis, keep="same", ids=(rows.ids, rows.ids))
        positives = map(jnp.logaddexp, positives, others.sides)
    value = add_up(map(hinges, positives, negatives.sides))
    if term.mix:
        share = draw_shares(rows, 2.0, 1.0, axis)
        for z, other in ((x, y), (y, x)):
            cos = (z * mixed(other, share, axis)).sum(1)
            value += term.mix * hinges(jnp.log(share) - term.alpha * cos, jnp.log1p(-share) + term.beta * cos)
    return value, Ranking(own, *negatives.maxima)


def mixup(term: config.Mixup, rows: Rows, scale: Scalar, bias: Scalar | None, axis: Axis) -> Ranked:
    """M3CoL (2409.17777): the mixture of x_i and x_{i+1} is to find y_i by its share and y_{i+1} by the rest, and they it.

    So the targets of columns are the same matrix's. Without mixtures it is CLIP's loss, and as exact.
    """
    share = draw_shares(rows, term.concentration, term.share, axis)

    def direction(x: Float[Array, "b e"], y: Float[Array, "b e"]) -> Array:
        x = mixed(x, share, axis)
        own, after = scale * (x * y).sum(1), scale * (x * following(y, axis)).sum(1)
        found = pairwise_logsumexp(x, y, scale, axis=axis, keep="off_diagonal")
        rows, cols = (jax.nn.softplus(lse - own) for lse in found.sides)  # the log-sum-exp of all logits, less the own one
        return mean(rows + share * cols + (1 - share) * (own + following(cols + own, axis) - 2 * after), axis) / 2

    sides = {"image": (rows.image, rows.text), "text": (rows.text, rows.image)}
    taken = sides if term.mix == "both" else (term.mix,)
    return add_up(direction(*sides[side]) for side in taken) / len(taken), None


def draw_shares(rows: Rows, concentration: float, part: float, axis: Axis) -> Float[Array, " b"]:
    """From Beta(concentration, concentration) for a `part` of the examples, 1 for the others; the mesh does not matter."""
    assert rows.shared.key is not None  # Term.draws
    places = device_index(axis) * len(rows.image) + jnp.arange(len(rows.image))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rows.shared.key, places)
    shares = jax.vmap(lambda key: jax.random.beta(key, concentration, concentration))(keys)
    return jnp.where(jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), part))(keys), shares, 1)


def mixed(z: Float[Array, "b e"], share: Float[Array, " b"], axis: Axis) -> Float[Array, "b e"]:
    """unit(share_i z_i + (1 - share_i) z_{i+1})."""
    return prefix(share[:, None] * z + (1 - share)[:, None] * following(z, axis), z.shape[1])
