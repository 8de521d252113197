"""Batches of NumPy arrays from a source, by Grain: shuffled and augmented for training, in order for evaluation.

The order of the data and every augmentation are a function of (seed, place), where place is the batch's number in the order. The
kind and number of workers, the number of processes and the step at which a run was resumed do not change a batch.
"""

import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from clipjax import config
from clipjax.config import ConfigError, require
from clipjax.data import reading
from clipjax.data.examples import EvaluationExample, Reader, TrainingExample
from clipjax.data.mixture import Mixture, batch_counts
from clipjax.data.order import derived
from clipjax.data.readers import training_order, training_reader
from clipjax.data.resize import check_resizer
from clipjax.data.sequential import Sequential
from clipjax.data.source import Source
from clipjax.data.teacher import Teacher
from clipjax.data.tokenizer import Tokenizer

Batch = dict[str, Any]  # arrays; of a single example also scalars of NumPy
SAMPLE = 1000  # examples that are read to find one with enough captions


class BatchStream(Iterator[Batch]):
    """Batches that workers prepare ahead of time. Close it, or leave its `with` block, to end the workers."""

    def __init__(self, dataset: grain.IterDataset, reader: Reader | None = None, *, shared: bool = False) -> None:
        """`reader`: is closed at the end. `shared`: batches arrive in shared memory. They are copied, and the shared memory is
        freed at once. Without the copy it would be freed at the end of the program, too late for Grain: the memory would leak."""
        self._iterator: Any = iter(dataset)
        self._reader, self._shared = reader, shared

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise ValueError("these batches are closed")
        batch = next(self._iterator)
        return {name: np.array(value) for name, value in batch.items()} if self._shared else batch

    def close(self) -> None:
        """Ends the workers, and drops Grain's iterator, whose destructor fails at the end of the program."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()
            if self._reader is not None:
                self._reader.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    teacher: Teacher | None = None,
) -> BatchStream:
    """This process's share of every global batch of `batch_size` examples, from `start_step` finished steps on. It never ends.
    The batches that `skip` names (`config.Train.skip`) are left out, and no image of them is read.

    A batch holds, with b = batch_size / process_count:

    - `image` uint8 [b, s, s, 3] and `text` int32 [b, t]; with `data.captions_per_image` = K > 1, `text` int32 [b, K, t];
    - `index` int32 [b], the example's number in the source. A replaced example keeps its own number;
    - `replaced` bool [b]: the example is bad, and another replaces it (`Order.stand_in`); `fault` int8 [b] is its kind, 1 + the
      index in FAULTS, or 0, and `fault_index` int32 [b] its number in the source, or -1;
    - `filtered` bool [b]: data.filter leaves the example out, and another replaces it;
    - `truncated` bool [b], or [b, K]: the caption was too long;
    - with `data.ids`, `id` int32 [b] of the main caption (`captions.caption_id`);
    - with `data.teacher`, `teacher_image` and `teacher_text` (of the main caption) float32 [b, f]. `teacher` is that file, if it
      has been opened already.

    At each visit one caption is chosen, or K of them (`captions.choose`). The shares of all processes, joined in the order of
    their indices, are the batch that a single process would get. No example comes twice in a batch: an epoch ends with its last
    full batch, and the next one is shuffled again.

    Raises ConfigError as `check_source` and `Teacher` do, and for a batch that the processes can't divide equally."""
    local = _local_batch(batch_size, process_count)
    check_source(source, data, batch_size)
    check_resizer(data.resizer)
    require(0 <= seed < 2**32, "seed", seed, "must lie in [0, 2^32)")
    if teacher is None and data.teacher is not None:
        teacher = Teacher(data.teacher, source)
    own = _Own(config.Train(skip=skip).place, start_step, batch_size, local, process_index)
    order = training_order(source, data, batch_size, seed, process_index * local, local)
    reader = training_reader(source, order, own.batch)
    make_example = TrainingExample(source, order, reader, tokenizer, data, image_size, teacher)
    # Grain gives each position of the order its own random generator. Positions count on over all epochs.
    positions = grain.MapDataset.range(sys.maxsize)
    at = _AtPosition(make_example, batch_size)
    examples = positions.random_map(at, seed=derived(seed, "choices"))
    return _open(positions.map(_Picked(examples, own)), data, local, reader)


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


def _open(examples: grain.MapDataset, data: config.Data, local: int, reader: Reader) -> BatchStream:
    """Starts the workers that `data` asks for. The end of the batches closes the reader."""
    if data.worker_kind == "threads":
        options = grain.ReadOptions(num_threads=data.workers, prefetch_buffer_size=2 * local)
        return BatchStream(examples.to_iter_dataset(options).batch(local, drop_remainder=True), reader)
    if not flags.FLAGS.is_parsed():  # Grain passes its own flags to its workers
        flags.FLAGS.mark_as_parsed()
    single = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    workers = grain.MultiprocessingOptions(num_workers=data.workers)
    batches = examples.batch(local, drop_remainder=True).to_iter_dataset(single)
    return BatchStream(batches.mp_prefetch(workers, worker_init_fn=_start_worker), shared=True)


def check_source(source: Source, data: config.Data, batch_size: int) -> None:
    """Raises ConfigError for a source with fewer examples than a batch, a mixture whose shares a batch can't have, or no example
    of `data.captions_per_image` captions."""
    n, k = len(source), data.captions_per_image
    remedy = f"is more than the {n} examples of {source.name}: use at most {n}"
    require(batch_size <= n, "train.batch_size", batch_size, remedy)
    if isinstance(source, Mixture):
        batch_counts(data, [len(part) for part in source.sources], batch_size)
    if k == 1:
        return
    most, sample = 0, np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).round().astype(int)).tolist()
    for i in sample:
        if (most := max(most, len(source.text(i).captions))) >= k:
            return
    remedy = f"no example of {source.name} has more than {most} ({len(sample):,} were looked at): use at most that many"
    raise ConfigError(f"data.captions_per_image = {k}: {remedy}, or set data.text_field to a field of several")


def _start_worker(_index: int, _count: int) -> None:
    """Makes a worker process log as the command line does, ignore signals, and end when the command line's process ends.

    A terminal or Slurm sends signals to all processes, but the command line still needs batches. A worker that waits for a
    process that has ended would wait for ever."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def eval_batches(
    source: Source,
    data: config.Data,
    *,
    image_size: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    captioned: bool = True,
) -> BatchStream:
    """This process's share of all examples, each once, in order, not augmented. Threads decode, whatever `data.worker_kind` is.
    `captioned`: an example without a caption is bad, unless the source has images alone.

    A batch holds `image` uint8 [b, s, s, 3], `index` int32 [b] (the example's; -1: padding), `label` int32 [b] (-1: none), and
    bool [b] `mask` (true for what counts: neither padding nor replaced) and `replaced`. The last batch is padded, so that shapes
    never change. All processes get the same number of batches."""
    local = _local_batch(batch_size, process_count)
    padded = math.ceil(len(source) / batch_size) * batch_size
    numbers = np.arange(len(source))
    read = Sequential(source, numbers[numbers // local % process_count == process_index])
    batches = (
        grain.MapDataset.range(padded)
        .map(EvaluationExample(source, read, data, image_size, captioned and source.captioned))
        .batch(local)
    )
    return BatchStream(batches[process_index::process_count].to_iter_dataset(_read_options(data.workers)))


def eval_captions(source: Source, quiet: bool = False) -> tuple[list[str], np.ndarray]:
    """Every caption of every example, m in all, and int32 [m]: the index of its example. Reads no image. Shows its progress
    unless `quiet`."""
    of_examples = [record.captions for record in reading.texts(source, quiet)]
    example = np.repeat(np.arange(len(of_examples), dtype=np.int32), [len(c) for c in of_examples])
    return [text for several in of_examples for text in several], example


def _local_batch(batch_size: int, process_count: int) -> int:
    divides = batch_size % process_count == 0
    require(divides, "batch_size", batch_size, f"must be a multiple of the number of processes, {process_count}")
    return batch_size // process_count


def _read_options(workers: int) -> grain.ReadOptions:
    """Each thread prepares one batch, and two more are ready."""
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 2)
