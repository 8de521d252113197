"""Heads in training: gradients on every mesh and with micro-batches, their scales, checkpoints, and who reads them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax import cli, config, losses
from clipjax.config import ConfigError, Head
from clipjax.export.imported import write_weights
from clipjax.metrics.flops import tower_flops
from clipjax.models import clip
from clipjax.train.optimizer import clamp_scale, layer_factors
from tests.evals.test_loaded import save
from tests.evals.tiny import MODEL, TOKENIZER, WORDS
from tests.train import tiny
from tests.train.test_accumulate import EIGHT, MIXED, OVER_DATA, assert_close, batch_of, gradient, named, run_of

HEADS = (Head(name="a", hidden=32, width=16, scale=20.0), Head(name="b", depth=3, hidden=24, width=8))
WITH_HEADS = dataclasses.replace(tiny.CLIP, heads=HEADS)
TERMS = (config.Softmax(weight=0.5), config.Softmax(head=("a", "b")))
RUN = run_of(model=WITH_HEADS, size=32, objective=TERMS)


def test_gradients_on_meshes_and_with_micro_batches():
    """Against the loss written out. `a` has a scale of its own, `b` the model's."""
    batch = batch_of(RUN)

    def loss(params):
        model = clip.bind(RUN.model, params)
        image, text = (model.vectors(side, batch[side]) for side in ("image", "text"))
        scale, own = jnp.exp(params["log_scale"]), jnp.exp(params["heads"]["a"]["log_scale"])
        of_heads = [losses.clip_loss(image.heads[n], text.heads[n], s) for n, s in (("a", own), ("b", scale))]
        return losses.clip_loss(image.embedding, text.embedding, scale) / 2 + sum(of_heads) / 2

    value, by_hand = jax.jit(jax.value_and_grad(loss))(clip.init(RUN.model, RUN.seed))
    want = named(by_hand)
    assert abs(want["heads/a/log_scale"]) > 1e-4
    for shape, micro_batches, mesh in ((MIXED, 2, config.Mesh()), (EIGHT, 4, OVER_DATA)):
        train = dataclasses.replace(RUN.train, micro_batches=micro_batches)
        got, logged = gradient(dataclasses.replace(RUN, train=train, mesh=mesh), shape, batch)
        assert_close(got, want)
        assert logged["loss"] == pytest.approx(float(value), rel=1e-6)
        assert logged["a_scale"] == pytest.approx(20, rel=1e-5)


def test_scales_are_clamped_and_layer_decay_leaves_heads_alone():
    params = {"log_scale": jnp.float32(9), "heads": {"a": {"log_scale": jnp.float32(-1)}, "b": {"log_scale": jnp.float32(9)}}}
    got = clamp_scale(params, 100.0)
    assert [float(jnp.exp(x)) for x in jax.tree.leaves(got)] == pytest.approx([1, 100, 100])
    assert clamp_scale(params, None) is params
    assert layer_factors("heads/patch/image/up/kernel", {"image": 2}, 0.5, {}) is None


def test_flops_count_heads_for_every_caption():
    one, two = (tower_flops(WITH_HEADS, None, captions)["heads"] for captions in (1, 2))
    of_pair = 2 * (32 * 32 + 32 * 16 + 32 * 24 + 24 * 24 + 24 * 8)
    assert (one, two) == (6 * of_pair, 9 * of_pair)
    assert "heads" not in tower_flops(tiny.CLIP)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a moving average, on a mesh of all axes; and its weights."""
    model = dataclasses.replace(MODEL, heads=(Head(name="a", hidden=32, width=6, predictor=True), HEADS[1]))
    optim, mesh = config.Optim(ema=0.5), config.Mesh(fsdp=2, tensor=2)
    terms = (config.Softmax(head=("a", "b")),)
    run = config.Run(data=config.Data(spec="emoji"), model=model, optim=optim, mesh=mesh, objective=terms)
    return save(run, tmp_path_factory.mktemp("heads")), clip.init(model, 0)


def test_only_who_names_a_head_reads_it(workdir):
    folder, params = workdir
    plain, tower, both = (clipjax.load(folder, features=f) for f in ("embedding", "tower", ("a", "b")))
    assert "heads" not in plain.params
    kernel = both.params["heads"]["a"]["image"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4
    bound, ids = clip.bind(plain.run.model, params), TOKENIZER.encode(WORDS)[0]
    want = bound.vectors("text", ids, feature=True)
    np.testing.assert_allclose(plain.encode_text(WORDS), want.embedding, atol=1e-6)
    np.testing.assert_allclose(tower.encode_text(WORDS), want.feature, atol=1e-6)
    z = both.encode_text(WORDS)
    mean = sum(np.asarray(want.heads[n] @ want.heads[n].T) for n in "ab") / 2
    np.testing.assert_allclose(z @ z.T, mean, atol=1e-5)
    with pytest.raises(ConfigError, match=r"--head = 'c': the text tower has a, b"):
        clipjax.load(folder, features=("c",)).encode_text(WORDS)
    with pytest.raises(ConfigError, match=r"^features = 'a': must be embedding or tower, or a tuple of heads' names"):
        clipjax.load(folder, features="a")

    saved = json.loads((folder / "config.json").read_text())  # another mesh
    (folder / "config.json").write_text(json.dumps(saved | {"mesh": dict(data=-1, fsdp=1, tensor=1, shard_optimizer=None)}))
    np.testing.assert_allclose(clipjax.load(folder, features=("a", "b")).encode_text(WORDS), z, atol=1e-6)


def test_what_comes_out_of_a_run_with_heads_has_none(workdir, tmp_path):
    """Neither a start nor an average with a run that has no heads, which is evaluated."""
    folder, params = workdir
    assert config.start_from(folder, data=dict(spec="emoji")).model.heads == ()
    without, weights = tmp_path / "plain", {name: x for name, x in jax.device_get(params).items() if name != "heads"}
    write_weights(config.Run(data=config.Data(spec="emoji"), model=MODEL), weights, TOKENIZER, without, "the test")
    assert cli.main(["average", str(folder), str(without), "--alpha", "0.5", "--out", str(tmp_path / "mean")]) == 0
    got = clipjax.load(tmp_path / "mean").params
    assert got.keys() == weights.keys()
    np.testing.assert_array_equal(got["text"]["projection"]["kernel"], weights["text"]["projection"]["kernel"])
    with pytest.raises(ConfigError, match=r"^--head = 'a': the text tower has no heads"):
        clipjax.load(tmp_path / "mean", features=("a",)).encode_text(WORDS)
