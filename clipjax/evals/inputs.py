"""What evaluations give to the towers: the images of a source, its captions, and the prompts of its classes."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from clipjax import config, distributed
from clipjax.config import ConfigError
from clipjax.data import reading
from clipjax.data.pipeline import eval_batches
from clipjax.data.source import Record, Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import Batch, CachedBatches, Encoder
from clipjax.evals.prompts import classnames, fill
from clipjax.status import CertainFailure

log = logging.getLogger(__name__)


def eval_data(run: config.Run, spec: str, split: str) -> config.Data:
    """How a run reads a dataset to evaluate: resized as in training, and by the same fields if it is the same dataset."""
    data = dataclasses.replace(run.data, spec=spec, split=split)
    return data if spec == run.data.spec else dataclasses.replace(data, image_field=None, text_field=None)


def image_batches(encoder: Encoder, source: Source, data: config.Data) -> CachedBatches:
    """Every image, with `index` and `label`. One that can't be read is left out, with a warning; no other replaces it."""
    size = encoder.model.image.image_size
    share = dict(process_index=jax.process_index(), process_count=jax.process_count())

    def read() -> Iterator[Batch]:
        unreadable = 0
        with eval_batches(source, data, image_size=size, batch_size=encoder.batch_size, **share) as batches:
            for batch in batches:
                unreadable += int(batch["replaced"].sum())
                counted = {k: np.where(batch["mask"], batch[k], np.int32(-1)) for k in ("index", "label")}
                yield {"image": batch["image"], **counted}
        if (unreadable := distributed.total(unreadable)) == len(source):
            raise CertainFailure(f"{source.name}: none of {unreadable:,} examples can be used; the log says why")
        if unreadable and jax.process_index() == 0:
            log.warning("%s: %d of %d images can't be read and are left out", source.name, unreadable, len(source))

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


def with_classes(source: Source, file: str | None) -> tuple[Source, tuple[str, ...]]:
    """The source with labels, and the name of each label: the lines of `file`, else the dataset's own names.

    In a dataset without labels (a tsv), an example's class is the one whose name is its main caption. Raises ConfigError where
    there are no names, where a file does not name as many classes as the dataset has, or where a caption is no class name.
    """
    own = source.classnames
    if file is None:
        if own is None:
            raise ConfigError(f"classnames = None: {source.name} has none of its own: give a file with one name a line")
        return source, own
    names = classnames(file)
    if own is None:
        return _ByCaption(source, names, file), names
    remedy = f"names {len(names)} classes, but {source.name} has {len(own)}: write one name a line, in the dataset's order"
    config.require(len(names) == len(own), "classnames", file, remedy)
    return source, names


class _ByCaption(Source):
    """A source whose classes are its main captions."""

    def __init__(self, source: Source, names: tuple[str, ...], file: str) -> None:
        super().__init__()
        self.name, self.fields, self.classnames, self._source = source.name, source.fields, names, source
        labels = {name: i for i, name in enumerate(names)}
        main = [record.captions[:1] for record in reading.texts(source, quiet=jax.process_index() > 0)]
        self._labels = [labels.get(caption[0], -1) if caption else -1 for caption in main]
        unknown = sorted({caption[0] for caption, label in zip(main, self._labels, strict=True) if caption and label < 0})
        remedy = f"{len(unknown)} captions of {source.name} are no class name: add {', '.join(map(repr, unknown[:5]))}"
        config.require(not unknown, "classnames", file, remedy + (", ..." if len(unknown) > 5 else ""))

    def __len__(self) -> int:
        return len(self._source)

    def _record(self, i: int) -> Record:
        return dataclasses.replace(self._source.record(i), label=self._labels[i])
