"""Micro-batches: the gradient of the full batch on any mesh, in less memory, for one more forward pass and no more traffic."""

import contextlib
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipjax import config, hlo, sharding
from clipjax.config import ConfigError
from clipjax.metrics.flops import model_flops
from clipjax.models import clip
from clipjax.train.optimizer import trained_names
from clipjax.train.state import TrainState
from clipjax.train.step import jit_step, make_train_step
from tests.train import tiny

pytestmark = pytest.mark.usefixtures("uncached")

BATCH = 256


def dropping(model):
    """Half of 16 patches, by the example's own key."""
    return dataclasses.replace(model, image=dataclasses.replace(model.image, image_size=32, patch_dropout=0.5))


CLIP, SIGLIP, COCA = map(dropping, (tiny.CLIP, tiny.SIGLIP, tiny.COCA))
ONE, EIGHT, MIXED = (1,), (8,), (2, 2, 2)


def run_of(micro_batches=1, model=CLIP, size=BATCH, **changes):
    return tiny.run(model, train=dataclasses.replace(tiny.TRAIN, batch_size=size, micro_batches=micro_batches), **changes)


def batch_of(run):
    """Noise, with all that the objective may ask for."""
    (batch,) = tiny.batches(run, 1)
    rng, size = np.random.default_rng(1), len(batch["text"])
    if run.data.ids:
        batch["id"] = rng.integers(0, size // 2, size, np.int32)
    if run.data.teacher:
        for name in ("teacher_image", "teacher_text"):
            z = rng.standard_normal((size, 12), np.float32)
            batch[name] = z / np.linalg.norm(z, axis=1, keepdims=True)
    if run.data.labels:
        labels = np.tile(np.arange(-1, run.model.classes.count, dtype=np.int32), (size, 1))
        batch["label"] = rng.permuted(labels, axis=1)[:, :3]
    return batch


# An optimizer whose state is the last gradient and whose update is none.
RECORD = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)
initial = functools.cache(clip.init)


def named(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


@functools.cache
def program(run, shape):
    """The compiled train step that keeps its gradient, and a function that makes its first state."""
    mesh = tiny.mesh_of(*shape)

    def start():
        params = jax.tree.map(jnp.array, initial(run.model, run.seed))
        state = TrainState(jnp.zeros((), jnp.int32), params, RECORD.init(params), None)
        return jax.device_put(state, sharding.shardings(state, mesh))

    rows = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch_of(run).items()}
    return jit_step(make_train_step(run, RECORD, mesh), start(), mesh).lower(start(), rows).compile(), start


def gradient(run, shape, batch):
    """Path -> gradient, and what the step logs."""
    step, start = program(run, shape)
    state, metrics = step(start(), sharding.to_global(batch, tiny.mesh_of(*shape)))
    return named(state.opt_state), {name: float(value) for name, value in metrics.items()}


def assert_close(got, want, rtol=1e-5):
    """Each array to `rtol` of its largest entry."""
    assert got.keys() == want.keys()
    for name, w in want.items():
        np.testing.assert_allclose(got[name], w, rtol=0, atol=rtol * np.abs(w).max(), err_msg=name)


OVER_DATA = config.Mesh(shard_optimizer=True)
TERMS = (config.Softmax(), config.MultiPositive(), config.Distillation())
SEVERAL = config.Data(spec="emoji", captions_per_image=2, ids="caption", teacher="teacher.npz")
VIEWS = config.Data(spec="emoji", views=(config.View(), config.View(crop=0.5)), text_augment=config.TextAugment(count=1))
HEADED = dataclasses.replace(CLIP, heads=(config.Head(name="local", hidden=32, width=16, scale=10.0),))
LOCAL = config.Softmax(head="local", images=(1,), texts=(1,))
OF_VIEWS = (*config.CUAXU, LOCAL, config.Mixup(mix="image", images=(0,)))
CASES = {
    "2": (run_of(2), EIGHT),
    "4": (run_of(4), EIGHT),
    "8": (run_of(8), EIGHT),
    "8, one device": (run_of(8), ONE),
    "2, fsdp and tensor": (run_of(2), MIXED),
    "8, sigmoid": (run_of(8, SIGLIP), EIGHT),
    "4, CUAXU, mixtures, views, copies and a head": (run_of(4, HEADED, objective=OF_VIEWS, data=VIEWS), EIGHT),
    "4, captions, ids and a teacher": (run_of(4, objective=TERMS, data=SEVERAL), EIGHT),
    "1, optimizer over data": (run_of(1, mesh=OVER_DATA), EIGHT),
    "4, optimizer over data": (run_of(4, SIGLIP, mesh=OVER_DATA), EIGHT),
    "4, captioning": (run_of(4, COCA), EIGHT),
    "2, captioning, words sharded": (run_of(2, COCA, data=config.Data(spec="emoji", captions_per_image=2)), MIXED),
}


def marks(case):
    return pytest.mark.optimized if case == "4" else pytest.mark.slow


@pytest.mark.parametrize("case", [pytest.param(case, marks=marks(case)) for case in CASES])
def test_any_number_of_micro_batches_gives_the_full_gradient(case):
    run, shape = CASES[case]
    batch = batch_of(run)
    want, logged = gradient(dataclasses.replace(run, train=run_of().train), ONE, batch)
    got, relogged = gradient(run, shape, batch)
    assert_close(got, want)
    for name in {"log_scale", "bias"} & want.keys():  # once, not once a micro-batch
        assert abs(want[name]) > 1e-3
        assert got[name] == pytest.approx(want[name], rel=1e-5)
    assert relogged == pytest.approx(logged, rel=1e-5)


def test_the_mean_of_micro_batches_gradients_is_another():
    """Without dropout, whose keys go by the row."""
    run, size = run_of(model=tiny.CLIP), BATCH // 16
    batch = batch_of(run)
    want, _ = gradient(run, ONE, batch)
    batches = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, BATCH, size)]
    gradients = [gradient(run_of(model=tiny.CLIP, size=size), ONE, part)[0] for part in batches]
    mean = {name: np.mean([grads[name] for grads in gradients], axis=0) for name in want}
    with pytest.raises(AssertionError):
        assert_close(mean, want, rtol=0.1)
    flat = {name: np.concatenate([g.ravel() for g in grads.values()]) for name, grads in (("mean", mean), ("want", want))}
    assert np.linalg.norm(flat["mean"] - flat["want"]) > 0.1 * np.linalg.norm(flat["want"])


def text_and_memory(run, shape=EIGHT):
    compiled, _ = program(run, shape)
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_falls_with_the_number_of_micro_batches():
    temp = [text_and_memory(run_of(micro_batches))[1] for micro_batches in (1, 2, 4, 8)]
    assert temp[1] < 0.7 * temp[0]
    assert temp[2] < 0.7 * temp[1]
    assert temp[3] < 0.9 * temp[2]


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "shape"), [(4, EIGHT), (2, MIXED)])
def test_no_image_leaves_its_device(micro_batches, shape):
    text, _ = text_and_memory(run_of(micro_batches), shape)
    moved = [line for line in text.splitlines() if re.search(rf" ({'|'.join(hlo.COLLECTIVES)})(-start)?\(", line)]
    assert moved
    assert not [line for line in moved if "u8[" in line]
    assert "u8[" in text  # or nothing would have been looked for
    if shape == EIGHT:
        assert not [line for line in moved if "s32[" in line]  # nor a caption


@pytest.mark.slow
def test_micro_batches_cost_one_forward_pass_and_no_traffic():
    one, *more = (hlo.cost(text_and_memory(run_of(micro_batches))[0]) for micro_batches in (1, 2, 8))
    forward = model_flops(CLIP) / 3 * BATCH / 8
    for cost in more:
        assert cost.uncounted == ()
        assert cost.flops - one.flops == pytest.approx(forward, rel=0.02)
        assert cost.collectives == more[0].collectives  # gradients are summed over the devices once, not once a micro-batch
        assert cost.collectives.keys() <= one.collectives.keys()
        assert all(moved.bytes <= 1.01 * one.collectives[kind].bytes for kind, moved in cost.collectives.items())


def test_a_frozen_tower_runs_once():
    optim = dataclasses.replace(tiny.OPTIM, rules=(config.Rule(pattern="image/.*", lr=0.0), *config.RULES))
    locked = run_of(4, optim=optim)
    grads, _ = gradient(locked, EIGHT, batch_of(locked))
    trained = trained_names(optim.rules, initial(CLIP, 0))
    assert {name for name, g in grads.items() if g.any()} <= trained
    pairs, image = BATCH / 8, CLIP.image
    saved = (model_flops(CLIP) - model_flops(CLIP, trained)) * 1.5  # of four passes through the tower, three
    saved -= 2 * image.patches * 3 * image.patch_size**2 * image.width  # which had no gradient to the pixels anyway
    full, less = (hlo.cost(text_and_memory(run)[0]).flops for run in (run_of(4), locked))
    assert full - less == pytest.approx(saved * pairs, rel=0.02)
    assert less < 0.6 * full


@pytest.mark.slow
def test_a_run_may_change_its_micro_batches_on_resume(tmp_path, capsys):
    optim = dataclasses.replace(tiny.OPTIM, schedule=config.Constant(warmup=3))

    def losses(workdir, micro_batches, steps):
        run = run_of(micro_batches, size=32, optim=optim)
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))
        made = [batch | tiny.marks(32) for batch in tiny.batches(run, steps)]
        tiny.train_in(workdir, run, lambda start: contextlib.nullcontext(iter(made[start:])), [], tiny.mesh_of())
        return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]

    losses(tmp_path / "several", 4, 10)
    got = losses(tmp_path / "several", 1, 20)
    assert "resuming at step 10 of 20; changed: train.steps = 20; train.micro_batches = 1\n" in capsys.readouterr().err
    np.testing.assert_allclose(got, losses(tmp_path / "one", 1, 20), rtol=1e-5)
    assert abs(got[-1] - got[0]) > 0.1


def test_micro_batches_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"^train\.micro_batches = 3: must divide train\.batch_size = 256, and each device's "):
        run_of(3)
    for micro_batches, near in ((64, "32"), (6, "4 or 8")):
        message = rf"^train\.micro_batches = {micro_batches}: must divide the 32 pairs of each .* = {32 * 6} over 6; try {near}$"
        with pytest.raises(ConfigError, match=message):
            sharding.check_batch(run_of(micro_batches, size=32 * 6), tiny.mesh_of(6))
    sharding.check_batch(run_of(32), tiny.mesh_of(2, 4))
