"""Batches of NumPy arrays from a source: shuffled and augmented for training, in order for evaluation.

The order of the data and every augmentation are a function of (seed, place), where place is the batch's number in the order. The
kind and number of workers, the number of processes and the step at which a run was resumed do not change a batch.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int

from clipjax import config
from clipjax.config import ConfigError, require
from clipjax.data import reading
from clipjax.data.examples import EvaluationExample, TrainingExample
from clipjax.data.images.resize import check_resizer
from clipjax.data.ordering.mixture import Mixture, batch_counts
from clipjax.data.ordering.order import derived
from clipjax.data.ordering.readers import training_order, training_reader
from clipjax.data.ordering.sequential import Sequential
from clipjax.data.prefetch import Batch, BatchStream, Workers
from clipjax.data.source import Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.data.vectors import LABELS, Vectors

SCALARS = 64  # bytes of an example, at most, beside its image, text and vectors
SAMPLE = 1000  # examples that are read to find one with enough captions


def train_batches(
    source: Source,
    tokenizer: Tokenizer,
    data: config.Data,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    skip: tuple[tuple[int, int], ...] = (),
    process_index: int = 0,
    process_count: int = 1,
    teacher: Vectors | None = None,
    embedded: Vectors | None = None,
    labels: Vectors | None = None,
) -> BatchStream:
    """This process's share of every global batch of `batch_size` examples, from `start_step` finished steps on. It never ends.
    The batches that `skip` names (`config.Train.skip`) are left out, and no image of them is read.

    A batch holds, with b = batch_size / process_count:

    - `image` uint8 [b, s, s, 3]; with V > 1 of `data.views`, [b, V, s, s, 3];
    - `text` int32 [b, t]; with `data.texts_per_image` = K > 1, [b, K, t]: captions, and then changed copies of the first;
    - `index` int32 [b], the example's number in the source. A replaced example keeps its own number;
    - `replaced` bool [b]: the example is bad, and another replaces it (`Order.stand_in`); `fault` int8 [b] is its kind, 1 + the
      index in FAULTS, or 0, and `fault_index` int32 [b] its number in the source, or -1;
    - `filtered` bool [b]: data.filter leaves the example out, and another replaces it;
    - `truncated` bool [b], or [b, K]: the caption was too long;
    - with `data.ids`, `id` int32 [b] of the main caption (`captions.caption_id`);
    - with `data.teacher`, `teacher_image` and `teacher_text` (of the main caption) float32 [b, f]. `teacher`: that file, open;
    - with `data.labels`, `label` int32 [b, l]: classes, -1: none. `labels`: that file, open;
    - with `embedded`, of a tower that does not run, `embedded` float32 [b, e]; where that is the image tower, no `image`.

    At each visit captions are chosen (`captions.choose`), or those in the places `data.captions` are taken. The shares of all
    processes, joined in the order of their indices, are the batch that a single process would get. No example comes twice in a
    batch: an epoch ends with its last full batch, and the next one is shuffled again.

    Raises ConfigError as `check_source` and `Vectors` do, and for a batch that the processes can't divide equally."""
    local = _local_batch(batch_size, process_count)
    check_source(source, data, batch_size)
    require(0 <= seed < 2**32, "seed", seed, "must lie in [0, 2^32)")
    own = _Own(config.Train(skip=skip).place, start_step, batch_size, local, process_index)
    order = training_order(source, data, batch_size, seed, process_index * local, local)
    reader = training_reader(source, order, own.batch)
    teacher = teacher or (Vectors(data.teacher, source) if data.teacher else None)
    keyed = teacher, embedded, labels or (Vectors(data.labels, source, use=LABELS) if data.labels else None)
    make_example = TrainingExample(source, order, reader, tokenizer, data, image_size, *keyed)
    numbers = tokenizer.length * data.texts_per_image + sum(v.numbers for v in keyed if v is not None)
    workers = _workers(data, image_size, 4 * numbers + SCALARS)
    return BatchStream(_Picked(_by_position(make_example, batch_size, seed), own), local, workers, closing=reader.close)


def _by_position(make_example: TrainingExample, batch_size: int, seed: int) -> grain.MapDataset:
    """The example at each position of the order, which counts on over all epochs. Each has a random generator of its own from
    Grain."""
    return grain.MapDataset.range(sys.maxsize).random_map(_AtPosition(make_example, batch_size), seed=derived(seed, "choices"))


@dataclass(frozen=True)
class _AtPosition:
    """Makes the example at a position of the order."""

    make_example: TrainingExample
    batch_size: int

    def __call__(self, position: int, rng: np.random.Generator) -> Batch:
        return self.make_example(*divmod(position, self.batch_size), rng)


@dataclass(frozen=True)
class _Own:
    """The positions of this process's examples, in the order in which it needs them."""

    batch_of_step: Callable[[int], int]  # which leaves out those of train.skip
    start_step: int
    batch_size: int  # global
    local: int
    process_index: int

    def __call__(self, i: int) -> int:
        step, place = divmod(i, self.local)
        return self.batch(step) * self.batch_size + self.process_index * self.local + place

    def batch(self, step: int) -> int:
        """The batch of the order that is the process's `step`-th."""
        return self.batch_of_step(self.start_step + step)


@dataclass(frozen=True)
class _Picked:
    """Element i is the example at position own(i)."""

    examples: grain.MapDataset
    own: _Own

    def __call__(self, i: int) -> Batch:
        example = self.examples[self.own(i)]
        assert example is not None  # only a filtered dataset has gaps
        return example


def _workers(data: config.Data, size: int, others: int) -> Workers:
    """Those that `data` asks for. `others`: the bytes of an example beside its image."""
    return Workers(data.worker_kind, data.workers, data.prefetch_bytes, 3 * size * size * data.views_per_image + others)


def check_source(source: Source, data: config.Data, batch_size: int) -> None:
    """Raises ConfigError for a source with fewer examples than a batch, a mixture whose shares a batch can't have, images
    alone, or no example of `data.captions_per_image` captions, or with a caption in all places of `data.captions`; and where the
    resizer's package is absent."""
    check_resizer(data.resizer)
    n, k = len(source), max((data.captions_per_image, *(place + 1 for place in data.captions)))
    remedy = f"is more than the {n} examples of {source.name}: use at most {n}"
    require(batch_size <= n, "train.batch_size", batch_size, remedy)
    if isinstance(source, Mixture):
        batch_counts(data, [len(part) for part in source.sources], batch_size)
    if not source.captioned:
        remedy = f"{source.name} has images alone, and training needs captions: name their field"
        raise ConfigError(f"data.text_field = {data.text_field!r}: {remedy}; there are {', '.join(source.fields)}")
    if k == 1:
        return
    most, sample = 0, np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).round().astype(int)).tolist()
    for i in sample:
        if (most := max(most, len(source.text(i).captions))) >= k:
            return
    field = f"data.captions = {data.captions}" if data.captions else f"data.captions_per_image = {k}"
    remedy = f"no example of {source.name} has more than {most} captions ({len(sample):,} were looked at): use at most that many"
    raise ConfigError(f"{field}: {remedy}, or set data.text_field to a field of several")


def eval_batches(
    source: Source,
    data: config.Data,
    *,
    image_size: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchStream:
    """This process's share of all examples, each once, in order, not augmented. Threads decode, whatever `data.worker_kind` is.

    A batch holds `image` uint8 [b, s, s, 3], `index` int32 [b] (the example's; -1: padding), `label` int32 [b] (-1: none), and
    bool [b] `captioned`, `mask` (true for what counts: neither padding nor replaced) and `replaced`. The last batch is padded, so
    that shapes never change. All processes get the same number of batches."""
    local = _local_batch(batch_size, process_count)
    numbers = np.arange(len(source))
    read = Sequential(source, numbers[numbers // local % process_count == process_index])
    own = _Own(lambda step: step, 0, batch_size, local, process_index)
    workers = _workers(dataclasses.replace(data, worker_kind="threads"), image_size, SCALARS)
    examples = EvaluationExample(source, read, data, image_size)
    return BatchStream(lambda i: examples(own(i)), local, workers, math.ceil(len(source) / batch_size))


@dataclass(frozen=True)
class Captions:
    """The m captions of a dataset, example by example."""

    texts: Sequence[str]  # m
    example: Int[np.ndarray, " m"]  # int32, ascending: the example that each is of
    keys: Sequence[str]  # of all examples

    def place(self) -> Int[np.ndarray, " m"]:
        """The place of each among its example's captions, from 0."""
        return np.arange(len(self.example)) - np.searchsorted(self.example, self.example)

    def per_example(self) -> int:
        """How many captions an example has; 0: not all that have any have the same number."""
        counts = np.unique(np.unique(self.example, return_counts=True)[1])
        return int(counts[0]) if len(counts) == 1 else 0

    def shared(self) -> int:
        """How many are word by word a caption of another example, too."""
        first: dict[str, int] = {}
        several = {text for text, i in zip(self.texts, self.example.tolist(), strict=True) if first.setdefault(text, i) != i}
        return sum(text in several for text in self.texts)


def eval_captions(source: Source, quiet: bool = False) -> Captions:
    """Every caption of every example. Reads no image. Shows its progress unless `quiet`."""
    records = [(record.key, record.captions) for record in reading.texts(source, quiet)]
    example = np.repeat(np.arange(len(records), dtype=np.int32), [len(captions) for _, captions in records])
    return Captions([text for _, captions in records for text in captions], example, [key for key, _ in records])


def _local_batch(batch_size: int, process_count: int) -> int:
    divides = batch_size % process_count == 0
    require(divides, "batch_size", batch_size, f"must be a multiple of the number of processes, {process_count}")
    return batch_size // process_count
