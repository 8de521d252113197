"""A run's checkpoints: asynchronous, atomic, state and configuration under one step; and the workdir they live in."""

import contextlib
import errno
import functools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clipjax import config, s3, sharding
from clipjax.files import as_path, reach, resolve
from clipjax.models import clip
from clipjax.train.state import TrainState

TOKENIZER = "tokenizer.json"
DAMAGED = "damaged"  # folder of a workdir, beside checkpoints/: those that could not be read
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in the quota, or under the limit of a file

# What TensorStore, which writes the arrays, says of files that are missing, cut or garbled; and of a storage that may well have
# them and does not answer now: that is no reason to give up a checkpoint.
_TORN = re.compile(r"\b(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE)\b|Encountered error while reading array index")
_AWAY = re.compile(r"\b(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED)\b")
_ERRNO = re.compile(r"os_error_code='(\d+)'")


class SaveError(OSError):
    """A checkpoint could not be written. The message names the workdir, the last good checkpoint and the remedy."""


class DamagedError(OSError):
    """A checkpoint is there and can't be read: files are missing, cut or garbled."""


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
        _ignore_latecomers()
        self._manager = _Manager(resolve(workdir) / "checkpoints", options=options)
        self._workdir, self._run = workdir, run

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        with self._writing():
            self._manager.close()

    def latest(self) -> int | None:
        """The newest finished step on disk, or None."""
        return self._manager.latest_step()

    def steps_after(self, step: int) -> list[int]:
        """The finished steps on disk that are newer than `step`."""
        return [s for s in sorted(self._manager.all_steps()) if s > step]

    def last_good(self) -> str:
        """What a message says of what is left, also after a save that failed: Orbax still counts that one."""
        self._manager.reload()
        good = self.latest()
        return (
            f"no checkpoint had been written to {self._workdir}"
            if good is None
            else f"the last good checkpoint is {self._workdir}@{good}"
        )

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Starts to write; returns once the state has left the devices, so that the next step may donate it.

        `metrics` (`task/name` and `task/dataset/name` -> value) are what train.best looks at. A step that is on disk already is
        left alone. Raises SaveError, also for an earlier save that has failed meanwhile.
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
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=tracked)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises SaveError where that failed."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (reason := _storage_says(error)) is None:
                raise
            remedy = "make room there, and the same command goes on from it"
            raise SaveError(f"a checkpoint could not be written ({reason}); {self.last_good()}. Remedy: {remedy}") from error

    def set_aside(self, step: int, why: str) -> None:
        """Moves a checkpoint that can't be read from checkpoints/ to damaged/, where it can be looked at, and says so."""
        if jax.process_index() == 0:
            aside = self._workdir / DAMAGED
            aside.mkdir(exist_ok=True)
            there = aside.iterdir() if aside.exists() else ()  # on gs:// and s3:// an empty folder is none
            place = aside / f"{step}.{sum(p.name.split('.')[0] == str(step) for p in there)}"
            (self._workdir / "checkpoints" / str(step)).rename(place)
            logging.warning(f"{why}; it now lies in {place}")
        multihost_utils.sync_global_devices(f"aside {step}")
        self._manager.reload()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state as it was saved, placed as `abstract` (shapes with shardings) says, on whatever mesh that is.

        Raises DamagedError, on all processes where one of them can't read its part."""
        items = {"params": ocp.args.StandardRestore(abstract.params)}
        items["training"] = ocp.args.StandardRestore(_training(abstract))
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        error = None
        try:
            with _reading(self._workdir, step), _reader(self._workdir, alone=True) as reader:
                got = reader.restore(step, args=ocp.args.Composite(**items))
        except DamagedError as e:
            error = e
        if not multihost_utils.process_allgather(np.array([error is None])).all():
            raise error or DamagedError(f"{self._workdir}@{step} can't be read by another process")
        training = got.training
        return TrainState(training["step"], got.params, training["opt_state"], got.get("ema"), training.get("memory", {}))


class _Manager(ocp.CheckpointManager):
    """Orbax asks JAX at each save whether the run is told to stop. JAX counts who asks how often; that is the loop's to ask."""

    def reached_preemption(self, step: int) -> bool:
        return False


@functools.cache  # once in a process
def _ignore_latecomers() -> None:
    """Where one array can't be read or written, Orbax closes its event loop, and each other one complains of that in the end."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(found: "sys.UnraisableHookArgs") -> None:
        if str(found.exc_value) != "Event loop is closed":
            before(found)

    sys.unraisablehook = hook


def _training(state: TrainState) -> dict[str, object]:
    """What only training needs, as it is stored."""
    return {"step": state.step, "opt_state": state.opt_state} | ({"memory": state.memory} if state.memory else {})


def _score(name: str, metrics: dict[str, float]) -> float:
    return metrics.get(name, -math.inf)


def split_name(name: str) -> tuple[Path, int | None]:
    """`RUN` or `RUN@STEP` -> the workdir and the step. Raises ConfigError unless it is a run that can be reached."""
    path, at, step = name.rpartition("@")
    workdir, step = (as_path(path), int(step)) if at and step.isdigit() else (as_path(name), None)
    found = reach(workdir, (workdir / "config.json").exists)
    config.require(found, "RUN", name, "is not a workdir of `clipjax train`: it has no config.json")
    return workdir, step


def _reader(workdir: Path, *, alone: bool = False) -> ocp.CheckpointManager:
    """Of a workdir that has checkpoints; it writes nothing and clears nothing away. `alone`: of this process's part, which waits
    for no other: one of them may find damage where the others find none."""
    me = jax.process_index()
    parts = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}")
    more = s3.options(workdir) | ({"multiprocessing_options": parts} if alone else {})
    options = ocp.CheckpointManagerOptions(read_only=True, **more)
    return ocp.CheckpointManager(resolve(workdir) / "checkpoints", options=options)


def read_config(reader: ocp.CheckpointManager, step: int) -> config.Run:
    saved = reader.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    return config.from_json(json.dumps(saved.config))


@contextlib.contextmanager
def _reading(workdir: Path, step: int) -> Iterator[None]:
    """Turns what damage looks like into DamagedError."""
    try:
        for item in ("config/metadata", "params/_METADATA", "training/_METADATA"):  # without them Orbax would guess from the rest
            if not (file := workdir / "checkpoints" / str(step) / item).exists():
                raise FileNotFoundError(f"{file} is missing")
        yield
    except Exception as error:
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        text = "\n".join(map(str, causes))
        torn = any(isinstance(e, FileNotFoundError | json.JSONDecodeError) for e in causes) or _TORN.search(text)
        if not torn or _AWAY.search(text):
            raise
        raise DamagedError(f"{workdir}@{step} can't be read: {str(causes[-1]).splitlines()[0]:.200}") from error


def _storage_says(error: BaseException) -> str | None:
    """Why the storage refused to write, in its own words; None where something else is the matter."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if found := _ERRNO.search(str(error)):
        return os.strerror(int(found[1]))
    return str(error).splitlines()[0][:200] if _AWAY.search(str(error)) else None


def newest(workdir: Path) -> tuple[int, config.Run] | None:
    """The step of a workdir's newest finished checkpoint and the configuration saved with it; None where there is none.

    One whose configuration can't be read is passed over. Raises DamagedError where that leaves none of those that were there:
    a run must not begin anew without its user's knowing.
    """
    if not (workdir / "checkpoints").exists():
        return None
    aside = sorted(p.name for p in (workdir / DAMAGED).iterdir()) if (workdir / DAMAGED).exists() else []
    with _reader(workdir) as reader:
        steps = sorted(reader.all_steps(), reverse=True)
        for step in steps:
            with contextlib.suppress(DamagedError), _reading(workdir, step):
                return step, read_config(reader, step)
    if steps or aside:
        there = ", ".join([str(step) for step in steps] + [f"{DAMAGED}/{name}" for name in aside])
        remedy = f"put a copy into {workdir / 'checkpoints'}, choose a new --workdir, or remove these to begin at step 0"
        raise DamagedError(f"{workdir}: none of its checkpoints can be read ({there}). Remedy: {remedy}")
    return None


def load_params(name: str, mesh: Mesh) -> tuple[config.Run, clip.Params, int]:
    """The configuration, the weights that evaluation uses (the moving average where there is one) and the step of `RUN[@STEP]`.

    Raises ConfigError where there is no such checkpoint, and DamagedError where it can't be read.
    """
    workdir, step = split_name(name)
    exists = (workdir / "checkpoints").exists()
    config.require(exists, "RUN", name, "has no checkpoint yet: it was stopped before the first was written")
    with _reader(workdir) as reader:
        steps = sorted(reader.all_steps())
        step = step if step is not None else steps[-1] if steps else None
        config.require(step in steps, "RUN", name, f"has checkpoints of steps {', '.join(map(str, steps)) or '(none)'} only")
        with _reading(workdir, step):
            run = read_config(reader, step)
            target = sharding.shapes(jax.eval_shape(lambda: clip.init(run.model, run.seed)), mesh)
            item = "params" if run.optim.ema is None else "ema"
            restored = reader.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)}))
    return run, restored[item], step
