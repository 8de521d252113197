"""From records to arrays: an example of a training batch, with a stand-in for a bad one, and an example of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from clipjax import config
from clipjax.data import captions
from clipjax.data.faults import BAD_IMAGE, FAULTS, NO_CAPTION, Bad, undecodable, usable
from clipjax.data.filter import Filtered, check_text
from clipjax.data.images import image
from clipjax.data.ordering.order import Order
from clipjax.data.source import Record, Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.data.vectors import Vectors
from clipjax.status import CertainFailure

Arrays = dict[str, Any]  # of a single example also scalars of NumPy
TRIES = 64  # stand-ins that may be bad, too
COPIES = 2**20  # the number of the generator of changed captions, behind those of views
FILTERED_TRIES = 2000  # stand-ins that data.filter may leave out


class Reader(Protocol):
    """Reads the example `number`, which is at a place of a batch of the order. May raise anything."""

    def __call__(self, step: int, place: int, number: int) -> Record: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TrainingExample:
    """Makes the example at a place of a batch."""

    source: Source
    order: Order
    reader: Reader
    tokenizer: Tokenizer
    data: config.Data
    size: int
    teacher: Vectors | None = None
    embedded: Vectors | None = None  # of a tower that does not run
    labels: Vectors | None = None
    parts: tuple[config.Data, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", self.data.parts)

    def __call__(self, step: int, place: int, rng: np.random.Generator) -> Arrays:
        """`rng`: of this place of this batch.

        Raises CertainFailure if none of TRIES stand-ins can be used, and if data.filter leaves out too many."""
        number = first = self.order.one(step, place)
        tried: list[str | None] = []  # what was wrong with the examples so far, of FAULTS; None: data.filter left it out
        failed, arrays = "", None
        while arrays is None:
            try:
                arrays = self._arrays(step, place, number, rng)
            except Filtered:
                tried.append(None)
            except Bad as bad:
                self.source.warn(bad.key, f"is replaced by another, because it {bad}")
                tried.append(bad.fault)
                failed = failed or bad.key
            # Here, and not where the exceptions are caught: the one that is raised would hold them, and they what was being read.
            if arrays is None:
                self._check_tries(tried, failed)
                number = self.order.stand_in(step, place, len(tried))
        # Only what this example is itself counts. A stand-in is one of another batch, where it is counted.
        own = tried[0] if tried else None
        fault = 0 if own is None else 1 + FAULTS.index(own)
        replaced = {"fault": np.int8(fault), "fault_index": np.int32(first if fault else -1), "replaced": np.bool_(fault)}
        return arrays | replaced | {"index": np.int32(first), "filtered": np.bool_(tried[:1] == [None])}

    def _check_tries(self, tried: list[str | None], failed: str) -> None:
        """Raises CertainFailure where so many examples in a row could not be used that no other will be tried."""
        filtered = tried.count(None)
        if filtered > min(FILTERED_TRIES, len(self.source)):
            remedy = "are left out, one after the other; loosen it, or filter the files once and for all"
            raise CertainFailure(f"data.filter: {filtered:,} examples of {self.source.name} {remedy}")
        if len(tried) - filtered > TRIES:
            kinds = "; ".join(f"{name}: {tried.count(name)}" for name in FAULTS if name in tried)
            remedy = "the log has the reasons; check the files and their paths"
            raise CertainFailure(f"{self.source.name}: {failed} and {TRIES} stand-ins are bad ({kinds}): {remedy}")

    def _arrays(self, step: int, place: int, number: int, rng: np.random.Generator) -> Arrays:
        """The arrays of the example `number`. Raises Bad, or Filtered."""
        data, k = self.parts[self.source.part_of(number)[0]], self.data.texts_per_image
        record = usable(lambda: self._read(step, place, number), number, imaged=self.imaged)
        if self.embedded is not None and number not in self.embedded:
            raise Bad(BAD_IMAGE, record.key)
        record = self.wanted(data.filter, record)
        chosen = self.texts(record, rng)
        try:
            pixels = {"image": image.training(record.image, self.size, data, rng)} if self.imaged else {}
            tokens, truncated = self.tokenizer.encode(chosen)
        except Filtered:
            raise
        except Exception as e:  # a decoder may raise anything, and a bad image must not end a run
            raise undecodable(record.key, e) from e
        arrays: Arrays = {
            **pixels,
            "text": tokens if k > 1 else tokens[0],
            "truncated": truncated if k > 1 else truncated[0],
        }
        if data.ids == "caption":
            arrays["id"] = np.int32(captions.caption_id(record.captions[0]))
        for vectors in (self.teacher, self.embedded, self.labels):
            arrays |= {} if vectors is None else vectors[number]
        return arrays

    def wanted(self, conditions: config.Filter, record: Record) -> Record:
        """The record with the captions that may be used. Raises Bad where one of data.captions is missing, or Filtered."""
        if not (places := self.data.captions):
            return check_text(conditions, record)
        if max(places) >= len(record.captions):
            raise Bad(NO_CAPTION, record.key)
        placed = replace(record, captions=tuple(record.captions[i] for i in places), chances=None)
        if len((record := check_text(conditions, placed)).captions) < len(places):
            raise Filtered("one of data.captions has no wanted length")
        return record

    def texts(self, record: Record, rng: np.random.Generator) -> list[str]:
        """The texts of a visit: captions, and changed copies of the first. `record`: from `wanted`."""
        n, data = len(record.captions), self.data
        places = range(n) if data.captions else captions.choose(n, data.captions_per_image, rng, record.chances)
        chosen = [record.captions[i] for i in places]
        if data.text_augment.count == 0:
            return chosen
        own = image.generator(rng, COPIES)
        return chosen + [captions.changed(chosen[0], data.text_augment, own) for _ in range(data.text_augment.count)]

    @property
    def imaged(self) -> bool:
        """Whether examples have pixels: not where `embedded` stands for the images."""
        return self.embedded is None or "image" not in self.embedded.use.arrays

    def _read(self, step: int, place: int, number: int) -> Record:
        """The record, without its image where it is not needed and nothing reads it anyway, as chunks do."""
        if self.imaged or self.data.order != "random":
            return self.reader(step, place, number)
        return self.source.text(number)


@dataclass(frozen=True)
class EvaluationExample:
    """Makes an example from its number, or padding from a number past the source's end."""

    source: Source
    read: Callable[[int], Record]  # may raise anything
    data: config.Data
    size: int

    def __call__(self, number: int) -> Arrays:
        real, good, captioned, label = number < len(self.source), False, False, -1
        pixels = np.zeros((self.size, self.size, 3), np.uint8)
        if real:
            try:
                record = usable(lambda: self.read(number), number, captioned=False)
                captioned, label = bool(record.captions), record.label
                pixels, good = self._pixels(record), True
            except Bad as bad:
                self.source.warn(bad.key, f"is left out, because it {bad}")
        return {
            "image": pixels,
            "index": np.int32(number if real else -1),
            "label": np.int32(label),
            "captioned": np.bool_(captioned),
            "mask": np.bool_(good),
            "replaced": np.bool_(real and not good),
        }

    def _pixels(self, record: Record) -> np.ndarray:
        try:
            return image.evaluation(record.image, self.size, self.data)
        except Exception as e:  # a decoder may raise anything
            raise undecodable(record.key, e) from e
