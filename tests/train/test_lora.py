"""Runs with low-rank adapters: what is trained and what is not, what a step costs, and what is read from the run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import aot, config, restore, sharding
from clipjax.checkpoint import Checkpoints
from clipjax.metrics.flops import model_flops
from clipjax.models import clip, lora
from clipjax.models.block import Block
from clipjax.models.facts import BlockShape
from clipjax.train.optimizer import trained_names
from clipjax.train.workdir import save_config
from tests.test_metrics import dots
from tests.train import tiny

ALL = ("attention/qkv", "attention/out", "mlp/up", "mlp/down")
IMAGE, TEXT = config.Lora(rank=4, kernels=ALL), config.Lora(rank=2)


def adapted(image=IMAGE, text=TEXT, model=tiny.CLIP, **changes):
    towers = {name: dataclasses.replace(getattr(model, name), lora=own) for name, own in (("image", image), ("text", text))}
    return dataclasses.replace(model, **towers, **changes)


def named(tree):
    return {sharding.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def is_lora(name: str) -> bool:
    return "/lora_" in name


@pytest.fixture(scope="module")
def finished():
    """A run on one device, before and after three steps."""
    run = tiny.run(adapted(), optim=dataclasses.replace(tiny.OPTIM, weight_decay=0.5))
    start, _, _ = tiny.train(run, tiny.mesh_of(), 0)
    state, losses, step = tiny.train(run, tiny.mesh_of(), 3)
    return run, start, state, losses, step


def test_adapters_alone_are_trained_and_have_an_optimizer_state(finished):
    run, start, state, losses, _ = finished
    before, after = named(start.params), named(state.params)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    trained = trained_names(run.optim_in_use.rules, start.params)
    assert changed == trained == {name for name in before if is_lora(name)} | {"log_scale"}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.size > 1]
    assert sum(x.size for x in moments) == 2 * sum(x.size for name, x in before.items() if is_lora(name))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 1), (1, 2, 4)])
def test_every_mesh_trains_the_same(finished, mesh):
    run, _, state, losses, _ = finished
    other, others, _ = tiny.train(run, tiny.mesh_of(*mesh), 3)
    np.testing.assert_allclose(others, losses, rtol=2e-5)
    for name, x in named(state.params).items():
        np.testing.assert_allclose(named(other.params)[name], x, atol=2e-5, err_msg=name)


def flops(run: config.Run, state, step) -> float:
    """Of the dot products of a compiled step on one device, loops unrolled."""
    batch = {name: jnp.asarray(x) for name, x in tiny.batches(run, 1)[0].items()}
    return aot.compile(step.lower(state, batch)).cost.flops


def layers(tower, depth: int) -> tuple[int, int]:
    """FLOPs that the forward pass of some layers has in kernels, and in adapters, for an example."""
    tokens = getattr(tower, "patches", tower.positions if isinstance(tower, config.TextTower) else 0)
    tokens += getattr(tower, "class_token", 0)
    shape = BlockShape(tokens, tower.width, tower.heads, tower.mlp_dim, tower.activation)
    return 2 * depth * tokens * Block.weights(shape), depth * lora.flops(shape._replace(lora=tower.lora))


def test_frozen_kernels_cost_no_gradient_of_weights(finished):
    """All that a step with adapters computes less, and more, than one that trains everything."""
    run, plain = finished[0], tiny.run()
    image, text = run.model.image, run.model.text
    size = run.train.batch_size
    patch, projections = 2 * image.patches * 3 * image.patch_size**2 * image.width, 2 * 2 * image.width * image.embed_dim
    (image_kernels, image_own), (text_kernels, text_own) = layers(image, image.depth), layers(text, text.depth)
    left_out = image_kernels + text_kernels + patch + projections
    start, _, step = tiny.train(plain, tiny.mesh_of(), 0)
    saved = flops(plain, start, step) - flops(run, finished[2], finished[4])
    assert saved == size * (left_out - 3 * (image_own + text_own))
    trained = trained_names(run.optim_in_use.rules, jax.eval_shape(lambda: clip.init(run.model, 0)))
    counted = size * (model_flops(plain.model) - model_flops(run.model, trained))
    assert counted == pytest.approx(saved, rel=0.15)  # counted by passes; attention has two for one


def test_unlock_trains_the_adapters_of_the_last_layers():
    model = adapted(text=None)
    model = dataclasses.replace(model, image=dataclasses.replace(model.image, unlock=1))
    run, whole = tiny.run(model), tiny.run(adapted(text=None))
    state, _, step = tiny.train(run, tiny.mesh_of(), 2)
    b = np.asarray(named(state.params)["image/blocks/attention/qkv/lora_b"])
    assert np.any(b[1])
    assert not np.any(b[0])
    kernels, own = layers(model.image, 1)
    batch, other = tiny.batches(run, 1)[0], tiny.train(whole, tiny.mesh_of(), 0)[2]
    saved = dots(jax.make_jaxpr(other)(state, batch).jaxpr) - dots(jax.make_jaxpr(step)(state, batch).jaxpr)
    assert saved > run.train.batch_size * (kernels + 2 * own)  # and attention's


def test_who_reads_the_run_gets_merged_kernels(finished, tmp_path):
    run, _, state, _, _ = finished
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(3, state)
    save_config(run, tmp_path)
    for mesh in (tiny.mesh_of(), tiny.mesh_of(1, 2, 2)):
        read, params, step = restore.load_params(str(tmp_path), mesh)
        assert (read.model, step) == (tiny.CLIP, 3)
        kernel = params["image"]["blocks"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.spec == sharding.spec("params/image/blocks/mlp/up/kernel", kernel.shape, mesh)
        batch = tiny.batches(run, 1)[0]
        for side, inputs in (("encode_image", batch["image"]), ("encode_text", batch["text"])):
            want = getattr(clip.bind(run.model, jax.device_get(state.params)), side)(inputs)
            got = getattr(clip.bind(read.model, jax.device_get(params)), side)(inputs)
            assert np.abs(want - got).max() < 1e-6
    before = clip.bind(tiny.CLIP, clip.init(tiny.CLIP, 0)).encode_text(batch["text"])
    assert np.abs(before - got).max() > 1e-4


def test_unlock_of_nothing_contradicts_adapters():
    with pytest.raises(config.ConfigError, match=r"^model\.text\.unlock = 0: trains nothing of the tower, and model\.text\.lora"):
        config.TextTower(lora=TEXT, unlock=0)
