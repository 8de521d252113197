"""Captions that a model generates greedily for the images of a dataset, compared with the dataset's own captions; and the
perplexity of those.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from clipjax import config
from clipjax.data import reading
from clipjax.data.faults import Shown, shown
from clipjax.data.images.sheet import Cell, contact_sheet
from clipjax.data.source import Source
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals import caption_metrics
from clipjax.evals.encoder import Batch, CachedBatches, Encoder, to_host
from clipjax.evals.evaluation import Evaluation, Metrics, Results
from clipjax.evals.inputs import image_batches, require_captions
from clipjax.generate import Captioner
from clipjax.losses import caption_nll
from clipjax.models.clip import Params, bind
from clipjax.models.text import lengths
from clipjax.placement import make_placement, token_nll_on
from clipjax.sharding import over_rows

WIDE_SHEET = 16  # images of a sheet: from this number on it has 8 in a row, else 4
CORRECT, WRONG, REFERENCE = "#000000", "#D55E00", "#777777"  # colours of a caption and of a reference

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionSample:
    """An image, its generated caption, and the caption that was expected."""

    image: Image.Image
    key: str
    caption: str
    reference: str  # the main one
    correct: bool  # the caption is one of the references

    def __str__(self) -> str:
        return f"{self.key}: {self.caption!r}" + ("" if self.correct else f", where the reference is {self.reference!r}")


@dataclass(frozen=True)
class CaptioningResults(Results):
    """The metrics, and the generated caption of each image that can be read, by the image's number."""

    captions: Mapping[int, str]
    samples: Sequence[CaptionSample]
    image_name: ClassVar = "samples"

    def lines(self) -> Sequence[str]:
        return [str(sample) for sample in self.samples]

    def draw(self, title: str) -> Image.Image | None:
        return sheet(self.samples, title) if self.samples else None


class CaptioningEvaluation(Evaluation):
    """Every image of a dataset. All its captions are references."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, source: Source, data: config.Data, samples: int = 0) -> None:
        """`samples`: how many images the results show. An image that can't be read is left out.

        Raises ConfigError for a model without a captioning head, and for a source without captions.
        """
        self.encoder, self._tokenizer, self._source, self._samples = encoder, tokenizer, source, samples
        self._captioner = Captioner(encoder.model, encoder.mesh, encoder.batch_size, tokenizer)
        self._score = jax.jit(self._nll, out_shardings=over_rows(encoder.mesh))
        require_captions(source, "captioning")
        self.references = [record.captions for record in reading.texts(source, quiet=jax.process_index() > 0)]
        require_captions(source, "captioning", any(self.references))
        self._accepted = with_round_trips(self.references, tokenizer)
        main = [several[0] if several else "" for several in self.references]
        self._pairs = _pair_batches(encoder, tokenizer, source, data, main)
        self.dataset = source.name
        if (missing := caption_metrics.missing()) and jax.process_index() == 0:
            packages = " and ".join(dict.fromkeys(missing.values()))
            log.warning("captioning: without %s some metrics are null: %s", packages, caption_metrics.INSTALL)

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Captioning) -> Self:
        return cls(encoder, tokenizer, open_source(data), data, cfg.samples)

    @classmethod
    def unavailable(cls) -> Mapping[str, str]:
        missing = caption_metrics.missing()
        return {metric: f"needs {package}: {caption_metrics.INSTALL}" for metric, package in missing.items()}

    def run(self, params: Params) -> CaptioningResults:
        """Metrics:

        - `exact_match`, in [0, 1]: share of captions that equal one of their image's references, as the reference is written
          or as the tokenizer decodes it (perhaps in lower case). `caption_metrics.exact_match` says what is not compared. A
          reference longer than the model's texts can't be matched;
        - `perplexity`, from 1: exp of the mean of -log p over the tokens of every image's main reference, including the end
          token. Each is predicted from the image and the true tokens before it. The mean is over tokens, not over captions;
        - `bleu` and `chrf` in [0, 100] and `cider` in [0, 10], see `caption_metrics`; None where their packages are missing.
        """

        def generate_and_score(rows: dict[str, Array]) -> tuple[Array, ...]:
            generated = self._captioner.generate(params, rows["image"], rows["index"])
            return rows["index"], generated.tokens, *self._score(params, rows["image"], rows["text"])

        results = (result for result, _ in self.encoder.map_batches(self._pairs, generate_and_score))
        columns = zip(*results, strict=True)
        index, tokens, nll, count = (np.concatenate([to_host(x) for x in column]) for column in columns)
        order = np.argsort(index)[(index < 0).sum() :]  # by image, without padding
        captions = {int(index[i]): self._tokenizer.decode(tokens[i]) for i in order}
        perplexity = float(np.exp(nll[order].sum(dtype=np.float64) / count[order].sum()))
        return CaptioningResults(self._metrics(captions, perplexity), captions, self.samples(captions, self._samples))

    def _metrics(self, captions: Mapping[int, str], perplexity: float) -> Metrics:
        generated, references = list(captions.values()), [self.references[i] for i in captions]
        return {
            "exact_match": caption_metrics.exact_match(generated, [self._accepted[i] for i in captions]),
            "perplexity": perplexity,
            "bleu": caption_metrics.bleu(generated, references),
            "chrf": caption_metrics.chrf(generated, references),
            "cider": caption_metrics.cider(generated, references),
        }

    def samples(self, captions: Mapping[int, str], n: int) -> list[CaptionSample]:
        """At most n images with these captions. They are the same images every time, so that two steps can be compared."""
        chosen = np.random.default_rng(0).permutation(list(captions))[:n].tolist()
        return [self._sample(example, captions[example.number]) for example in shown(self._source, chosen)]

    def _sample(self, example: Shown, caption: str) -> CaptionSample:
        correct = caption_metrics.exact_match([caption], [self._accepted[example.number]]) == 1
        return CaptionSample(example.image, example.record.key, caption, example.record.captions[0], correct)

    def _nll(self, params: Params, images: Array, tokens: Int[Array, "b t"]) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
        """The sum of -log p over each caption's tokens, and their number."""
        mesh, model = self.encoder.mesh, bind(self.encoder.model, params)
        _, _, states = model.encode_pairs(images, tokens, placement=make_placement(mesh, self.encoder.model.dtype))
        real = lengths(tokens)
        return caption_nll(states, model.words, tokens, real, token_nll_on(mesh)), real - 1


def sheet(samples: Sequence[CaptionSample], title: str) -> Image.Image:
    """Images with their captions: black if correct, else orange above the main reference in grey."""
    cells = [Cell(sample.image, _texts(sample)) for sample in samples]
    return contact_sheet(title, cells, 4 if len(cells) < WIDE_SHEET else 8)


def _texts(sample: CaptionSample) -> list[tuple[str, str]]:
    if sample.correct:
        return [(sample.caption, CORRECT)]
    return [(sample.caption or "(nothing)", WRONG), (f"({sample.reference})", REFERENCE)]


def with_round_trips(references: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[list[str]]:
    """Each image's references, and the text that the tokenizer decodes from the tokens of each that it does not truncate."""
    flat = [text for several in references for text in several]
    ids, truncated = tokenizer.encode(flat)
    decoded = iter([None if lost else tokenizer.decode(row) for row, lost in zip(ids, truncated, strict=True)])
    return [[*several, *(text for _ in several if (text := next(decoded)) is not None)] for several in references]


def _pair_batches(
    encoder: Encoder, tokenizer: Tokenizer, source: Source, data: config.Data, captions: Sequence[str]
) -> CachedBatches:
    """Every image with the tokens of its one caption, as `text`."""
    tokens, truncated = tokenizer.encode(captions)
    if truncated.any() and jax.process_index() == 0:
        what = "%s: %d of %d main captions were truncated to %d tokens, and perplexity is of what is left"
        log.warning(what, source.name, truncated.sum(), len(truncated), tokenizer.length)
    images = image_batches(encoder, source, data)

    def read() -> Iterator[Batch]:
        for batch in images:
            yield batch | {"text": tokens[np.maximum(batch["index"], 0)]}

    return CachedBatches(read, len(images), source.name, images.unit)
