"""Times clipjax and open_clip in turns, each in a process of its own.

Both stay loaded and take turns, so that noise on the machine affects both; the medians of the turns are compared. Every turn
begins with untimed work: a virtual machine returns idle memory to its host. To get it back cost the first step after the other
side's turn four seconds of kernel time, which training without pauses does not have.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

READY = "ready: "


def arguments(description: str | None, sides: Mapping[str, object]) -> argparse.ArgumentParser:
    """The options that the scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--serve", choices=sides, help=argparse.SUPPRESS)
    return parser


def serve(
    untimed: Callable[[], Any], timed: Callable[[], Any], about: Any = None, clock: Callable[[], float] = time.perf_counter
) -> None:
    """One side: prints `about` as JSON, then for every line on stdin runs both functions and prints the seconds of the second."""
    print(READY + json.dumps(about), flush=True)
    for _ in sys.stdin:
        untimed()
        start = clock()
        timed()
        print(clock() - start, flush=True)


class Side:
    """A child process that runs `serve`."""

    def __init__(self, script: str, name: str, options: Sequence[str], variables: Mapping[str, str]) -> None:
        command = [sys.executable, script, "--serve", name, *options]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.name, self.process = name, subprocess.Popen(command, **pipes, text=True, env=os.environ | variables)

    def about(self) -> Any:
        """Waits until the side is ready; what it says of itself."""
        while not (line := self.process.stdout.readline()).startswith(READY):
            if self.process.poll() is not None:
                sys.exit(f"{self.name} failed: exit status {self.process.returncode}")
        return json.loads(line.removeprefix(READY))

    def turn(self) -> float:
        """Seconds of one turn."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


@contextlib.contextmanager
def started(
    script: str, names: Sequence[str], options: Sequence[str], variables: Mapping[str, str] | Sequence[Mapping[str, str]]
) -> Iterator[list[Side]]:
    """The sides, which end with the context. `variables`: of their environment, the same for all or of each."""
    of_each = [variables] * len(names) if isinstance(variables, Mapping) else variables
    sides = [Side(script, name, options, own) for name, own in zip(names, of_each, strict=True)]
    try:
        yield sides
    finally:
        for side in sides:
            side.process.stdin.close()
            side.process.wait()


def rates(sides: Sequence[Side], turns: int, examples: int) -> dict[str, list[float]]:
    """Examples per second of every turn, by side. `examples`: in a turn."""
    found = {side.name: [] for side in sides}
    for _ in range(turns):
        for side in sides:
            found[side.name].append(examples / side.turn())
    return found


def report(found: Mapping[str, Sequence[float]], unit: str) -> dict[str, float]:
    """Prints the medians, and the ratio of two sides. Returns the medians."""
    medians = {side: statistics.median(values) for side, values in found.items()}
    for side, values in found.items():
        print(f"{side:10} {medians[side]:7.1f} {unit}  (turns: {min(values):.1f} to {max(values):.1f})")
    if len(found) == 2:
        ratios = [a / b for a, b in zip(*found.values(), strict=True)]
        print(f"{' / '.join(found)}: {statistics.median(ratios):.2f}  (turns: {min(ratios):.2f} to {max(ratios):.2f})")
    return medians
