"""How fast a configuration's batches are read, decoded and tokenised here, with no model that waits for them."""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipjax import build, config
from clipjax.data.sources import open_source
from clipjax.files import write_whole
from clipjax.train.workdir import Workdir


@dataclass(frozen=True)
class Figures:
    """Of one process, which reads whole global batches."""

    dataset: str
    examples: int
    workers: int
    worker_kind: str
    batch_size: int
    first_seconds: float  # until the first batch: starting workers, filling their buffers
    batch_seconds: tuple[float, ...]  # of each batch after it
    examples_per_second: float  # over all of them


def measure(run: config.Run, seconds: float) -> Figures:
    """Reads for so long, two batches at least. Raises ConfigError for what `clipjax train` would refuse."""
    source = open_source(run.data)
    with tempfile.TemporaryDirectory() as folder:  # which gets the tokenizer that is trained or loaded
        tokens = build.tokenizer(run, Workdir(Path(folder)), source)
    batches = build.batches(run, source, tokens, build.teacher(run, source))
    start = time.perf_counter()
    with batches(0) as stream:
        next(stream)
        times = [time.perf_counter()]
        while len(times) < 3 or times[-1] - times[0] < seconds:
            next(stream)
            times.append(time.perf_counter())
    each = tuple(b - a for a, b in itertools.pairwise(times))
    return Figures(
        dataset=source.name,
        examples=len(source),
        workers=run.data.workers,
        worker_kind=run.data.worker_kind,
        batch_size=run.train.batch_size,
        first_seconds=times[0] - start,
        batch_seconds=each,
        examples_per_second=run.train.batch_size * len(each) / sum(each),
    )


def lines(figures: Figures) -> Iterator[str]:
    """The figures to read."""
    by = f"{figures.workers} {figures.worker_kind}"
    yield f"{figures.dataset}: {figures.examples:,} examples, in batches of {figures.batch_size:,} by {by}"
    yield f"  first batch      after {figures.first_seconds:.3g} s"
    each = figures.batch_seconds
    yield f"  a batch          {statistics.median(each):.3g} s, median of {len(each):,} ({min(each):.3g} to {max(each):.3g})"
    yield f"  examples/s       {figures.examples_per_second:,.4g}"


def run(args: argparse.Namespace, run: config.Run) -> None:
    """`clipjax bench input`. Raises ConfigError."""
    figures = measure(run, args.seconds)
    print(*lines(figures), sep="\n", flush=True)
    if args.json:
        with write_whole(args.json) as part:
            part.write_text(json.dumps(dataclasses.asdict(figures), indent=2) + "\n")
