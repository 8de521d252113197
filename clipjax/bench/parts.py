"""What the parts of a training example cost: read, decode, resize, tokenise, the rest, stack; and the transfer of a batch."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.examples import TrainingExample
from clipjax.data.images import image
from clipjax.data.ordering.readers import training_order, training_reader
from clipjax.data.prefetch import Batch, Stacked
from clipjax.data.source import Record, Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.data.vectors import Vectors
from clipjax.train.loop import ON_DEVICE

REPEATS = 5  # of which the medians count
EXAMPLES = 64  # of a repeat, where the batch has as many
TRIED = 10_000  # examples that are read to find as many that can be used
PARTS = ("read", "decode", "resize", "tokenise", "rest", "stack")  # of which a worker's time consists

T = TypeVar("T")


def measure(run: config.Run, source: Source, tokenizer: Tokenizer, **keyed: Vectors | None) -> dict[str, float]:
    """Medians, in microseconds an example: each of PARTS, in CPU time of a thread; `wait`, for which `read` waits for the storage
    beside that; and `transfer`, from the host's memory to one device, of the clock.

    `rest` is what else there is: the order, random generators, the choice of a caption, checks. Raises ConfigError where hardly
    an example can be used. `keyed`: the teacher, the embeddings and the labels of `clipjax.build`."""
    size, batch_size = run.model.image.image_size, run.train.batch_size
    order = training_order(source, run.data, batch_size, run.seed, 0, batch_size)
    reader = training_reader(source, order, lambda step: step)
    timed = _Timed(TrainingExample(source, order, reader, tokenizer, run.data, size, **keyed))
    places = (divmod(i, batch_size) for i in range(TRIED))
    try:
        usable = (one for step, place in places if (one := timed.example(step, place)) is not None)
        found = [_repeat(usable, min(EXAMPLES, batch_size), batch_size) for _ in range(REPEATS)]
    finally:
        reader.close()
    if not found[-1]:
        raise ConfigError(f"data.spec: hardly any of {TRIED:,} examples of {source.name} can be used; the log says why")
    return {part: statistics.median(times[part] for times in found) * 1e6 for part in found[0]}


class _Timed:
    """Makes training examples part by part."""

    def __init__(self, make: TrainingExample) -> None:
        self._make = make
        self._held = _Held()
        self._from_held = dataclasses.replace(make, reader=self._held)

    def example(self, step: int, place: int) -> tuple[dict[str, float], Batch] | None:
        """The seconds of each part, and the example. None for one that can't be used."""
        make, seconds = self._make, {}
        number = make.order.one(step, place)
        start = time.perf_counter()
        try:
            record, seconds["read"] = _cpu(lambda: make.reader(step, place, number))
            seconds["wait"] = max(0.0, time.perf_counter() - start - seconds["read"])
            seconds |= self._parts(record, number)
            again = self._parts(record, number)  # in warm caches, as what follows is
            self._held.record = record
            arrays, whole = _cpu(lambda: self._from_held(step, place, np.random.default_rng(number)))
        except Exception:  # of an example that is bad, or filtered: training has another in its place
            return None
        seconds["rest"] = whole - sum(again.values())
        return None if arrays["replaced"] or arrays["filtered"] else (seconds, arrays)

    def _parts(self, record: Record, number: int) -> dict[str, float]:
        """The seconds of each part of making this example. Raises what that raises."""
        make, rng, seconds = self._make, np.random.default_rng(number), {}
        data = make.parts[make.source.part_of(number)[0]]
        chosen = make.texts(make.wanted(data.filter, record), rng)
        seconds["decode"] = seconds["resize"] = 0.0
        if make.imaged:
            crops, seconds["decode"] = _cpu(lambda: image.decoded_crops(record.image, make.size, data, rng))
            _, seconds["resize"] = _cpu(lambda: image.squares(crops, make.size, data))
        _, seconds["tokenise"] = _cpu(lambda: make.tokenizer.encode(chosen))
        return seconds


class _Held:
    """A reader of a record that was read before."""

    record: Record

    def __call__(self, step: int, place: int, number: int) -> Record:
        return self.record

    def close(self) -> None:
        """Nothing is open."""


def _repeat(usable: Iterator[tuple[dict[str, float], Batch]], count: int, batch_size: int) -> dict[str, float]:
    """Seconds an example of all parts, over `count` examples; {} where there are no more. Each is dropped once it is stacked, as
    by a worker: memory that is new costs more."""
    stacked, taken = Stacked(count, 1), 0
    seconds: dict[str, float] = dict.fromkeys(("read", "wait", *PARTS[1:]), 0.0)
    for times, example in itertools.islice(usable, count):
        _, times["stack"] = _cpu(lambda row=taken, example=example: stacked.put(row, example))
        seconds = {part: seconds[part] + times[part] for part in seconds}
        taken += 1
    if not taken:
        return {}
    stacked.finish_piece()
    arrays = stacked.wait()
    batch = {name: np.resize(arrays[name], (batch_size, *arrays[name].shape[1:])) for name in ON_DEVICE if name in arrays}
    start = time.perf_counter()
    jax.block_until_ready(jax.device_put(batch, jax.local_devices()[0]))
    transfer = (time.perf_counter() - start) / batch_size
    return {part: max(0.0, s / taken) for part, s in seconds.items()} | {"transfer": transfer}


def _cpu(work: Callable[[], T]) -> tuple[T, float]:
    """The result of `work`, and the CPU time that this thread took for it, in seconds."""
    start = time.thread_time()
    return work(), time.thread_time() - start


def lines(parts: dict[str, float]) -> Iterator[str]:
    yield "  part         us an example   examples/s of a core"
    for part in PARTS:
        yield f"  {part:10} {parts[part]:15,.1f} {1e6 / max(parts[part], 0.1):22,.0f}"
    total = sum(parts[part] for part in PARTS)
    yield f"  {'sum':10} {total:15,.1f} {1e6 / total:22,.0f}"
    yield f"  beside them: waiting for storage {parts['wait']:,.1f} us, transfer to one device {parts['transfer']:,.1f} us"
