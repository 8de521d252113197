"""The train step: the same on every mesh, compiled once, random per example, clamped, averaged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import config, losses, sharding
from clipjax.metrics.flops import model_flops
from clipjax.models import clip, runner
from clipjax.train.optimizer import trained_names
from clipjax.train.step import example_keys

from . import tiny

DROPOUT = dataclasses.replace(tiny.CLIP, image=dataclasses.replace(tiny.CLIP.image, image_size=32, patch_dropout=0.5))


SLOW = pytest.mark.slow
SHAPES = [(1, 8, 1, 1), (1, 1, 8, 1), (1, 2, 4, 1), (1, 4, 2, 1), (1, 2, 2, 2), (2, 2, 2, 1)]  # slices, data, fsdp, tensor
NAMES = {tiny.CLIP: "clip", tiny.SIGLIP: "siglip", DROPOUT: "patch_dropout"}
ON_MESHES = [(model, shape) for model in (tiny.CLIP, tiny.SIGLIP) for shape in SHAPES] + [
    (DROPOUT, shape) for shape in SHAPES[::4]
]
ON_MESHES[4] = pytest.param(*ON_MESHES[4], marks=pytest.mark.optimized)  # every axis


@functools.cache
def one_device(model):
    """The losses of 20 steps."""
    _, losses, _ = tiny.train(tiny.run(model), tiny.mesh_of(), 20)
    assert abs(losses[-1] - losses[0]) > 1e-2  # it moves
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("model", "shape"), ON_MESHES, ids=lambda value: NAMES.get(value, str(value)))
def test_every_mesh_gives_the_losses_of_one_device(model, shape):
    _, got, _ = tiny.train(tiny.run(model), jax.make_mesh(shape, sharding.AXES, axis_types=sharding.AUTO), 20)
    np.testing.assert_allclose(got, one_device(model), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 1, 2)], ids=str)
def test_every_mesh_gives_the_captioning_losses_of_one_device(shape):
    """The last shards the words, the first two do not. Half of the captions are predicted in parallel."""
    _, got, _ = tiny.train(tiny.run(tiny.COCA), jax.make_mesh(shape, sharding.AXES, axis_types=sharding.AUTO), 20)
    np.testing.assert_allclose(got, one_device(tiny.COCA), rtol=1e-5)


@pytest.mark.slow
def test_a_captioning_weight_of_0_is_a_model_without_a_head():
    """But for weight decay, which shrinks parameters without a gradient."""
    off = (config.Softmax(), config.Caption(weight=0.0))
    bare = dataclasses.replace(tiny.COCA, decoder=None)
    with_head, losses_with, _ = tiny.train(tiny.run(tiny.COCA, objective=off), tiny.mesh_of(2), 20)
    without, losses_without, _ = tiny.train(tiny.run(bare), tiny.mesh_of(2), 20)
    np.testing.assert_allclose(losses_with, losses_without, rtol=1e-6)
    shared = {name: x for name, x in named(with_head.params).items() if not name.startswith("decoder/")}
    assert shared.keys() == named(without.params).keys()
    for name, x in named(without.params).items():
        np.testing.assert_allclose(shared[name], x, rtol=0, atol=1e-6 * max(1, np.abs(x).max()), err_msg=name)


@pytest.mark.slow
def test_a_contrastive_weight_of_0_trains_a_captioner():
    one = (config.Softmax(weight=0.0), config.Caption(weight=1.0))
    run = tiny.run(dataclasses.replace(tiny.COCA, decoder=dataclasses.replace(tiny.COCA.decoder, parallel=0.0)), objective=one)
    params = clip.init(run.model, run.seed)
    state, found, _ = tiny.train(run, tiny.mesh_of(2), 20)
    assert found[0] == pytest.approx(np.log(run.model.text.vocab_size), rel=0.1)
    assert found[-1] < found[0] - 0.1
    assert float(state.params["log_scale"]) == float(params["log_scale"])  # it has no gradient


CHUNKED = [
    pytest.param(policy, shape, marks=SLOW, id=f"{policy}-{way}")
    for policy, way, shape in (
        ("full", "data", (4, 1, 1)),
        ("full", "fsdp", (1, 4, 1)),
        ("full", "tensor", (1, 2, 2)),
        ("dots", "fsdp", (2, 2, 1)),
        ("mlp", "data", (4, 1, 1)),
    )
]


@pytest.mark.parametrize(("policy", "shape"), CHUNKED)
def test_chunks_of_a_batch_give_the_same_losses(policy, shape):
    """What is recomputed runs in chunks of a device's rows, in all three ways of clipjax/placement.py."""
    want = one_device(DROPOUT)[:4]
    part = 32  # 16 patches an image: two of a device's four or eight at a time
    assert runner.Runner("full", part=part).to_chunks(jnp.zeros((8, 3)), 16).shape == (4, 2, 3)
    assert runner.Runner("none", part=part).to_chunks(jnp.zeros((8, 3)), 16).shape == (1, 8, 3)
    _, got, _ = tiny.train(tiny.run(dataclasses.replace(DROPOUT, remat=policy, part=part)), tiny.mesh_of(*shape), 4)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_step_compiles_once_and_holds_no_weak_types():
    run = tiny.run(optim=dataclasses.replace(tiny.OPTIM, ema=0.9))
    state, _, step = tiny.train(run, tiny.mesh_of(8), 3)
    assert step._cache_size() == 1
    assert not [x for x in jax.tree.leaves(state) if x.weak_type]


def test_parameters_are_sharded_over_fsdp_and_tensor():
    state, _, _ = tiny.train(tiny.run(), tiny.mesh_of(1, 4, 2), 1)
    kernel = state.params["image"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    moments = [x for path, x in jax.tree.leaves_with_path(state.opt_state) if x.shape == kernel.shape and "up" in str(path)]
    assert len(moments) == 4  # two of each tower
    assert all(m.sharding.spec == kernel.sharding.spec for m in moments)


@pytest.mark.parametrize("kind", ["adamw", pytest.param("adafactor", marks=SLOW)])
def test_an_optimizer_over_data_trains_as_on_one_device(kind):
    """Each device updates its share of what is trained, with moments and moving average; the frozen tower is replicated."""
    rules = (config.Rule(pattern="text/(?!projection).*", lr=0.0), config.Rule(pattern=".*", layer_decay=0.8))
    optim = dataclasses.replace(tiny.OPTIM, kind=kind, ema=0.9, rules=rules)
    run = tiny.run(optim=optim, train=dataclasses.replace(tiny.TRAIN, nonfinite="skip"))
    one, want, _ = tiny.train(run, tiny.mesh_of(), 6)
    state, got, _ = tiny.train(dataclasses.replace(run, mesh=config.Mesh(shard_optimizer=True)), tiny.mesh_of(8), 6)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert abs(want[-1] - want[0]) > 1e-2  # it moves
    for name, x in named(one.ema).items():
        if not name.endswith("qkv/bias"):  # a bias of keys has no gradient but rounding errors, of which Adam makes full steps
            np.testing.assert_allclose(np.asarray(named(state.ema)[name]), x, rtol=0, atol=1e-5, err_msg=name)
    for name, x in named(state).items():
        if name.startswith(("params/", "ema/")) or "/mu/" in name:
            trained = "text/" not in name or "text/projection" in name
            assert ("data" in x.sharding.spec) == (trained and name.endswith(("kernel", "image/positions"))), name


def test_the_scale_is_clamped_after_the_update():
    model = dataclasses.replace(tiny.CLIP, init_scale=100.0, max_scale=100.0)
    optim = config.Optim(lr=0.1, schedule=config.Constant(warmup=0), rules=(config.Rule(pattern=".*", decay=0.0),))
    start, _, _ = tiny.train(tiny.run(dataclasses.replace(model, max_scale=None), optim=optim), tiny.mesh_of(), 1)
    moved = float(start.params["log_scale"]) - np.log(100)
    assert abs(abs(moved) - 0.1) < 1e-3  # Adam's first step is the learning rate, up or down
    bound = dataclasses.replace(model, max_scale=100.0) if moved > 0 else dataclasses.replace(model, init_scale=1.0)
    state, _, _ = tiny.train(tiny.run(bound, optim=optim), tiny.mesh_of(), 1)
    assert 0 <= float(state.params["log_scale"]) <= np.float32(np.log(100))


def named(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


@functools.cache
def flops_of(cfg):
    """As XLA counts them, of the step on one device."""
    state, _, step = tiny.train(cfg, tiny.mesh_of(), 0)
    batch = {k: jnp.asarray(v) for k, v in tiny.batches(cfg, 1)[0].items()}
    return step.lower(state, batch).compile().cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["image/.*", "image/(?!projection).*", "text/.*"])
def test_a_frozen_tower_keeps_every_bit_and_has_no_backward_pass(frozen):
    model = dataclasses.replace(tiny.CLIP, unroll=2)  # the cost analysis counts the body of a loop once
    run = tiny.run(model)
    locked = tiny.run(model, optim=dataclasses.replace(tiny.OPTIM, rules=(config.Rule(pattern=frozen, lr=0.0), *config.RULES)))
    start, _, _ = tiny.train(locked, tiny.mesh_of(), 0)
    trained = trained_names(locked.optim.rules, start.params)
    saved = (model_flops(model) - model_flops(model, trained)) * run.train.batch_size
    assert saved > 0.2 * flops_of(run)
    assert flops_of(run) - flops_of(locked) > 0.95 * saved

    before, after = named(start.params), named(tiny.train(locked, tiny.mesh_of(), 3)[0].params)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == trained


def test_the_gradients_norm_is_over_trained_parameters():
    optim = dataclasses.replace(tiny.OPTIM, rules=(config.Rule(pattern="image/.*", lr=0.0), *config.RULES))
    locked = tiny.run(optim=optim)
    state, _, step = tiny.train(locked, tiny.mesh_of(), 0)
    batch = {k: jnp.asarray(v) for k, v in tiny.batches(locked, 1)[0].items()}

    def loss(params):
        model = clip.bind(locked.model, params)
        zimg, ztxt = model.encode_image(batch["image"]), model.encode_text(batch["text"])
        return losses.objective(locked.objective, losses.Rows(zimg, ztxt), jnp.exp(params["log_scale"]), None)[0]

    grads = named(jax.jit(jax.grad(loss))(state.params))
    norm = np.sqrt(sum((np.float64(g) ** 2).sum() for name, g in grads.items() if not name.startswith("image/")))
    assert float(step(state, batch)[1]["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_the_moving_average_follows_the_weights():
    run = tiny.run(optim=dataclasses.replace(tiny.OPTIM, ema=0.999))
    start, _, _ = tiny.train(run, tiny.mesh_of(), 0)
    state, _, _ = tiny.train(run, tiny.mesh_of(), 3)
    before, now, mean = (s["log_scale"] for s in (start.params, state.params, state.evaluated))
    assert min(before, now) < mean < max(before, now)


def test_keys_belong_to_the_example_and_the_step():
    index = jnp.arange(6)
    keys = jax.random.key_data(example_keys(0, "patch_dropout", jnp.int32(3), index))
    shuffled = jax.random.key_data(example_keys(0, "patch_dropout", jnp.int32(3), index[::-1]))
    assert np.array_equal(keys, shuffled[::-1])
    assert len(np.unique(keys, axis=0)) == 6
    for other in (example_keys(0, "patch_dropout", jnp.int32(4), index), example_keys(1, "patch_dropout", jnp.int32(3), index)):
        assert not np.array_equal(keys, jax.random.key_data(other))
