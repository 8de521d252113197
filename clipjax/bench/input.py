"""How fast a configuration's batches are read, decoded and tokenised on this machine, without a model that waits for them."""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipjax import build, config
from clipjax.data.sources import open_source
from clipjax.files import write_json
from clipjax.train.workdir import Workdir


@dataclass(frozen=True)
class InputRates:
    """How fast one process reads global batches in full."""

    dataset: str
    examples: int
    workers: int
    worker_kind: str
    batch_size: int
    first_seconds: float  # until the first batch: starting the workers and filling their buffers
    batch_seconds: tuple[float, ...]  # of each later batch
    examples_per_second: float  # over all later batches


def measure(run: config.Run, seconds: float) -> InputRates:
    """Reads for so many seconds, but at least two timed batches. Raises ConfigError for what `clipjax train` would refuse."""
    source = open_source(run.data)
    with tempfile.TemporaryDirectory() as folder:  # for the tokenizer that is trained or loaded
        tokens = build.tokenizer(run, Workdir(Path(folder)), source)
    batches = build.batches(run, source, tokens, build.teacher(run, source))
    start = time.perf_counter()
    with batches(0) as stream:
        next(stream)
        times = [time.perf_counter()]
        while len(times) < 3 or times[-1] - times[0] < seconds:
            next(stream)
            times.append(time.perf_counter())
    batch_seconds = tuple(b - a for a, b in itertools.pairwise(times))
    return InputRates(
        dataset=source.name,
        examples=len(source),
        workers=run.data.workers,
        worker_kind=run.data.worker_kind,
        batch_size=run.train.batch_size,
        first_seconds=times[0] - start,
        batch_seconds=batch_seconds,
        examples_per_second=run.train.batch_size * len(batch_seconds) / sum(batch_seconds),
    )


def lines(rates: InputRates) -> Iterator[str]:
    """The text of the figures."""
    workers, seconds = f"{rates.workers} {rates.worker_kind}", rates.batch_seconds
    yield f"{rates.dataset}: {rates.examples:,} examples, in batches of {rates.batch_size:,} by {workers}"
    yield f"  first batch      after {rates.first_seconds:.3g} s"
    median, least, most = statistics.median(seconds), min(seconds), max(seconds)
    yield f"  a batch          {median:.3g} s, median of {len(seconds):,} ({least:.3g} to {most:.3g})"
    yield f"  examples/s       {rates.examples_per_second:,.4g}"


def run(args: argparse.Namespace, run: config.Run) -> None:
    """`clipjax bench input`. Raises ConfigError."""
    rates = measure(run, args.seconds)
    print(*lines(rates), sep="\n", flush=True)
    if args.json:
        write_json(args.json, dataclasses.asdict(rates))
