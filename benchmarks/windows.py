"""Rate and traffic of `data.order = "windows"` over HTTP with latency: records are read, not decoded.

Run: python benchmarks/windows.py [--latency 0.02] [--hosts 1 2 4 8] [--shards 32] [--repeats 5]

Makes tars of 1,000 samples of 54 kB, lets a server of its own answer after the latency, and reads one epoch by 16 lanes and
windows of 256, as each of so many hosts in turn. Prints medians: examples a second on one host, from its first request on; bytes
fetched over all hosts, without those that lie ready for the next epoch, for each byte of the samples that were used; CPU
microseconds an example, of the reading process alone.

Seen on two cores that nine others kept busy (load 10), for 1, 2, 4 and 8 hosts: 6,196, 6,971, 6,711 and 6,571 examples/s a host;
1.008, 1.016, 1.032 and 1.063 bytes for each used; 110 to 127 us.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from clipjax import config
from clipjax.data.formats.index import root_of, shards_of
from clipjax.data.formats.indexing import build
from clipjax.data.formats.wds import Wds
from clipjax.data.ordering.chunks import ChunkReader
from clipjax.data.ordering.readers import training_order, training_reader
from clipjax.data.source import Fetched

SAMPLES, BYTES = 1000, 54_000
BATCH, WORKERS = 1024, 4
SERVER = Path(__file__).parents[1] / "tests" / "data" / "http_server.py"


def write_shards(folder: Path, count: int) -> None:
    """Tars with the same content, which is on the disk once."""
    rng = np.random.default_rng(0)
    with TarWriter(str(folder / "00000.tar")) as writer:
        for i in range(SAMPLES):
            writer.write({"__key__": f"{i:05}", "jpg": rng.bytes(BYTES), "txt": f"number {i}"})
    for shard in range(1, count):
        os.link(folder / "00000.tar", folder / f"{shard:05}.tar")


class Counted(Wds):
    """Counts the bytes that are fetched."""

    fetched_bytes = 0
    lock = threading.Lock()

    def fetch(self, chunk: int) -> Fetched:
        fetched = super().fetch(chunk)
        with self.lock:
            self.fetched_bytes += fetched.nbytes
        return fetched


def read_epoch(source: Counted, data: config.Data, host: int, hosts: int) -> tuple[int, float, np.ndarray]:
    """Examples, seconds, and the numbers of the examples of an epoch of one host."""
    local = BATCH // hosts
    order = training_order(source, data, BATCH, 0, host * local, local)
    reader = training_reader(source, order, lambda step: step)

    def read(position: int) -> int:
        step, place = position // local, host * local + position % local
        number = order.one(step, place)
        assert reader(step, place, number).image
        return number

    start = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        numbers = np.array(list(pool.map(read, range(order.batches * local))))
    seconds = time.perf_counter() - start
    assert isinstance(reader, ChunkReader)
    reader.close(wait=True)
    source.fetched_bytes -= reader.ready_bytes()
    return len(numbers), seconds, numbers


def measure(source: Counted, data: config.Data, hosts: int) -> tuple[float, float, float]:
    """Examples a second on one host, bytes fetched for each used, CPU microseconds an example."""
    source.fetched_bytes, rates, used, examples, cpu = 0, [], 0, 0, time.process_time()
    for host in range(hosts):
        count, seconds, numbers = read_epoch(source, data, host, hosts)
        rates.append(count / seconds)
        examples += count
        used += 512 * int(source.index.spans[numbers, 1].sum())
    return statistics.median(rates), source.fetched_bytes / used, (time.process_time() - cpu) / examples * 1e6


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--latency", type=float, default=0.02, help="seconds before an answer")
    p.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--shards", type=int, default=32)
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "shards")
        folder.mkdir()
        write_shards(folder, args.shards)
        command = [sys.executable, str(SERVER), str(folder), str(args.latency)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            shards = f"{address}/{{00000..{args.shards - 1:05}}}.tar"
            data = config.Data(
                spec=f"wds:{shards}", order="windows", lanes=16, window=256, index=str(Path(scratch, "index")), workers=WORKERS
            )
            build(data.spec, shards_of(shards), root_of(shards), str(data.index))
            source = Counted(data, shards)
            print(f"{len(source):,} samples, latency {1e3 * args.latency:.0f} ms, load {os.getloadavg()[0]:.1f}")
            for hosts in args.hosts:
                found = [measure(source, data, hosts) for _ in range(args.repeats)]
                rate, traffic, cpu = (statistics.median(values) for values in zip(*found, strict=True))
                print(
                    f"{hosts} hosts: {rate:7,.0f} examples/s a host, {traffic:.3f} bytes for each used, {cpu:.0f} us CPU",
                    flush=True,
                )
            server.communicate("")


if __name__ == "__main__":
    main()
