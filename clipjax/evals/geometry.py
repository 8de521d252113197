"""How a run's pictures and texts lie on the sphere: the contrastive gap between them, how far each spreads, and in how many
dimensions. METHODS B.4 and D.1 to D.5, in float64 on the host.
"""

import dataclasses
from typing import ClassVar

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Bool, Float

from clipjax import config
from clipjax.data.pipeline import eval_captions
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.embed import by_index
from clipjax.evals.encoder import CachedBatches, Encoder, Metrics, to_host
from clipjax.evals.inputs import caption_batches, image_batches
from clipjax.models.clip import Params

LEAST = 5  # pairs: a fifth of them is held out
ROWS = 256  # met with all columns at once: 50,000 pairs take 100 MB and not 20 GB
COLLAPSED = 1e-12  # below this a spread is rounding

Rows = Float[np.ndarray, "n e"]  # unit vectors, float64; row i of pictures and row i of texts are a pair


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an evaluation found: the figures, and what a picture of them shows."""

    image: Rows
    text: Rows
    metrics: Metrics


class Geometry:
    """An evaluation that is prepared once and run with any weights. A picture's pair is its main caption, its first: with all of
    them, captions of a picture would count as spread of the texts.
    """

    task: ClassVar[str] = "geometry"

    def __init__(self, encoder: Encoder, images: CachedBatches, captions: CachedBatches, examples: int) -> None:
        """`index` of both is the number of the example, less than `examples`; a caption an example, or none."""
        self.encoder, self.images, self.captions, self.examples = encoder, images, captions, examples

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data) -> "Geometry":
        """Of a dataset. Raises ConfigError as `open_source` does, and where it has fewer than LEAST captioned pictures."""
        source = open_source(data)
        captions, owner = eval_captions(source)
        named, main = np.unique(owner, return_index=True)
        _enough(len(named), source.name)
        texts = caption_batches(encoder, tokenizer, [captions[i] for i in main], named, source.name)
        return cls(encoder, image_batches(encoder, source, data), texts, len(source))

    @property
    def dataset(self) -> str:
        """SPEC/SPLIT, or the SPEC alone of what has no splits."""
        return self.images.name

    def run(self, params: Params) -> Metrics:
        """The figures of `geometry`, of this run's pairs; its `scale`, 1/temperature, and its `bias`, None where it has none."""
        return self.measure(params).metrics

    def measure(self, params: Params) -> Measured:
        """Raises ConfigError for fewer than LEAST pairs that can be read, FloatingPointError for vectors that are not finite."""
        image, seen = by_index(self.encoder, params, self.images, self.examples)
        text, named = by_index(self.encoder, params, self.captions, self.examples)
        pairs = seen & named
        _enough(pairs.sum(), self.dataset)
        x, y = _unit(image[pairs], self.dataset), _unit(text[pairs], self.dataset)
        scale, bias = np.exp(to_host(params["log_scale"])), params.get("bias")
        own = {"scale": float(scale), "bias": None if bias is None else float(to_host(bias))}
        return Measured(x, y, geometry(x, y) | own)


def _enough(pairs: int, name: str) -> None:
    remedy = f"has {pairs} pairs of a readable picture and a caption, too few to tell; name a split with at least {LEAST}"
    config.require(pairs >= LEAST, "data.spec", name, remedy)


def _unit(z: Float[np.ndarray, "n e"], name: str) -> Rows:
    """Once more in float64: float32 leaves lengths of 1 ± 1e-7, and cosines of equal vectors above 1."""
    if not np.isfinite(z).all():
        raise FloatingPointError(f"{name}: embeddings are not finite; evaluate an earlier checkpoint, RUN@STEP")
    z = z.astype(np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def geometry(x: Rows, y: Rows) -> Metrics:
    """All figures of n pairs, of which at least LEAST; None where one is not defined, as the gap of a collapsed model.

    `explained_variance_image` and `_text` are lists: the share of the variance in the first 1, 2, ... principal components.
    """
    figures: Metrics = {
        "pairs": len(x),
        "centroid_distance": float(np.linalg.norm(x.mean(0) - y.mean(0))),
        "linear_separability": linear_separability(x, y),
        "relative_modality_gap": relative_modality_gap(x, y),
        "uniformity_image": uniformity(x, x),
        "uniformity_text": uniformity(y, y),
        "cross_uniformity": uniformity(x, y),
        "alignment": alignment(x, y),
        "positive_cosine": float(np.einsum("ne,ne->n", x, y).mean()),
    }
    for name, z in (("image", x), ("text", y)):
        figures[f"rankme_{name}"] = rankme(singular_values(z))
        spread = singular_values(z - z.mean(0))
        collapsed = spread[0] < COLLAPSED * len(z) ** 0.5
        figures[f"rankme_centred_{name}"] = None if collapsed else rankme(spread)
        figures[f"explained_variance_{name}"] = None if collapsed else explained_variance(spread).tolist()
    return figures


def uniformity(x: Rows, y: Rows) -> float:
    """`log mean_{i != j} exp(-2 |x_i - y_j|^2)` (METHODS B.2, D.1): of X with itself, or across. 0 is collapse, the law of points
    spread evenly near -4. Streamed by rows, O(n) memory. Needs two rows.
    """
    total, n = 0.0, len(x)
    for start in range(0, n, ROWS):
        rows = x[start : start + ROWS]
        near = np.exp(4 * rows @ y.T - 4)  # |x - y|^2 = 2 - 2 cos
        own = np.arange(len(rows))
        near[own, start + own] = 0
        total += near.sum()
    return float(np.log(total / (n * (n - 1))))


def alignment(x: Rows, y: Rows) -> float:
    """`mean |x_i - y_i|^2`, from 0 to 4."""
    return float(np.square(x - y).sum(1).mean())


def relative_modality_gap(x: Rows, y: Rows) -> float | None:
    """How far a pair lies apart against how far any two of one modality do (METHODS D.4): 0 is no gap, 1/2 as far.

    None where all vectors are one.
    """

    def apart(cosine: float) -> float:
        return (1 - cosine) / 2

    def within(z: Rows) -> float:  # the mean over i != j without a matrix
        n = len(z)
        return apart((np.square(z.sum(0)).sum() - np.square(z).sum()) / (n * (n - 1)))

    between, spread = apart((x * y).sum(1).mean()), (within(x) + within(y)) / 2
    return None if between + spread < COLLAPSED else float(between / (between + spread))


def linear_separability(x: Rows, y: Rows, seed: int = 0) -> float:
    """The share of a fifth, held out, whose modality a logistic regression on the rest tells: 1 is a gap, 1/2 is none.

    A pair is held out whole. Were a picture in training and its caption held out, the nearer the two lie the surer the caption
    would be taken for a picture, and a closed gap would score below 1/2, with few pairs near 0. Always the same fifth.
    """
    n = len(x)
    order = np.random.default_rng(seed).permutation(n)
    held, rest = np.split(order, [-(-n // 5)])

    def pooled(pairs: np.ndarray) -> tuple[Rows, Bool[np.ndarray, " 2n"]]:
        return np.concatenate([x[pairs], y[pairs]]), np.arange(2 * len(pairs)) >= len(pairs)

    w = logistic_regression(*pooled(rest))
    z, is_text = pooled(held)
    return float(np.mean((z @ w[:-1] + w[-1] > 0) == is_text))


def logistic_regression(z: Float[np.ndarray, "n e"], label: Bool[np.ndarray, " n"], c: float = 1.0) -> Float[np.ndarray, " e+1"]:
    """Weights, and last the intercept, that minimise `|w|^2 / 2 + c sum softplus(-sign (z w + b))`: scikit-learn's default model,
    with its C = 1. L-BFGS on the whole batch.
    """
    sign = np.where(label, 1.0, -1.0)
    n = len(z)

    def loss(w: Float[np.ndarray, " e+1"]) -> tuple[float, Float[np.ndarray, " e+1"]]:
        margin = sign * (z @ w[:-1] + w[-1])
        value = np.logaddexp(0, -margin).sum() + w[:-1] @ w[:-1] / (2 * c)
        pull = -sign * scipy.special.expit(-margin)
        return value / n, np.append(z.T @ pull + w[:-1] / c, pull.sum()) / n

    precise = {"ftol": 0.0, "gtol": 1e-8, "maxiter": 10_000}
    return scipy.optimize.minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B", options=precise).x


def singular_values(z: Float[np.ndarray, "n e"]) -> Float[np.ndarray, " m"]:
    """Descending, min(n, e) of them. By QR, as fast as the Gram matrix and without squaring the condition number."""
    return np.linalg.svd(np.linalg.qr(z, mode="r"), compute_uv=False)


def rankme(singular: Float[np.ndarray, " m"], eps: float = 1e-7) -> float:
    """The effective number of dimensions, 1 to e (METHODS D.2). Of unit vectors as they are, a common offset (a cone, a gap) is
    one large singular value and lowers it; of centred ones, not."""
    p = singular / singular.sum() + eps
    return float(np.exp(-(p * np.log(p)).sum()))


def explained_variance(singular: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Cumulative shares of the variance by principal components, from the singular values of centred rows."""
    variance = np.square(singular)
    return np.cumsum(variance) / variance.sum()
