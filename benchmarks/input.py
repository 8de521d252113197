"""Training batches of JPEGs from this tree and from another commit, in turns: examples a second of CPU, or bytes that lie ready.

Run:   python benchmarks/input.py [--base 4f2fa3c] [--kind processes] [--wall]        the rates
       python benchmarks/input.py --memory                                             of 32 workers nobody takes batches from
Input: JPEGs like photographs (benchmarks/images.py), 500 x 375 of about 54 kB and 1024 x 768 of about 176 kB, in a tsv; random
       crops of at least 0.9 of the area to 224 pixels (--crop); two workers, batches of 32; the resizer `fast` where there is one
Each side runs in a process of its own. The base is a git worktree of that commit in a temporary folder. Before each timed turn
what lies ready is taken. Rates are per second of CPU time of all of the side, so that other work on the machine does little; with
--wall, and always for processes, per second of the clock.
Seen:  on two idle cores, medians of 5 turns: 834 examples/s of CPU against 464 (1.81), and 423 against 154 (2.70); with --wall
       --workers 1: 934 against 482 (1.92), and 450 against 156 (2.87); with --wall and two workers, which slow each other down
       on this machine: 1,389 against 900 (1.50), and 622 against 308 (2.02)
       --memory: 2.41 GiB, the first batch after 3.8 s; the base 8.76 GiB, 80.7 s
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import side_by_side

ROOT = Path(__file__).parents[1]
SIDES = ("here", "base")
SHAPES = ((500, 375, 54_000), (1024, 768, 176_000))  # width, height, bytes
SIZE, BATCH, READY, TIMED = 224, 32, 20, 20  # READY and TIMED: batches
MANY, MANY_BATCH = 32, 1024  # workers and batch of --memory


def parsed():
    parser = side_by_side.arguments(__doc__, SIDES)
    parser.add_argument("--base", default="4f2fa3c", help="the commit beside this tree (default 4f2fa3c)")
    parser.add_argument("--kind", choices=["threads", "processes"], default="threads", help="of the workers")
    parser.add_argument("--workers", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--crop", type=float, default=0.9, help="data.augment.crop (default 0.9, as in the recipes of CLIP)")
    parser.add_argument("--images", type=int, default=64, help="JPEGs of each shape (default 64)")
    parser.add_argument("--wall", action="store_true", help="by the clock instead of CPU time")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of rates")
    parser.add_argument("--tsv", help=side_by_side.argparse.SUPPRESS)
    return parser.parse_args()


def batches(args, batch_size, workers):
    """The training batches of the side that this process runs."""
    from clipjax.config import Augment, Data
    from clipjax.data.pipeline import train_batches
    from clipjax.data.sources import open_source
    from clipjax.data.tokenizer import Tokenizer

    fast = {"resizer": "fast"} if "resizer" in {field.name for field in dataclasses.fields(Data)} else {}
    data = Data(spec=f"tsv:{args.tsv}", augment=Augment(crop=args.crop), workers=workers, worker_kind=args.kind, **fast)
    tokenizer = Tokenizer.train(["a photo of a dog on a lawn"], 300, lowercase=True, length=32)
    return train_batches(open_source(data), tokenizer, data, image_size=SIZE, batch_size=batch_size, seed=0)


def serve_rate(args):
    clock = time.perf_counter if args.wall or args.kind == "processes" else time.process_time
    with batches(args, BATCH, args.workers) as stream:

        def take(count):
            for _ in itertools.islice(stream, count):
                pass

        side_by_side.serve(lambda: take(READY), lambda: take(TIMED), clock=clock)


def serve_memory(args):
    """Takes one batch, waits until nothing more is made, and says by how much this process has grown."""
    before = resident()
    with batches(args, MANY_BATCH, MANY) as stream:
        start = time.perf_counter()
        next(stream)
        first, size = time.perf_counter() - start, 0
        while resident() > size * 1.001 + 1e6:
            size = resident()
            time.sleep(3)
        print(json.dumps({"first": first, "bytes": resident() - before}), flush=True)
    os._exit(0)  # the base would wait for what its threads have begun


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write(folder, shape, count, copies=64):
    """A tsv of JPEGs: `count` different ones, each under `copies` names. Grain's shuffle of fewer than some thousand takes
    0.4 ms an example, which larger sets don't have."""
    from images import photo  # here: the side of another commit may lack what that imports

    width, height, size = shape
    rows = ["filepath\ttitle"]
    for i in range(count):
        stored = photo(width, height, size, i)
        (folder / f"{i}-0.jpg").write_bytes(stored)
        for copy in range(copies):
            if copy:
                (folder / f"{i}-{copy}.jpg").hardlink_to(folder / f"{i}-0.jpg")
            rows.append(f"{i}-{copy}.jpg\ta photo of a dog on lawn {i}")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.tsv"


def options(args, tsv):
    values = {"kind": args.kind, "workers": args.workers, "crop": args.crop, "tsv": tsv}
    flags = [f"--{name}" for name in ("wall", "memory") if getattr(args, name)]
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + flags


def compare_rates(args, folder, trees):
    found = {}
    for shape in SHAPES:
        name = f"{shape[0]}x{shape[1]}"
        (folder / name).mkdir()
        tsv = write(folder / name, shape, args.images)
        print(f"{name} JPEGs, {args.workers} {args.kind}")
        variables = [{"PYTHONPATH": str(tree)} for tree in trees]
        with side_by_side.started(__file__, SIDES, options(args, tsv), variables) as sides:
            for side in sides:
                side.about()
            unit = "examples/s" if args.wall or args.kind == "processes" else "examples/s of CPU"
            found[name] = side_by_side.report(side_by_side.rates(sides, args.turns, TIMED * BATCH), unit)
    return found


def compare_memory(args, folder, trees):
    """Small JPEGs, which are soon made: what lies ready is as large for any."""
    tsv, found = write(folder, (48, 36, 1_000), 32), {}
    for name, tree in zip(SIDES, trees, strict=True):
        command = [sys.executable, __file__, "--serve", name, *options(args, tsv)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, check=True, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        batch = MANY_BATCH * 3 * SIZE * SIZE
        said = f"{found[name]['bytes'] / 2**30:.2f} GiB, {found[name]['bytes'] / batch:.1f} batches of {MANY_BATCH:,}"
        print(f"{name}: {said}; the first after {found[name]['first']:.1f} s", flush=True)
    return found


def main():
    args = parsed()
    if args.serve:
        (serve_memory if args.memory else serve_rate)(args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(folder / "base"), args.base], check=True)
        try:
            found = (compare_memory if args.memory else compare_rates)(args, folder, (ROOT, folder / "base"))
        finally:
            subprocess.run([*git, "remove", "--force", str(folder / "base")], check=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
