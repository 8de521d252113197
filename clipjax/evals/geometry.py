"""The geometry of a run's embeddings on the unit sphere: the contrastive gap between images and texts, how far each spreads,
and over how many dimensions. Everything is computed in float64 on the host.
"""

import dataclasses
from typing import Self

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Bool, Float
from PIL import Image

from clipjax import config
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.embed import MainPairs
from clipjax.evals.encoder import Encoder, to_host
from clipjax.evals.evaluation import Evaluation, Metrics, Results
from clipjax.models.clip import Params

MIN_PAIRS = 5  # a fifth of them is held out
BLOCK_ROWS = 256  # rows that are compared with all columns at once: 50,000 pairs take 100 MB and not 20 GB
COLLAPSED = 1e-12  # a spread below this is rounding

Rows = Float[np.ndarray, "n e"]  # unit vectors, float64; row i of the images and row i of the texts are a pair


@dataclasses.dataclass(frozen=True)
class GeometryResults(Results):
    """The metrics, and the embeddings that they describe."""

    image: Rows
    text: Rows

    def draw(self, title: str) -> Image.Image:
        """Both clouds and their spectra."""
        from clipjax.evals.geometry_plot import plot  # here: matplotlib takes a second to import

        return plot(self, title)


class GeometryEvaluation(Evaluation):
    """The pairs of a dataset. An image is paired with its main caption only: several captions of one image would count as
    spread of the texts.
    """

    def __init__(self, encoder: Encoder, pairs: MainPairs) -> None:
        """Raises ConfigError for a dataset with fewer than MIN_PAIRS captioned images."""
        _check_count(pairs.captioned, pairs.name)
        self.encoder, self.pairs, self.dataset = encoder, pairs, pairs.name

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Geometry) -> Self:
        return cls(encoder, MainPairs(encoder, tokenizer, data))

    def run(self, params: Params) -> GeometryResults:
        """The metrics of `geometry`, and of the model `scale`, which is 1/temperature, and `bias`, None where it has none.

        Raises ConfigError for fewer than MIN_PAIRS pairs that can be read, FloatingPointError for vectors that are not finite.
        """
        image, text, _ = self.pairs.embed(params)
        _check_count(len(image), self.dataset)
        x, y = _unit(image, self.dataset), _unit(text, self.dataset)
        scale, bias = np.exp(to_host(params["log_scale"])), params.get("bias")
        own = {"scale": float(scale), "bias": None if bias is None else float(to_host(bias))}
        return GeometryResults(geometry(x, y) | own, x, y)


def _check_count(pairs: int, name: str) -> None:
    remedy = f"has {pairs} pairs of a readable image and a caption, too few to measure; name a split with at least {MIN_PAIRS}"
    config.require(pairs >= MIN_PAIRS, "data.spec", name, remedy)


def _unit(z: Float[np.ndarray, "n e"], name: str) -> Rows:
    """Normalised again in float64: float32 leaves lengths of 1 ± 1e-7, and cosines of equal vectors above 1."""
    if not np.isfinite(z).all():
        raise FloatingPointError(f"{name}: embeddings are not finite; evaluate an earlier checkpoint, RUN@STEP")
    z = z.astype(np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def geometry(x: Rows, y: Rows) -> Metrics:
    """All metrics of n pairs, n >= MIN_PAIRS. None where one is not defined, as the gap of a collapsed model.

    `explained_variance_image` and `_text` are lists: the share of the variance in the first 1, 2, ... principal components.
    """
    metrics: Metrics = {
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
        metrics[f"rankme_{name}"] = rankme(singular_values(z))
        spread = singular_values(z - z.mean(0))
        collapsed = spread[0] < COLLAPSED * len(z) ** 0.5
        metrics[f"rankme_centred_{name}"] = None if collapsed else rankme(spread)
        metrics[f"explained_variance_{name}"] = None if collapsed else explained_variance(spread).tolist()
    return metrics


def uniformity(x: Rows, y: Rows) -> float:
    """`log mean_{i != j} exp(-2 |x_i - y_j|^2)`: of one modality with itself (2005.10242), or across both (2405.18570).

    0 means collapse. Points that are spread evenly over the sphere have about -4. Streamed by rows, O(n) memory. Needs two rows.
    """
    total, n = 0.0, len(x)
    for start in range(0, n, BLOCK_ROWS):
        rows = x[start : start + BLOCK_ROWS]
        kernel = np.exp(4 * rows @ y.T - 4)  # |x - y|^2 = 2 - 2 cos
        own = np.arange(len(rows))
        kernel[own, start + own] = 0
        total += kernel.sum()
    return float(np.log(total / (n * (n - 1))))


def alignment(x: Rows, y: Rows) -> float:
    """`mean |x_i - y_i|^2`, from 0 to 4 (2005.10242)."""
    return float(np.square(x - y).sum(1).mean())


def relative_modality_gap(x: Rows, y: Rows) -> float | None:
    """d / (d + s) of d, the mean distance within a pair, and s, the mean distance of any two within one modality (2404.07983).

    A distance is (1 - cos) / 2. 0 means no gap; 1/2, that a pair is as far apart as any two images or texts. None if all
    vectors are equal.
    """

    def distance(cosine: float) -> float:
        return (1 - cosine) / 2

    def within(z: Rows) -> float:  # the mean over i != j, without a matrix
        n = len(z)
        return distance((np.square(z.sum(0)).sum() - np.square(z).sum()) / (n * (n - 1)))

    between, spread = distance((x * y).sum(1).mean()), (within(x) + within(y)) / 2
    return None if between + spread < COLLAPSED else float(between / (between + spread))


def linear_separability(x: Rows, y: Rows, seed: int = 0) -> float:
    """The held-out accuracy of a logistic regression that tells images from texts (2405.18570): 1 means a gap, 1/2 none.

    A fifth of the pairs is held out, always the same fifth. Both sides of a pair are held out together. Otherwise a held-out
    caption would be classified as an image because it is close to its own image, which is in training: a closed gap would score
    below 1/2, and with few pairs near 0.
    """
    n = len(x)
    order = np.random.default_rng(seed).permutation(n)
    held_out, rest = np.split(order, [-(-n // 5)])

    def pooled(pairs: np.ndarray) -> tuple[Rows, Bool[np.ndarray, " 2n"]]:
        return np.concatenate([x[pairs], y[pairs]]), np.arange(2 * len(pairs)) >= len(pairs)

    w = logistic_regression(*pooled(rest))
    z, is_text = pooled(held_out)
    return float(np.mean((z @ w[:-1] + w[-1] > 0) == is_text))


def logistic_regression(z: Float[np.ndarray, "n e"], label: Bool[np.ndarray, " n"], c: float = 1.0) -> Float[np.ndarray, " e+1"]:
    """The weights, and last the intercept, that minimise `|w|^2 / 2 + c sum softplus(-sign (z w + b))`.

    This is scikit-learn's default model, with its C = 1. L-BFGS on the full batch.
    """
    sign = np.where(label, 1.0, -1.0)
    n = len(z)

    def loss(w: Float[np.ndarray, " e+1"]) -> tuple[float, Float[np.ndarray, " e+1"]]:
        margin = sign * (z @ w[:-1] + w[-1])
        value = np.logaddexp(0, -margin).sum() + w[:-1] @ w[:-1] / (2 * c)
        gradient = -sign * scipy.special.expit(-margin)
        return value / n, np.append(z.T @ gradient + w[:-1] / c, gradient.sum()) / n

    precise = {"ftol": 0.0, "gtol": 1e-8, "maxiter": 10_000}
    return scipy.optimize.minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B", options=precise).x


def singular_values(z: Float[np.ndarray, "n e"]) -> Float[np.ndarray, " m"]:
    """min(n, e) singular values, descending. By QR: as fast as the Gram matrix, but the condition number is not squared."""
    return np.linalg.svd(np.linalg.qr(z, mode="r"), compute_uv=False)


def rankme(singular: Float[np.ndarray, " m"], eps: float = 1e-7) -> float:
    """The effective number of dimensions, 1 to e (RankMe, 2210.02885).

    For unit vectors, a common offset (a cone, a gap) is one large singular value and lowers the result. For centred vectors it
    does not.
    """
    p = singular / singular.sum() + eps
    return float(np.exp(-(p * np.log(p)).sum()))


def explained_variance(singular: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Cumulative shares of the variance by principal components, from the singular values of centred rows."""
    variance = np.square(singular)
    return np.cumsum(variance) / variance.sum()
