"""What is remembered of every example: written where it belongs, the same on any mesh, kept through a checkpoint."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from clipjax import config, sharding
from clipjax.checkpoint import Checkpoints
from clipjax.losses.sogclr import UNSEEN
from clipjax.models import clip
from clipjax.plan.program import lower_step, state_of
from clipjax.train import memory
from clipjax.train.optimizer import make_optimizer
from clipjax.train.state import abstract_state, initial_state
from clipjax.train.step import jit_step, make_train_step

from . import tiny

EXAMPLES = 40
SOGCLR = (config.Sogclr(examples=EXAMPLES, gamma=0.6),)
FROZEN = dataclasses.replace(tiny.OPTIM, lr=1e-20)  # the towers stay as they are: what moves is what is remembered
ISOGCLR = (config.Isogclr(examples=EXAMPLES, temperature=0.02, rho=0.5, temperature_lr=0.003, temperature_momentum=0.5),)


@functools.cache
def program(cfg, mesh):
    """The optimizer and the step, compiled once for all tests."""
    tx = make_optimizer(cfg.optim, cfg.train.steps, jax.eval_shape(lambda: clip.init(cfg.model, cfg.seed)))
    return tx, jit_step(make_train_step(cfg, tx, mesh), initial_state(cfg, tx, mesh), mesh)


def train(cfg, mesh, steps, state=None, skip=0):
    """The state after some steps, each of 16 of the 40 examples, and the temperature gradients' check values."""
    tx, step = program(cfg, mesh)
    state = initial_state(cfg, tx, mesh) if state is None else state
    rng = np.random.default_rng(1)
    orders = [rng.permutation(EXAMPLES)[:16].astype(np.int32) for _ in range(steps)]
    for batch, index in list(zip(tiny.batches(cfg, steps), orders, strict=True))[skip:]:
        state, metrics = step(state, sharding.to_global(batch | {"index": index}, mesh))
    return state, metrics, orders


@pytest.mark.slow
@pytest.mark.optimized  # its last digits
def test_every_mesh_and_micro_batching_remember_alike():
    cfg = tiny.run(objective=ISOGCLR, optim=FROZEN)
    one, metrics, orders = train(cfg, tiny.mesh_of(), 3)
    assert np.isfinite(metrics["loss"])
    seen = np.unique(np.concatenate(orders))
    for name in ("log_u_image", "log_u_text"):
        values = np.asarray(one.memory[name])
        assert len(values) == memory.MULTIPLE  # the same on every usual mesh
        assert np.isfinite(values[seen]).all()
        assert (np.delete(values, seen) == UNSEEN).all()
    split = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batches=2))
    for other, shape in ((cfg, (2, 4, 1)), (split, (2, 1, 1))):
        state, _, _ = train(other, tiny.mesh_of(*shape), 3)
        for name, values in state.memory.items():
            assert values.sharding.spec == jax.sharding.PartitionSpec(sharding.BATCH)
            finite = np.isfinite(one.memory[name])
            np.testing.assert_array_equal(np.isfinite(values), finite)
            np.testing.assert_allclose(values[finite], one.memory[name][finite], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_average_is_that_of_its_definition():
    cfg = tiny.run(objective=SOGCLR, optim=FROZEN)
    state, _, orders = train(cfg, tiny.mesh_of(2), 3)
    want = np.full(EXAMPLES, UNSEEN)
    params = clip.init(cfg.model, cfg.seed)
    model, scale = clip.bind(cfg.model, params), float(np.exp(params["log_scale"]))
    for batch, index in zip(tiny.batches(cfg, 3), orders, strict=True):
        x, y = (np.float64(z) for z in (model.encode_image(batch["image"]), model.encode_text(batch["text"])))
        s = scale * (x @ y.T - np.sum(x * y, 1, keepdims=True))
        g = (np.exp(s).sum(1) - 1) / (len(s) - 1)
        want[index] = np.where(want[index] == UNSEEN, np.log(g), np.log(0.4 * np.exp(want[index]) + 0.6 * g))
    np.testing.assert_allclose(state.memory["log_u_image"][:EXAMPLES], want, rtol=1e-4, atol=1e-5)


def test_a_temperature_moves_by_its_own_gradient():
    cfg = tiny.run(objective=ISOGCLR)
    state, _, (index,) = train(cfg, tiny.mesh_of(4), 1)
    (term,) = ISOGCLR
    model = clip.bind(cfg.model, clip.init(cfg.model, cfg.seed))
    (batch,) = tiny.batches(cfg, 1)
    x, y = (np.float64(z) for z in (model.encode_image(batch["image"]), model.encode_text(batch["text"])))
    h = x @ y.T - np.sum(x * y, 1, keepdims=True)
    e = np.where(np.eye(len(h), dtype=bool), 0, np.exp(h / term.temperature))
    # First visit: u = g, so the gradient is log g + rho - sum_j p_ij h_ij / tau, p the softmax of the negatives.
    gradient = np.log(e.sum(1) / (len(h) - 1)) + term.rho - (e * h).sum(1) / e.sum(1) / term.temperature
    momentum = 0.5 * np.clip(gradient, -memory.MAX_GRADIENT, memory.MAX_GRADIENT)
    want = np.clip(term.temperature - term.temperature_lr * momentum, term.min_temperature, term.max_temperature)
    assert len(np.unique(want)) > 2  # not all at a bound
    np.testing.assert_allclose(state.memory["temperature_image"][index], want, rtol=1e-3)
    np.testing.assert_allclose(state.memory["momentum_image"][index], momentum, rtol=1e-3, atol=1e-4)
    untouched = np.delete(np.asarray(state.memory["temperature_image"]), index)
    np.testing.assert_array_equal(untouched, np.float32(term.temperature))


@pytest.mark.slow
def test_a_checkpoint_keeps_it_for_another_mesh_too(tmp_path):
    cfg = tiny.run(objective=ISOGCLR)
    mesh = tiny.mesh_of(8)
    want, _, _ = train(cfg, mesh, 3)
    state, _, _ = train(cfg, mesh, 2)
    with Checkpoints(tmp_path, cfg) as checkpoints:
        checkpoints.save(2, state)
        checkpoints.wait()
        for target in (mesh, tiny.mesh_of(2, 2)):
            tx = make_optimizer(cfg.optim, cfg.train.steps, jax.eval_shape(lambda: clip.init(cfg.model, cfg.seed)))
            restored = checkpoints.restore(2, abstract_state(cfg, tx, target))
            for name, values in state.memory.items():
                np.testing.assert_array_equal(restored.memory[name], values)
    got, _, _ = train(cfg, tiny.mesh_of(2, 2), 3, restored, skip=2)
    for name, values in want.memory.items():
        # A momentum is a difference of logits of up to 2 / temperature = 100 each, in float32.
        atol = 2e-6 * 100 if name.startswith("momentum") else 1e-5
        np.testing.assert_allclose(got.memory[name], values, rtol=1e-4, atol=atol, err_msg=name)


def test_no_device_has_all_of_it_whatever_their_number(tmp_path):
    """6 and 7 do not divide 1,024. A checkpoint goes from any mesh to any other."""
    cfg = tiny.run(objective=ISOGCLR)
    tx = make_optimizer(cfg.optim, cfg.train.steps, jax.eval_shape(lambda: clip.init(cfg.model, cfg.seed)))
    numbers = np.arange(EXAMPLES, dtype=np.float32)
    state = initial_state(cfg, tx, tiny.mesh_of(3, 2))
    values = {name: jax.device_put(np.resize(numbers, x.shape), x.sharding) for name, x in state.memory.items()}
    state = dataclasses.replace(state, memory=values)
    with Checkpoints(tmp_path, cfg) as checkpoints:
        for step, (shape, size) in enumerate([((3, 2), 1026), ((7,), 1029), ((8,), 1024), ((3, 2), 1026)]):
            mesh = tiny.mesh_of(*shape)
            checkpoints.save(step, state)
            checkpoints.wait()
            state = checkpoints.restore(step, abstract_state(cfg, tx, mesh))
            for values in state.memory.values():
                assert len(values) == size
                assert {shard.data.shape for shard in values.addressable_shards} == {(size // mesh.size,)}
                np.testing.assert_array_equal(values[:EXAMPLES], numbers)


def test_a_step_does_not_gather_it():
    cfg = tiny.run(objective=SOGCLR, train=dataclasses.replace(tiny.TRAIN, batch_size=12))
    mesh = tiny.mesh_of(3, 2)
    state = state_of(cfg, mesh)
    (size,) = {len(x) for x in state.memory.values()}
    text = lower_step(cfg, mesh, state).compile().as_text()
    assert f"f32[{size // 6}]" in text
    assert f"[{size}]" not in text
