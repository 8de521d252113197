"""The metrics that a run writes: metrics.jsonl and TensorBoard's event files in its workdir, and Weights & Biases."""

import contextlib
import functools
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from clipjax import config
from clipjax.files import Mirror, scheme, strict, write_atomic
from clipjax.metrics.wandb_board import RECORD, WandbBoard
from clipjax.train.owner import CheckOwner, never_lost

if TYPE_CHECKING:
    from clipjax.metrics.board import Board as _Board

EvaluationResults = Mapping[str, float | np.ndarray]  # what an evaluation returns: metrics, and images uint8 [h, w, 3]


_Pushed = tuple[int, dict[str, jax.Array], dict[str, Any] | None]  # step, scalars on the devices, numbers of the host


class NonFiniteError(FloatingPointError):
    """A loss or norm is NaN or infinite. `step` is the number of finished steps at that point."""

    def __init__(self, name: str, value: float, step: int, skipped: int = 0) -> None:
        in_row = f", after {skipped - 1} others in a row that were skipped" if skipped else ""
        super().__init__(f"{name} = {value} at step {step}{in_row}")
        self.name, self.step, self.skipped = name, step, skipped


class MetricsWriter:
    """Writes metrics.jsonl and tensorboard/ of a workdir. Every process reads and checks the values; process 0 writes them.

    Values are read from the devices one log interval late, so that the host never waits for the newest step. For a remote
    workdir the files are local, and are copied there at every checkpoint, every evaluation and at the end, and in between at
    most Mirror.EVERY seconds late.
    """

    CHECKED = ("loss", "grad_norm", "param_norm", "update_norm")  # must be finite in every step that is not skipped
    IN_ROW = "skipped_in_row"  # not written

    def __init__(
        self,
        workdir: Path,
        step: int = 0,
        nonfinite_max: int = 0,
        check_owner: CheckOwner = never_lost,
        run: config.Run | None = None,
    ) -> None:
        """`step`: finished steps of the state that the run starts from. Lines of later steps are removed from the file.
        `nonfinite_max`: how many steps in a row may be skipped because they were not finite. `check_owner`: `Workdir`'s. `run`:
        goes to Weights & Biases, where it asks for that.
        """
        self._nonfinite_max, self._check_owner = nonfinite_max, check_owner
        self._before: list[_Pushed] = []  # the last interval, up to and with the last step that becomes a line
        self._since: list[_Pushed] = []  # the steps after it
        self._file = self._mirror = None
        self._boards: list[_Board | WandbBoard] = []
        if jax.process_index() == 0:
            from clipjax.metrics.board import Board  # not above: the step benchmark runs without tensorboardX

            folder = workdir
            if scheme(workdir):
                self._mirror = Mirror(workdir, functools.partial(check_owner, True))
                for name in ("metrics.jsonl", RECORD):
                    self._mirror.fetch(name)
                folder = self._mirror.local
            folder.mkdir(parents=True, exist_ok=True)
            _truncate(folder / "metrics.jsonl", step)
            self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._boards.append(Board(folder / "tensorboard", step))
            if run is not None and run.train.wandb:
                self._boards.append(WandbBoard(run, folder, workdir, step))

    def push(self, step: int, values: Mapping[str, jax.Array], host: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Takes the scalars of a step; `step` is the number of finished steps.

        With `host`, numbers (or None) such as those of Clock.read(), the step becomes a line. Without it, the step's values are
        only checked. Returns the line that was written now, which is that of the last interval, or None. Raises NonFiniteError
        for the first step whose values are not finite.
        """
        self._check_owner(False)
        if host is None:
            self._since.append((step, {k: values[k] for k in (*self.CHECKED, self.IN_ROW) if k in values}, None))
            return None
        ready, self._before, self._since = self._before, [*self._since, (step, dict(values), dict(host))], []
        return self._read(ready)

    def flush(self) -> dict[str, Any] | None:
        """Reads and checks all that was pushed, and writes its lines. Waits for the newest step.

        Called before each checkpoint: so no checkpoint holds a state that is not finite, and a run that resumes from it misses
        no line.
        """
        ready, self._before, self._since = self._before + self._since, [], []
        line = self._read(ready)
        self._upload()
        return line

    def evaluation(self, step: int, task: str, results: EvaluationResults, **more: str) -> dict[str, float]:
        """Writes the line of an evaluation: `step`, `task`, `metrics`, and the keys of `more` (the dataset). Returns the metrics.

        Images among the results, uint8 [h, w, 3], are written to the boards only.
        """
        images = {name: value for name, value in results.items() if isinstance(value, np.ndarray)}
        values = {name: float(value) for name, value in results.items() if not isinstance(value, np.ndarray)}
        prefix = "/".join([task, *more.values(), ""])
        self._write({"step": step, "task": task, **more, "metrics": values}, prefix, values)
        for board in self._boards:
            board.images(step, prefix, images)
        self._upload()  # a checkpoint may follow, and a run that resumes from it does not evaluate again
        return values

    def close(self) -> None:
        """Closes the files. What was pushed since the last flush is dropped."""
        with contextlib.ExitStack() as stack:  # all are closed, even if closing one fails, as on a full disk
            for part in (self._mirror, *self._boards, self._file):
                if part is not None:
                    stack.callback(part.close)

    def _upload(self) -> None:
        """Copies everything to the workdir, where that is remote."""
        if self._mirror is not None:
            for board in self._boards:
                board.flush()
            self._mirror.push()

    def _read(self, steps: list[_Pushed]) -> dict[str, Any] | None:
        line = None
        fetched = jax.device_get([values for _, values, _ in steps])
        for (step, _, host), values in zip(steps, fetched, strict=True):
            self._check(step, values, int(values.pop(self.IN_ROW, 0)))
            if host is not None:
                line = {"step": step} | {name: _number(value) for name, value in values.items()} | host
                self._write(line, "", {k: v for k, v in line.items() if k != "step"})
        return line

    def _check(self, step: int, values: Mapping[str, np.ndarray], skipped: int) -> None:
        """Raises NonFiniteError for values that are not finite. `skipped`: so many steps in a row, up to here, did nothing."""
        is_skipped = 0 < skipped <= self._nonfinite_max
        for name in ("param_norm",) if is_skipped else self.CHECKED:
            if name in values and not math.isfinite(values[name]):
                raise NonFiniteError(name, float(values[name]), step, skipped)
        if is_skipped and self._file is not None:  # once, in the first process
            logging.warning(f"step {step:,} was skipped: loss = {values['loss']}, grad_norm = {values['grad_norm']}")

    def _write(self, line: Mapping[str, Any], prefix: str, scalars: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._check_owner(self._mirror is None)  # a mirror checks it for itself
        self._file.write(json.dumps(strict(line), allow_nan=False) + "\n")
        self._file.flush()
        known = {name: value for name, value in scalars.items() if strict(value) is not None}
        for board in self._boards:
            board.scalars(line["step"], prefix, known)
        if self._mirror is not None:
            self._mirror.push_if_due()


def _number(value: np.ndarray) -> int | float:
    """A scalar for JSON. A float32 becomes the shortest text that gives it again, so 0.2 and not 0.20000000298."""
    return float(str(value)) if value.dtype.kind == "f" else int(value)


def _truncate(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and torn lines. The file is replaced in one operation, or stays as it was."""

    def is_valid(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    before = path.read_bytes() if path.exists() else b""
    after = b"".join(line for line in before.splitlines(keepends=True) if is_valid(line))
    if after != before:
        with write_atomic(path) as part, part.open("wb") as f:
            f.write(after)
            f.flush()
            os.fsync(f.fileno())
