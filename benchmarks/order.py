"""What the order of the examples costs: CPU time of an example, and the table of an epoch of 400 million.

Run: python benchmarks/order.py [--batch 4096] [--processes 8]

Prints medians of five: CPU microseconds an example of looking up which example is at a place, as the pipeline does it (a
process's part of a batch at a time, kept until it is used), and of the bookkeeping of the chunks that are read ahead; CPU
seconds, megabytes of the table and megabytes at most while it is made, of an epoch of 400 million examples in chunks of 128 and
256.

Seen on two busy cores, with 8 to 512 places on a process: random 7 us, windows 0.6 to 2.4, with its chunks 6 to 13, a mixture 7;
0.3 s, 25 MB and 30 MB for chunks of 128.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from clipjax.data.ordering.chunks import ChunkReader
from clipjax.data.ordering.mixture import Mixed, spread
from clipjax.data.ordering.order import Order, Planned, Random
from clipjax.data.ordering.windows import Windows
from clipjax.data.source import Fetched, Record, Source

N, SMALL, STEPS, START = 400_000_000, 2_000_000, 4, 100
RECORD = Record(b"1", ("",), "")


class Nothing(Source):
    """Chunks that take no time."""

    name, fields = "nothing", {}

    def __len__(self) -> int:
        return SMALL

    def _record(self, i: int) -> Record:
        return RECORD

    def chunks(self) -> np.ndarray:
        return np.full(SMALL // 250, 250)

    def fetch(self, chunk: int) -> Fetched:
        return Fetched(None, 1)

    def record_in(self, fetched: Fetched, chunk: int, j: int) -> Record:
        return RECORD


def median(measured: Callable[[], float]) -> float:
    return statistics.median(measured() for _ in range(5))


def of_an_example(order: Order, first: int, count: int, reader: Callable[[int, int, int], Record] | None = None) -> float:
    """CPU microseconds of this thread for an example, over some steps that were not asked for before."""
    step = START

    def measured() -> float:
        nonlocal step
        start, step = time.thread_time(), step + STEPS
        for batch in range(step - STEPS, step):
            for place in range(first, first + count):
                number = order.one(batch, place)
                if reader is not None:
                    reader(batch, place, number)
        return (time.thread_time() - start) / STEPS / count * 1e6

    return median(measured)


def mixed(batch: int, count: int) -> Mixed:
    part, own = spread(np.array([batch - batch // 3, batch // 3]))
    sizes = [int((part[:count] == number).sum()) for number in (0, 1)]
    orders = [Planned(Random(N, int((part == number).sum()), number), 0, sizes[number]) for number in (0, 1)]
    return Mixed(orders, np.array([0, N, 2 * N]), part, own)


def epoch_table(length: int) -> tuple[float, float, float]:
    """CPU seconds, MB of the table and MB at most, of an epoch of chunks of `length` examples."""
    windows = Windows(np.full(N // length, length), 32768, 0, 256, 2048)
    epochs = iter(range(10))

    def measured() -> float:
        start = time.thread_time()
        windows.epoch(next(epochs))
        return time.thread_time() - start

    seconds = median(measured)
    tracemalloc.start()
    table, _, _ = windows.epoch(next(epochs))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, (table.nbytes + windows.starts.nbytes) / 1e6, (peak + windows.starts.nbytes) / 1e6


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=4096, help="global")
    p.add_argument("--processes", type=int, default=8)
    args = p.parse_args()
    batch, count = args.batch, args.batch // args.processes
    small = Windows(Nothing().chunks(), batch, 0, 64, 2048)
    planned = Planned(small, 0, count)
    reader = ChunkReader(Nothing(), planned, lambda k: START + k)
    print(f"CPU us an example, {count} of {batch:,} examples of a batch on this process")
    print(f"  random                {of_an_example(Planned(Random(N, batch, 0), 0, count), 0, count):6.1f}")
    windows = Planned(Windows(np.full(N // 250, 250), batch, 0, 64, 2048), 0, count)
    windows.plan(0)
    print(f"  windows               {of_an_example(windows, 0, count):6.1f}")
    print(f"  windows, with chunks  {of_an_example(planned, 0, count, reader):6.1f}")
    print(f"  mixture               {of_an_example(mixed(batch, count), 0, count):6.1f}")
    reader.close()
    for length in (128, 256):
        seconds, size, most = epoch_table(length)
        print(f"epoch of 400M in chunks of {length}: {seconds:.2f} s CPU, {size:.1f} MB, at most {most:.1f} MB while it is made")


if __name__ == "__main__":
    main()
