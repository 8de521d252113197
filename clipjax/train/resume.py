"""Before the first step: whether the run can be trained here, and what it goes on from. Reads; only `save_config` writes, and
`restored` sets damaged checkpoints aside."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clipjax import config, distributed, sharding
from clipjax.checkpoint import Checkpoints, DamagedError, newest
from clipjax.files import write_whole
from clipjax.train.optimizer import can_grow
from clipjax.train.state import TrainState


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a run goes on from."""

    step: int
    run: config.Run


def check(run: config.Run, workdir: Path, mesh: Mesh) -> Saved | None:
    """What can be said before any data is opened. Raises ConfigError for several processes that are not joined, a mesh that the
    batch or the towers do not divide over, and a workdir of another run; returns the checkpoint to go on from, if there is one.
    """
    distributed.require_joined()
    sharding.check_batch(run, mesh)
    sharding.check_tensor(run.model, mesh)
    return resumable(run, workdir)


def resumable(run: config.Run, workdir: Path) -> Saved | None:
    """The newest checkpoint of the workdir; None where it has none. Raises ConfigError unless it is one of `run`'s own, and
    DamagedError where there are some and none can be read."""
    found = newest(workdir)
    if found is None:
        return None
    saved = Saved(*found)
    if differences := config.identity_differences(saved.run, run):
        rows = "\n  ".join(differences)
        raise config.ConfigError(f"the workdir holds another run; change these back, or choose a new --workdir:\n  {rows}")
    if refusal := can_grow(run.optim, saved.run.train.steps, run.train.steps, saved.step):
        raise config.ConfigError(refusal)
    return saved


def restored(
    saved: Saved, run: config.Run, workdir: Path, checkpoints: Checkpoints, placed: TrainState
) -> tuple[Saved, TrainState]:
    """The newest state that can be read, `saved` being the newest whose configuration can; it lies as `placed` says.

    Each one that can't be read is set aside, so that its step can be saved again. Raises as `resumable` does.
    """
    while True:
        for step in checkpoints.after(saved.step):
            checkpoints.set_aside(step, f"{workdir}@{step} can't be read: its configuration is damaged")
        try:
            return saved, checkpoints.restore(saved.step, placed)
        except DamagedError as error:
            checkpoints.set_aside(saved.step, str(error))
            found = resumable(run, workdir)
            assert found, "it raises where none is left"
            saved = found


def evaluated(workdir: Path, step: int, tasks: Sequence[tuple[str, str]]) -> list[bool]:
    """Which of these tasks, each with its dataset, have a line of `step` in metrics.jsonl: as process 0 sees the file."""
    path = workdir / "metrics.jsonl"
    found = set()
    for line in path.read_text(encoding="utf-8").splitlines() if tasks and path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a torn line
            record = json.loads(line)
            if record["step"] == step:
                found.add((record.get("task"), record.get("dataset")))
    return multihost_utils.broadcast_one_to_all(np.array([task in found for task in tasks], bool)).tolist()


def changes(saved: config.Run, run: config.Run) -> list[str]:
    """`field = value` of what is no longer as it was."""
    before = config.lines(saved)
    return [line for line in config.lines(run) if line not in before]


def save_config(run: config.Run, workdir: Path) -> None:
    """Writes config.json, whole or not at all."""
    if jax.process_index() == 0:
        with write_whole(workdir / "config.json") as part:
            part.write_text(config.to_json(run), encoding="utf-8")
