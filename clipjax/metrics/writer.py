"""What a run writes to its workdir: metrics.jsonl and TensorBoard's events."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clipjax.files import Mirror, scheme, write_whole

Found = Mapping[str, float | np.ndarray]  # by an evaluation: metrics, and pictures


class NonFiniteError(FloatingPointError):
    """A loss or norm that is NaN or infinite, and the finished steps when it was."""

    def __init__(self, name: str, value: float, step: int) -> None:
        super().__init__(f"{name} = {value} at step {step}")
        self.step = step


class Writer:
    """metrics.jsonl and tensorboard/ of a workdir. Every process reads values and checks them; process 0 writes. A remote workdir
    has copies: of metrics.jsonl at every checkpoint and evaluation, of all at the end and Mirror.EVERY seconds late in between.

    Device values are read one interval late, so that the host never waits for the newest step.
    """

    CHECKED = ("loss", "grad_norm", "param_norm", "update_norm")  # must be finite in every step

    def __init__(self, workdir: Path, step: int = 0) -> None:
        """`step`: finished steps of the state that the run goes on from; what the files say of later ones is removed."""
        self._before: list[tuple] = []  # from the last line on
        self._since: list[tuple] = []  # after it
        self._file = self._board = self._mirror = None
        if jax.process_index() == 0:
            from clipjax.metrics.board import Board  # here: the step benchmark runs where tensorboardX is not

            if scheme(workdir):
                self._mirror = Mirror(workdir)
                self._mirror.fetch("metrics.jsonl")
                workdir = self._mirror.local
            workdir.mkdir(parents=True, exist_ok=True)
            _truncate(workdir / "metrics.jsonl", step)
            self._file = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = Board(workdir / "tensorboard", step)

    def push(self, step: int, values: Mapping[str, jax.Array], host: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Hands over the scalars of a step, `step` being the number of finished ones.

        With `host`, numbers (or None) such as Clock.read(), the step becomes a line; without, it is checked only. Returns the
        line that was written, which is that of an interval ago, or None. Raises NonFiniteError for the first step whose values
        are not finite.
        """
        if host is None:
            self._since.append((step, {k: values[k] for k in self.CHECKED if k in values}, None))
            return None
        ready, self._before, self._since = self._before, [*self._since, (step, dict(values), dict(host))], []
        return self._read(ready)

    def flush(self) -> dict[str, Any] | None:
        """Reads all that was pushed, waiting for the newest step: before each checkpoint, so that none holds a state gone bad and
        a run that resumes from it misses no line.
        """
        ready, self._before, self._since = self._before + self._since, [], []
        line = self._read(ready)
        self._upload()
        return line

    def evaluation(self, step: int, task: str, found: Found, **more: str) -> dict[str, float]:
        """Writes an evaluator's line: `step`, `task`, `metrics` and what `more` names, as the dataset. Pictures, arrays uint8
        [h, w, 3] among what was found, go to TensorBoard alone. Returns the others: the metrics."""
        pictures = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
        values = {name: float(value) for name, value in found.items() if name not in pictures}
        prefix = "/".join([task, *more.values(), ""])
        self._write({"step": step, "task": task, **more, "metrics": values}, prefix, values)
        if self._board is not None:
            self._board.images(step, {prefix + name: picture for name, picture in pictures.items()})
        self._upload()  # a checkpoint may follow, and whoever resumes from it does not evaluate again
        return values

    def close(self) -> None:
        """Ends the files. What was pushed since the last flush is dropped."""
        with contextlib.ExitStack() as stack:  # each is closed, though another can't be, as on a full disk
            for part in (self._mirror, self._board, self._file):
                if part is not None:
                    stack.callback(part.close)

    def _upload(self) -> None:
        """Everything so far, where the workdir is remote."""
        if self._mirror is not None and self._board is not None:
            self._board.flush()
            self._mirror.push()

    def _read(self, steps: list[tuple]) -> dict[str, Any] | None:
        line = None
        fetched = jax.device_get([values for _, values, _ in steps])
        for (step, _, host), values in zip(steps, fetched, strict=True):
            for name in self.CHECKED:
                if name in values and not math.isfinite(values[name]):
                    raise NonFiniteError(name, float(values[name]), step)
            if host is not None:
                # str: a float32 in as few digits as tell it from its neighbours, 0.2 and not 0.20000000298
                line = {"step": step} | {k: float(str(v)) for k, v in values.items()} | host
                self._write(line, "", {k: v for k, v in line.items() if k != "step"})
        return line

    def _write(self, line: Mapping[str, Any], prefix: str, scalars: Mapping[str, float]) -> None:
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(_strict(line), allow_nan=False) + "\n")
        self._file.flush()
        known = {prefix + name: value for name, value in scalars.items() if value is not None}  # mfu may not be
        self._board.scalars(line["step"], known)
        if self._mirror is not None:
            self._mirror.pulse()


def _strict(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: null in their place."""
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, step: int) -> None:
    """Removes lines past `step` and torn ones, at once or not at all."""

    def holds(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    before = path.read_bytes() if path.exists() else b""
    after = b"".join(line for line in before.splitlines(keepends=True) if holds(line))
    if after != before:
        with write_whole(path) as part, part.open("wb") as f:
            f.write(after)
            f.flush()
            os.fsync(f.fileno())
