"""Killed at any moment and started again, a run goes on as if nothing had happened: real processes, real data, SIGKILL."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import clipjax
from clipjax import config, sharding
from clipjax.models import clip
from clipjax.restore import newest, restore
from clipjax.train.optimizer import optimizer_of
from clipjax.train.state import abstract_state
from tests.conftest import CACHE

pytestmark = pytest.mark.optimized

CONFIG = Path(__file__).with_name("tiny_heads.py")


def command(workdir, *overrides):
    return [sys.executable, "-m", "clipjax.cli", "train", str(CONFIG), "--workdir", str(workdir), *overrides]


def start(workdir, *overrides):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(CACHE), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command(workdir, *overrides), env=env, stderr=subprocess.PIPE, text=True)


def finish(workdir, *overrides):
    process = start(workdir, *overrides)
    errors = process.communicate(timeout=300)[1]
    return process.returncode, errors


def lines(workdir):
    """The lines of metrics.jsonl that are complete."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill_at(workdir, step, *overrides):
    """SIGKILL once a step is logged."""
    process = start(workdir, *overrides)
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in lines(workdir)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # its workers hold the other end of stderr: this returns once they have ended too
    assert process.returncode == -signal.SIGKILL


def losses(workdir):
    found = {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}
    assert len(found) == sum("loss" in line for line in lines(workdir))  # no step twice
    return found


def evaluations(workdir):
    return [line for line in lines(workdir) if "task" in line]


def same_weights(a, b):
    """All that is saved: weights, heads, class vectors, moments, moving average."""
    steps, runs = zip(*map(newest, (a, b)), strict=True)
    mesh = sharding.make_mesh(runs[0].mesh)
    tx = optimizer_of(runs[0], jax.eval_shape(lambda: clip.init(runs[0].model, 0)))
    states = [restore(workdir, step, abstract_state(runs[0], tx, mesh)) for workdir, step in zip((a, b), steps, strict=True)]
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), *states))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight") / "run"
    status, errors = finish(workdir)
    assert status == 0, errors
    return workdir


@pytest.mark.parametrize("kind", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_equal(straight, tmp_path, kind):
    workdir = tmp_path / "run"
    workers = ("--data.worker_kind", kind, "--data.workers", "3")
    kill_at(workdir, 33, *workers)
    kill_at(workdir, 90, *workers)
    with (workdir / "metrics.jsonl").open("a") as f:
        f.write('{"step": 91, "lo')  # as if it had died in the middle of a line
    status, errors = finish(workdir, *workers)
    assert status == 0, errors
    assert "resuming" in errors
    assert losses(straight).keys() == set(range(1, 151))
    assert losses(workdir) == losses(straight)
    assert evaluations(workdir) == evaluations(straight)
    assert same_weights(workdir, straight)


def test_the_workdir_says_it_all(straight):
    assert {p.name for p in straight.iterdir()} == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "tokenizer.json",
    }
    assert sorted(int(p.name) for p in (straight / "checkpoints").iterdir()) == [140, 150]  # keep = 2
    line = next(line for line in lines(straight) if line["step"] == 100 and "loss" in line)
    ranking = {"image_to_text_accuracy", "text_to_image_accuracy", "positive_cosine", "hardest_negative_cosine"}
    norms = {"grad_norm", "param_norm", "update_norm"}
    data = {"replaced", "filtered", "truncated", "bad_share", "filtered_share", "examples_seen", "epoch", "data_wait"}
    times = {"examples_per_second", "save_seconds", "eval_seconds", "useful_share"}
    losses = {"loss", "softmax_0_loss", "softmax_1_loss", "classify_loss"}
    ranking |= {f"a_{name}" for name in ranking}
    assert line.keys() == {"step", "scale", "a_scale", "lr", "skipped_steps"} | losses | ranking | norms | data | times
    assert [line["step"] for line in evaluations(straight)] == [50, 100, 150]
    assert all(line.keys() == {"step", "task", "dataset", "metrics"} for line in evaluations(straight))
    ranks = {f"{found}_retrieval_{middle}_rank" for found in ("image", "text") for middle in ("mean", "median")}
    assert all(line["metrics"].keys() == {*config.Retrieval.metrics} | ranks for line in evaluations(straight))
    assert list((straight / "tensorboard").iterdir())


def test_a_finished_run_is_left_alone(straight):
    before = (straight / "metrics.jsonl").read_bytes()
    status, errors = finish(straight)
    assert (status, (straight / "metrics.jsonl").read_bytes()) == (0, before)
    assert "150" in errors


def test_another_runs_workdir_is_refused_and_named(straight):
    status, errors = finish(straight, "--optim.lr", "0.5", "--data.augment.flip", "True")
    assert status == 2
    assert "optim.lr: 0.001 -> 0.5" in errors
    assert "data.augment.flip: False -> True" in errors
    assert "Traceback" not in errors


def test_a_cosine_cannot_grow(straight):
    status, errors = finish(straight, "--train.steps", "200")
    assert status == 2
    assert "train.steps = 200" in errors


def test_a_non_finite_loss_stops_the_run_before_it_is_saved(tmp_path):
    workdir = tmp_path / "run"
    status, errors = finish(workdir, "--optim.lr", "1e30", "--optim.schedule.warmup", "149", "--train.steps", "150")
    assert status == 3
    assert "at step" in errors
    assert f"no checkpoint had been written to {workdir}. Remedy" in errors
    assert "Traceback" not in errors
    assert list((workdir / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_a_non_finite_loss_names_the_last_good_checkpoint(tmp_path):
    """Weights that decay by twice their size and more at every step grow, with alternating signs, until they overflow."""
    workdir = tmp_path / "run"
    status, errors = finish(workdir, "--optim.weight_decay", "4000", "--train.checkpoint_every", "5")
    assert status == 3
    said = re.search(r"(\w+) = (nan|inf) at step (\d+); the last good checkpoint is (.*)@(\d+)\. Remedy", errors)
    assert said, errors
    bad, good = int(said[3]), int(said[5])
    assert (said[4], good) == (str(workdir), (bad - 1) // 5 * 5)
    assert good == max(int(p.name) for p in (workdir / "checkpoints").iterdir()) >= 10
    found = clipjax.load(f"{workdir}@{good}")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))
    assert max(losses(workdir)) < bad
