"""What evaluations give to the towers: the images of a source, its captions, and the prompts of its classes."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from clipjax import config, distributed
from clipjax.config import ConfigError
from clipjax.data.pipeline import eval_batches
from clipjax.data.source import Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import Batch, CachedBatches, Encoder
from clipjax.evals.prompts import fill
from clipjax.status import CertainFailure

log = logging.getLogger(__name__)


def eval_data(run: config.Run, spec: str, split: str, **fields: str | None) -> config.Data:
    """How a run reads a dataset to evaluate: resized as in training. `fields`: `image_field`, `text_field` and `label_field`; one
    that is None is the run's own if the run trains on this dataset, alone or with others. No example is filtered out."""
    own = next((part for part in run.data.parts if part.spec == spec), None)
    names = ("image_field", "text_field", "label_field")
    chosen = {name: fields.get(name) or getattr(own, name, None) for name in names}
    index = own.index if own else None
    return dataclasses.replace(run.data, spec=spec, split=split, sources=(), index=index, filter=config.Filter(), **chosen)


def require_captions(source: Source, task: str, some: bool = True) -> None:
    """Raises ConfigError for a source of images alone, and one without any caption (not `some`)."""
    if not (source.captioned and some):
        lacks = f"none of its {len(source):,} examples has a caption" if source.captioned else "it has images alone"
        remedy = f"{lacks}, and {task} needs captions: name their field (text_field; --text-field)"
        raise ConfigError(f"data.spec = {source.name!r}: {remedy}; there are {', '.join(source.fields) or 'no fields'}")


def image_batches(
    encoder: Encoder,
    source: Source,
    data: config.Data,
    *,
    labels: Int[np.ndarray, " n"] | None = None,
    captioned: bool = True,
) -> CachedBatches:
    """Every image, with `index` and `label`. One that can't be read is left out, with a warning; no other replaces it.

    `labels`: of all examples; None: the source's own. `captioned`: an image without a caption is left out, too, unless the source
    has images alone. Iteration raises CertainFailure where every image is left out."""
    size = encoder.model.image.image_size
    share = dict(process_index=jax.process_index(), process_count=jax.process_count())

    def read() -> Iterator[Batch]:
        unreadable = 0
        with eval_batches(source, data, image_size=size, batch_size=encoder.batch_size, captioned=captioned, **share) as batches:
            for batch in batches:
                unreadable += int(batch["replaced"].sum())
                index = np.where(batch["mask"], batch["index"], np.int32(-1))
                own = batch["label"] if labels is None else labels[np.maximum(index, 0)]
                counted = {"index": index, "label": np.where(batch["mask"], own, np.int32(-1))}
                yield {"image": batch["image"], **counted}
        if (unreadable := distributed.total(unreadable)) == len(source):
            raise CertainFailure(f"{source.name}: none of {unreadable:,} examples can be used; the log says why")
        if unreadable and jax.process_index() == 0:
            log.warning("%s: %d of %d examples can't be used and are left out", source.name, unreadable, len(source))

    return CachedBatches(read, encoder.batch_count(len(source)), source.name, "images")


def caption_batches(
    encoder: Encoder, tokenizer: Tokenizer, captions: Sequence[str], owner: Sequence[int] | np.ndarray, name: str
) -> CachedBatches:
    """Tokens of captions. `index` is `owner`, the example that each caption belongs to."""
    return _text_batches(encoder, tokenizer, captions, {"index": np.asarray(owner, np.int32)}, name, "captions")


def prompt_batches(encoder: Encoder, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str]) -> CachedBatches:
    """Tokens of every name in every template, class by class. `label` is the class."""
    labels = np.repeat(np.arange(len(names), dtype=np.int32), len(templates))
    return _text_batches(encoder, tokenizer, _Prompts(names, templates), {"label": labels}, "classes", "prompts")


class _Prompts:
    """A sequence of prompts. It makes a prompt only on access: 21,000 classes in 80 templates would be many strings."""

    def __init__(self, names: Sequence[str], templates: Sequence[str]) -> None:
        self._names, self._templates = names, templates

    def __len__(self) -> int:
        return len(self._names) * len(self._templates)

    def __getitem__(self, i: int) -> str:
        name, template = divmod(i, len(self._templates))
        return fill(self._templates[template], self._names[name])


def _text_batches(
    encoder: Encoder,
    tokenizer: Tokenizer,
    texts: Sequence[str] | _Prompts,
    columns: dict[str, np.ndarray],
    name: str,
    unit: str,
) -> CachedBatches:
    """Tokens of texts as `text`, with a row of each column. Warns once all are read if some texts were truncated."""

    def read() -> Iterator[Batch]:
        count = 0
        for rows, real in encoder.rows(len(texts)):
            tokens, truncated = tokenizer.encode([texts[int(i)] for i in rows])
            count += int((truncated & real).sum())
            yield {"text": tokens, **{k: np.where(real, v[rows], np.int32(-1)) for k, v in columns.items()}}
        if (count := distributed.total(count)) and jax.process_index() == 0:
            log.warning("%s: %d of %d %s were truncated to %d tokens", name, count, len(texts), unit, tokenizer.length)

    return CachedBatches(read, encoder.batch_count(len(texts)), name, unit)
