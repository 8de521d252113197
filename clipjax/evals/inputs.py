"""What evaluations give to the towers: the images of a source, its captions, and the prompts of its classes."""

import dataclasses
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from clipjax import config, distributed
from clipjax.config import ConfigError
from clipjax.data.pipeline import eval_batches
from clipjax.data.source import Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals import identity
from clipjax.evals.encoder import Batch, CachedBatches, Content, Encoder
from clipjax.evals.prompts import fill
from clipjax.status import CertainFailure

log = logging.getLogger(__name__)


def eval_data(data: config.Data, spec: str, split: str, **fields: str | None) -> config.Data:
    """How a run with this data reads a dataset to evaluate: resized as in training. `fields`: `image_field`, `text_field` and
    `label_field`; one that is None is the run's own if the run trains on this dataset, alone or with others. No example is
    filtered out."""
    own = next((part for part in data.parts if part.spec == spec), None)
    names = ("image_field", "text_field", "label_field")
    chosen = {name: fields.get(name) or getattr(own, name, None) for name in names}
    index = own.index if own else None
    return dataclasses.replace(data, spec=spec, split=split, sources=(), index=index, filter=config.Filter(), **chosen)


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
        with eval_batches(source, data, image_size=size, batch_size=encoder.batch_size, **share) as batches:
            for batch in batches:
                own = {"usable": batch["mask"], "captioned": batch["captioned"], "own_label": batch["label"]}
                yield {"image": batch["image"], "row": batch["index"], "checksum": _checksums(batch["image"]), **own}

    def complete(batches: Iterable[Batch]) -> Iterator[Batch]:
        left_out, silent, checksums = 0, 0, []
        for batch in batches:
            row, used = batch["row"], batch["usable"]
            if captioned and source.captioned:
                silent += int((used & ~batch["captioned"]).sum())
                used = used & batch["captioned"]
            left_out += int((row >= 0).sum() - used.sum())
            checksums.append(np.where(used[:, None], batch["checksum"], np.uint32(0)))
            label = batch["own_label"] if labels is None else labels[np.maximum(row, 0)]
            yield batch | {"index": np.where(used, row, np.int32(-1)), "label": np.where(used, label, np.int32(-1))}
        left_out, silent = distributed.total(left_out), distributed.total(silent)
        encoder.usable[source.name] = len(source) - left_out, left_out
        if left_out == len(source):
            raise CertainFailure(f"{source.name}: none of {left_out:,} examples can be used; the log says why")
        if left_out and jax.process_index() == 0:
            why = f" ({silent} have no caption)" if silent else ""
            log.warning("%s: %d of %d examples can't be used and are left out%s", source.name, left_out, len(source), why)
        if (copies := _copies(np.concatenate(checksums))) and jax.process_index() == 0:
            log.warning("%s: %d of %d images are copies of others, to the pixel", source.name, copies, len(source))

    kept = ("usable", "captioned", "own_label", "checksum")
    content = Content(len(source), lambda: identity.of_images(source, data), complete, kept)
    count = encoder.batch_count(len(source))
    return CachedBatches(lambda: complete(read()), count, source.name, "images", content=content)


def _checksums(images: np.ndarray) -> Int[np.ndarray, "b 2"]:
    """By which equal images are found: two of 32 bits, because one alone is the same by chance in some 100,000 images."""
    return np.array([(zlib.crc32(x), zlib.adler32(x)) for x in images], np.uint32)


def _copies(own: Int[np.ndarray, "b 2"]) -> int:
    """How many images equal an earlier one, over all processes, by their checksums; 0, 0: none. All of them must call this."""
    every = own if jax.process_count() == 1 else multihost_utils.process_allgather(own, tiled=True)
    real = every[every.any(1)]
    return len(real) - len(np.unique(real, axis=0))


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
            yield {"text": tokens, "row": np.where(real, rows, -1).astype(np.int32)}
        if (count := distributed.total(count)) and jax.process_index() == 0:
            log.warning("%s: %d of %d %s were truncated to %d tokens", name, count, len(texts), unit, tokenizer.length)

    def complete(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            row = batch["row"]
            yield batch | {k: np.where(row >= 0, v[np.maximum(row, 0)], np.int32(-1)) for k, v in columns.items()}

    content = Content(len(texts), lambda: identity.of_texts(tokenizer, texts), complete)
    return CachedBatches(lambda: complete(read()), encoder.batch_count(len(texts)), name, unit, content=content)
