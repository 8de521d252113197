"""How fast a configuration's batches are read, decoded and tokenised on this machine, without a model that waits for them; and
what each part of that costs."""

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipjax import build, config
from clipjax.bench import parts
from clipjax.data.sources import open_source
from clipjax.files import write_json
from clipjax.train.loop import Batches
from clipjax.train.workdir import Workdir

TURNS = 5  # equal parts of the time, of which the medians count

Kind = Literal["threads", "processes"]
KINDS: tuple[Kind, ...] = ("threads", "processes")


@dataclass(frozen=True)
class StreamRates:
    """How fast workers of one kind make batches."""

    first_seconds: float  # until the first batch, which all workers make: starting them, and making it
    batch_seconds: tuple[float, ...]  # of each later batch
    examples_per_second: float  # over all later batches; the median of TURNS parts of the time
    cpu_microseconds: float | None  # of all threads and processes, an example; None where the system does not say
    share: float  # of what the cores could do if there were nothing but the parts: examples/s x sum of the parts / cores


@dataclass(frozen=True)
class InputRates:
    """How fast one process reads global batches in full."""

    dataset: str
    examples: int
    workers: int
    worker_kind: str
    batch_size: int
    cores: int  # that the workers can use
    parts: dict[str, float]  # microseconds an example (`parts.measure`)
    sum: float  # of parts.PARTS
    streams: dict[str, StreamRates]  # by the kind of workers


def measure(run: config.Run, seconds: float) -> InputRates:
    """Reads for so many seconds with each kind of workers, but at least two timed batches. Raises ConfigError for what
    `clipjax train` would refuse."""
    source = open_source(run.data)
    with tempfile.TemporaryDirectory() as folder:  # for the tokenizer that is trained or loaded
        tokens = build.tokenizer(run, Workdir(Path(folder)), source)
    keyed = dict(teacher=build.teacher(run, source), embedded=build.embedded(run, source), labels=build.labels(run, source))
    found = parts.measure(run, source, tokens, **keyed)
    total = sum(found[part] for part in parts.PARTS)
    cores = min(run.data.workers, _cores())
    streams = {}
    for kind in KINDS if run.data.order == "random" else KINDS[:1]:  # chunks are read ahead for threads only
        of_kind = dataclasses.replace(run, data=dataclasses.replace(run.data, worker_kind=kind))
        batches = build.batches(of_kind, source, tokens, **keyed)
        streams[kind] = _stream(batches, run.train.batch_size, seconds, total / cores * 1e-6)
    return InputRates(
        dataset=source.name,
        examples=len(source),
        workers=run.data.workers,
        worker_kind=run.data.worker_kind,
        batch_size=run.train.batch_size,
        cores=cores,
        parts=found,
        sum=total,
        streams=streams,
    )


def _stream(batches: Batches, batch_size: int, seconds: float, ideal: float) -> StreamRates:
    """`ideal`: seconds an example of all cores, if there were nothing but the parts."""
    start = time.perf_counter()
    with batches(0) as stream:
        next(stream)
        first = time.perf_counter() - start
        while time.perf_counter() - start < 2 * first:  # until all workers have started
            next(stream)
        times, cpu = [time.perf_counter()], _cpu_seconds()
        while len(times) < 3 or times[-1] - times[0] < seconds:
            next(stream)
            times.append(time.perf_counter())
        after = _cpu_seconds()
    spent = None if cpu is None or after is None else (after - cpu) / (batch_size * (len(times) - 1)) * 1e6
    turns = min(TURNS, len(times) - 1)
    ends = [round(i * (len(times) - 1) / turns) for i in range(turns + 1)]
    rate = statistics.median(batch_size * (b - a) / (times[b] - times[a]) for a, b in itertools.pairwise(ends))
    batch_seconds = tuple(b - a for a, b in itertools.pairwise(times))
    return StreamRates(first, batch_seconds, rate, spent, rate * ideal)


def _cpu_seconds() -> float | None:
    """CPU time of this process and of its children that are alive."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # not Linux
            return None
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime
    return total


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lines(rates: InputRates) -> Iterator[str]:
    yield f"{rates.dataset}: {rates.examples:,} examples, in batches of {rates.batch_size:,}"
    yield from parts.lines(rates.parts)
    for kind, stream in rates.streams.items():
        yield f"  {rates.workers} {kind}{' (as configured)' if kind == rates.worker_kind else ''}, on {rates.cores} cores:"
        seconds = stream.batch_seconds
        yield f"    first batch  after {stream.first_seconds:.3g} s"
        median, least, most = statistics.median(seconds), min(seconds), max(seconds)
        yield f"    a batch      {median:.3g} s, median of {len(seconds):,} ({least:.3g} to {most:.3g})"
        spent = "" if stream.cpu_microseconds is None else f"; {stream.cpu_microseconds:,.0f} us of CPU an example"
        yield f"    examples/s   {stream.examples_per_second:,.4g}, {stream.share:.0%} of what the parts allow{spent}"


def run(args: argparse.Namespace, run: config.Run) -> None:
    """`clipjax bench input`. Raises ConfigError."""
    rates = measure(run, args.seconds)
    print(*lines(rates), sep="\n", flush=True)
    if args.json:
        write_json(args.json, dataclasses.asdict(rates))
