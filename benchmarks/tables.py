"""Time and memory of opening a csv, and rates of reading parquet, in windows and at random:

    python benchmarks/tables.py [ROWS]

A csv of ROWS (1,000,000: 75 MB; a third of the captions in quotes), and parquet files of 6,000 pictures of 54 kB in row groups of
100 and 1,000. CPU time, the best of three. On two cores under load:

    csv of 1,000,000 rows: 0.58 s; 88 MB held, 526 MB at the peak
      a record at random: 12.3 us
    parquet, row groups of 100: 30,399 examples/s by groups, 284 at random, 201,067 captions/s
    parquet, row groups of 1000: 37,964 examples/s by groups, 171 at random, 246,298 captions/s

At random most reads miss the 256 MiB that are held of 324 MB, or do so until then: with more data, each read costs its group.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from clipjax import config
from clipjax.data.sources import open_source

PICTURES, BYTES = 6_000, 54_000


def cpu(task, repeats=3):
    """CPU seconds of the process, the best of `repeats`, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.process_time()
        result = task()
        best = min(best, time.process_time() - start)
    return best, result


def write_csv(path, rows):
    with path.open("w") as file:
        file.write("filepath,title\n")
        for i in range(rows):
            title = f"a photograph of number {i} in a green field" if i % 3 else f'"a photo of number {i}, in a field of flowers"'
            file.write(f"images/{i // 1000:05}/{i:09}.jpg,{title}\n")


def write_parquet(path, group):
    rng = np.random.default_rng(0)
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, PICTURES, group):
            rows = [
                {"image": {"bytes": rng.bytes(BYTES), "path": None}, "caption": f"picture {i}"}
                for i in range(start, start + group)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def in_chunks(source, count):
    """Reads all rows of the first groups, `count` of them, each group once."""
    done = 0
    for chunk, size in enumerate(source.chunks().tolist()):
        fetched = source.fetch(chunk)
        for j in range(size):
            source.record_in(fetched, chunk, j)
        done += size
        if done >= count:
            return done
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.csv"
        write_csv(path, rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, source = cpu(lambda: open_source(config.Data(spec=f"csv:{path}")))
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        held = pa.total_allocated_bytes() / 1e6
        print(f"csv of {len(source):,} rows: {seconds:.2f} s; {held:.0f} MB held, {peak:.0f} MB at the peak")
        numbers = np.random.default_rng(0).integers(len(source), size=20_000).tolist()
        print(f"  a record at random: {cpu(lambda: [source.record(i) for i in numbers])[0] / len(numbers) * 1e6:.1f} us")
        for group in (100, 1000):
            path = Path(folder) / f"{group}.parquet"
            write_parquet(path, group)
            source = open_source(config.Data(spec=f"parquet:{path}"))
            seconds, done = cpu(lambda source=source: in_chunks(source, 3000))
            some = np.random.default_rng(0).integers(len(source), size=40 if group > 100 else 200).tolist()
            at_random, _ = cpu(lambda source=source, some=some: [source.read(i) for i in some], 1)
            texts, _ = cpu(lambda source=source: sum(1 for _ in source.texts()))
            rates = f"{done / seconds:,.0f} examples/s by groups, {len(some) / at_random:,.0f} at random"
            print(f"parquet, row groups of {group}: {rates}, {len(source) / texts:,.0f} captions/s")


if __name__ == "__main__":
    main()
