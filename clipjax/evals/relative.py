"""How alike the spaces of two runs are, by relative representations (2209.15430): each vector is described by its cosines with
those of the same anchors in its own run. So descriptions don't change when a space is turned, and two runs can be compared.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from clipjax import config
from clipjax.evals.embed import MainPairs, Pairs, Vectors
from clipjax.evals.evaluation import Metrics
from clipjax.evals.inputs import eval_data
from clipjax.evals.loaded import LoadedRun
from clipjax.evals.ranks import Ranks
from clipjax.evals.ties import nearer

KS = (1, 5, 10)
ANCHORS = 1024  # of more there are little better descriptions
NEIGHBOURS = 10
AT_ONCE = 1 << 22  # cosines


def spaces(model: LoadedRun, wanted: Mapping[str, Any], clean: config.Clean | None, anchors: str) -> tuple[Pairs, Pairs]:
    """The pairs of a dataset and, of its split `anchors`, those to describe them by. `wanted`: its `spec` and `split`, and the
    fields that are not as the run reads it; `clean` as in evaluations."""

    def of_split(split: str) -> MainPairs:
        data = eval_data(model.run.data, **{**wanted, "split": split})
        return MainPairs(model.encoder, model.tokenizer.cleaning(clean), data)

    pairs, others = of_split(wanted["split"]), of_split(anchors)  # both, before anything is embedded
    return pairs.embed(model.params), others.embed(model.params)


def compare(a: tuple[Pairs, Pairs], b: tuple[Pairs, Pairs], name: str) -> Metrics:
    """`relative` of what `spaces` gave of two runs: of the examples that both could read, and of ANCHORS of them that are always
    the same. Raises ConfigError where there are none. `name`: the dataset's."""
    pairs, anchors = (np.intersect1d(in_a.number, in_b.number) for in_a, in_b in zip(a, b, strict=True))
    some = len(pairs) > 0 and len(anchors) > 0
    config.require(some, "data.spec", name, "no example, or no anchor, has an image that can be read and a caption in both runs")
    anchors = np.random.default_rng(0).permutation(anchors)[:ANCHORS]
    return relative(a[0].at(pairs), b[0].at(pairs), a[1].at(anchors), b[1].at(anchors))


def relative(a: Pairs, b: Pairs, anchors_a: Pairs, anchors_b: Pairs) -> Metrics:
    """Of the same pairs and the same anchors in two runs; images are described by the anchors' images, texts by their texts.

    `*_cosine`: of the two descriptions of an example, the mean. `*_mrr`: the mean of 1 / (rank of its description in run B among
    those of all, for the one in run A). `*_jaccard@10`: how much of the union of an example's 10 nearest in run A and in run B is
    in both. `*_retrieval_recall@K`: of images in run A and texts in run B, as in retrieval, by their descriptions;
    `absolute_*` by the vectors themselves, None where their lengths differ. The last are at chance for unrelated runs.
    """
    image_a, text_a = described(a.image, anchors_a.image), described(a.text, anchors_a.text)
    image_b, text_b = described(b.image, anchors_b.image), described(b.text, anchors_b.text)
    metrics: Metrics = {"pairs": len(a.number), "anchors": len(anchors_a.number)}
    for what, (in_a, in_b) in {"image": (image_a, image_b), "text": (text_a, text_b)}.items():
        metrics[f"{what}_cosine"] = float(np.einsum("na,na->n", in_a, in_b).mean())
        metrics[f"{what}_mrr"] = float((1 / ranks(in_a, in_b).rank()).mean())
        metrics[f"{what}_jaccard@{NEIGHBOURS}"] = jaccard(in_a, in_b)
    found = {"image": ranks(text_b, image_a), "text": ranks(image_a, text_b)}
    metrics |= {f"{what}_retrieval_recall@{k}": float(found[what].hits(k).mean()) for what in found for k in KS}
    comparable = a.image.shape[1] == b.text.shape[1]
    found = {"image": ranks(b.text, a.image), "text": ranks(a.image, b.text)} if comparable else {}
    recalls = {what: float(of.hits(1).mean()) for what, of in found.items()}
    return metrics | {f"absolute_{what}_retrieval_recall@1": recalls.get(what) for what in ("image", "text")}


def described(z: Vectors, anchors: Vectors) -> Float[np.ndarray, "n a"]:
    """The cosines of unit vectors with the anchors, as a unit vector; of one that is at a right angle to all, 0."""
    cosines = z @ anchors.T
    return cosines / np.maximum(np.linalg.norm(cosines, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def ranks(queries: Float[np.ndarray, "n d"], keys: Float[np.ndarray, "n d"]) -> Ranks:
    """Where the key of the same row stands among all keys, for each query."""

    def of_rows(rows: Int[np.ndarray, " r"]) -> np.ndarray:
        cosines = queries[rows] @ keys.T
        greater, equal = nearer(cosines, cosines[np.arange(len(rows)), rows][:, None])
        return np.stack([np.sum(greater, axis=1), np.sum(equal, axis=1) - 1])

    greater, equal = np.concatenate(_by_rows(of_rows, len(queries)), axis=1)
    return Ranks(greater, equal, np.ones_like(greater))


def jaccard(in_a: Float[np.ndarray, "n d"], in_b: Float[np.ndarray, "n d"]) -> float | None:
    """The mean over rows of |A ∩ B| / |A ∪ B|, where A and B are the NEIGHBOURS other rows that are nearest in each run.

    None where there are not more rows than that."""
    if len(in_a) <= NEIGHBOURS:
        return None

    def of_rows(rows: Int[np.ndarray, " r"]) -> np.ndarray:
        nearest = []
        for z in (in_a, in_b):
            cosines = z[rows] @ z.T
            cosines[np.arange(len(rows)), rows] = -np.inf
            nearest.append(np.argpartition(-cosines, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS])
        both = (nearest[0][:, :, None] == nearest[1][:, None]).sum((1, 2))
        return both / (2 * NEIGHBOURS - both)

    return float(np.concatenate(_by_rows(of_rows, len(in_a))).mean())


def _by_rows(fn: Callable[[Int[np.ndarray, " r"]], np.ndarray], n: int) -> list[np.ndarray]:
    """`fn` of some rows at a time: an n by n matrix may be too large."""
    return [fn(rows) for rows in np.array_split(np.arange(n), -(-n * n // AT_ONCE))]
