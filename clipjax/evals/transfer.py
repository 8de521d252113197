"""From texts to images: what a classifier of captions' vectors, which has seen no image, is worth on images.

How far below a classifier of images it stays is what the gap between the modalities costs. Noise on the captions' vectors makes a
classifier blind to differences as small as the gap, so that it transfers better (CLOSE, 2211.09778).
"""

from typing import Self

import numpy as np
from jaxtyping import Float, Int

from clipjax import config
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.classifiers import expected_right, ridge_scores
from clipjax.evals.embed import Vectors, by_index
from clipjax.evals.encoder import CachedBatches, Encoder
from clipjax.evals.evaluation import Evaluation, Examples, Results
from clipjax.evals.inputs import caption_batches, image_batches, require_captions
from clipjax.evals.labels import LabelledImages, open_splits, shared_classes
from clipjax.models.clip import Params

NOISES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the curve: lengths
RIDGE = 0.005  # of the mean eigenvalue of x'x: little, because a large ridge is noise by another name
ROWS = 10_000  # fewer captions are learned from in several copies, each with noise of its own


class TransferEvaluation(Evaluation):
    """Classifiers of the captions of a split, tested on the images of another."""

    def __init__(self, captions: CachedBatches, train: LabelledImages, test: LabelledImages, classes: int, noise: float) -> None:
        """`captions` are the main ones of the examples of `train`."""
        self.captions, self.train, self.test, self.classes, self.noise = captions, train, test, classes, noise
        self.dataset = test.batches.name

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Transfer) -> Self:
        """Classes are as in `labels.shared_classes`."""
        splits = open_splits(data, cfg.train)
        source = splits[0][0]
        require_captions(source, "transfer")
        classes, examples = shared_classes([source for source, _ in splits], cfg.label_pattern)
        used = [i for i, text in enumerate(examples[0].captions) if text and examples[0].labels[i] >= 0]
        require_captions(source, "transfer", bool(used))
        captions = caption_batches(encoder, tokenizer, [examples[0].captions[i] for i in used], used, source.name)
        train, test = (
            LabelledImages(encoder, image_batches(encoder, opened, own, captioned=False), labelled)
            for (opened, own), labelled in zip(splits, examples, strict=True)
        )
        return cls(captions, train, test, classes, cfg.noise)

    def run(self, params: Params) -> Results:
        """`acc1` on images of a classifier of captions' vectors with the noise, and `acc1_without_noise`; `acc1_from_images`, of
        one that learns from the images themselves, is what they would come to without a gap. `acc1_by_noise` is the curve over
        `noises`. All in [0, 1]; ties as in `classifiers.expected_right`."""
        x, has_caption = by_index(self.train.encoder, params, self.captions, len(self.train.examples.keys))
        x, known = x[has_caption], self.train.examples.labels[has_caption]
        queries, wanted, found = self.test.embed(params)

        def right(z: Vectors, labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
            scores = ridge_scores(z, labels, self.classes, queries, RIDGE * len(z) / z.shape[1])
            return expected_right(scores, wanted)

        copies = -(-ROWS // len(x))
        curve = {noise: right(noisy(x, noise, copies), np.tile(known, copies)) for noise in (*NOISES, self.noise)}
        image, labels, _ = self.train.embed(params)
        right_by = {"acc1": curve[self.noise], "acc1_without_noise": curve[0.0], "acc1_from_images": right(image, labels)}
        means = {name: float(values.mean()) for name, values in right_by.items()}
        by_noise = {"noises": list(NOISES), "acc1_by_noise": [float(curve[noise].mean()) for noise in NOISES]}
        keys = [self.test.examples.keys[i] for i in np.flatnonzero(found)]
        counts = {"train_captions": len(x), "test_images": len(queries), "classes": len(np.unique(known))}
        return Results({**counts, **means, **by_noise}, examples=[Examples(keys, right_by)])


def noisy(x: Vectors, length: float, copies: int) -> Vectors:
    """Unit vectors of x with normal noise of about this length, in so many copies one after the other; always the same noise."""
    d = x.shape[1]
    noise = np.random.default_rng(0).standard_normal((copies, *x.shape), np.float32) * np.float32(length / d**0.5)
    z = (x + noise).reshape(-1, d)
    return z / np.linalg.norm(z, axis=1, keepdims=True)
