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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from clipjax import config
from clipjax.config import ConfigError, require
from clipjax.data import captions
from clipjax.data.image import fit, min_decoded_side, transform
from clipjax.data.order import Order, derived
from clipjax.data.source import Source
from clipjax.data.teacher import Teacher
from clipjax.data.tokenizer import Tokenizer

Batch = dict[str, Any]  # arrays; of a single example also scalars of NumPy
SAMPLE = 1000  # examples that are read to find one with enough captions


class BatchStream(Iterator[Batch]):
    """Batches that workers prepare ahead of time. Close it, or leave its `with` block, to end the workers."""

    def __init__(self, dataset: grain.IterDataset, *, shared: bool = False) -> None:
        """`shared`: batches arrive in shared memory. They are copied, and the shared memory is freed
        at once. Without the copy it would be freed at the end of the program, too late for Grain: the memory would leak."""
        self._iterator: Any = iter(dataset)
        self._shared = shared

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

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _TrainExample:
    """Makes the example at a position of the order. Grain calls it in a worker, with a random generator of this position."""

    source: Source
    order: Order
    tokenizer: Tokenizer
    data: config.Data
    size: int
    teacher: Teacher | None

    def __call__(self, position: int, rng: np.random.Generator) -> Batch:
        data, k, index = self.data, self.data.captions_per_image, self.order[position]
        example = self.source.read(index, min_decoded_side(self.size, data.augment))
        chosen = [example.captions[i] for i in captions.choose(len(example.captions), k, rng)]
        tokens, truncated = self.tokenizer.encode(chosen)
        arrays: Batch = {
            "image": transform(example.image, self.size, data.resize, data.augment, rng),
            "text": tokens if k > 1 else tokens[0],
            "index": np.int32(index),
            "replaced": np.bool_(example.replaced),
            "truncated": truncated if k > 1 else truncated[0],
        }
        if data.ids == "caption":
            arrays["id"] = np.int32(captions.caption_id(example.captions[0]))
        return arrays if self.teacher is None else arrays | self.teacher[example.index]


@dataclass(frozen=True)
class _EvalExample:
    """Makes an example from its index, or padding from an index past the source's end."""

    source: Source
    data: config.Data
    size: int

    def __call__(self, index: int) -> Batch:
        real = index < len(self.source)
        example = self.source.read(index if real else 0)
        return {
            "image": fit(example.image, self.size, self.data.resize),
            "index": np.int32(index if real else -1),
            "label": np.int32(example.label),
            "mask": np.bool_(real and not example.replaced),
            "replaced": np.bool_(real and example.replaced),
        }


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
    - `replaced` bool [b]: the image could not be read, and another example replaces it;
    - `truncated` bool [b], or [b, K]: the caption was too long;
    - with `data.ids`, `id` int32 [b] of the main caption (`captions.caption_id`);
    - with `data.teacher`, `teacher_image` and `teacher_text` (of the main caption) float32 [b, f]. `teacher` is that file, if it
      has been opened already.

    At each visit one caption is chosen, or K of them (`captions.choose`). The shares of all processes, joined in the order of
    their indices, are the batch that a single process would get. No example comes twice in a batch: an epoch ends with its last
    full batch, and the next one is shuffled again.

    Raises ConfigError as `check_source` and `Teacher` do, and for a batch that the processes can't divide equally."""
    n = len(source)
    local = _local_batch(batch_size, process_count)
    check_source(source, data, batch_size)
    require(0 <= seed < 2**32, "seed", seed, "must lie in [0, 2^32)")
    if teacher is None and data.teacher is not None:
        teacher = Teacher(data.teacher, source)
    make_example = _TrainExample(source, Order(n, batch_size, seed), tokenizer, data, image_size, teacher)
    # From positions, not from examples: Grain would decode all images of a batch before it augments the first. They count on
    # over all epochs, and random_map keys its generator by them.
    positions = grain.MapDataset.range(sys.maxsize).random_map(make_example, seed=derived(seed, "choices"))
    batches = positions.batch(local, drop_remainder=True)
    return _open(_without(batches[process_index::process_count], skip)[start_step:], data)


def _without(batches: grain.MapDataset, skip: tuple[tuple[int, int], ...]) -> grain.MapDataset:
    """`batches` without the ranges of `skip`, which ascend."""
    if not skip:
        return batches
    starts, ends = (0, *(end for _, end in skip)), (*(first for first, _ in skip), None)
    parts = [batches[start:end] for start, end in zip(starts, ends, strict=True) if start != end]
    return grain.MapDataset.concatenate(parts)


def _open(batches: grain.MapDataset, data: config.Data) -> BatchStream:
    """Starts the workers that `data` asks for."""
    if data.worker_kind == "threads":
        return BatchStream(batches.to_iter_dataset(_read_options(data.workers)))
    if not flags.FLAGS.is_parsed():  # Grain passes its own flags to its workers
        flags.FLAGS.mark_as_parsed()
    single = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    workers = grain.MultiprocessingOptions(num_workers=data.workers)
    return BatchStream(batches.to_iter_dataset(single).mp_prefetch(workers, worker_init_fn=_start_worker), shared=True)


def check_source(source: Source, data: config.Data, batch_size: int) -> None:
    """Raises ConfigError for a source with fewer examples than a batch, or no example of `data.captions_per_image` captions."""
    n, k = len(source), data.captions_per_image
    remedy = f"is more than the {n} examples of {source.name}: use at most {n}"
    require(batch_size <= n, "train.batch_size", batch_size, remedy)
    if k == 1:
        return
    most, sample = 0, np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).round().astype(int)).tolist()
    for i in sample:
        if (most := max(most, len(source.record(i).captions))) >= k:
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
) -> BatchStream:
    """This process's share of all examples, each once, in order, not augmented. Threads decode, whatever `data.worker_kind` is.

    A batch holds `image` uint8 [b, s, s, 3], `index` int32 [b] (the example's; -1: padding), `label` int32 [b] (-1: none), and
    bool [b] `mask` (true for what counts: neither padding nor replaced) and `replaced`. The last batch is padded, so that shapes
    never change. All processes get the same number of batches."""
    local = _local_batch(batch_size, process_count)
    padded = math.ceil(len(source) / batch_size) * batch_size
    batches = grain.MapDataset.range(padded).map(_EvalExample(source, data, image_size)).batch(local)
    return BatchStream(batches[process_index::process_count].to_iter_dataset(_read_options(data.workers)))


def eval_captions(source: Source) -> tuple[list[str], np.ndarray]:
    """Every caption of every example, m in all, and int32 [m]: the index of its example. Decodes no image."""
    of_examples = [source.record(i).captions for i in range(len(source))]
    example = np.repeat(np.arange(len(of_examples), dtype=np.int32), [len(c) for c in of_examples])
    return [text for several in of_examples for text in several], example


def _local_batch(batch_size: int, process_count: int) -> int:
    divides = batch_size % process_count == 0
    require(divides, "batch_size", batch_size, f"must be a multiple of the number of processes, {process_count}")
    return batch_size // process_count


def _read_options(workers: int) -> grain.ReadOptions:
    """Each thread prepares one batch, and two more are ready."""
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 2)
