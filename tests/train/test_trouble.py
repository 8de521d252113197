"""Going on after trouble: batches that are left out, steps that are not finite, and a state that another run hands on."""

import contextlib
import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest

from clipjax import config, sharding
from clipjax.config import ConfigError
from clipjax.models import clip
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import initial_state
from clipjax.train.step import jit_step, make_train_step
from tests.test_cli import overridden
from tests.train import tiny
from tests.train.test_memory import ISOGCLR

TRAIN = config.Train(steps=8, batch_size=16, log_every=1, checkpoint_every=4, keep=9)
RUN = tiny.run(train=TRAIN, optim=dataclasses.replace(tiny.OPTIM, schedule=config.Constant(warmup=3)))


def during(run=RUN, **changes):
    """A run with another `train`."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def batches(run, change=lambda place, batch: batch):
    """The batches of the run's order, without those that it leaves out."""
    made = [change(place, batch) for place, batch in enumerate(tiny.batches(run, 30))]
    return lambda start: contextlib.nullcontext(made[run.train.place(step)] | tiny.marks(16) for step in itertools.count(start))


def train_in(workdir, run, change=lambda place, batch: batch, mesh=None):
    return tiny.train_in(workdir, run, batches(run, change), [], mesh or tiny.mesh_of())


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other))


@pytest.mark.slow
def test_batches_are_left_out_when_a_run_resumes(tmp_path):
    """The batch that made trouble lies after the checkpoint: the resumed run goes on as one that never read it."""
    want = train_in(tmp_path / "straight", during(skip=((5, 7),)))
    train_in(tmp_path / "run", during(steps=4))
    got = train_in(tmp_path / "run", during(skip=((5, 7),)))
    assert same(got, want)


def test_the_past_can_not_be_left_out(tmp_path):
    train_in(tmp_path, during(skip=((2, 4),)))  # eight steps, to batch 9
    for skip, first in (((), 2), (((2, 5),), 2), (((2, 4), (9, 10)), 7)):
        with pytest.raises(ConfigError, match=rf"^train\.skip = .*from step {first} on; .*from a step of {first} at most$"):
            tiny.opened(during(skip=skip), tmp_path)
    assert tiny.opened(during(skip=((2, 3), (3, 4), (10, 12))), tmp_path).saved


def test_batches_to_leave_out_are_an_option():
    assert overridden("--train.skip", "3", "5", "9", "12").train.skip == ((3, 5), (9, 12))


@pytest.mark.parametrize("skip", [((3, 3),), ((4, 3),), ((-1, 2),), ((1, 4), (3, 5)), ((6, 7), (1, 2))])
def test_ranges_that_are_no_ranges_are_refused(skip):
    with pytest.raises(ConfigError, match=rf"^train\.skip = {re.escape(str(skip))}: must be pairs \(a, b\) with 0 <= a < b"):
        config.Train(skip=skip)


SKIP = during(nonfinite="skip", nonfinite_max=2)
AVERAGED = dataclasses.replace(SKIP.optim, ema=0.9)
SKIPPING = {
    "average, micro-batches, fsdp": (dataclasses.replace(during(SKIP, micro_batches=2), optim=AVERAGED), (2, 2)),
    "example memory": (dataclasses.replace(SKIP, objective=ISOGCLR), (2, 1)),
}


def spoiled(*places):
    """For `batches`: images are float32, and those of some batches are not finite."""

    def change(place, batch):
        image = batch["image"].astype(np.float32)
        return batch | {"image": image * np.float32(np.nan) if place in places else image, "index": np.arange(16, dtype=np.int32)}

    return change


@pytest.mark.parametrize("case", SKIPPING)
def test_a_step_that_is_not_finite_changes_nothing(case):
    """Bit-equal to a run in which that step did not happen, apart from the number of steps."""
    run, shape = SKIPPING[case]
    mesh = tiny.mesh_of(*shape)
    tx = make_optimizer(run.optim, run.train.steps, jax.eval_shape(lambda: clip.init(run.model, run.seed)))
    step = jit_step(make_train_step(run, tx, mesh), initial_state(run, tx, mesh), mesh)

    def after(*order):
        state, metrics = initial_state(run, tx, mesh), []
        made = [spoiled(1, 2)(place, batch) for place, batch in enumerate(tiny.batches(run, 5))]
        for place in order:
            state, values = step(state, sharding.to_global(made[place], mesh))
            metrics.append({name: float(value) for name, value in values.items()})
        return state, metrics

    (got, metrics), (want, _) = after(0, 1, 2, 3, 4), after(0, 3, 4)
    assert [m["skipped_steps"] for m in metrics] == [0, 1, 2, 2, 2]
    assert [m["skipped_in_row"] for m in metrics] == [0, 1, 2, 0, 0]
    assert [np.isfinite(m["loss"]) for m in metrics] == [True, False, False, True, True]
    assert (int(got.step), int(want.step)) == (5, 3)
    assert bool(got.memory) == (case == "example memory")
    assert same(dataclasses.replace(got, step=want.step), want)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_steps_that_are_skipped_are_counted_over_a_resume(tmp_path, caplog):
    """Batches 1, 3 and 4 are not finite, and then 6 to 8, which are one more in a row than is allowed."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    change = spoiled(1, 3, 4, 6, 7, 8)
    train_in(resumed, during(SKIP, steps=7, checkpoint_every=7), change)  # its checkpoint lies within the row
    for workdir in (resumed, straight):
        with pytest.raises(FloatingPointError) as raised:
            train_in(workdir, during(SKIP, steps=12, checkpoint_every=7), change)
        assert "without batches 6 to 8 (train.skip); or" in str(raised.value)
        assert f"loss = nan at step 9, after 2 others in a row that were skipped; the last good checkpoint is {workdir}@7" in str(
            raised.value
        )
    assert [record["skipped_steps"] for record in lines(straight)] == [0, 1, 1, 2, 3, 3, 4, 5]
    assert [record["loss"] is None for record in lines(straight)] == [False, True, False, True, True, False, True, True]
    assert [(r["step"], r["loss"], r["skipped_steps"]) for r in lines(resumed)] == [
        (r["step"], r["loss"], r["skipped_steps"]) for r in lines(straight)
    ]
    assert "step 2 was skipped: loss = nan, grad_norm = nan" in caplog.text


@pytest.mark.slow
def test_a_run_may_begin_and_cease_to_skip(tmp_path):
    """Its checkpoints open in both directions; the count of all skipped steps does not get lost."""
    change = spoiled(1)
    train_in(tmp_path, during(SKIP, steps=3), change)
    train_in(tmp_path, during(steps=4), change)
    assert "skipped_steps" not in lines(tmp_path)[-1] or lines(tmp_path)[-1]["skipped_steps"] == 0
    state = train_in(tmp_path, during(SKIP, steps=5), change)
    assert lines(tmp_path)[-1]["skipped_steps"] == 1
    assert int(state.skipped_in_row) == 0
    remedy = r"Remedy: the same command without batch 5 \(train\.skip\), or with train\.nonfinite = skip; or a new --workdir"
    with pytest.raises(FloatingPointError, match=rf"^loss = nan at step 6; the last good checkpoint is .*{remedy}"):
        train_in(tmp_path, during(steps=6), spoiled(5))
