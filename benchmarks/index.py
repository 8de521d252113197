"""How fast tars are indexed, here and over HTTP, and what it costs to open the index of 400 million samples.

Run: python benchmarks/index.py [--folder DIR] [--runs 5]   (2 minutes, 0.9 GB in a temporary folder below DIR, and 3.6 sparse)

Indexing: shards of 2,000 samples of a 54 kB image, a caption and a json. Before each cold run the page cache lets go of them.
Over HTTP a server in a process of its own answers after 20 ms. Opening: a process that has imported everything opens `wds:` with
40,000 shards of 10,000 samples; their index is sparse, so it takes no disk.

Medians of five on two idle cores. "Without waiting" leaves out the time in which the thread could have run and had no core
(/proc/thread-self/schedstat): on a busy machine, an estimate of an idle one.

    one thread, cold                   14,569 samples/s   0.84 GB/s   38.7 us CPU a sample;   14,619 samples/s without waiting
    tarfile, cold                       9,544 samples/s   0.55 GB/s   71.5 us CPU a sample;    9,558 samples/s without waiting
    one thread, warm                   89,252 samples/s   5.12 GB/s   11.2 us CPU a sample;   89,252 samples/s without waiting
    over HTTP, 8 shards at once        20,464 samples/s   1.17 GB/s   46.3 us CPU a sample
    opening 400000000 samples            0.45 s   0.47 s CPU     18 MB anonymous
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clipjax.data.formats import index, indexing, spans
from clipjax.data.storage import store

ROOT = Path(__file__).parents[1]
SHARDS, SAMPLES, SIZES = 8, 2000, {"jpg": 54_000, "txt": 60, "json": 800}
MANY, LARGE = 40_000, 10_000  # shards, and samples of each, of the set that is opened
OPEN = """
import sys, time
from clipjax import config
from clipjax.data.formats import wds  # what is imported is not measured
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1e3
before, start, cpu = anonymous(), time.perf_counter(), time.process_time()
source = wds.Wds(config.Data(spec=f"wds:{sys.argv[1]}"), sys.argv[1])
print(len(source), time.perf_counter() - start, time.process_time() - cpu, anonymous() - before)
"""


def header(name: str, size: int) -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:265] = name.encode(), b"%011o\0" % size, b"0", b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def write_shards(folder: Path) -> list[store.Stored]:
    noise = np.random.default_rng(0).bytes(max(SIZES.values()))
    for shard in range(SHARDS):
        with (folder / f"{shard:05}.tar").open("wb") as file:
            for i in range(SAMPLES):
                for suffix, size in SIZES.items():
                    file.write(header(f"{shard:05}{i:04}.{suffix}", size) + noise[:size] + bytes(-size % 512))
            file.write(bytes(1024))
            os.fsync(file.fileno())
    return store.find("folder", str(folder), (".tar",))


def forget(shards: list[store.Stored]) -> None:
    """Nothing of the shards stays in the page cache."""
    for shard in shards:
        file = os.open(shard.url, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def clocks() -> np.ndarray:
    """Now, CPU time, and time that was spent waiting for a core, of this thread, in seconds."""
    waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return np.array([time.perf_counter(), time.thread_time(), waited])


def local(shards: list[store.Stored], cold: bool) -> np.ndarray:
    """Seconds, CPU seconds, and those of waiting for a core, of one thread."""
    if cold:
        forget(shards)
    start = clocks()
    assert sum(len(spans.scan(shard).spans) for shard in shards) == SHARDS * SAMPLES
    return clocks() - start


def by_tarfile(shards: list[store.Stored]) -> np.ndarray:
    """The same by Python's tarfile, of which two shards are enough to compare with; scaled to all."""
    forget(shards)
    start = clocks()
    for shard in shards[:2]:
        with tarfile.open(shard.url) as file:
            assert len({member.name.partition(".")[0] for member in file}) == SAMPLES
    return (clocks() - start) * len(shards) / 2


def over_http(folder: Path) -> np.ndarray:
    command = [sys.executable, str(ROOT / "tests/data/http_server.py"), str(folder), "0.02"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().strip()
        shards = store.find("address", f"{address}/{{00000..{SHARDS - 1:05}}}.tar", (".tar",))
        start, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(indexing.AT_ONCE) as pool:
            assert sum(len(found.spans) for found in pool.map(spans.scan, shards)) == SHARDS * SAMPLES
        took = np.array([time.perf_counter() - start, time.process_time() - cpu, np.nan])
        server.stdin.close()
    return took


def write_large_index(folder: Path) -> None:
    n, rows = MANY * LARGE, []
    for shard in range(MANY):
        path = folder / f"{shard:05}.tar"
        path.touch()
        facts = dict(samples=LARGE, dropped={}, suffixes=dict(jpg=LARGE, json=LARGE, txt=LARGE), digest=f"{shard:016x}")
        rows.append(dict(name=path.name, size=0, tag=str(path.stat().st_mtime_ns)) | facts)
    place = folder / index.NAME
    place.mkdir()
    head = dict(format=index.FORMAT, spec=f"wds:{folder}", samples=n, digest="0" * 16, shards=rows)
    (place / "index.json").write_text(json.dumps(head))
    for name, start, size in (("spans", indexing._header("<u4", n, 2), 8 * n), ("buckets", indexing._header("|u1", n), n)):
        (place / f"{name}.npy").write_bytes(start)
        os.truncate(place / f"{name}.npy", len(start) + size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="clipjax-index-") as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        shards = write_shards(folder / "shards")
        size, n = sum(shard.size for shard in shards), SHARDS * SAMPLES
        for label, measure in (
            ("one thread, cold", lambda: local(shards, True)),
            ("tarfile, cold", lambda: by_tarfile(shards)),
            ("one thread, warm", lambda: local(shards, False)),
            (f"over HTTP, {indexing.AT_ONCE} shards at once", lambda: over_http(folder / "shards")),
        ):
            wall, cpu, waited = np.median([measure() for _ in range(args.runs)], axis=0)
            rate = f"{n / wall:8,.0f} samples/s {size / wall / 1e9:6.2f} GB/s {cpu / n * 1e6:6.1f} us CPU a sample"
            rate += "" if np.isnan(waited) else f"; {n / (wall - waited):8,.0f} samples/s without waiting"
            print(f"{label:32} {rate}", flush=True)
        (folder / "large").mkdir()
        write_large_index(folder / "large")
        command = [sys.executable, "-c", OPEN, str(folder / "large")]
        found = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout for _ in range(args.runs)]
        wall, cpu, anonymous = (statistics.median(float(text.split()[i]) for text in found) for i in (1, 2, 3))
        print(f"{'opening ' + found[0].split()[0] + ' samples':32} {wall:8.2f} s {cpu:6.2f} s CPU {anonymous:6.0f} MB anonymous")


if __name__ == "__main__":
    main()
