"""`clipjax plan`: figures of a run on chips that need not be there, and its largest batch."""

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator

from clipjax import aot, config
from clipjax.files import write_whole
from clipjax.plan import figures, report


def run(args: argparse.Namespace, run: config.Run) -> int:
    """Prints the plan and writes it where --json names a file. The exit status: 0 also where it does not fit, which is an answer;
    1 where the compiler failed. Raises ConfigError."""
    where = figures.setting(run, args.topology, args.slices)

    def watch(size: int) -> contextlib.AbstractContextManager[None]:
        return compiling(f"compiling the step of batch {size:,} for {len(where.devices):,} x {where.devices[0].device_kind}")

    try:
        with watch(run.train.batch_size):
            plan, held = figures.make_plan(run, where)
    except aot.CompilerError as error:
        print(f"clipjax: the compiler failed, which tells nothing about memory: {error}", file=sys.stderr)
        return 1
    failed = False
    if args.find_batch:

        def say(tried: figures.Try) -> None:
            nonlocal failed
            failed |= tried.fits is None
            print(report.outcome(tried), file=sys.stderr, flush=True)

        plan = figures.with_largest_batch(run, where, plan, held, say, watch)
    print(*report.lines(plan), sep="\n", flush=True)
    if args.json:
        with write_whole(args.json) as part:
            part.write_text(json.dumps(plan.to_json(), indent=2) + "\n")
    return 1 if failed else 0


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Says what is compiled; on a terminal also for how long, for a compiler tells nothing on its way."""
    start, done = time.perf_counter(), threading.Event()
    if not sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield
        return

    def tick() -> None:
        while not done.wait(0.5):
            print(f"\r{what} ... {time.perf_counter() - start:.0f} s", end="", file=sys.stderr, flush=True)

    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
        print("\r\033[K", end="", file=sys.stderr, flush=True)
