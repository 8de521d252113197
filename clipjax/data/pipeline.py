"""Batches of NumPy arrays from a source, by Grain: shuffled and augmented for training, in order for evaluation.

The order of the data and every augmentation are a function of (seed, step): neither the workers' kind or number, nor the
number of hosts, nor where a run was resumed changes a batch.
"""

import logging
import math
import multiprocessing
import os
import signal
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
from clipjax.data.image import fit, least_side, transform
from clipjax.data.source import Source
from clipjax.data.teacher import Teacher
from clipjax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
SAMPLE = 1000  # examples looked at before it is said that none has so many captions


class BatchStream(Iterator[Batch]):
    """Batches that workers make ahead of time. Close it, or leave its `with` block, to end the workers."""

    def __init__(self, dataset: grain.IterDataset, *, shared: bool = False) -> None:
        """`shared`: batches arrive in shared memory. They are copied out of it, so that it is freed at once and not when the
        last user lets go, which at the end of the program is too late for Grain and leaks it."""
        self._iterator: Any = iter(dataset)
        self._shared = shared

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise ValueError("these batches are closed")
        batch = next(self._iterator)
        return {name: np.array(value) for name, value in batch.items()} if self._shared else batch

    def close(self) -> None:
        """Ends the workers. Lets go of Grain's iterator, whose destructor complains at the end of the program."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _TrainExample:
    """From an index to a finished example; Grain calls it in a worker, with a generator of this index and epoch."""

    source: Source
    tokenizer: Tokenizer
    data: config.Data
    size: int
    teacher: Teacher | None

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        example, k = self.source.read(index, least_side(self.size, self.data.augment)), self.data.captions_per_image
        shown = [example.captions[i] for i in captions.drawn(len(example.captions), k, rng)]
        tokens, truncated = self.tokenizer.encode(shown)
        made = {
            "image": transform(example.picture, self.size, self.data.resize, self.data.augment, rng),
            "text": tokens if k > 1 else tokens[0],
            "index": np.int32(index),
            "replaced": np.bool_(example.replaced),
            "truncated": truncated if k > 1 else truncated[0],
        }
        if self.data.ids == "caption":
            made["id"] = np.int32(captions.caption_id(example.captions[0]))
        return made if self.teacher is None else made | self.teacher[example.index]


@dataclass(frozen=True)
class _EvalExample:
    source: Source
    data: config.Data
    size: int

    def __call__(self, index: int) -> Batch:
        real = index < len(self.source)
        example = self.source.read(index if real else 0)
        return {
            "image": fit(example.picture, self.size, self.data.resize),
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
    process_index: int = 0,
    process_count: int = 1,
    teacher: Teacher | None = None,
) -> BatchStream:
    """This host's share of every global batch of `batch_size` examples, for ever, from `start_step` finished steps on.

    A batch has `image` uint8 [b, s, s, 3], `text` int32 [b, t], `index` int32 [b] (of the example; also where another stands in
    for it, so that none comes twice), and `replaced` (the picture could not be read, another stands in) and `truncated` (the
    caption was too long) bool [b], b = batch_size / process_count. The hosts' shares in the order of their indices are what a
    single host would get. No example comes twice in a batch: an epoch ends with its last whole batch, and the next one is
    shuffled anew.

    Of several captions one is drawn at each visit. With `data.captions_per_image` = K > 1, `text` is [b, K, t] and `truncated`
    [b, K]: the main caption, then K - 1 of the others (`captions.drawn`). With `data.ids` there is `id` int32 [b], that of the
    main caption (`captions.caption_id`); with `data.teacher` `teacher_image` and `teacher_text` float32 [b, f], the latter of the
    main caption. `teacher` is that file, where it has been opened already.

    Raises ConfigError as `check_source` and `Teacher` do, and for a batch that does not divide over the hosts."""
    n = len(source)
    local = _local_batch(batch_size, process_count)
    check_source(source, data, batch_size)
    require(0 <= seed < 2**32, "seed", seed, "must lie in [0, 2^32)")
    if teacher is None and data.teacher is not None:
        teacher = Teacher(data.teacher, source)
    load = _TrainExample(source, tokenizer, data, image_size, teacher)
    # From indices, not from the source: Grain would decode a whole batch before it augments the first picture.
    examples = grain.MapDataset.range(n).seed(seed).shuffle()[: n // batch_size * batch_size]
    # The generator of random_map is keyed by the index it sees here: that within the global order of all epochs.
    batches = examples.random_map(load).repeat().batch(local, drop_remainder=True)
    share = batches[process_index::process_count][start_step:]
    if data.worker_kind == "threads":
        return BatchStream(share.to_iter_dataset(_read_options(data.workers)))
    if not flags.FLAGS.is_parsed():  # Grain hands its own flags to its workers
        flags.FLAGS.mark_as_parsed()
    one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    workers = grain.MultiprocessingOptions(num_workers=data.workers)
    return BatchStream(share.to_iter_dataset(one).mp_prefetch(workers, worker_init_fn=_start_worker), shared=True)


def check_source(source: Source, data: config.Data, batch_size: int) -> None:
    """Raises ConfigError for a source that has fewer examples than a batch, or none with `data.captions_per_image` captions."""
    n, k = len(source), data.captions_per_image
    remedy = f"is more than the {n} examples of {source.name}: use at most {n}"
    require(batch_size <= n, "train.batch_size", batch_size, remedy)
    if k == 1:
        return
    most, seen = 0, np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).round().astype(int)).tolist()
    for i in seen:
        if (most := max(most, len(source.record(i).captions))) >= k:
            return
    remedy = f"no example of {source.name} has more than {most} ({len(seen):,} were looked at): use at most that many"
    raise ConfigError(f"data.captions_per_image = {k}: {remedy}, or set data.text_field to a field of several")


def _start_worker(_index: int, _count: int) -> None:
    """Has a worker log as the command line does, leave signals to it (a terminal or Slurm gives them to all processes, and the
    command line still needs batches), and end when it has ended: a worker that waits for it would stay for ever."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
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
    """This host's share of every example once, in order, never augmented, decoded by threads whatever `data.worker_kind`.

    A batch has `image` uint8 [b, s, s, 3], `index` int32 [b] (of the example; -1: padding), `label` int32 [b] (-1: none) and,
    bool [b], `mask` (counts: neither padding nor replaced) and `replaced`. The last batch is padded, so that shapes never change;
    all hosts get as many batches."""
    local = _local_batch(batch_size, process_count)
    padded = math.ceil(len(source) / batch_size) * batch_size
    batches = grain.MapDataset.range(padded).map(_EvalExample(source, data, image_size)).batch(local)
    return BatchStream(batches[process_index::process_count].to_iter_dataset(_read_options(data.workers)))


def eval_captions(source: Source) -> tuple[list[str], np.ndarray]:
    """Every caption of every example, m in all, and int32 [m]: the index of its example. Decodes no picture."""
    captions = [source.record(i).captions for i in range(len(source))]
    owner = np.repeat(np.arange(len(captions), dtype=np.int32), [len(c) for c in captions])
    return [text for several in captions for text in several], owner


def _local_batch(batch_size: int, process_count: int) -> int:
    divides = batch_size % process_count == 0
    require(divides, "batch_size", batch_size, f"must be a multiple of the number of hosts, {process_count}")
    return batch_size // process_count


def _read_options(workers: int) -> grain.ReadOptions:
    """A batch in the making for each thread, and two in hand."""
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 2)
