"""Every loss in float64 NumPy: dense, from its definition in the papers, with nothing of clipjax or of JAX.

Derivatives are complex steps, f'(a) = Im f(a + ih) / h at h = 1e-30: exact to rounding, no differences taken, so that one
definition gives the value and every gradient. A stop-gradient is then the real part. The primitives, which are tested at larger
sizes, have their derivatives written out; test_reference.py holds the two ways against each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

STEP = 1e-30


def unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def fixture(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The golden fixture before its rows are normalised: closed formulas, so that a program in any language can make it."""
    i, j = np.arange(rows, dtype=np.float64)[:, None], np.arange(width, dtype=np.float64)[None]
    x = np.sin(1 + 3 * i + 2 * j * j + 0.5 * i * j)
    return x, x + 0.7 * np.cos(2 + 5 * i + 2 * j + i * j)


def random_pairs(
    rows: int, width: int, *, texts: int = 1, gap: float = 0.5, noise: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors that float32 holds exactly, every text near its image, and the two clouds separated by a gap."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width))
    y = np.repeat(x, texts, 0) + rng.normal(size=(rows * texts, width))
    x[:, 0] += gap
    y[:, 0] -= gap
    return tuple(np.float64(np.float32(unit_rows(z))) for z in (x, y))


def separated(rows: int, positive: float = 0.3, negative: float = -0.3) -> tuple[np.ndarray, np.ndarray]:
    """An extreme geometry, a wide contrastive gap: cosine `positive` within a pair and `negative` in every other."""
    axis, plane = np.sqrt(-negative), np.sqrt(1 + negative)
    near = (positive - negative) / (1 + negative)
    eye, zero, one = np.eye(rows), np.zeros((rows, rows)), np.ones((rows, 1))
    x = np.concatenate([plane * eye, zero, axis * one], 1)
    y = np.concatenate([plane * near * eye, plane * np.sqrt(1 - near**2) * eye, -axis * one], 1)
    return tuple(np.float64(np.float32(z)) for z in (x, y))


def gradients(fn: Callable, *args: np.ndarray | float) -> tuple[np.ndarray, ...]:
    """d fn / d argument, for every argument of a function with a scalar value."""
    grads = []
    for k, a in enumerate(args):
        a = np.asarray(a, np.complex128)
        grad = np.empty(a.shape)
        for at in np.ndindex(a.shape):
            a_at = a.copy()
            a_at[at] += 1j * STEP
            grad[at] = np.imag(fn(*args[:k], a_at, *args[k + 1 :])) / STEP
        grads.append(grad)
    return tuple(grads)


def by_logit(fn: Callable, x: np.ndarray, y: np.ndarray, scale: float) -> np.ndarray:
    """d fn / d logit_ij, of a loss that sees x and y through their cosines C alone: so do the identity and C's transpose."""
    c = x @ y.T
    return gradients(lambda ct: fn(np.eye(len(x)), ct, scale), c.T)[0].T / scale


def tangent(grad: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The part of a gradient along the sphere: what the normaliser lets through, the same for cosines and for distances."""
    return grad - z * (grad * z).sum(-1, keepdims=True)


def logsumexp(s: np.ndarray, keep: np.ndarray | bool = True, axis: int = -1) -> np.ndarray:
    """Over the kept entries; -inf where there is none."""
    keep = np.broadcast_to(keep, s.shape)
    top = np.where(keep, s.real, -np.inf).max(axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    total = np.where(keep, np.exp(np.where(keep, s - top, 0)), 0).sum(axis)
    empty = ~keep.any(axis)
    return np.where(empty, -np.inf, np.squeeze(top, axis) + np.log(np.where(empty, 1, total)))


def softmax(s: np.ndarray, keep: np.ndarray | bool = True, axis: int = -1) -> np.ndarray:
    """Over the kept entries; 0 elsewhere, and where there is none."""
    keep = np.broadcast_to(keep, s.shape)
    lse = np.expand_dims(logsumexp(s, keep, axis), axis)
    return np.where(keep, np.exp(np.where(keep, s - np.where(np.isneginf(lse.real), 0, lse), 0)), 0)


def softplus(s: np.ndarray) -> np.ndarray:
    small = np.log1p(np.exp(np.where(s.real > 0, -s, s)))
    return np.where(s.real > 0, s + small, small)


def own_pairs(images: int, texts: int) -> np.ndarray:
    """[b, c]: image i and its first text, i K."""
    return np.arange(texts)[None] == np.arange(images)[:, None] * (texts // images)


def kept(own: np.ndarray, keep: str = "all", ids: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    if keep == "all":
        return np.ones_like(own)
    return ~own if keep == "off_diagonal" else ~own & (ids[0][:, None] != ids[1][None])


# The primitives, with what a cotangent of their outputs becomes.


class Pulled(NamedTuple):
    """Gradients, and for each scale's the sum of the absolute values of what it adds up (per row or column, as the scale is)."""

    x: np.ndarray
    y: np.ndarray
    row_scale: np.ndarray
    col_scale: np.ndarray
    row_terms: np.ndarray
    col_terms: np.ndarray


def pairwise_logsumexp(x, y, row_scale, col_scale, keep="all", ids=None) -> dict[str, np.ndarray]:
    cos, own = x @ y.T, own_pairs(len(x), len(y))
    mask = kept(own, keep, ids)
    out = {
        "rows": logsumexp(np.reshape(row_scale, (-1, 1)) * cos, mask, 1),
        "cols": logsumexp(np.reshape(col_scale, (1, -1)) * cos, mask, 0),
        "row_max": np.where(mask, cos.real, -np.inf).max(1),
        "col_max": np.where(mask, cos.real, -np.inf).max(0),
    }
    if ids is not None:
        equal = (ids[0][:, None] == ids[1][None]) & ~own
        out |= {"row_positive": np.where(equal, cos, 0).sum(1), "col_positive": np.where(equal, cos, 0).sum(0)}
    return out


def pull_logsumexp(x, y, row_scale, col_scale, cotangents: dict[str, np.ndarray], keep="all", ids=None) -> Pulled:
    cos, own = x @ y.T, own_pairs(len(x), len(y))
    mask = kept(own, keep, ids)
    rows, cols = np.broadcast_to(row_scale, len(x))[:, None], np.broadcast_to(col_scale, len(y))[None]
    by_row = cotangents["rows"][:, None] * softmax(rows * cos, mask, 1)
    by_col = cotangents["cols"][None] * softmax(cols * cos, mask, 0)
    by_cos = rows * by_row + cols * by_col
    if ids is not None:
        equal = (ids[0][:, None] == ids[1][None]) & ~own
        by_cos = by_cos + equal * (cotangents["row_positive"][:, None] + cotangents["col_positive"][None])
    row_axes, col_axes = (1 if np.ndim(row_scale) else None), (0 if np.ndim(col_scale) else None)
    return Pulled(
        by_cos @ y,
        by_cos.T @ x,
        (by_row * cos).sum(row_axes),
        (by_col * cos).sum(col_axes),
        np.abs(by_row * cos).sum(row_axes),
        np.abs(by_col * cos).sum(col_axes),
    )


def pairwise_softplus(x, y, scale, bias, ids=None) -> np.ndarray:
    own = own_pairs(len(x), len(y))
    mask = own | kept(own, "off_diagonal" if ids is None else "distinct", ids)
    return np.where(mask, softplus(np.where(own, -1, 1) * (scale * (x @ y.T) + bias)), 0).sum()


def pull_softplus(x, y, scale, bias, ids=None) -> tuple[np.ndarray, ...]:
    """dx, dy, d scale, d bias, and the sums of absolute terms of the last two."""
    own, cos = own_pairs(len(x), len(y)), x @ y.T
    mask = own | kept(own, "off_diagonal" if ids is None else "distinct", ids)
    sign = np.where(own, -1, 1)
    by_logit = np.where(mask, sign * np.exp(-softplus(-sign * (scale * cos + bias))), 0)
    by_cos = scale * by_logit
    return by_cos @ y, by_cos.T @ x, (by_logit * cos).sum(), by_logit.sum(), np.abs(by_logit * cos).sum(), np.abs(by_logit).sum()


def pairwise_cross_entropy(x, y, scale, tx, ty, teacher_scale) -> tuple[np.ndarray, np.ndarray]:
    logits, teacher = scale * (x @ y.T), np.real(teacher_scale * (tx @ ty.T))
    return tuple((-softmax(teacher, axis=a) * (logits - np.expand_dims(logsumexp(logits, axis=a), a))).sum(a) for a in (1, 0))


def pull_cross_entropy(x, y, scale, tx, ty, teacher_scale, rows, cols) -> tuple[np.ndarray, ...]:
    """dx, dy, d scale and the sum of its absolute terms, for cotangents `rows` and `cols`."""
    cos, teacher = x @ y.T, teacher_scale * (tx @ ty.T)
    by_logit = rows[:, None] * (softmax(scale * cos, axis=1) - softmax(teacher, axis=1))
    by_logit = by_logit + cols[None] * (softmax(scale * cos, axis=0) - softmax(teacher, axis=0))
    return scale * by_logit @ y, scale * by_logit.T @ x, (by_logit * cos).sum(), np.abs(by_logit * cos).sum()


# The losses.


def both(direction: Callable, logits: np.ndarray, *masks: np.ndarray, weight: float = 0.5) -> np.ndarray:
    """A direction's rows over images, then over texts; its mean over either, weighted."""
    return weight * direction(logits, *masks).mean() + (1 - weight) * direction(logits.T, *(m.T for m in masks)).mean()


def clip(x, y, scale, *, image_weight=0.5, label_smoothing=0.0, ids=None):
    """The softmax is over a row's own pair and those of another id; label smoothing spreads its share evenly over these."""
    own = np.eye(len(x), dtype=bool)
    mask = own | (True if ids is None else ids[:, None] != ids[None])

    def direction(s, mask):
        target = (1 - label_smoothing) * own + label_smoothing * mask / mask.sum(1, keepdims=True)
        return (target * np.where(mask, logsumexp(s, mask)[:, None] - s, 0)).sum(1)

    return both(direction, scale * (x @ y.T), mask, weight=image_weight)


def siglip(x, y, scale, bias, *, ids=None):
    return pairwise_softplus(x, y, scale, bias, None if ids is None else (ids, ids)) / len(x)


def negatives(n: int, ids) -> np.ndarray:
    return ~np.eye(n, dtype=bool) & (True if ids is None else ids[:, None] != ids[None])


def decoupled(x, y, scale, *, sigma=None, stop_gradient=False, ids=None):
    mask = negatives(len(x), ids)
    weight = 1 if sigma is None else 2 - len(x) * softmax((x * y).sum(1) / sigma)
    weight = np.real(weight) if stop_gradient else weight

    def direction(s, mask):
        return np.where(mask.any(1), logsumexp(s, mask) - weight * np.diag(s), 0) if mask.any() else np.zeros(len(s))

    return both(direction, scale * (x @ y.T), mask)


def hard_negative(x, y, scale, *, alpha=1.0, beta=0.25, stop_gradient=False, ids=None):
    """w_ij = n_i softmax_j(beta S_ij) over the n_i negatives of row i: of mean 1, so that beta = 0 leaves them as they are."""

    def direction(s, mask):
        w = mask.sum(1, keepdims=True) * softmax(beta * s, mask)
        w = w.real if stop_gradient else w
        top = np.where(mask | np.eye(len(s), dtype=bool), s.real, -np.inf).max(1, keepdims=True)
        weighted = alpha * np.exp(np.diag(s) - top[:, 0]) + (np.where(mask, w * np.exp(s - top), 0)).sum(1)
        some = mask.any(1)
        return np.where(some, top[:, 0] + np.log(np.where(some, weighted, 1)) - np.diag(s), 0)

    return both(direction, scale * (x @ y.T), negatives(len(x), ids))


def soft_targets(s: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Cross-entropy of every row."""
    return (targets * (logsumexp(s)[:, None] - s)).sum(1)


def multi_positive(x, y, scale, image_ids, text_ids):
    """The target of a row is spread evenly over its positives; a row without any adds 0."""
    equal = image_ids[:, None] == text_ids[None]
    return both(lambda s, equal: soft_targets(s, equal / np.maximum(equal.sum(1, keepdims=True), 1)), scale * (x @ y.T), equal)


def matryoshka(loss: Callable, x, y, prefixes: tuple[int, ...], *args, **kw):
    return sum(loss(unit_rows(x[:, :m]), unit_rows(y[:, :m]), *args, **kw) for m in prefixes)


def cwcl(frozen, trained, scale, *, weights=None):
    """The sum of both directions; `weights` [B, B] in place of the frozen tower's own."""
    weights = np.real(0.5 + 0.5 * frozen @ frozen.T) if weights is None else weights
    s = scale * (frozen @ trained.T)
    return soft_targets(s, weights / weights.sum(1, keepdims=True)).mean() + soft_targets(s.T, np.eye(len(s))).mean()


def distillation(x, y, scale, tx, ty, teacher_scale):
    rows, cols = pairwise_cross_entropy(x, y, scale, tx, ty, teacher_scale)
    return (rows.mean() + cols.mean()) / 2


def preserved(z, start):
    """(mean squared difference of the numbers, mean of 1 - the dot product)."""
    return ((z - start) ** 2).mean(), (1 - (z * start).sum(1)).mean()


def cyclip(x, y):
    """(in-modal, cross-modal), each B times the mean of squared differences."""
    cross = x @ y.T
    return len(x) * ((x @ x.T - y @ y.T) ** 2).mean(), len(x) * ((cross - cross.T) ** 2).mean()


def log_inner(x, y, row_scale, col_scale):
    """SogCLR's log g (2202.12387): of every image over the other texts, of every text over the other images."""
    cos = x @ y.T
    n, own = len(x), np.eye(len(x), dtype=bool)
    h = (
        (cos - np.diag(cos)[:, None]) * np.reshape(row_scale, (-1, 1)),
        (cos.T - np.diag(cos)[:, None]) * np.reshape(col_scale, (-1, 1)),
    )
    return tuple(logsumexp(s, ~own) - np.log(n - 1) for s in h)


def moved(log_u, log_g, gamma):
    """log((1 - gamma) u + gamma g), g without gradient; g itself on the first visit, where log u is -inf."""
    log_g = np.real(log_g)
    return np.where(np.isneginf(log_u), log_g, np.log((1 - gamma) * np.exp(log_u) + gamma * np.exp(log_g)))


def sogclr(x, y, row_scale, col_scale, log_u, gamma, rho=0.0):
    """Half the sum over both sides of mean_i tau_i (log u_i + rho); and the moved log u."""
    new = [moved(u, g, gamma) for u, g in zip(log_u, log_inner(x, y, row_scale, col_scale), strict=True)]
    return sum(((u + rho) / t).mean() for u, t in zip(new, (row_scale, col_scale), strict=True)) / 2, new


def sogclr_surrogate(x, y, row_scale, col_scale, log_u, gamma):
    """Half the sum over both sides of mean_i tau_i g_i / u_i, u the moved average, held constant: it has SogCLR's gradient."""
    scales, gs = (row_scale, col_scale), log_inner(x, y, row_scale, col_scale)
    terms = [np.exp(g - moved(u, g, gamma)) / np.real(t) for g, u, t in zip(gs, log_u, scales, strict=True)]
    return sum(t.mean() for t in terms) / 2


def by_temperature(x, y, row_scale, col_scale, log_u, gamma, rho=0.0):
    """iSogCLR's gradient for tau_i (2305.11965), of half the mean of tau_i (log u_i + rho). Also its absolute terms.

    u is differentiated as g is.
    """
    n, cos, own = len(x), x @ y.T, np.eye(len(x), dtype=bool)
    found = []
    for c, g, u, t in zip((cos, cos.T), log_inner(x, y, row_scale, col_scale), log_u, (row_scale, col_scale), strict=True):
        u = moved(u, g, gamma)
        h = (c - np.diag(c)[:, None]) * np.broadcast_to(t, n)[:, None]
        weighted = np.where(own, 0, np.exp(np.where(own, 0, h - u[:, None]))) * h / (n - 1)
        found.append(((u + rho - weighted.sum(1)) / 2 / n, (np.abs(u) + rho + np.abs(weighted).sum(1)) / 2 / n))
    return tuple(zip(*found, strict=True))


def _distances(x, y):
    return ((x[:, None] - y[None]) ** 2).sum(-1)


def uniformity(z, t=2.0):
    return np.log(np.exp(-t * _distances(z, z)[np.triu_indices(len(z), 1)]).mean())


def cross_uniformity(x, y, t=2.0):
    return np.log(np.exp(-t * _distances(x, y)[~np.eye(len(x), dtype=bool)]).mean())


def alignment(x, y):
    return ((x - y) ** 2).sum(1).mean()
