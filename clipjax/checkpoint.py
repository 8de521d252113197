"""A run's checkpoints in its workdir: written asynchronously and atomically, each with the state and the configuration.

`clipjax.restore` reads them."""

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
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from clipjax import config, distributed, s3
from clipjax.config.start import TOKENIZER as TOKENIZER
from clipjax.files import resolve
from clipjax.preservation import Preservation
from clipjax.restore import COUNTS, DAMAGED, FINGERPRINT, restore, training_part
from clipjax.storage import WEIGHTS_ONLY, SaveError, refusal
from clipjax.train.owner import CheckOwner, never_lost
from clipjax.train.state import TrainState


class Checkpoints:
    """The checkpoints of one workdir, for the run that writes them. A context manager: its end waits for the writes."""

    def __init__(
        self,
        workdir: Path,
        run: config.Run,
        check_owner: CheckOwner = never_lost,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        """`check_owner` and `fingerprint`: `Workdir`'s."""
        self._preservation = Preservation(run.train)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,  # removes what a killed save left
            preservation_policy=self._preservation,
            **s3.options(workdir),
        )
        _ignore_closed_loop()
        self._workdir, self._run, self._check_owner, self._fingerprint = workdir, run, check_owner, fingerprint
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
            "training": ocp.args.StandardSave(training_part(state)),
            "config": ocp.args.JsonSave(json.loads(config.to_json(self._run))),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        if state.skipped_in_row is not None:
            items[COUNTS] = ocp.args.StandardSave({"skipped_in_row": state.skipped_in_row})
        if self._fingerprint is not None:
            items[FINGERPRINT] = ocp.args.JsonSave(dict(self._fingerprint))
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
        return restore(self._workdir, step, abstract)


def save_weights(workdir: Path, run: config.Run, params: Any, made_by: str) -> None:
    """Writes a checkpoint of step 0 that holds weights alone: a run can start from it by init, and not go on in its workdir.

    `made_by`: the command that made it. Returns when it is on disk.
    """
    items = {
        "params": ocp.args.StandardSave(params),
        "config": ocp.args.JsonSave(json.loads(config.to_json(run))),
        WEIGHTS_ONLY: ocp.args.JsonSave({"made_by": made_by}),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **s3.options(workdir))
    with ocp.CheckpointManager(resolve(workdir) / "checkpoints", options=options) as manager:
        manager.save(0, args=ocp.args.Composite(**items))


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
