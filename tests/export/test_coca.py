"""CoCa in open_clip: exported folders, caption logits, losses and every gradient."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipjax import config, sharding
from clipjax.config import ConfigError, ImageTower, Model
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare.reference import load
from clipjax.export.compare.verify import encode
from clipjax.export.folder import export
from clipjax.export.formats import open_clip as layout
from clipjax.export.formats.table import flatten, to_ours, to_theirs
from clipjax.models.clip import init
from clipjax.train.state import TrainState
from clipjax.train.step import make_train_step
from tests import torch_reference
from tests.export.models import IMAGE, LENGTH, TEXT, check, coca, parameters

torch_reference.load()
import open_clip  # noqa: E402
import torch  # noqa: E402


def torch_model(model: Model, params: dict) -> torch.nn.Module:
    """open_clip's CoCa with our weights."""
    special = dict(bos=1, eos=TEXT["vocab_size"] - 1, pad=0)
    cfg = layout.configs(model, special, "squash")["open_clip_config.json"]["model_cfg"]
    assert cfg.pop("custom_text")
    theirs = open_clip.CoCa(**cfg)
    weights = {name: torch.from_numpy(tensor) for name, tensor in to_theirs(layout.table(model), params).items()}
    theirs.load_state_dict(weights, strict=True)
    return theirs


CASES = {
    "single": coca(),
    # As wide as its embedding, torch keeps the pooler's weights in one matrix; no projection of texts; with a bias.
    "single, joint weights": coca(
        dict(width=32, heads=2, activation="quick_gelu", pre_norm=False, positions="sincos2d"),
        dict(embed_dim=None, activation="quick_gelu"),
        init_bias=-10.0,
    ),
    "no pooler": coca(dict(pool="cls", width=32, heads=2, activation="gelu_tanh", norm_eps=1e-6)),
}


@pytest.mark.parametrize("model", CASES.values(), ids=CASES.keys())
def test_same_embeddings_and_caption_logits(tmp_path, tokenizer, images, model):
    words = Tokenizer.load(tokenizer, LENGTH)
    model = replace(model, text=replace(model.text, vocab_size=words.vocab_size))  # open_clip may write ids that no token has
    params = parameters(model)
    export(model, params, tokenizer, "squash", tmp_path / "out", "open_clip")
    report = check(tmp_path / "out", "open_clip", model, params, tokenizer, images)
    assert report.failures == []
    assert max(report.image, report.text, report.logits, report.token_logits) < 1e-5
    assert report.other_captions == 0
    theirs = load(tmp_path / "out", "open_clip")
    captions = theirs.generate(theirs.pixels(images), words)
    assert len({tuple(row) for row in captions}) > 1  # else it would mean little that they are equal


def captions() -> np.ndarray:
    """Captions of many lengths, from one word to a full row: start, words, end, padding of id 0."""
    rng = np.random.default_rng(1)
    rows = np.zeros((8, LENGTH), np.int32)
    for row, words in zip(rows, (1, 2, 3, 5, 8, 11, LENGTH - 3, LENGTH - 2), strict=True):
        row[: words + 2] = [1, *rng.integers(2, TEXT["vocab_size"] - 1, words), TEXT["vocab_size"] - 1]
    return rows


@pytest.fixture(scope="module")
def both():
    """One training step of ours, whose "optimizer" only keeps the gradient, and open_clip's forward and backward pass."""
    model = coca(dtype="float32")
    params, tokens = parameters(model), captions()
    images = np.random.default_rng(2).integers(0, 256, (len(tokens), IMAGE["image_size"], IMAGE["image_size"], 3), np.uint8)
    terms = (config.Softmax(weight=0.7), config.Caption(weight=2.0))
    run = config.Run(data=config.Data(spec="emoji"), model=model, objective=terms, train=config.Train(batch_size=len(tokens)))
    keep_gradient = optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    step = jax.jit(make_train_step(run, keep_gradient, sharding.make_mesh(run.mesh, jax.devices()[:1])))
    batch = dict(image=images, text=tokens, index=np.arange(len(tokens), dtype=np.int32))
    state, metrics = step(TrainState(jnp.int32(0), params, keep_gradient.init(params), None), batch)
    ours = to_theirs(layout.table(model), state.opt_state)

    theirs = torch_model(model, params)
    mean, std = np.float32(model.image.mean), np.float32(model.image.std)
    pixels = torch.from_numpy(((np.float32(images) / 255 - mean) / std).transpose(0, 3, 1, 2).copy())
    out = theirs(pixels, torch.from_numpy(tokens).long())
    loss = open_clip.loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.7)(**out, output_dict=True)
    sum(loss.values()).backward()
    return model, params, images, tokens, metrics, ours, out, loss, theirs


def test_logits_against_open_clip(both):
    model, params, images, tokens, _, _, out, _, _ = both
    ours = encode(model, params, images, tokens)
    words = out["logits"].detach().numpy()
    assert ours.token_logits.shape == words.shape == (8, LENGTH - 1, TEXT["vocab_size"])
    np.testing.assert_allclose(ours.token_logits, words, rtol=0, atol=1e-5 * np.abs(words).max())
    for got, name in ((ours.image, "image_features"), (ours.text, "text_features")):
        np.testing.assert_allclose(got, out[name].detach().numpy(), rtol=0, atol=1e-5)


def test_losses_against_open_clip(both):
    *_, metrics, _, _, loss, _ = both
    np.testing.assert_allclose(0.7 * metrics["softmax_loss"], loss["contrastive_loss"].item(), rtol=1e-5)
    np.testing.assert_allclose(2 * metrics["caption_loss"], loss["caption_loss"].item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], sum(loss.values()).item(), rtol=1e-5)


def test_every_gradient_against_torch(both):
    """Of the weighted sum of both losses, to 1e-5 of the largest entry of each tensor."""
    *_, ours, _, _, theirs = both
    want = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert ours.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(ours[name], want[name], rtol=0, atol=1e-5 * np.abs(want[name]).max(), err_msg=name)


def test_the_legacy_mask_matters(both):
    """With the mask by position the same weights give other embeddings: the comparison above can fail."""
    model, params, images, tokens, *_ = both
    by_position = replace(model, text=replace(model.text, legacy_mask=False))
    other, usual = (encode(m, params, images, tokens).text for m in (by_position, model))
    difference = np.linalg.norm(other - usual, axis=1)
    assert difference[:-1].min() > 1e-3


@pytest.mark.parametrize("model", CASES.values(), ids=CASES.keys())
def test_there_and_back(model):
    model = model if model.image.positions == "learned" else coca(dict(width=32, heads=2))
    params = parameters(model)
    leaves = dict(flatten(params))
    back = dict(flatten(to_ours(layout.table(model), to_theirs(layout.table(model), params), params)))
    assert back.keys() == leaves.keys()
    assert all(np.array_equal(back[path], leaves[path]) for path in leaves)


REFUSED = {
    "cascade": (coca(dict(pool="cascade")), "open_clip", "model.image.pool = 'cascade'"),
    "parallel pooler": (coca(dict(pool="parallel")), "open_clip", "model.image.pool = 'parallel'"),
    "map": (
        coca(vars(ImageTower.siglip("B/16")), dict(embed_dim=768)),
        "open_clip",
        "model.image.pool = 'map': a tower of timm's",
    ),
    "mask": (coca(text=dict(legacy_mask=False)), "open_clip", "model.text.legacy_mask = False: .*train with True"),
    "no class token": (coca(text=dict(pool="eot", legacy_mask=False)), "open_clip", "model.text.pool = 'eot': .*use cls"),
    "width": (coca(dict(embed_dim=48), dict(embed_dim=48)), "open_clip", "model.text.width = 32: .*that is 48"),
    "one MLP": (coca(head=dict(mlps=1)), "open_clip", "model.decoder.mlps = 1"),
    "MLP": (coca(head=dict(mlp_dim=100)), "open_clip", r"model.decoder.mlp_dim = 100: .* = 128"),
    "tied": (coca(head=dict(tied=True)), "open_clip", "model.decoder.tied = True"),
    "parallel": (coca(head=dict(parallel=0.5)), "open_clip", "model.decoder.parallel = 0.5"),
    "activation": (coca(text=dict(activation="gelu_tanh")), "open_clip", "model.text.activation = 'gelu_tanh'"),
    "eps": (coca(text=dict(norm_eps=1e-6)), "open_clip", "model.text.norm_eps = 1e-06"),
    "pooler's eps": (coca(dict(norm_eps=1e-6)), "open_clip", "model.image.norm_eps = 1e-06"),
    "patch bias": (coca(dict(patch_bias=True)), "open_clip", "model.image.patch_bias = True"),
    "transformers": (coca(), "transformers", "transformers has no CoCa; use --to open_clip"),
}


@pytest.mark.parametrize(("model", "to", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_what_open_clip_has_not(tmp_path, tokenizer, model, to, message):
    with pytest.raises(ConfigError, match=message):
        export(model, jax.eval_shape(lambda: init(model, 0)), tokenizer, "squash", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
