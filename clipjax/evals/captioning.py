"""What a model writes of a dataset's pictures, greedily, against what people wrote; and how well it foresees the latter."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from clipjax import config
from clipjax.data.sheet import Cell, contact_sheet
from clipjax.data.source import Source
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals import caption_metrics
from clipjax.evals.encoder import Batch, CachedBatches, Encoder, Metrics, to_host
from clipjax.evals.inputs import image_batches
from clipjax.files import write_whole
from clipjax.generate import Captioner
from clipjax.losses import caption_nll
from clipjax.models.clip import Params, bind
from clipjax.models.text import lengths
from clipjax.placement import placement, token_nll_on
from clipjax.sharding import over_rows

WIDE = 16  # pictures of a sheet, from which on it has 8 a row and not 4
RIGHT, WRONG, REFERENCE = "#000000", "#D55E00", "#777777"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captioned:
    """What a model wrote of each picture that can be read, by the picture's number, and how good that is."""

    captions: dict[int, str]
    metrics: Metrics


@dataclass(frozen=True)
class Sample:
    """A picture, what was written of it, and what should have been."""

    picture: Image.Image
    key: str
    caption: str
    reference: str  # the main one
    right: bool  # it is one of the references

    def __str__(self) -> str:
        return f"{self.key}: {self.caption!r}" + ("" if self.right else f", where the reference is {self.reference!r}")


class Captioning:
    """An evaluation that is prepared once and run with any weights."""

    task: ClassVar[str] = "captioning"

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, source: Source, data: config.Data) -> None:
        """Raises ConfigError for a model without a captioning head. A picture that can't be read is left out."""
        self.encoder, self._tokenizer, self._source = encoder, tokenizer, source
        self._captioner = Captioner(encoder.model, encoder.mesh, encoder.batch_size, tokenizer)
        self._score = jax.jit(self._nll, out_shardings=over_rows(encoder.mesh))
        self.references = [source.record(i).captions for i in range(len(source))]
        self._accepted = _with_round_trips(self.references, tokenizer)
        main = [several[0] if several else "" for several in self.references]
        self._pairs = _pair_batches(encoder, tokenizer, source, data, main)
        if (missing := caption_metrics.missing()) and jax.process_index() == 0:
            log.warning("captioning: without %s some metrics are null: %s", " and ".join(missing), caption_metrics.INSTALL)

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data) -> "Captioning":
        """Of every picture of a dataset, with all its captions as references."""
        return cls(encoder, tokenizer, open_source(data), data)

    @property
    def dataset(self) -> str:
        """SPEC/SPLIT, or the SPEC alone of what has no splits."""
        return self._pairs.name

    def run(self, params: Params) -> Metrics:
        return self.measure(params).metrics

    def measure(self, params: Params) -> Captioned:
        """With the metrics

        - `exact_match`, in [0, 1]: share of captions equal to one of their picture's references, as that is written or as the
          tokenizer gives it back (lower-cased, perhaps), but for what `caption_metrics.exact_match` looks past. A reference
          longer than the model's texts can't be met;
        - `perplexity`, from 1: exp of the mean of -log p over the tokens of every picture's main reference, the end's with them,
          each foreseen from the picture and the true tokens before it. A mean over tokens, not over captions;
        - `bleu` and `chrf` in [0, 100] and `cider` in [0, 10], see `caption_metrics`; None where their packages are missing.
        """

        def both(rows: dict[str, Array]) -> tuple[Array, ...]:
            written = self._captioner.write(params, rows["image"], rows["index"])
            return rows["index"], written.tokens, *self._score(params, rows["image"], rows["text"])

        parts = zip(*(made for made, _ in self.encoder.map_batches(self._pairs, both)), strict=True)
        index, tokens, nll, count = (np.concatenate([to_host(x) for x in part]) for part in parts)
        order = np.argsort(index)[(index < 0).sum() :]
        captions = {int(index[i]): self._tokenizer.decode(tokens[i]) for i in order}
        said, wanted = list(captions.values()), [self.references[i] for i in captions]
        metrics = {
            "exact_match": caption_metrics.exact_match(said, [self._accepted[i] for i in captions]),
            "perplexity": float(np.exp(nll[order].sum(dtype=np.float64) / count[order].sum())),
        }
        for metric in (caption_metrics.bleu, caption_metrics.chrf, caption_metrics.cider):
            metrics[metric.__name__] = metric(said, wanted)
        return Captioned(captions, metrics)

    def samples(self, found: Captioned, n: int) -> list[Sample]:
        """Of at most n pictures: the same ones every time, so that two steps can be compared."""
        chosen = np.random.default_rng(0).permutation(list(found.captions))[:n].tolist()
        return [self._sample(i, found.captions[i]) for i in chosen]

    def _sample(self, i: int, caption: str) -> Sample:
        example = self._source[i]
        right = caption_metrics.exact_match([caption], [self._accepted[i]]) == 1
        return Sample(example.picture, example.key, caption, example.captions[0], right)

    def _nll(self, params: Params, images: Array, tokens: Int[Array, "b t"]) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
        """The sum of -log p over each caption's tokens, and how many these are."""
        mesh, model = self.encoder.mesh, bind(self.encoder.model, params)
        _, _, states = model.encode_pairs(images, tokens, place=placement(mesh, self.encoder.model.dtype))
        real = lengths(tokens)
        return caption_nll(states, model.words, tokens, real, token_nll_on(mesh)), real - 1


def sheet(samples: Sequence[Sample], title: str) -> Image.Image:
    """Pictures with what was written of them, in black; in vermilion, above the main reference, where that is no reference."""

    def texts(sample: Sample) -> list[tuple[str, str]]:
        if sample.right:
            return [(sample.caption, RIGHT)]
        return [(sample.caption or "(nothing)", WRONG), (f"({sample.reference})", REFERENCE)]

    cells = [Cell(sample.picture, texts(sample)) for sample in samples]
    return contact_sheet(title, cells, 4 if len(cells) < WIDE else 8)


def save_png(path: str | Path, picture: Image.Image) -> None:
    """Whole or not at all."""
    with write_whole(path) as part:
        picture.save(part, "png")


def _with_round_trips(references: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[list[str]]:
    """Each picture's references, and what the tokenizer makes of those that it does not cut."""
    flat = [text for several in references for text in several]
    ids, truncated = tokenizer.encode(flat)
    again = iter([None if cut else tokenizer.decode(row) for row, cut in zip(ids, truncated, strict=True)])
    return [[*several, *(text for _ in several if (text := next(again)) is not None)] for several in references]


def _pair_batches(
    encoder: Encoder, tokenizer: Tokenizer, source: Source, data: config.Data, captions: Sequence[str]
) -> CachedBatches:
    """Every picture with the tokens of its one caption, as `text`."""
    tokens, truncated = tokenizer.encode(captions)
    if truncated.any() and jax.process_index() == 0:
        what = "%s: %d of %d main captions were cut to %d tokens, and perplexity is of what is left"
        log.warning(what, source.name, truncated.sum(), len(truncated), tokenizer.length)
    pictures = image_batches(encoder, source, data)

    def read() -> Iterator[Batch]:
        for batch in pictures:
            yield batch | {"text": tokens[np.maximum(batch["index"], 0)]}

    return CachedBatches(read, len(pictures), source.name, pictures.unit)
