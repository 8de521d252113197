"""Checkpoints: what is kept, what comes back, on which mesh, and what a killed save leaves."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from clipjax import config
from clipjax.checkpoint import Checkpoints
from clipjax.config import ConfigError
from clipjax.config.start import split_name
from clipjax.models import clip
from clipjax.restore import load_params, newest
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import abstract_state
from clipjax.train.workdir import save_config
from tests.train import tiny

EMA = dataclasses.replace(tiny.OPTIM, ema=0.9)
METRIC = "zeroshot_retrieval/image_retrieval_recall@1"


@pytest.fixture(scope="module")
def run():
    return tiny.run(optim=EMA, train=dataclasses.replace(tiny.TRAIN, keep=2), evals=(config.Retrieval(),))


@pytest.fixture(scope="module")
def state(run):
    """After three steps on eight devices: moments, average and step are not what they started as."""
    return tiny.train(run, tiny.mesh_of(2, 4), 3)[0]


def fresh(run, mesh):
    tx = make_optimizer(run.optim, run.train.steps, jax.eval_shape(lambda: clip.init(run.model, run.seed)))
    return abstract_state(run, tx, mesh)


def at(state, step):
    return dataclasses.replace(state, step=state.step + (step - int(state.step)))


def steps_on_disk(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_nothing_is_there_at_first(tmp_path, run):
    assert newest(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    with Checkpoints(tmp_path, run) as checkpoints:
        assert checkpoints.latest() is None
    assert newest(tmp_path) is None


def test_the_newest_are_kept(tmp_path, run, state):
    with Checkpoints(tmp_path, run) as checkpoints:
        for step in (3, 5, 11):
            checkpoints.save(step, at(state, step))
        checkpoints.wait()
        assert checkpoints.latest() == 11
    assert steps_on_disk(tmp_path) == [5, 11]
    other = dataclasses.replace(run.train, keep=1, best=METRIC)  # both are free to change
    with Checkpoints(tmp_path, dataclasses.replace(run, train=other)) as checkpoints:
        checkpoints.save(20, at(state, 20))
    assert steps_on_disk(tmp_path) == [20]


def test_multiples_of_keep_every_are_kept_for_good(tmp_path, run, state):
    sparse = dataclasses.replace(run, train=dataclasses.replace(run.train, keep=1, keep_every=10, checkpoint_every=5))
    for part in ((5, 10, 12), (15, 20, 25, 30, 33)):  # 12 and 33: a stop was requested
        with Checkpoints(tmp_path, sparse) as checkpoints:
            for step in part:
                checkpoints.save(step, at(state, step))
    assert steps_on_disk(tmp_path) == [10, 20, 30, 33]
    best = dataclasses.replace(sparse, train=dataclasses.replace(sparse.train, best=METRIC))
    with Checkpoints(tmp_path, best) as checkpoints:
        checkpoints.save(35, at(state, 35))
        checkpoints.note(35, {METRIC: 0.5})
        checkpoints.save(45, at(state, 45))
    assert steps_on_disk(tmp_path) == [10, 20, 30, 35, 45]


def test_the_best_is_kept_however_old(tmp_path, run, state):
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, keep=1, best=METRIC))
    scores = {1: 0.2, 2: 0.7, 3: math.nan, 4: 0.5, 5: None, 6: 0.1}
    for part in ((1, 2, 3), (4, 5, 6)):  # also by a process that did not see it
        with Checkpoints(tmp_path, run) as checkpoints:
            for before in range(1, part[0]):
                checkpoints.note(before, {METRIC: scores[before]})
            for step in part:  # a checkpoint is evaluated once it is saved
                checkpoints.save(step, at(state, step))
                checkpoints.note(step, {"other/x": 9.0} | ({} if scores[step] is None else {METRIC: scores[step]}))
    assert steps_on_disk(tmp_path) == [2, 6]
    old = tmp_path / "checkpoints" / "2" / "metrics"  # as releases to 0.2 have written it
    old.mkdir()
    (old / "metrics").write_text(json.dumps({METRIC: 0.7}))
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(7, at(state, 7))
        checkpoints.note(7, {METRIC: 0.6})
        checkpoints.save(8, at(state, 8))
        checkpoints.wait()
        assert steps_on_disk(tmp_path) == [2, 8]
        checkpoints.note(8, {METRIC: 0.8})
        checkpoints.save(9, at(state, 9))
    assert steps_on_disk(tmp_path) == [8, 9]
    with Checkpoints(tmp_path, run) as checkpoints:
        assert checkpoints.latest() == 9  # what resumes is the newest, not the best
        same(checkpoints.restore(8, fresh(run, tiny.mesh_of())), at(state, 8))


def test_a_step_is_saved_once(tmp_path, run, state):
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(3, state)
        checkpoints.wait()
        checkpoints.save(3, jax.tree.map(lambda x: x + 1, state))
        checkpoints.wait()
        same(checkpoints.restore(3, fresh(run, tiny.mesh_of(2, 4))), state)


OVER_DATA = config.Mesh(shard_optimizer=True)


@pytest.mark.parametrize("mesh", [config.Mesh(), OVER_DATA], ids=["", "optimizer over data"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_it_comes_back_bit_equal_on_any_mesh(tmp_path, run, state, shape, mesh):
    """Also where another part of the state is on each device than when it was saved."""
    if mesh == OVER_DATA and shape == (1, 1, 1):
        state = jax.device_put(
            state, jax.tree.map(lambda x: x.sharding, fresh(dataclasses.replace(run, mesh=mesh), tiny.mesh_of(8)))
        )
        assert state.ema["text"]["tokens"].sharding.spec == jax.sharding.PartitionSpec("data", None)
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(3, state)
    target = fresh(dataclasses.replace(run, mesh=mesh), tiny.mesh_of(*shape))
    with Checkpoints(tmp_path, run) as checkpoints:
        restored = checkpoints.restore(3, target)
    same(restored, state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, run, state):
    copy = jax.tree.map(lambda x: x + 0, state)
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(3, copy)
        jax.tree.map(lambda x: x.delete(), copy)
        checkpoints.wait()
        same(checkpoints.restore(3, fresh(run, tiny.mesh_of(2, 4))), state)


def test_the_configuration_is_saved_under_the_step(tmp_path, run, state):
    longer = dataclasses.replace(run, train=dataclasses.replace(run.train, log_every=7))
    for step, cfg in ((3, run), (5, longer)):
        with Checkpoints(tmp_path, cfg) as checkpoints:
            checkpoints.save(step, at(state, step))
    save_config(longer, tmp_path)
    assert load_params(f"{tmp_path}@3", tiny.mesh_of())[0] == run
    assert load_params(str(tmp_path), tiny.mesh_of())[0] == longer
    assert newest(tmp_path) == (5, longer)
    items = {p.name for p in (tmp_path / "checkpoints" / "3").iterdir() if p.is_dir()}
    assert {"params", "training", "ema", "config"} <= items


def test_evaluation_takes_the_moving_average_where_there_is_one(tmp_path, run, state):
    plain = dataclasses.replace(run, optim=tiny.OPTIM)
    for name, cfg, saved in (("ema", run, state), ("plain", plain, dataclasses.replace(state, ema=None))):
        save_config(cfg, tmp_path / name)
        with Checkpoints(tmp_path / name, cfg) as checkpoints:
            checkpoints.save(3, saved)
        assert (tmp_path / name / "checkpoints" / "3" / "ema").exists() == (name == "ema")
    assert not np.array_equal(state.ema["text"]["tokens"], state.params["text"]["tokens"])
    for mesh in (tiny.mesh_of(), tiny.mesh_of(1, 4)):
        cfg, params, step = load_params(str(tmp_path / "ema"), mesh)
        assert (cfg, step) == (run, 3)
        same(params, state.ema)
        same(load_params(f"{tmp_path / 'plain'}@3", mesh)[1], state.params)
    assert params["text"]["tokens"].sharding.spec == jax.sharding.PartitionSpec("fsdp", None)


def test_an_interrupted_save_is_ignored_and_cleared_away(tmp_path, run, state):
    save_config(run, tmp_path)
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(3, state)
    checkpoint = tmp_path / "checkpoints" / "3"
    torn = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"  # what a killed Orbax leaves
    torn.mkdir()
    (torn / "params.orbax-checkpoint-tmp").mkdir()
    (torn / "params.orbax-checkpoint-tmp" / "manifest.ocdbt").write_bytes(b"half")
    before = {p.relative_to(checkpoint): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    assert load_params(str(tmp_path), tiny.mesh_of())[2] == 3  # someone who only reads takes what is complete and removes nothing
    assert torn.exists()
    with Checkpoints(tmp_path, run) as checkpoints:
        assert checkpoints.latest() == 3
        checkpoints.save(5, at(state, 5))
        checkpoints.wait()
        assert not torn.exists()
        same(checkpoints.restore(5, fresh(run, tiny.mesh_of(2, 4))), at(state, 5))
    assert {p.relative_to(checkpoint): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()} == before


def test_names_of_runs(tmp_path, run, monkeypatch):
    save_config(run, tmp_path / "a")
    save_config(run, tmp_path / "user@host")
    save_config(run, tmp_path / "b@12")
    monkeypatch.chdir(tmp_path)
    assert [split_name(n)[1] for n in ("a", "a@12", "user@host", "user@host@7")] == [None, 12, None, 7]
    assert split_name("user@host@7")[0].name == "user@host"
    assert config.from_json((tmp_path / "a" / "config.json").read_text()) == run
    for name in ("nothing", "nothing@3", "a@", "a@x", "."):
        with pytest.raises(ConfigError, match=f"^RUN = '{name}': is not a workdir of `clipjax train`: it has no config.json"):
            split_name(name)


def test_what_is_not_there_is_refused_with_what_is(tmp_path, run, state):
    save_config(run, tmp_path)
    mesh = tiny.mesh_of()
    with pytest.raises(ConfigError, match=r"^RUN = '.*': has no checkpoint yet"):
        load_params(str(tmp_path), mesh)
    with Checkpoints(tmp_path, run):
        pass
    with pytest.raises(ConfigError, match=r"^RUN = '.*': has checkpoints of steps \(none\) only"):
        load_params(str(tmp_path), mesh)
    with Checkpoints(tmp_path, run) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, at(state, step))
    with pytest.raises(ConfigError, match=r"^RUN = '.*@4': has checkpoints of steps 3, 5 only$"):
        load_params(f"{tmp_path}@4", mesh)
    assert load_params(f"{tmp_path}@3", mesh)[2] == 3
    assert json.loads((tmp_path / "config.json").read_text())["train"]["keep"] == 2
