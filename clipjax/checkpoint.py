"""A run's checkpoints in its workdir: written asynchronously and atomically, each with the state and the configuration."""

import contextlib
import functools
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clipjax import config, distributed, s3, sharding
from clipjax.files import as_path, reach, resolve
from clipjax.models import clip
from clipjax.preservation import Preservation
from clipjax.storage import DamagedError, SaveError, reading, refusal
from clipjax.train.owner import CheckOwner, never_lost
from clipjax.train.state import TrainState

TOKENIZER = "tokenizer.json"
COUNTS = "counts"  # item of a checkpoint, only with train.nonfinite = skip
DAMAGED = "damaged"  # folder of a workdir, beside checkpoints/, for checkpoints that could not be read


class Checkpoints:
    """The checkpoints of one workdir, for the run that writes them. A context manager: its end waits for the writes."""

    def __init__(self, workdir: Path, run: config.Run, check_owner: CheckOwner = never_lost) -> None:
        """`check_owner`: `Workdir`'s."""
        self._preservation = Preservation(run.train)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,  # removes what a killed save left
            preservation_policy=self._preservation,
            **s3.options(workdir),
        )
        _ignore_closed_loop()
        self._workdir, self._run, self._check_owner = workdir, run, check_owner
        self._manager = _Manager(resolve(workdir) / "checkpoints", options=options)
        self._manager.when_a_write_fails = self._end_together

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._writing():
                self._manager.close()
        except SaveError as failed:
            if error is None or isinstance(error, SaveError):
                raise
            logging.warning(str(failed))  # `error` came first, and is what ends the run

    def latest(self) -> int | None:
        """The newest step on disk, or None."""
        return self._manager.latest_step()

    def steps_after(self, step: int) -> list[int]:
        """The steps on disk that are newer than `step`, in order."""
        return [s for s in sorted(self._manager.all_steps()) if s > step]

    def last_good(self) -> str:
        """The part of a message that names the newest checkpoint on disk."""
        self._manager.reload()  # after a save that failed, Orbax still counts that one
        good = self.latest()
        if good is None:
            return f"no checkpoint had been written to {self._workdir}"
        return f"the last good checkpoint is {self._workdir}@{good}"

    def save(self, step: int, state: TrainState) -> None:
        """Starts to write. Returns when the state is copied from the devices, so that the next step may donate it.

        The writing goes on in threads, whatever the devices and the other processes' main threads do meanwhile. Does nothing for
        a step that is on disk already. Raises SaveError, also for an earlier save that has failed since.
        """
        if step in self._manager.all_steps():
            return
        self._check_owner(True)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "training": ocp.args.StandardSave(_training(state)),
            "config": ocp.args.JsonSave(json.loads(config.to_json(self._run))),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        if state.skipped_in_row is not None:
            items[COUNTS] = ocp.args.StandardSave({"skipped_in_row": state.skipped_in_row})
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of evaluations of a step, as `task/name` and as `task/dataset/name`: those that train.best can name.

        The step may have been saved before: the next save decides which checkpoint is the best, and keeps it.
        """
        self._preservation.note(step, metrics)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises SaveError if that failed."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """For `with`: turns an error of the storage into a SaveError."""
        try:
            yield
        except Exception as error:
            if (reason := refusal(error)) is None:
                raise
            remedy = "make room there, and the same command goes on from it"
            raise SaveError(f"a checkpoint could not be written ({reason}); {self.last_good()}. Remedy: {remedy}") from error

    def _end_together(self, error: Exception) -> None:
        """Of several processes, this one could not write its part: ends all of them, because the others wait for it, the main
        threads in the next save."""
        if not distributed.joined():
            return
        message = "".join(traceback.format_exception(error))
        with contextlib.suppress(Exception):
            try:
                with self._writing():
                    raise error
            except SaveError as named:
                message = str(named)
        distributed.leave(1, message)

    def set_aside(self, step: int, why: str) -> None:
        """Moves a checkpoint that can't be read from checkpoints/ to damaged/, for a person to look at, and logs a warning."""
        if jax.process_index() == 0:
            aside = self._workdir / DAMAGED
            aside.mkdir(exist_ok=True)
            before = aside.iterdir() if aside.exists() else ()  # on gs:// and s3:// an empty folder does not exist
            target = aside / f"{step}.{sum(p.name.split('.')[0] == str(step) for p in before)}"
            (self._workdir / "checkpoints" / str(step)).rename(target)
            logging.warning(f"{why}; it was moved to {target}")
        multihost_utils.sync_global_devices(f"aside {step}")
        self._manager.reload()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """`restore` of this workdir."""
        return restore(self._workdir, step, abstract)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager with two differences, for runs of several processes."""

    when_a_write_fails: Callable[[Exception], None]

    def reached_preemption(self, step: int) -> bool:
        """Whether a stop is requested. Only the loop may ask JAX, and not Orbax at each save: all must ask equally often."""
        return False

    def _wait_for_checkpointers(self) -> None:
        """Runs in the thread that completes a save. Where a process can't write its part, Orbax's threads in all of them wait for
        each other, for twenty minutes, and the next save waits for them."""
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.when_a_write_fails(error)
            raise


@functools.cache  # once in a process
def _ignore_closed_loop() -> None:
    """Silences follow-up errors. Where one array can't be read or written, Orbax closes its event loop; later each of the other
    arrays reports the closed loop.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(found: "sys.UnraisableHookArgs") -> None:
        if str(found.exc_value) != "Event loop is closed":
            before(found)

    sys.unraisablehook = hook


def _training(state: TrainState) -> dict[str, Any]:
    """The part of the state that only training needs, with the names that it has on disk."""
    values: dict[str, Any] = {"step": state.step, "opt_state": state.opt_state}
    return values | ({"memory": state.memory} if state.memory else {})


def split_name(name: str, field: str = "RUN") -> tuple[Path, int | None]:
    """`RUN` or `RUN@STEP` -> the workdir, and the step or None.

    Raises ConfigError, with `field` for the name, unless it is a workdir that can be read.
    """
    path, at, step = name.rpartition("@")
    workdir, step = (as_path(path), int(step)) if at and step.isdigit() else (as_path(name), None)
    found = reach(workdir, (workdir / "config.json").exists)
    config.require(found, field, name, "is not a workdir of `clipjax train`: it has no config.json")
    return workdir, step


def _reader(workdir: Path) -> ocp.CheckpointManager:
    """Reads a workdir that has checkpoints. Writes nothing and removes nothing.

    Each process reads its part without waiting for the others, because it may find damage where they find none.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}")
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone, **s3.options(workdir))
    return ocp.CheckpointManager(resolve(workdir) / "checkpoints", options=options)


def read_config(reader: ocp.CheckpointManager, step: int) -> config.Run:
    """The configuration that was saved with a checkpoint."""
    saved = reader.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    return config.from_json(json.dumps(saved["config"]))


def newest(workdir: Path) -> tuple[int, config.Run] | None:
    """The step and the configuration of a workdir's newest checkpoint; None where there is no checkpoint.

    Skips checkpoints whose configuration can't be read. Raises DamagedError where there are some and none can be read: a run must
    not start again from step 0 unless its user says so.
    """
    if not (workdir / "checkpoints").exists():
        return None
    aside = sorted(p.name for p in (workdir / DAMAGED).iterdir()) if (workdir / DAMAGED).exists() else []
    with _reader(workdir) as reader:
        steps = sorted(reader.all_steps(), reverse=True)
        for step in steps:
            with contextlib.suppress(DamagedError), reading(workdir, step):
                return step, read_config(reader, step)
    if steps or aside:
        names = ", ".join([str(step) for step in steps] + [f"{DAMAGED}/{name}" for name in aside])
        remedy = f"put a copy into {workdir / 'checkpoints'}, choose a new --workdir, or remove these to begin at step 0"
        raise DamagedError(f"{workdir}: none of its checkpoints can be read ({names}). Remedy: {remedy}")
    return None


def restore(workdir: Path, step: int, abstract: TrainState) -> TrainState:
    """The state as it was saved, sharded as `abstract` (shapes with shardings) says. Its mesh may differ from the saved one.

    Raises DamagedError on all processes if one of them can't read its part.
    """
    items = {"params": ocp.args.StandardRestore(abstract.params)}
    # The example memory has a few numbers after the last example, as many as the mesh asks for: they come and go unread.
    items["training"] = ocp.args.StandardRestore(_training(abstract), strict=not abstract.memory)
    if abstract.ema is not None:
        items["ema"] = ocp.args.StandardRestore(abstract.ema)
    if abstract.skipped_in_row is not None and (workdir / "checkpoints" / str(step) / COUNTS).exists():
        items[COUNTS] = ocp.args.StandardRestore({"skipped_in_row": abstract.skipped_in_row})
    error = None
    try:
        with reading(workdir, step), _reader(workdir) as reader:
            got = reader.restore(step, args=ocp.args.Composite(**items))
    except DamagedError as e:
        error = e
    if not multihost_utils.process_allgather(np.array([error is None])).all():
        raise error or DamagedError(f"{workdir}@{step} can't be read by another process")
    training, in_row = got.training, got.get(COUNTS, {}).get("skipped_in_row")
    if abstract.skipped_in_row is not None and in_row is None:  # train.nonfinite was `stop` so far
        in_row = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=abstract.skipped_in_row.sharding)()
    memory = training.get("memory", {})
    return TrainState(training["step"], got.params, training["opt_state"], got.get("ema"), memory, in_row)


def look_up(name: str, field: str = "RUN") -> tuple[Path, int, config.Run]:
    """The workdir, the step and the configuration of the checkpoint `RUN[@STEP]`.

    Raises ConfigError where there is no such checkpoint, with `field` for its name, and DamagedError where it can't be read.
    """
    workdir, step = split_name(name, field)
    exists = (workdir / "checkpoints").exists()
    config.require(exists, field, name, "has no checkpoint yet: it was stopped before the first was written")
    with _reader(workdir) as reader:
        steps = sorted(reader.all_steps())
        if step is None and steps:
            step = steps[-1]
        if step is None or step not in steps:
            found = ", ".join(map(str, steps)) or "(none)"
            raise config.ConfigError(f"{field} = {name!r}: has checkpoints of steps {found} only")
        distributed.agree("the checkpoint's step", step)
        with reading(workdir, step):
            return workdir, step, read_config(reader, step)


def load_params(name: str, mesh: Mesh) -> tuple[config.Run, clip.Params, int]:
    """The configuration, the weights that evaluation uses (the moving average where there is one) and the step of `RUN[@STEP]`.

    Raises as `look_up`.
    """
    workdir, step, run = look_up(name)
    with reading(workdir, step), _reader(workdir) as reader:
        target = sharding.shapes(jax.eval_shape(lambda: clip.init(run.model, run.seed)), mesh)
        item = "params" if run.optim.ema is None else "ema"
        restored = reader.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)}))
    return run, restored[item], step
