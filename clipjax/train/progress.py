"""The progress line of a training run on stderr. A terminal shows one line that is redrawn; elsewhere each log is a line."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

import jax


class Progress:
    """Shows the rate, the loss, the time left, the share of time spent waiting for data, and those of bad and filtered examples.

    A context manager: on a terminal it takes the place of sys.stderr, so that the live line is erased before others print.
    """

    def __init__(self, steps: int, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._stream, self._now = steps, stream or sys.stderr, now
        self._quiet = jax.process_index() > 0  # only the first process prints
        self._live = self._stream.isatty()
        self._line: Mapping[str, Any] = {}
        self._first: tuple[int, float] | None = None  # step and time of the first update, which comes after compilation
        self._drawn_at = -1.0
        self._on_screen = False
        self._foreign = ""  # the last text that was written by others

    def update(self, step: int, line: Mapping[str, Any] | None = None) -> None:
        """Shows that `step` steps are finished. `line`: a new line of metrics, if there is one (see MetricsWriter.push).

        Off a terminal each line is printed once, with its own step, which is one log interval behind.
        """
        if self._quiet:
            return
        now = self._now()
        self._first = self._first or (step, now)
        self._line = line or self._line
        if not self._live:
            if line:
                self._stream.write(self._text(step, now, line["step"]) + "\n")
                self._stream.flush()
        elif (line or step == self._steps or now - self._drawn_at > 0.2) and self._foreign[-1:] in ("", "\n"):
            columns = self._columns() - 1
            self._stream.write("\r" + self._text(step, now, step)[:columns] + "\x1b[K")
            self._stream.flush()
            self._drawn_at, self._on_screen = now, True

    def _text(self, step: int, now: float, shown: int) -> str:
        """`shown`: the step to print."""
        parts = [f"step {shown:,}/{self._steps:,}"]
        if "loss" in self._line:
            parts.append(f"loss {self._line['loss']:.4g}")
        if "examples_per_second" in self._line:
            rate = self._line["examples_per_second"]
            parts.append(f"{rate:,.{0 if rate >= 100 else 2}f} examples/s")
        if "data_wait" in self._line:
            parts.append(f"data wait {self._line['data_wait']:.0%}")
        for name in ("bad", "filtered"):
            if share := self._line.get(f"{name}_share"):
                parts.append(f"{name} {100 * share:.2g}%")
        start, since = self._first or (step, now)
        if step > start:  # from all the time so far, so that evaluations and checkpoints are included
            parts.append(f"{duration((now - since) / (step - start) * (self._steps - step))} left")
        return "  ".join(parts)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError, AttributeError):
            return 80

    # The methods of sys.stderr that others call.

    def write(self, text: str) -> int:
        if self._on_screen and text:
            self._stream.write("\r\x1b[K")
            self._on_screen = False
        self._foreign = text or self._foreign
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "Progress":
        if self._live:
            self._before, sys.stderr = sys.stderr, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            sys.stderr = self._before
        if self._on_screen:
            self._stream.write("\n")
            self._stream.flush()


def duration(seconds: float) -> str:
    """`59 s`, `1:02 min`, `3:04 h`, `2 d 03 h`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if not minutes:
        return f"{s} s"
    if not hours:
        return f"{m}:{s:02} min"
    return f"{hours}:{m:02} h" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"
