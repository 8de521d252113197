"""From a configuration, batches and evaluators to a finished run in its workdir."""

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from clipjax import config, distributed, preemption, sharding
from clipjax.checkpoint import FULL, Checkpoints
from clipjax.metrics.clock import Clock, DataCounts
from clipjax.metrics.flops import mfu, model_flops
from clipjax.metrics.writer import EvaluationResults, MetricsWriter, NonFiniteError
from clipjax.models import clip
from clipjax.train import remat
from clipjax.train.optimizer import make_optimizer, trained_names
from clipjax.train.progress import Progress
from clipjax.train.state import TrainState, abstract_state, initial_state
from clipjax.train.step import jit_step, make_train_step
from clipjax.train.workdir import Workdir, changes, evaluated, restore_newest, save_config

# Opens this process's batches from a step on.
Batches = Callable[[int], AbstractContextManager[Iterator[dict[str, np.ndarray]]]]
ON_DEVICE = ("image", "text", "index", "id", "teacher_image", "teacher_text")  # as far as a batch has it; the rest is counted
AHEAD = 2  # steps that the devices are given before the first must be done: keeps them busy, and the clock honest


class Evaluator(Protocol):
    """What the loop needs of an evaluation."""

    @property
    def task(self) -> str: ...

    @property
    def dataset(self) -> str: ...

    def due(self, step: int) -> bool: ...

    def run(self, params: clip.Params, step: int) -> EvaluationResults: ...


def train(run: config.Run, workdir: Workdir, batches: Batches, evaluators: Sequence[Evaluator], mesh: Mesh) -> TrainState:
    """Trains to `train.steps` finished steps, from the newest checkpoint if the workdir has one.

    Raises ConfigError for a rule without a parameter and for a mesh that would replicate what it should shard, FloatingPointError
    where a loss is not finite, OSError where the disk is full, and Preempted where a stop was requested and the state is on disk.
    """
    cfg = run.train
    params = jax.eval_shape(lambda: clip.init(run.model, run.seed))
    tx = make_optimizer(run.optim, cfg.steps, params)
    placed = abstract_state(run, tx, mesh)
    # Nothing is written above this line: the run is sound.
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir.path, run))
        stack.enter_context(_naming_the_last_good(checkpoints, workdir.path))
        saved, state = restore_newest(run, workdir, checkpoints, placed) or (None, initial_state(run, tx, mesh))
        start = saved.step if saved else 0
        # An evaluation that failed or was cut short, as the last one of a preempted run, is missed.
        missed = [e for e in evaluators if start and (start >= cfg.steps or e.due(start))]
        done = evaluated(workdir.path, start, [(e.task, e.dataset) for e in missed])
        missed = [e for e, it_is in zip(missed, done, strict=True) if not it_is]
        if start >= cfg.steps and not missed:
            say(f"{workdir.path}: finished, with all its {cfg.steps:,} steps; raise train.steps or choose a new --workdir")
            return state
        if saved:
            changed = "; ".join(changes(saved.run, run))
            say(f"{workdir.path}: resuming at step {start:,} of {cfg.steps:,}" + (f"; changed: {changed}" if changed else ""))
        decided = remat.resolved(run, mesh, placed)
        if decided != run:
            say(f"model.remat = auto: {decided.model.remat}")
        step_fn = jit_step(make_train_step(decided, tx, mesh), state, mesh)
        data = stack.enter_context(batches(start))
        save_config(run, workdir.path)
        writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir.path, start)))
        progress = stack.enter_context(Progress(cfg.steps))
        clock, counts, running = Clock(), DataCounts(), deque(maxlen=AHEAD)
        flops = model_flops(run.model_at_work, trained_names(run.optim.rules, params), run.data.captions_per_image)
        for step in range(start, cfg.steps + 1):
            # Here `state` and `data` both describe exactly `step` finished steps. Keep this order.
            last, stop = step == cfg.steps, preemption.requested()
            due = missed if step == start else [e for e in evaluators if last or e.due(step)]
            save = stop or last or step % cfg.checkpoint_every == 0
            if due or (save and step > start):
                distributed.enter_stage(step, "evaluating or saving")
                with clock.paused(state):
                    progress.update(step, writer.flush())  # a state gone bad is found before it is evaluated or saved
                    best = None
                    try:
                        results = _evaluate([] if stop else due, step, state, writer)
                        best = results if cfg.best in results else None
                    except preemption.Preempted:  # in the midst of it
                        stop = save = True
                    finally:  # an evaluation that fails does not cost the steps since the last checkpoint
                        if save or best:
                            checkpoints.save(step, state, best)
            if stop:
                checkpoints.wait()
                raise preemption.Preempted(f" at step {step:,}: saved; the same command goes on")
            if last:
                break
            if len(running) == AHEAD:
                running[0].block_until_ready()
            distributed.enter_stage(step, "reading data")
            with clock.waiting(running[-1] if running else None):
                batch = next(data)
            counts.count(batch)
            rows = sharding.to_global({k: batch[k] for k in ON_DEVICE if k in batch}, mesh)
            distributed.enter_stage(step, "compiling" if step == start else "training")
            if step == start:  # the compilation, and with it the first step, is no part of the rate
                with clock.paused(), jax.transfer_guard("disallow"):
                    state, metrics = jax.block_until_ready(step_fn(state, rows))
                stack.enter_context(preemption.listening())  # until now there was nothing to lose: a signal ended it at once
            else:
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, rows)
                clock.count(cfg.batch_size)
            running.append(metrics["loss"])
            log = (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps
            host = _rates(clock, flops, mesh) | counts.read() if log else None
            progress.update(step + 1, writer.push(step + 1, metrics, host))
    _say_what_was_mended(counts.total, (cfg.steps - start) * cfg.batch_size, run)
    return state


def say(text: str) -> None:
    """A line for the person who watches, from one process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def _say_what_was_mended(total: Mapping[str, int], examples: int, run: config.Run) -> None:
    if total["replaced"]:
        say(f"{total['replaced']:,} of {examples:,} pictures could not be read; others stood in for them")
    if total["truncated"]:
        captions, length = examples * run.data.captions_per_image, run.model.text.length
        say(f"{total['truncated']:,} of {captions:,} captions were cut to model.text.length = {length} tokens")


@contextlib.contextmanager
def _naming_the_last_good(checkpoints: Checkpoints, workdir: Path) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        checkpoints.wait()
        remedy = "lower optim.lr or set optim.clip_norm, in a new workdir"
        raise FloatingPointError(f"{error}; {checkpoints.last_good()}. Remedy: {remedy}") from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        with contextlib.suppress(OSError):  # the last save may have met the same
            checkpoints.wait()
        remedy = "make room there, and the same command goes on from it"
        raise OSError(f"{workdir}: {error.strerror}; {checkpoints.last_good()}. Remedy: {remedy}") from error


def _evaluate(due: Sequence[Evaluator], step: int, state: TrainState, writer: MetricsWriter) -> dict[str, float]:
    """Runs evaluators and writes their lines; all values as `task/metric` and `task/dataset/metric`."""
    results = {}
    for evaluator in due:
        found = evaluator.run(state.evaluated, step)
        metrics = writer.evaluation(step, evaluator.task, found, dataset=evaluator.dataset)
        say(f"step {step:,}  {evaluator.task} on {evaluator.dataset}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        for prefix in (evaluator.task, f"{evaluator.task}/{evaluator.dataset}"):
            results |= {f"{prefix}/{name}": value for name, value in metrics.items()}
    return results


def _rates(clock: Clock, flops: float, mesh: Mesh) -> dict[str, float]:
    values = clock.read()
    if not values["examples_per_second"]:  # the first step alone, which has no rate
        return {}
    utilisation = mfu(values["examples_per_second"] * flops, list(mesh.devices.flat))
    return values if utilisation is None else values | {"mfu": utilisation}
