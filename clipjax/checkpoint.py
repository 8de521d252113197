"""A run's checkpoints: asynchronous, atomic, state and configuration under one step; and the workdir they live in."""

import functools
import json
import math
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from clipjax import config, s3, sharding
from clipjax.files import place, reach, resolve
from clipjax.models import clip
from clipjax.train.state import TrainState

TOKENIZER = "tokenizer.json"


class Checkpoints:
    """The checkpoints of one workdir, for the run that writes them. Use as a context manager: leaving it waits for the writes."""

    def __init__(self, workdir: Path, run: config.Run) -> None:
        policies = ocp.checkpoint_managers
        keep, score = [policies.LatestN(run.train.keep)], None
        if run.train.best:
            score = functools.partial(_score, run.train.best)
            keep.append(policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,  # what a killed save left behind
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=score,  # chooses nothing beside a policy, but without it metrics are not written: a resumed run needs them
            **s3.options(workdir),
        )
        self._manager = ocp.CheckpointManager(resolve(workdir) / "checkpoints", options=options)
        self._run = run

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest finished step on disk, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Starts to write; returns once the state has left the devices, so that the next step may donate it.

        `metrics` (`task/name` and `task/dataset/name` -> value) are what train.best looks at. A step that is on disk already is
        left alone.
        """
        if step in self._manager.all_steps():
            return
        items = {
            "params": ocp.args.StandardSave(state.params),
            "training": ocp.args.StandardSave(_training(state)),
            "config": ocp.args.JsonSave(json.loads(config.to_json(self._run))),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        tracked = (metrics or {}) if self._run.train.best else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=tracked)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state as it was saved, placed as `abstract` (shapes with shardings) says, on whatever mesh that is."""
        items = {"params": ocp.args.StandardRestore(abstract.params)}
        items["training"] = ocp.args.StandardRestore(_training(abstract))
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        got = self._manager.restore(step, args=ocp.args.Composite(**items))
        training = got.training
        return TrainState(training["step"], got.params, training["opt_state"], got.get("ema"), training.get("memory", {}))


def _training(state: TrainState) -> dict[str, object]:
    """What only training needs, as it is stored."""
    return {"step": state.step, "opt_state": state.opt_state} | ({"memory": state.memory} if state.memory else {})


def _score(name: str, metrics: dict[str, float]) -> float:
    return metrics.get(name, -math.inf)


def split_name(name: str) -> tuple[Path, int | None]:
    """`RUN` or `RUN@STEP` -> the workdir and the step. Raises ConfigError unless it is a run that can be reached."""
    path, at, step = name.rpartition("@")
    workdir, step = (place(path), int(step)) if at and step.isdigit() else (place(name), None)
    found = reach(workdir, (workdir / "config.json").exists)
    config.require(found, "RUN", name, "is not a workdir of `clipjax train`: it has no config.json")
    return workdir, step


def _reader(workdir: Path) -> ocp.CheckpointManager:
    """Of a workdir that has checkpoints; it writes nothing and clears nothing away."""
    options = ocp.CheckpointManagerOptions(read_only=True, **s3.options(workdir))
    return ocp.CheckpointManager(resolve(workdir) / "checkpoints", options=options)


def _run_of(reader: ocp.CheckpointManager, step: int) -> config.Run:
    saved = reader.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    return config.from_json(json.dumps(saved.config))


def newest(workdir: Path) -> tuple[int, config.Run] | None:
    """The step of a workdir's newest finished checkpoint and the configuration saved with it; None where there is none."""
    if not (workdir / "checkpoints").exists():
        return None
    with _reader(workdir) as reader:
        step = reader.latest_step()
        return None if step is None else (step, _run_of(reader, step))


def load_params(name: str, mesh: Mesh) -> tuple[config.Run, clip.Params, int]:
    """The configuration, the weights that evaluation uses (the moving average where there is one) and the step of `RUN[@STEP]`.

    Raises ConfigError where there is no such checkpoint.
    """
    workdir, step = split_name(name)
    exists = (workdir / "checkpoints").exists()
    config.require(exists, "RUN", name, "has no checkpoint yet: it was stopped before the first was written")
    with _reader(workdir) as reader:
        steps = sorted(reader.all_steps())
        step = step if step is not None else steps[-1] if steps else None
        config.require(step in steps, "RUN", name, f"has checkpoints of steps {', '.join(map(str, steps)) or '(none)'} only")
        run = _run_of(reader, step)
        target = sharding.shapes(jax.eval_shape(lambda: clip.init(run.model, run.seed)), mesh)
        item = "params" if run.optim.ema is None else "ema"
        restored = reader.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)}))
    return run, restored[item], step
