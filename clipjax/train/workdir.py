"""A run's folder before the first step: which checkpoint the run resumes from, and whether it can be trained here at all.

They only read, with three exceptions: `open_workdir` writes owner.json, `save_config` config.json, and `restore_newest` sets
damaged checkpoints aside.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clipjax import config, distributed, sharding
from clipjax.checkpoint import Checkpoints
from clipjax.files import write_atomic
from clipjax.models import cudnn, tpu_attention
from clipjax.restore import newest, require_state
from clipjax.storage import DamagedError
from clipjax.train.optimizer import can_grow
from clipjax.train.origin import Origin, changes_order, find_origin
from clipjax.train.owner import CheckOwner, never_lost, owned
from clipjax.train.state import TrainState
from clipjax.train.weights import Weights, find_weights


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a run resumes from."""

    step: int  # finished steps
    run: config.Run  # as it was when the checkpoint was saved


@dataclass(frozen=True)
class Workdir:
    """A run's folder, and what was found in it."""

    path: Path
    saved: Saved | None = None  # None: there is no checkpoint
    # Of a workdir without checkpoint: where its state or its weights come from. None: it starts with new weights.
    origin: Origin | Weights | None = None
    check_owner: CheckOwner = never_lost  # raises LostError where another process owns the folder now; see `Owner.check`
    fingerprint: Mapping[str, Any] | None = None  # of the run's data, once they are open: `same_data.recognized`


@contextlib.contextmanager
def open_workdir(run: config.Run, path: Path, mesh: Mesh) -> Iterator[Workdir]:
    """For `with`: checks that `run` can be trained on `mesh` into the folder `path`, owns the folder, and finds the checkpoint to
    resume from.

    Called once for a run, before any data is opened; later functions get the result. Writes nothing but owner.json.

    Raises ConfigError for several processes that are not joined or find different checkpoints, for a mesh that does not divide
    the batch or the towers, for a model of one tower, for attention that these devices don't compute, and for a checkpoint of
    another run, or one that run.init names and that does not fit. Raises OwnedError if another process trains there, and
    DamagedError if no checkpoint can be read.
    """
    distributed.require_joined()
    run.model.require_towers("image", "text")
    sharding.check_batch(run, mesh)
    sharding.check_tensor(run.model, mesh)
    cudnn.check(run.model, mesh.devices.flat[0])
    tpu_attention.check(run.model, mesh.devices.flat[0], mesh.shape["tensor"])
    with owned(path) as check_owner:
        saved = _find_checkpoint(run, path)
        yield Workdir(path, saved, None if saved else _find_start(run), check_owner)


def _find_start(run: config.Run) -> Origin | Weights | None:
    """What `run.init` names; None without init. Raises as `find_origin` and `find_weights`."""
    if run.init is None:
        return None
    if run.init.state == "weights":
        return find_weights(run)
    origin = find_origin(run)
    distributed.agree("the step of init.run", origin.step)
    if not changes_order(origin.run, run):
        _check_skip(run, origin.path, origin)
    return origin


def _find_checkpoint(run: config.Run, path: Path) -> Saved | None:
    """The newest checkpoint whose configuration can be read; None where there is no checkpoint. Raises as `open_workdir`."""
    found = newest(path)
    distributed.agree("the newest checkpoint's step", found[0] if found else "none")
    if found is None:
        return None
    saved = Saved(*found)
    require_state(path, saved.step, "--workdir")
    before = saved.run.init
    if run.init and (before is None or before.state != run.init.state):  # what another run gave stands in the checkpoint
        remedy = f"{path} has checkpoints, from which it goes on; choose a new --workdir, or set init to {before}"
        raise config.ConfigError(f"init.run = {run.init.run!r}: {remedy}")
    if differences := config.identity_differences(saved.run, run):
        rows = "\n  ".join(differences)
        remedy = "change these back, or choose a new --workdir, which init starts from this one where its state fits"
        raise config.ConfigError(f"the workdir holds another run; {remedy}:\n  {rows}")
    if refusal := can_grow(run.optim, saved.run.train.steps, run.train.steps, saved.step):
        raise config.ConfigError(refusal)
    _check_skip(run, path, saved)
    return saved


def _check_skip(run: config.Run, path: Path, saved: Saved | Origin) -> None:
    """Raises ConfigError where `run` leaves out batches that a checkpoint in the workdir `path` was trained on, or has those that
    it left out.
    """
    first = run.train.first_other_batch(saved.run.train)
    if first is not None and first < saved.step:
        go_back = f"or start a new --workdir by init = Init(run='{path}@STEP', state='all'), from a step of {first} at most"
        remedy = f"changes batches of the {saved.step} finished steps, from step {first} on; change it back, {go_back}"
        raise config.ConfigError(f"train.skip = {run.train.skip}: {remedy}")


def restore_newest(
    run: config.Run, workdir: Workdir, checkpoints: Checkpoints, abstract: TrainState
) -> tuple[Saved, TrainState] | None:
    """The newest checkpoint that can be read, and its state, sharded as `abstract` (shapes with shardings) says; None where the
    workdir has no checkpoint.

    A checkpoint that can't be read is set aside, so that its step can be saved again, and the one before it is looked up. Raises
    as `open_workdir` does.
    """
    if (saved := workdir.saved) is None:
        return None
    while True:
        damaged = checkpoints.steps_after(saved.step)
        distributed.agree("the steps of damaged checkpoints", str(damaged))
        for step in damaged:
            checkpoints.set_aside(step, f"{workdir.path}@{step} can't be read: its configuration is damaged")
        try:
            return saved, checkpoints.restore(saved.step, abstract)
        except DamagedError as error:
            checkpoints.set_aside(saved.step, str(error))
            saved = _find_checkpoint(run, workdir.path)
            assert saved, "newest() raises where checkpoints were set aside and none is left"


def with_start(run: config.Run, workdir: Workdir) -> config.Run:
    """`run`; where it resumes and has no init, with that of the checkpoint: config.json goes on to say what it started from."""
    init = None if workdir.saved is None else workdir.saved.run.init
    return dataclasses.replace(run, init=init) if run.init is None and init is not None else run


def evaluations(workdir: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that evaluations wrote: `step`, `task`, `dataset`, `metrics`."""
    path = workdir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a torn line
            record = json.loads(line)
            if "task" in record:
                yield record


def evaluated(workdir: Path, step: int, tasks: Sequence[tuple[str, str]]) -> list[bool]:
    """For each (task, dataset): whether metrics.jsonl has its line of `step`. Process 0 reads the file for all processes."""
    found = {(line["task"], line.get("dataset")) for line in evaluations(workdir) if line["step"] == step} if tasks else set()
    return multihost_utils.broadcast_one_to_all(np.array([task in found for task in tasks], bool)).tolist()


def qualified(task: str, dataset: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an evaluation under the names that train.best may have: `task/metric` and `task/dataset/metric`."""
    return {f"{prefix}/{name}": value for prefix in (task, f"{task}/{dataset}") for name, value in metrics.items()}


def note_evaluations(run: config.Run, workdir: Path, checkpoints: Checkpoints, step: int) -> None:
    """Tells the checkpoints what evaluations up to `step` have found. train.best needs it."""
    for line in evaluations(workdir) if run.train.best else ():
        if line["step"] <= step:
            checkpoints.note(line["step"], qualified(line["task"], line.get("dataset", ""), line["metrics"]))


def changes(saved: config.Run, run: config.Run) -> list[str]:
    """The fields of `run` that differ from `saved`, each as `field = value`."""
    before = config.lines(saved)
    return [line for line in config.lines(run) if line not in before]


def save_config(run: config.Run, workdir: Path) -> None:
    """Writes config.json in one operation: a reader never sees half of it."""
    if jax.process_index() == 0:
        with write_atomic(workdir / "config.json") as part:
            part.write_text(config.to_json(run), encoding="utf-8")
