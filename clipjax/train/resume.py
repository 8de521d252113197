"""Before the first step: whether the run can be trained here, and what it goes on from. Reads; the only file it writes is
config.json, in a function of its own."""

from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from clipjax import config, distributed, sharding
from clipjax.checkpoint import newest
from clipjax.files import write_whole
from clipjax.train.optimizer import can_grow


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
    """The newest checkpoint of the workdir; None where it has none. Raises ConfigError unless it is one of `run`'s own."""
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


def changes(saved: config.Run, run: config.Run) -> list[str]:
    """`field = value` of what is no longer as it was."""
    before = config.lines(saved)
    return [line for line in config.lines(run) if line not in before]


def save_config(run: config.Run, workdir: Path) -> None:
    """Writes config.json, whole or not at all."""
    if jax.process_index() == 0:
        with write_whole(workdir / "config.json") as part:
            part.write_text(config.to_json(run), encoding="utf-8")
