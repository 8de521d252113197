"""`clipjax plan`: the figures of a run on chips that this machine need not have, and its largest batch."""

import argparse
import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator

from clipjax import aot, config
from clipjax.files import write_json
from clipjax.plan import figures, report
from clipjax.plan.target import make_target


def run(args: argparse.Namespace, run: config.Run) -> int:
    """Prints the plan, and writes it to the file of --json. Returns the exit status.

    0: also if the run does not fit, which is an answer. 1: the compiler failed. Raises ConfigError.
    """
    target = make_target(run, args.topology, args.slices)

    def progress(size: int) -> contextlib.AbstractContextManager[None]:
        return compiling(f"compiling the step of batch {size:,} for {len(target.devices):,} x {target.devices[0].device_kind}")

    try:
        with progress(run.train.batch_size):
            plan, fixed = figures.make_plan(run, target)
    except aot.CompilerError as error:
        print(f"clipjax: the compiler failed, which says nothing about memory: {error}", file=sys.stderr)
        return 1
    failed = False
    if args.find_batch:

        def print_try(result: figures.Try) -> None:
            nonlocal failed
            failed |= result.fits is None
            print(report.outcome(result), file=sys.stderr, flush=True)

        plan = figures.with_largest_batch(run, target, plan, fixed, print_try, progress)
    print(*report.lines(plan), sep="\n", flush=True)
    if args.json:
        write_json(args.json, dataclasses.asdict(plan))
    return 1 if failed else 0


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Prints what is compiled; on a terminal also for how long, because a compiler shows no progress."""
    start, done = time.perf_counter(), threading.Event()
    if not sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield
        return

    def show_time() -> None:
        while not done.wait(0.5):
            print(f"\r{what} ... {time.perf_counter() - start:.0f} s", end="", file=sys.stderr, flush=True)

    clock = threading.Thread(target=show_time, daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
        print("\r\033[K", end="", file=sys.stderr, flush=True)
