"""Going on after trouble: batches that are left out, steps that are not finite, and a state that another run hands on."""

import contextlib
import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError
from clipjax.train.workdir import open_workdir
from tests.test_cli import overridden
from tests.train import tiny

TRAIN = config.Train(steps=8, batch_size=16, log_every=1, checkpoint_every=4, keep=9)
RUN = tiny.run(train=TRAIN, optim=dataclasses.replace(tiny.OPTIM, schedule=config.Constant(warmup=3)))


def during(run=RUN, **changes):
    """A run with another `train`."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def batches(run, change=lambda place, batch: batch):
    """The batches of the run's order, without those that it leaves out."""
    made = [change(place, batch) for place, batch in enumerate(tiny.batches(run, 30))]
    counts = {"replaced": np.zeros(16, bool), "truncated": np.zeros(16, bool)}
    return lambda start: contextlib.nullcontext(made[run.train.place(step)] | counts for step in itertools.count(start))


def train_in(workdir, run, change=lambda place, batch: batch, mesh=None):
    return tiny.train_in(workdir, run, batches(run, change), [], mesh or tiny.mesh_of(2))


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other))


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
            open_workdir(during(skip=skip), tmp_path, tiny.mesh_of())
    assert open_workdir(during(skip=((2, 3), (3, 4), (10, 12))), tmp_path, tiny.mesh_of()).saved


def test_batches_to_leave_out_are_an_option():
    assert overridden("--train.skip", "3", "5", "9", "12").train.skip == ((3, 5), (9, 12))


@pytest.mark.parametrize("skip", [((3, 3),), ((4, 3),), ((-1, 2),), ((1, 4), (3, 5)), ((6, 7), (1, 2)), ((1, 2, 3),), ((1,),)])
def test_ranges_that_are_no_ranges_are_refused(skip):
    with pytest.raises(ConfigError, match=rf"^train\.skip = {re.escape(str(skip))}: must be pairs \(a, b\) with 0 <= a < b"):
        config.Train(skip=skip)
