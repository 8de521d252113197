"""Told to stop, a run saves at the next step and the same command goes on: real signals, damaged files and full disks."""

import contextlib
import dataclasses
import json
import os
import signal
import threading

import jax
import numpy as np
import pytest

from clipjax import config, preemption
from clipjax.train.loop import train
from tests import hosts
from tests.train import tiny

TRAIN = config.Train(steps=12, batch_size=16, log_every=1, checkpoint_every=4, keep=9)
RUN = tiny.run(train=TRAIN)
LONG = dataclasses.replace(RUN, train=dataclasses.replace(TRAIN, steps=60, checkpoint_every=1000))


def batches(at=None, do=None, run=RUN):
    """The same examples for every start; something happens while the batch of step `at` is read."""

    def read(start):
        for step, batch in enumerate(tiny.batches(run, run.train.steps)[start:], start):
            if step == at:
                do()
            yield batch | {"replaced": np.zeros(16, bool), "truncated": np.zeros(16, bool)}

    return lambda start: contextlib.nullcontext(read(start))


def run_it(workdir, at=None, do=None, evaluators=(), run=RUN):
    return train(run, workdir, batches(at, do, run), list(evaluators), tiny.mesh_of(2))


def told(*numbers):
    """This process gets signals."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def steps_on_disk(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def written(workdir):
    """The lines of metrics.jsonl without what time decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("examples_per_second", "data_wait")} for line in lines]


@dataclasses.dataclass
class Evaluator:
    """A mean of the weights, every 6 steps; `during` happens between two of its batches."""

    task: str = "zeroshot_retrieval"
    dataset: str = "emoji/test"
    during: object = None
    runs: list = dataclasses.field(default_factory=list)

    def due(self, step):
        return step % 6 == 0

    def run(self, params, step):
        self.runs.append(step)
        preemption.check()
        if self.during:
            self.during()
        preemption.check()
        return {"mean": float(np.mean(params["text"]["tokens"]))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of a run that nothing stopped: its state and its workdir."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return run_it(workdir, evaluators=[Evaluator(), Evaluator(dataset="emoji/train")]), workdir


@pytest.mark.parametrize(
    ("numbers", "status", "word"),
    [((signal.SIGTERM,), 75, "preempted"), ((signal.SIGTERM,) * 3, 75, "preempted"), ((signal.SIGINT,), 130, "interrupted")],
)
def test_a_signal_saves_at_the_next_step(tmp_path, whole, numbers, status, word):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(preemption.Preempted, match=f"^{word} at step 7: saved; the same command goes on$") as stopped:
        run_it(tmp_path, 6, told(*numbers))
    assert stopped.value.status == status
    assert steps_on_disk(tmp_path) == [4, 7]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert same(run_it(tmp_path), whole[0])
    assert written(tmp_path) == [line for line in written(whole[1]) if "loss" in line]
    assert steps_on_disk(tmp_path) == [4, 7, 8, 12]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_it(tmp_path, 6, told(signal.SIGINT, signal.SIGINT))
    assert steps_on_disk(tmp_path) == [4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_before_the_first_step_there_is_nothing_to_wait_for(tmp_path):
    """Restoring and compiling take minutes in large runs: a signal ends them at once."""
    seen = []
    run_it(tmp_path, 0, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    assert seen == [signal.SIG_DFL]


def test_a_step_that_is_saved_anyway_is_saved_once(tmp_path):
    with pytest.raises(preemption.Preempted, match="at step 8: saved"):
        run_it(tmp_path, 7, told(signal.SIGTERM))
    assert steps_on_disk(tmp_path) == [4, 8]


@pytest.mark.parametrize("step", [6, 12])
def test_no_evaluation_is_waited_for_and_none_is_lost(tmp_path, whole, step):
    """Step 12 is the last: all is trained, and still the run has not finished."""
    during = told(signal.SIGTERM)
    first, second = Evaluator(), Evaluator(dataset="emoji/train", during=lambda: during() if second.runs[-1] == step else None)
    third = Evaluator(task="geometry")
    with pytest.raises(preemption.Preempted, match=f"at step {step}: saved"):
        run_it(tmp_path, evaluators=[first, second, third])
    assert (first.runs[-1], second.runs[-1], third.runs[-1:]) == (step, step, [6] if step == 12 else [])
    assert max(steps_on_disk(tmp_path)) == step
    first, second = Evaluator(), Evaluator(dataset="emoji/train")
    state = run_it(tmp_path, evaluators=[first, second])
    assert first.runs == ([12] if step == 6 else [])
    assert second.runs == ([6, 12] if step == 6 else [12])
    assert same(state, whole[0])
    assert [x for x in written(tmp_path) if x.get("task") != "geometry"] == written(whole[1])


def test_told_while_due_to_evaluate_starts_none(tmp_path):
    evaluator = Evaluator()
    with pytest.raises(preemption.Preempted, match="at step 6"):
        run_it(tmp_path, 5, told(signal.SIGTERM), [evaluator])
    assert evaluator.runs == []


def test_a_thread_has_no_signals_and_trains_all_the_same(tmp_path, whole):
    results = []
    thread = threading.Thread(target=lambda: results.append(run_it(tmp_path)))
    thread.start()
    thread.join()
    assert same(results[0], whole[0])
    assert not preemption.told()


# A run that goes on until it is stopped, and then for as many steps as it is asked for.
ENDLESS = """
from tests.train.tiny_emoji import config as tiny
import dataclasses
from clipjax.config import Constant

def config():
    run = tiny()
    train = dataclasses.replace(run.train, steps=100_000, checkpoint_every=100_000, log_every=1)
    return dataclasses.replace(run, train=train, optim=dataclasses.replace(run.optim, schedule=Constant(warmup=10)), evals=())
"""


def command(folder, workdir, *overrides):
    (folder / "endless.py").write_text(ENDLESS)
    return [*hosts.CLI, "train", str(folder / "endless.py"), "--workdir", str(workdir), *overrides]


@pytest.mark.parametrize("whom", ["one", pytest.param("all", marks=pytest.mark.slow)])
def test_two_processes_stop_at_the_same_step(tmp_path, whom):
    workdir = tmp_path / "run"
    with hosts.started(2, command(tmp_path, workdir), tmp_path / "first") as both:
        hosts.until(both, workdir / "metrics.jsonl", '"step": 20,')
        for host in both[1:] if whom == "one" else both:
            host.signal(signal.SIGTERM)
        assert hosts.ended(both) == [75, 75], hosts.report(both)
    (step,) = steps_on_disk(workdir)
    assert f"preempted at step {step:,}: saved; the same command goes on" in both[0].complained
    assert max(hosts.losses(workdir)) == step
    if whom == "one":
        return
    more = ("--train.steps", str(step + 20))
    resumed = hosts.run(2, command(tmp_path, workdir, *more), tmp_path / "second")
    assert f"resuming at step {step:,} of {step + 20:,}" in resumed[0].complained
    hosts.run(2, command(tmp_path, tmp_path / "straight", *more), tmp_path / "third")
    assert hosts.losses(workdir) == hosts.losses(tmp_path / "straight")
    assert same_weights(workdir, tmp_path / "straight")
