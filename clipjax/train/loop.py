"""The training loop: from a configuration, batches and evaluators to a finished run in its workdir."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from clipjax import config, distributed, preemption, sharding
from clipjax.checkpoint import Checkpoints
from clipjax.data.source import Source
from clipjax.metrics.counts import TooManyBadError
from clipjax.metrics.flops import run_flops
from clipjax.metrics.writer import EvaluationResults, MetricsWriter, NonFiniteError
from clipjax.models import clip
from clipjax.storage import DISK_FULL
from clipjax.train import remat
from clipjax.train.optimizer import optimizer_of
from clipjax.train.profiling import Profile
from clipjax.train.progress import Progress
from clipjax.train.report import Report, say_finished, say_start
from clipjax.train.state import TrainState, abstract_state, initial_state
from clipjax.train.step import Batch, Metrics, jit_step, make_train_step
from clipjax.train.weights import started_state
from clipjax.train.workdir import Workdir, evaluated, note_evaluations, qualified, restore_newest, save_config, with_start

# Opens this process's batches, beginning with the one that follows a number of finished steps.
Batches = Callable[[int], AbstractContextManager[Iterator[dict[str, np.ndarray]]]]
# Keys of a batch that the step may read.
ON_DEVICE = ("image", "text", "index", "id", "teacher_image", "teacher_text", "embedded", "label")
STEPS_AHEAD = 2  # how many steps the host may be ahead: the devices never wait for it, and the clock stays exact


class Evaluator(Protocol):
    """What the loop needs of an evaluation."""

    @property
    def task(self) -> str: ...

    @property
    def dataset(self) -> str: ...

    def due(self, step: int) -> bool: ...

    def run(self, params: clip.Params, step: int) -> EvaluationResults: ...


def train(
    run: config.Run,
    workdir: Workdir,
    batches: Batches,
    evaluators: Sequence[Evaluator],
    mesh: Mesh,
    source: Source | None = None,
    profile: range = range(0),
    check: Callable[[clip.Params], None] = lambda params: None,
) -> TrainState:
    """Trains until `train.steps` steps are finished, from the checkpoint that `open_workdir` found, or from the start.

    `source`: the dataset that the batches are of, for the number of epochs. `profile`: the steps to trace. `check`: may
    refuse the weights, before the first step.

    Raises ConfigError for an optimizer rule without a parameter and for a mesh that would replicate what it should shard,
    FloatingPointError where a loss is not finite, TooManyBadError where more examples are bad than data.max_bad allows, OSError
    where the disk is full, and Preempted where a stop was requested and the state is saved.
    """
    run = with_start(run, workdir)
    params = jax.eval_shape(lambda: clip.init(run.model, run.seed))
    tx = optimizer_of(run, params)
    abstract, origin = abstract_state(run, tx, mesh), workdir.origin
    given = None if origin is None else started_state(run, origin, tx, mesh)
    # Nothing above this line writes a file: it only finds what is wrong with the run.
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir.path, run, workdir.check_owner, workdir.fingerprint))
        stack.enter_context(_name_last_good(checkpoints, workdir.path, run.train))
        begin, state = restore_newest(run, workdir, checkpoints, abstract) or (origin, given or initial_state(run, tx, mesh))
        schedule = _Schedule(run.train, evaluators, None if begin is None else begin.step, workdir.path)
        note_evaluations(run, workdir.path, checkpoints, schedule.start)
        if schedule.is_finished:
            say_finished(run, workdir.path)
            return state
        say_start(run, workdir.path, begin, source)
        devices = _Devices(remat.resolved(run, mesh, abstract, explain=True), tx, mesh, state)
        check(devices.evaluated)
        data = stack.enter_context(batches(schedule.start))
        save_config(run, workdir.path)
        if origin:  # from here on, the workdir needs nothing of the runs that it started from
            checkpoints.save(origin.step, state)
        written = MetricsWriter(workdir.path, schedule.start, run.train.nonfinite_max, workdir.check_owner, run)
        writer = stack.enter_context(contextlib.closing(written))
        progress = stack.enter_context(Progress(run.train.steps))
        report = Report(run, mesh, writer, progress, run_flops(run, params), source)
        profiler = stack.enter_context(Profile(profile, schedule.start, workdir.path, lambda: report.clock.paused(devices.state)))
        _Loop(run.train, schedule, devices, data, checkpoints, report, profiler).run()
    report.say_repairs(run.train.steps - schedule.start)
    return devices.state


class _Schedule:
    """Decides what is due when a number of steps is finished."""

    def __init__(self, cfg: config.Train, evaluators: Sequence[Evaluator], start: int | None, workdir: Path) -> None:
        """`start`: the finished steps of the state that the run starts from; None: it starts with new weights."""
        self._cfg, self._evaluators, self.start = cfg, evaluators, start or 0
        # Evaluations of step `start` that have no line yet: of the weights that a run starts from, and those that did not finish,
        # as in a run that was preempted at its end.
        due = [] if start is None else [e for e in evaluators if start == 0 or start >= cfg.steps or e.due(start)]
        done = evaluated(workdir, self.start, [(e.task, e.dataset) for e in due])
        self._missed = [e for e, is_done in zip(due, done, strict=True) if not is_done]

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.start >= self._cfg.steps and not self._missed

    def evaluations(self, step: int) -> Sequence[Evaluator]:
        """The evaluations that are due: all of them at the end."""
        if step == self.start:
            return self._missed
        return [e for e in self._evaluators if step == self._cfg.steps or e.due(step)]

    def saves(self, step: int, due: Sequence[Evaluator], stop: bool) -> bool:
        """Whether the state must be saved. The state of the start is not: it is on disk, or new.

        Where train.best is a metric of the evaluations `due`, their step is saved, whatever they find.
        """
        regular = stop or step == self._cfg.steps or step % self._cfg.checkpoint_every == 0
        return step > self.start and (regular or any(self._gives_best(evaluator) for evaluator in due))

    def _gives_best(self, evaluator: Evaluator) -> bool:
        evaluation, _, _ = (self._cfg.best or "").rpartition("/")
        return evaluation in (evaluator.task, f"{evaluator.task}/{evaluator.dataset}")


class _Devices:
    """The state on the devices, and the compiled step that updates it."""

    def __init__(self, run: config.Run, tx: optax.GradientTransformation, mesh: Mesh, state: TrainState) -> None:
        self.state = state
        self._mesh = mesh
        self._step = jit_step(make_train_step(run, tx, mesh), state, mesh)
        self._losses: deque[jax.Array] = deque(maxlen=STEPS_AHEAD)  # of the newest steps, which may still be running

    @property
    def newest_loss(self) -> jax.Array | None:
        """The loss of the newest step, which may still be running; None before the first step."""
        return self._losses[-1] if self._losses else None

    @property
    def evaluated(self) -> clip.Params:
        """The weights that evaluations use, gathered over `data` where they are sharded over it."""
        return jax.device_put(self.state.evaluated, sharding.shardings(self.state.evaluated, self._mesh))

    def wait(self) -> None:
        """Waits until the devices have fewer than STEPS_AHEAD steps to do."""
        if len(self._losses) == STEPS_AHEAD:
            self._losses[0].block_until_ready()

    def put(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """This process's part of a global batch, on the devices."""
        return sharding.to_global({k: batch[k] for k in ON_DEVICE if k in batch}, self._mesh)

    def step(self, batch: Batch) -> Metrics:
        """Starts one step. Returns its metrics, which the devices may still be computing."""
        with jax.transfer_guard("disallow"):
            self.state, metrics = self._step(self.state, batch)
        self._losses.append(metrics["loss"])
        return metrics


class _Loop:
    """A run between its first and its last step."""

    def __init__(
        self,
        cfg: config.Train,
        schedule: _Schedule,
        devices: _Devices,
        data: Iterator[dict[str, np.ndarray]],
        checkpoints: Checkpoints,
        report: Report,
        profiler: Profile,
    ) -> None:
        self._cfg, self._schedule, self._devices = cfg, schedule, devices
        self._data, self._checkpoints, self._report, self._profiler = data, checkpoints, report, profiler

    def run(self) -> None:
        """Trains to the end. Raises Preempted where a stop was requested, once the state is saved."""
        with contextlib.ExitStack() as stack:
            for step in range(self._schedule.start, self._cfg.steps + 1):
                # Here the state and the data both describe exactly `step` finished steps, so a checkpoint that is saved here
                # resumes bit-exactly. Keep this order: save, evaluate, stop, and only then read the next batch.
                stop = preemption.requested()
                due = [] if stop else self._schedule.evaluations(step)
                save = self._schedule.saves(step, due, stop)
                if due or save:
                    stop |= self._save_and_evaluate(step, due, save)
                if stop:
                    self._checkpoints.wait()
                    raise preemption.Preempted(f" at step {step:,}: saved; the same command goes on")
                if step == self._cfg.steps:
                    return
                with self._profiler.step(step):
                    metrics = self._train_step(step)
                if step == self._schedule.start:  # earlier, a signal ends the process at once: there is nothing to save
                    stack.enter_context(preemption.listening())
                self._report.log(step + 1, metrics)

    def _save_and_evaluate(self, step: int, due: Sequence[Evaluator], save: bool) -> bool:
        """Starts to save the state if `save`, then runs evaluations. Returns whether a stop was requested meanwhile; then the
        state is saved in any case.

        An evaluation may fail in one process while the others wait for it on their devices. Then nothing can be saved any more,
        because all must take part. But a save that was started goes on, and is complete before the processes end.
        """
        distributed.enter_stage(step, "evaluating or saving")
        with self._report.clock.paused(self._devices.state):
            self._report.flush(step)  # first: a state that is not finite must be neither evaluated nor saved
            if save:
                self._save(step)
            try:
                self._evaluate(step, due)
            except preemption.Preempted:  # in all processes; the restarted run evaluates again
                self._save(step)
                return True
            except Exception:
                if jax.process_count() == 1:  # nobody else must take part: the steps since the last checkpoint are not lost
                    self._save(step)
                raise
        return False

    def _save(self, step: int) -> None:
        with self._report.clock.spending("save_seconds"):
            self._checkpoints.save(step, self._devices.state)

    def _evaluate(self, step: int, due: Sequence[Evaluator]) -> None:
        for evaluator in due:
            with self._report.clock.spending("eval_seconds"):
                results = evaluator.run(self._devices.evaluated, step)
            metrics = self._report.evaluation(step, evaluator.task, evaluator.dataset, results)
            self._checkpoints.note(step, qualified(evaluator.task, evaluator.dataset, metrics))

    def _train_step(self, step: int) -> Metrics:
        """Reads a batch and starts a step on it. Its transfer starts while the devices still compute the step before."""
        first, clock = step == self._schedule.start, self._report.clock
        self._devices.wait()
        distributed.enter_stage(step, "reading data")
        with clock.waiting(self._devices.newest_loss):
            batch = next(self._data)
            rows = self._devices.put(batch)
        self._report.counts.count(batch)
        distributed.enter_stage(step, "compiling" if first else "training")
        if first:
            with clock.paused():  # the first step compiles, so it does not count for the rate
                metrics = self._devices.step(rows)
                jax.block_until_ready((self._devices.state, metrics))
        else:
            metrics = self._devices.step(rows)
            clock.count(self._cfg.batch_size)
        return metrics


@contextlib.contextmanager
def _name_last_good(checkpoints: Checkpoints, workdir: Path, cfg: config.Train) -> Iterator[None]:
    """For `with`: a loss that is not finite, too much bad data, or a full disk, becomes an error that names the last good
    checkpoint."""
    try:
        yield
    except NonFiniteError as error:
        checkpoints.wait()
        first, last = cfg.place(error.step - max(error.skipped, 1)), cfg.place(error.step - 1)
        trained_on = f"batch {last}" if first == last else f"batches {first} to {last}"
        would_skip = error.name in ("loss", "grad_norm") and not error.skipped
        or_skip = ", or with train.nonfinite = skip" if would_skip else ""
        remedy = f"the same command without {trained_on} (train.skip){or_skip}; or a new --workdir, started from a "
        remedy += "checkpoint by init, with a lower optim.lr or with optim.clip_norm"
        raise FloatingPointError(f"{error}; {checkpoints.last_good()}. Remedy: {remedy}") from error
    except TooManyBadError as error:
        checkpoints.wait()
        remedy = "check the files and their paths (the log has the reasons), and the same command goes on from it; or allow more"
        raise TooManyBadError(f"{error}; {checkpoints.last_good()}. Remedy: {remedy}, by data.max_bad") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        with contextlib.suppress(OSError):  # the last save may have failed for the same reason
            checkpoints.wait()
        remedy = "make room there, and the same command goes on from it"
        raise OSError(f"{workdir}: {error.strerror}; {checkpoints.last_good()}. Remedy: {remedy}") from error
