"""Three classifiers that are learned from vectors: softmax regression, nearest neighbours, and ridge regression. Each gives the
scores of classes; the highest is the class.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from clipjax.evals.encoder import to_host
from clipjax.evals.ties import nearer, own_first
from clipjax.sharding import BATCH, batch_devices, over_rows, replicated

STEPS = 1000  # of L-BFGS at most
FLAT = 1e-6  # L-BFGS ends where no number of the gradient of the mean loss is larger
CS = tuple(10.0 ** np.linspace(-6, 5, 45))  # DINOv2's and DINOv3's sweep
VALIDATION = 10  # one in so many of the training vectors chooses C
TEMPERATURE = 0.07  # of neighbours' votes
COMPARED = 2**25  # cosines that a device holds at once

Rows = Float[np.ndarray, "n e"]
Labels = Int[np.ndarray, " n"]
Scores = Float[np.ndarray, "n c"]


def expected_right(scores: Scores, labels: Labels) -> Float[np.ndarray, " n"]:
    """The chance that each row's class is the one with the highest score, where equal scores are in random order."""
    return own_first(scores, np.arange(scores.shape[1]) == labels[:, None])


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Softmax regression with the C of the sweep that was the best on the validation part."""

    weights: Float[np.ndarray, "e+1 c"]  # the last row is the bias
    c: float
    validation: tuple[float, ...]  # accuracy on the validation part, for each of CS

    def scores(self, x: Rows) -> Scores:
        return x @ self.weights[:-1] + self.weights[-1]


def linear_probe(x: Rows, labels: Labels, classes: int, mesh: Mesh, cs: Sequence[float] = CS) -> LinearProbe:
    """A tenth of the rows, always the same, chooses C: of equally good ones the smallest. Then all rows are learned from.

    The protocol of DINOv2 (2304.07193) and DINOv3 (2508.10104), on unit vectors.
    """
    held_out = np.random.default_rng(0).permutation(len(x))[: -(-len(x) // VALIDATION)]
    rest = labels.copy()
    rest[held_out] = -1  # a mask, so that both fits are one program
    weights, found = None, []
    fit = SoftmaxRegression(x, rest, classes, mesh)
    for c in cs:
        weights = fit(c, weights)
        right = expected_right(LinearProbe(weights, c, ()).scores(x[held_out]), labels[held_out])
        found.append((float(right.mean()), weights))
    accuracies = [accuracy for accuracy, _ in found]
    best = int(np.argmax(accuracies))
    weights = SoftmaxRegression(x, labels, classes, mesh)(cs[best], found[best][1])
    return LinearProbe(weights, float(cs[best]), tuple(accuracies))


class SoftmaxRegression:
    """Weights W and biases b that minimise `|W|^2 / 2 + C sum_i cross_entropy(x_i W + b, label_i)`, scikit-learn's objective.

    L-BFGS on the full batch, in float32. The rows are sharded over the devices; those with label -1 are left out."""

    def __init__(self, x: Rows, labels: Labels, classes: int, mesh: Mesh) -> None:
        self._shape, self._mesh = (x.shape[1] + 1, classes), mesh
        pad = -len(x) % batch_devices(mesh)
        rows = np.pad(x, ((0, pad), (0, 0))), np.pad(labels, (0, pad), constant_values=-1)
        self._rows = tuple(_place(a, over_rows(mesh)) for a in rows)

    def __call__(self, c: float, start: Float[np.ndarray, "e+1 c"] | None = None) -> Float[np.ndarray, "e+1 c"]:
        """`start`: weights to begin with, as those of another C; None: zeros."""
        first = np.zeros(self._shape, np.float32) if start is None else start
        everywhere = replicated(self._mesh)
        return to_host(_minimum(*self._rows, _place(np.asarray(c, np.float32), everywhere), _place(first, everywhere)))


@jax.jit
def _minimum(x: Float[Array, "n e"], labels: Int[Array, " n"], c: Array, start: Float[Array, "e+1 c"]) -> Float[Array, "e+1 c"]:
    """It ends at a flat place, or where float32 can't lower the loss any more."""
    n = (labels >= 0).sum()

    def loss(w: Float[Array, "e+1 c"]) -> Array:
        logits = jnp.matmul(x, w[:-1], precision=jax.lax.Precision.HIGHEST) + w[-1:]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.where(labels >= 0, nll, 0).sum() / n + jnp.square(w[:-1]).sum() / (2 * c * n)

    solver, value_and_gradient = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry: tuple) -> tuple:
        w, state, steps, _ = carry
        value, gradient = value_and_gradient(w, state=state)
        update, state = solver.update(gradient, state, w, value=value, grad=gradient, value_fn=loss)
        w = optax.apply_updates(w, update)
        ends = (jnp.abs(optax.tree.get(state, "grad")).max() <= FLAT) | (optax.tree.get(state, "value") >= value)
        return w, state, steps + 1, ends

    first = start, solver.init(start), 0, jnp.bool_(False)
    return jax.lax.while_loop(lambda carry: ~carry[3] & (carry[2] < STEPS), step, first)[0]


def neighbours(x: Rows, labels: Labels, classes: int, queries: Rows, ks: Sequence[int], mesh: Mesh) -> list[Scores]:
    """The votes, for each k of ks, of the k nearest of n unit vectors: `exp(cosine / 0.07)` each, as shares of the highest.

    The protocol of DINO (2104.14294). Neighbours that are equally near as the k-th share its places, so that votes do not depend
    on an order of the rows. More neighbours than rows are all rows.
    """
    devices, order = batch_devices(mesh), np.argsort(labels, kind="stable")
    block = min(-(-len(queries) // devices), max(1, COMPARED // len(x))) * devices
    full, rows = replicated(mesh), over_rows(mesh)
    known, classed = _place(x[order], full), _place(labels[order].astype(np.int32), full)
    vote = functools.partial(_votes, ks=tuple(min(k, len(x)) for k in ks), classes=classes)
    by_rows = P(BATCH)  # by shard_map, because XLA gathers all rows of a top_k
    vote = jax.jit(jax.shard_map(vote, mesh=mesh, in_specs=(by_rows, P(), P()), out_specs=by_rows))
    votes = []
    for start in range(0, len(queries), block):
        asked = queries[start : start + block]
        padded = np.pad(asked, ((0, block - len(asked)), (0, 0)))
        votes.append(to_host(vote(_place(padded, rows), known, classed))[: len(asked)])
    return list(np.concatenate(votes).transpose(1, 0, 2))


def _votes(
    queries: Float[Array, "b e"], x: Float[Array, "n e"], labels: Int[Array, " n"], ks: tuple[int, ...], classes: int
) -> Float[Array, "b k c"]:
    """`labels` are sorted."""
    cosines = jnp.matmul(queries, x.T, precision=jax.lax.Precision.HIGHEST)
    nearest = jax.lax.top_k(cosines, max(ks))[0]
    weight = jnp.exp((cosines - nearest[:, :1]) / TEMPERATURE)
    votes = []
    for k in ks:
        greater, equal = nearer(cosines, nearest[:, k - 1 : k])
        share = (k - greater.sum(1, keepdims=True)) / equal.sum(1, keepdims=True)
        given = jnp.where(greater, weight, jnp.where(equal, weight * share, 0))
        by_class = jax.ops.segment_sum(given.T, labels, classes, indices_are_sorted=True).T
        votes.append(by_class / by_class.max(1, keepdims=True))
    return jnp.stack(votes, 1)


def few_shot_scores(x: Rows, labels: Labels, classes: int, queries: Rows) -> Scores:
    """big_vision's few-shot classifier (evaluators/fewshot_lsr.py): vectors whitened by the mean and the standard deviation of
    x, a column of 100 for the bias, targets -1 and 1, and a ridge of 2^10. In float64."""
    x, queries = x.astype(np.float64), queries.astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    return ridge_scores((x - mean) / std, labels, classes, (queries - mean) / std, ridge=2.0**10, bias=100.0)


def ridge_scores(x: Rows, labels: Labels, classes: int, queries: Rows, ridge: float, bias: float = 1.0) -> Scores:
    """Least squares on targets -1 and 1; `bias`: the column that stands for it. In float64."""
    x, queries = (np.pad(z.astype(np.float64), ((0, 0), (0, 1)), constant_values=bias) for z in (x, queries))
    targets = 2.0 * (np.arange(classes) == labels[:, None]) - 1
    solve = primal if len(x) >= x.shape[1] else dual
    return queries @ solve(x, targets, ridge)


def primal(x: Rows, targets: Scores, ridge: float) -> Float[np.ndarray, "e c"]:
    """`(x'x + ridge I)^-1 x' targets`: for more rows than columns."""
    return scipy.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ targets, assume_a="pos")


def dual(x: Rows, targets: Scores, ridge: float) -> Float[np.ndarray, "e c"]:
    """The same as `x' (x x' + ridge I)^-1 targets`: for more columns than rows."""
    return x.T @ scipy.linalg.solve(x @ x.T + ridge * np.eye(len(x)), targets, assume_a="pos")


def few_shots(labels: Labels, classes: int, shots: int, seed: int) -> Int[np.ndarray, " m"]:
    """The rows of the first `shots` of each class, in an order drawn anew for each class, as in big_vision."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(classes)])


def _place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices of all."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
