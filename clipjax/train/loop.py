"""From a configuration, batches and evaluators to a finished run in its workdir."""

import contextlib
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from clipjax import config, sharding
from clipjax.checkpoint import Checkpoints
from clipjax.metrics import Clock, NonFiniteError, Writer, mfu
from clipjax.models import clip
from clipjax.train.optimizer import can_grow, make_optimizer
from clipjax.train.progress import Progress
from clipjax.train.state import TrainState, abstract_state, initial_state
from clipjax.train.step import compile_step, make_train_step

# Opens this process's batches from a step on.
Batches = Callable[[int], AbstractContextManager[Iterator[dict[str, np.ndarray]]]]
ON_DEVICE = ("image", "text")  # of a batch; the rest is counted on the host
AHEAD = 2  # steps that the devices are given before the first must be done: keeps them busy, and the clock honest


class Evaluator(Protocol):
    """What the loop needs of an evaluation."""

    task: str
    dataset: str

    def due(self, step: int) -> bool: ...

    def run(self, params: clip.Params) -> dict[str, float]: ...


def train(run: config.Run, workdir: Path, batches: Batches, evaluators: Sequence[Evaluator], mesh: Mesh) -> TrainState:
    """Trains to `train.steps` finished steps, from the newest checkpoint if the workdir has one.

    Raises ConfigError where the checkpoint belongs to another run, FloatingPointError where a loss is not finite.
    """
    cfg = run.train
    sharding.check_batch(run, mesh)
    tx = make_optimizer(run.optim, cfg.steps, jax.eval_shape(lambda: clip.init(run.model, run.seed)))
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir, run))
        stack.enter_context(_naming_the_last_good(checkpoints, workdir))
        saved = checkpoints.latest()
        if saved is not None:
            check_resumable(checkpoints.run_of(saved), run, saved)
        save_config(run, workdir)
        state = initial_state(run, tx, mesh)
        if saved is not None:
            state = checkpoints.restore(saved, abstract_state(state))
        start = saved or 0
        if start >= cfg.steps:
            say(f"{workdir}: finished, with all its {cfg.steps:,} steps; raise train.steps or choose a new --workdir")
            return state
        if saved is not None:
            say(f"{workdir}: resuming at step {start:,} of {cfg.steps:,}")
        step_fn = compile_step(make_train_step(run, tx, mesh), state, mesh)
        data = stack.enter_context(batches(start))
        writer = stack.enter_context(contextlib.closing(Writer(workdir, start)))
        progress = stack.enter_context(Progress(cfg.steps))
        clock, counts, running = Clock(), Counter(), deque(maxlen=AHEAD)
        for step in range(start, cfg.steps + 1):
            # Here `state` and `data` both describe exactly `step` finished steps. Keep this order.
            last = step == cfg.steps
            due = [e for e in evaluators if last or e.due(step)]
            save = last or step % cfg.checkpoint_every == 0
            if step > start and (due or save):
                with clock.paused(state):
                    progress.update(step, writer.flush())  # a state gone bad is found before it is evaluated or saved
                    results = _evaluate(due, step, state, writer)
                    best = results if cfg.best in results else None
                    if save or best:
                        checkpoints.save(step, state, best)
            if last:
                break
            if len(running) == AHEAD:
                running[0].block_until_ready()
            with clock.waiting(running[-1] if running else None):
                batch = next(data)
            counts.update({k: int(batch[k].sum()) for k in ("replaced", "truncated")})
            placed = sharding.to_global({k: batch[k] for k in ON_DEVICE}, mesh)
            if step == start:  # the compilation, and with it the first step, is no part of the rate
                with clock.paused(), jax.transfer_guard("disallow"):
                    state, metrics = jax.block_until_ready(step_fn(state, placed))
            else:
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, placed)
                clock.count(cfg.batch_size)
            running.append(metrics["loss"])
            log = (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps
            progress.update(step + 1, writer.push(step + 1, metrics, _host_values(run, clock, counts, mesh) if log else None))
    if counts["replaced"] or counts["truncated"]:
        seen = (cfg.steps - start) * cfg.batch_size // jax.process_count()
        say(f"of {seen:,} examples, {counts['replaced']:,} pictures could not be read and were replaced by others, and")
        say(f"{counts['truncated']:,} captions were cut to model.text.length = {run.model.text.length} tokens")
    return state


def check_resumable(saved: config.Run, run: config.Run, step: int) -> None:
    """Raises ConfigError where `run` is not the run that `saved`, checkpointed at `step`, was; says which free fields differ."""
    if differences := config.identity_differences(saved, run):
        rows = "\n  ".join(differences)
        raise config.ConfigError(f"the workdir holds another run; change these back, or choose a new --workdir:\n  {rows}")
    if refusal := can_grow(run.optim, saved.train.steps, run.train.steps, step):
        raise config.ConfigError(refusal)
    before, now = config.lines(saved), config.lines(run)
    if changed := [line for line in now if line not in before]:
        say(f"changed since the checkpoint: {'; '.join(changed)}")


def save_config(run: config.Run, workdir: Path) -> None:
    """Writes config.json, at once or not at all."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / "config.json.tmp"
        temporary.write_text(config.to_json(run))
        os.replace(temporary, workdir / "config.json")


def say(text: str) -> None:
    """A line for the person who watches, from one process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _naming_the_last_good(checkpoints: Checkpoints, workdir: Path) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        checkpoints.wait()
        good = checkpoints.latest()
        known = (
            f"no checkpoint had been written to {workdir}" if good is None else f"the last good checkpoint is {workdir}@{good}"
        )
        remedy = "lower optim.lr or set optim.clip_norm, in a new workdir"
        raise FloatingPointError(f"{error}; {known}. Remedy: {remedy}") from error


def _evaluate(due: Sequence[Evaluator], step: int, state: TrainState, writer: Writer) -> dict[str, float]:
    """Runs evaluators and writes their lines; all values as `task/metric`."""
    results = {}
    for evaluator in due:
        metrics = evaluator.run(state.evaluated)
        writer.evaluation(step, evaluator.task, metrics, dataset=evaluator.dataset)
        say(f"step {step:,}  {evaluator.task} on {evaluator.dataset}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        results |= {f"{evaluator.task}/{name}": value for name, value in metrics.items()}
    return results


def _host_values(run: config.Run, clock: Clock, counts: Counter, mesh: Mesh) -> dict[str, float]:
    values = clock.read()
    if not values["examples_per_second"]:  # the first step alone, which has no rate
        values = {}
    elif (utilisation := mfu(values["examples_per_second"], run.model, list(mesh.devices.flat))) is not None:
        values["mfu"] = utilisation
    return values | {"replaced": counts["replaced"], "truncated": counts["truncated"]}
