"""Image-text retrieval in both directions, with any number of captions an image."""

import logging
from collections.abc import Sequence
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from clipjax import config
from clipjax.data.pipeline import Captions, eval_captions
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import CachedBatches, Embeddings, Encoder
from clipjax.evals.evaluation import Evaluation, Examples, Metrics, Results
from clipjax.evals.inputs import caption_batches, image_batches, require_captions
from clipjax.evals.ranks import TILE, Ranks, pair_auc, ranks
from clipjax.models.clip import Params

KS = (1, 5, 10)

log = logging.getLogger(__name__)


class RetrievalEvaluation(Evaluation):
    """Every image of a dataset against every caption."""

    def __init__(
        self, encoder: Encoder, images: CachedBatches, tokens: CachedBatches, captions: Captions, languages: Sequence[str] = ()
    ) -> None:
        """`tokens` are of `captions`, and their `index` is the caption's number there. `languages`: of each image's captions."""
        self.encoder, self.images, self.tokens, self.captions, self.languages = encoder, images, tokens, captions, languages
        self.dataset = images.name

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Retrieval) -> Self:
        """Raises ConfigError also where an image doesn't have one caption for each of `cfg.languages`."""
        source = open_source(data)
        require_captions(source, "retrieval")
        captions = eval_captions(source, quiet=jax.process_index() > 0)
        require_captions(source, "retrieval", bool(captions.texts))
        if cfg.languages:
            remedy = (
                f"not every image of {source.name} has {len(cfg.languages)} captions: name the language of each, in their order"
            )
            config.require(captions.per_example() == len(cfg.languages), "languages", cfg.languages, remedy)
        if (shared := captions.shared()) and jax.process_index() == 0:
            told = "%s: %d of %d captions are another image's, too: in a tie, a hit is what random order gives on average"
            log.warning(told, source.name, shared, len(captions.texts))
        tokens = caption_batches(encoder, tokenizer, captions.texts, np.arange(len(captions.texts)), source.name)
        return cls(encoder, image_batches(encoder, source, data), tokens, captions, cfg.languages)

    def run(self, params: Params) -> Results:
        """The metrics of `retrieve`, and what each caption and each image gave to them."""
        images, texts = self.encoder.embed(params, self.images), self.encoder.embed(params, self.tokens)
        return retrieve(images, texts, self.captions, self.encoder.mesh, self.languages)


def retrieve(
    images: Embeddings, texts: Embeddings, captions: Captions, mesh: Mesh, languages: Sequence[str] = (), tile: int = TILE
) -> Results:
    """R@K under CLIP_benchmark's names, each in [0, 1], and mean and median rank, from 1.

    `image_retrieval_recall@K` is text to image: the share of captions whose image is among the K nearest.
    `text_retrieval_recall@K` is image to text: the share of images with any of their captions among the K nearest.
    In a tie a hit is what random order gives on average (`ties.expected_hits`), and a rank is 1 + #{greater} + #{equal} / 2.
    `pair_auc` is the chance that an own pair is nearer than another. Where every image has the same number of captions, more
    than one, `mean_rank_variance` says how differently they find it; of named `languages`, each also has its own recalls. The
    `index` of an image is its example, that of a text its caption's number. Captions of images without a vector aren't counted.
    """
    own = np.arange(len(captions.keys))
    to_image = ranks(texts, captions.example, images, own, mesh, tile)
    to_text = ranks(images, own, texts, captions.example, mesh, tile)
    values = {"image": _values("image", to_image), "text": _values("text", to_text)}
    metrics: Metrics = {name: float(np.nanmean(v)) for of in values.values() for name, v in of.items()}
    metrics |= {f"{of}_retrieval_median_rank": float(np.nanmedian(v[f"{of}_retrieval_mean_rank"])) for of, v in values.items()}
    metrics["pair_auc"] = pair_auc(texts, captions.example, images, own, mesh, tile)
    if captions.per_example() > 1:
        metrics["mean_rank_variance"] = mean_rank_variance(to_image.rank(), captions)
    for place, language in enumerate(languages):
        of = captions.place() == place
        in_language = ranks(images, own, texts, np.where(of, captions.example, -1), mesh, tile)
        for k in KS:
            metrics[f"image_retrieval_recall@{k}_{language}"] = float(np.nanmean(to_image.hits(k)[of]))
            metrics[f"text_retrieval_recall@{k}_{language}"] = float(np.nanmean(in_language.hits(k)))
    groups = [captions.keys[i] for i in map(int, captions.example)]
    keys = [f"{group}#{place}" for group, place in zip(groups, captions.place(), strict=True)]
    return Results(metrics, examples=(Examples(keys, values["image"], groups), Examples(captions.keys, values["text"])))


def _values(what: str, found: Ranks) -> dict[str, Float[np.ndarray, " n"]]:
    """What each query gives to the metrics that are means."""
    recalls = {f"{what}_retrieval_recall@{k}": found.hits(k) for k in KS}
    return recalls | {f"{what}_retrieval_mean_rank": found.rank()}


def mean_rank_variance(rank: Float[np.ndarray, " m"], captions: Captions) -> float | None:
    """The mean, over images and their captions, of (rank - the image's mean rank)^2: 0 where all languages find an image alike.

    Every image has the same number of captions. An image that can't be read is left out, and so is one whose later caption
    repeats its main one, which stands for a name that is missing in that language. None: all are.
    Source: 1-to-K contrastive learning (2406.18254).
    """
    of_images = rank.reshape(-1, captions.per_example())
    texts = np.reshape(captions.texts, of_images.shape)
    counted = of_images[~np.isnan(of_images).any(1) & ~(texts[:, 1:] == texts[:, :1]).any(1)]
    return float(counted.var(axis=1).mean()) if len(counted) else None
