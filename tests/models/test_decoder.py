"""CoCa's poolers, class token and captioning head: what depends on what, and the published sizes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import ConfigError, Decoder, ImageTower, Model, TextTower
from clipjax.losses import clip_loss, token_nll
from clipjax.models.clip import bind, init
from clipjax.models.runner import Runner
from clipjax.models.text import lengths
from tests.models.test_towers import loud

SHAPE = dict(width=32, depth=2, heads=4, mlp_dim=64, embed_dim=24)
LENGTH, VOCAB = 9, 300


def model(pool="cascade", **changes):
    """Changes are the decoder's, and the text tower's where they have its fields."""
    text = {k: changes.pop(k) for k in ("length", "legacy_mask") if k in changes}
    return Model(
        image=ImageTower(image_size=16, patch_size=4, pool=pool, queries=5, pool_heads=4, **SHAPE),
        text=TextTower(**(dict(length=LENGTH, vocab_size=VOCAB, pool="cls", **SHAPE) | text)),
        decoder=Decoder(**(dict(depth=2, heads=4, mlp_dim=64) | changes)),
        dtype="float32",
    )


def inputs(n=4, length=LENGTH):
    """Captions of 3, 5, 7, 9 tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB - 2, (n, length), np.int32)
    for row, count in zip(tokens, range(3, 3 + 2 * n, 2), strict=True):
        row[0], row[count - 1], row[count:] = VOCAB - 2, VOCAB - 1, 0
    return rng.integers(0, 256, (n, 16, 16, 3), np.uint8), tokens


@functools.partial(jax.jit, static_argnums=0)
def pairs(cfg, params, images, tokens, parallel=None):
    """Embeddings of images and texts, and states: `CLIP.encode_pairs`."""
    image, text, states = bind(cfg, params).encode_pairs(images, tokens, None, parallel)
    return image.embedding, text.embedding, states


@pytest.fixture(scope="module")
def cascade():
    cfg = model()
    params = loud(init(cfg, 0))
    return cfg, params, *inputs()


def far(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def test_a_state_depends_on_no_later_token(cascade):
    cfg, params, images, tokens = cascade
    _, text, states = pairs(cfg, params, images, tokens)
    other = tokens.copy()
    other[3, 5] = 7  # of nine
    _, text_after, after = pairs(cfg, params, images, other)
    assert far(states[3, :5], after[3, :5]) == 0
    assert far(states[3, 5:], after[3, 5:]) > 1e-3
    assert far(text[3], text_after[3]) > 1e-3  # the class token attends to it
    assert far(states[:3], after[:3]) == 0


@pytest.mark.parametrize("pool", ["cls", "eot"])
def test_padding_changes_nothing_whatever_its_id(cascade, pool):
    """By position: an id of padding may be a word's too, as 0 is in CLIP's vocabulary."""
    cfg, params, images, tokens = cascade
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, pool=pool))
    params = params if pool == "cls" else loud(init(cfg, 0))
    _, text, states = pairs(cfg, params, images, tokens)
    padding = np.arange(LENGTH) >= np.asarray(lengths(tokens))[:, None]
    assert padding.sum() == 6 + 4 + 2
    _, other, after = pairs(cfg, params, images, np.where(padding, 11, tokens))
    assert far(text, other) == 0
    assert far(np.where(padding[:, 1:, None], 0, states), np.where(padding[:, 1:, None], 0, after)) == 0


def test_the_class_token_attends_to_every_real_token_and_no_token_to_it(cascade):
    cfg, params, images, tokens = cascade
    _, text, states = pairs(cfg, params, images, tokens)
    for position in range(4):  # the fifth is the end
        other = tokens.copy()
        other[1, position] = 5
        assert far(pairs(cfg, params, images, other)[1][1], text[1]) > 1e-4, position
    moved = params | {"text": params["text"] | {"class_token": params["text"]["class_token"][::-1]}}
    _, text_after, after = pairs(cfg, moved, images, tokens)
    assert far(after, states) == 0
    assert far(text_after, text) > 1e-3


def test_with_the_legacy_mask_the_class_token_attends_to_the_first_padding_and_not_itself():
    """open_clip's: one position late, and it finds padding by its id, 0."""
    cfg = model(legacy_mask=True)
    _, tokens = inputs()
    mask = bind(cfg, init(cfg, 0)).text.mask(tokens)[:, -1]
    for row, count in zip(mask, (3, 5, 7, 9), strict=True):
        assert row.tolist() == [j <= count for j in range(LENGTH + 1)]
    right = bind(model(), init(model(), 0)).text.mask(tokens)[:, -1]
    for row, count in zip(right, (3, 5, 7, 9), strict=True):
        assert row.tolist() == [j < count or j == LENGTH for j in range(LENGTH + 1)]


def test_the_order_of_tokens_does_not_matter_to_poolers(cascade):
    """Nor does the order of an image's tokens to the captioning head."""
    cfg, params, images, tokens = cascade
    m, order = bind(cfg, params), np.random.default_rng(0).permutation(16)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 32)), jnp.float32)
    np.testing.assert_allclose(m.image.pooler(x), m.image.pooler(x[:, order]), atol=1e-5)
    _, context, _ = m.image(images, None, Runner(), tokens=True)
    _, states, _ = m.text(tokens, Runner(), states=True)
    assert context.shape == (4, 5, 24)
    got, want = (m.decoder(states, tokens, Runner()) for tokens in (context[:, ::-1], context))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    "pool", [pytest.param(p, marks=pytest.mark.slow) for p in ("cls", "mean", "map", "parallel")] + ["cascade", "single"]
)
def test_a_head_on_every_pooling(pool):
    cfg = model(pool)
    images, tokens = inputs()
    params = loud(init(cfg, 0))
    image, text, states = pairs(cfg, params, images, tokens)
    m = bind(cfg, params)
    assert m.image(images, None, Runner(), tokens=True)[1].shape == (4, *cfg.image.context)
    assert states.shape == (4, LENGTH - 1, 32)
    np.testing.assert_allclose(image, m.encode_image(images), atol=1e-6)
    np.testing.assert_allclose(text, m.encode_text(tokens), atol=1e-6)
    assert far(states, pairs(cfg, params, images[::-1], tokens)[2]) > 1e-3  # it depends on the image


@pytest.mark.slow
def test_contrast_has_no_gradient_to_the_head(cascade):
    cfg, params, images, tokens = cascade

    def losses(params):
        m = bind(cfg, params)
        image, text, states = m.encode_pairs(images, tokens)
        nll = token_nll(states.reshape(-1, 32), m.words, tokens[:, 1:].reshape(-1))
        return clip_loss(image.embedding, text.embedding, jnp.float32(10.0)), nll.mean()

    contrast, caption = jax.jit(jax.jacrev(losses))(params)
    assert all(not np.any(g) for g in jax.tree.leaves(contrast["decoder"]))
    assert all(np.any(g) for g in jax.tree.leaves(caption["decoder"]))
    assert not np.any(caption["text"]["projection"]["kernel"])
    assert not np.any(caption["image"]["contrastive"]["queries"])  # on top of the tokens that the head attends to
    assert np.any(caption["image"]["pooler"]["queries"])


def test_twice_the_length_in_padding_changes_no_token(cascade):
    cfg, params, images, tokens = cascade
    longer = model(length=2 * LENGTH)
    positions = params["text"]["positions"]
    room = jnp.concatenate([positions[:-1], jnp.ones((LENGTH, 32)), positions[-1:]])
    stretched = params | {"text": params["text"] | {"positions": room}}
    _, text, states = pairs(cfg, params, images, tokens)
    _, text_after, after = pairs(longer, stretched, images, np.pad(tokens, ((0, 0), (0, LENGTH))))
    np.testing.assert_allclose(after[:, : LENGTH - 1], states, atol=1e-5)
    np.testing.assert_allclose(text_after, text, atol=1e-6)


def test_in_parallel_captions_are_predicted_from_the_image_alone():
    cfg = model(parallel=0.5)
    params = loud(init(cfg, 0))
    images, tokens = inputs()
    chosen = jnp.array([True, False, True, False])
    _, _, states = pairs(cfg, params, images, tokens, chosen)
    _, _, other = pairs(cfg, params, images, np.roll(tokens, 1, axis=0), chosen)
    _, _, elsewhere = pairs(cfg, params, images[::-1], tokens, chosen)
    assert far(states[::2], other[::2]) == 0
    assert far(states[::2], elsewhere[::2]) > 1e-3
    assert far(states[1::2], other[1::2]) > 1e-3
    _, _, none = pairs(cfg, params, images, tokens)
    np.testing.assert_allclose(states[1::2], none[1::2], atol=1e-5)
    masks = params["decoder"]["masks"]
    moved = params | {"decoder": params["decoder"] | {"masks": masks.at[-1].set(masks[-1, ::-1])}}
    assert (
        far(pairs(cfg, moved, images, tokens, chosen)[2][0, 0], states[0, 0]) > 1e-4
    )  # they attend to each other, in both directions


def test_several_captions_of_an_image(cascade):
    cfg, params, images, tokens = cascade
    _, text, states = pairs(cfg, params, images[:2], tokens)  # two each
    _, want_text, want = pairs(cfg, params, np.repeat(images[:2], 2, axis=0), tokens)
    np.testing.assert_allclose(text, want_text, atol=1e-6)
    np.testing.assert_allclose(states, want, atol=1e-5)


def test_a_tied_head_predicts_with_the_table_of_tokens():
    cfg = model(tied=True)
    params = init(cfg, 0)
    assert "output" not in params["decoder"]
    assert bind(cfg, params).words is params["text"]["tokens"]
    own = init(model(), 0)
    assert own["decoder"]["output"]["kernel"].shape == (VOCAB, 32)


def test_parameters_do_not_depend_on_there_being_a_head():
    with_head = init(model(), 0)
    without = init(dataclasses.replace(model(), decoder=None), 0)
    for path, x in jax.tree.leaves_with_path(without):
        other = with_head
        for key in path:
            other = other[key.key]
        assert (x == other).all(), path


def count(cfg):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(lambda: init(cfg, 0)))) / 1e6


@pytest.mark.parametrize(("name", "patch", "millions"), [("B", 18, 383), ("L", 18, 787)])
def test_published_sizes(name, patch, millions):
    """2205.01917, table 1. It leaves out the poolers: 4 to 6 e^2 each on top."""
    cfg = Model(image=ImageTower.coca(f"{name}/{patch}"), text=TextTower.coca(name), decoder=Decoder.coca(name))
    assert count(cfg) == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("size", "patch", "image", "width", "millions"), [("B", 32, 768, 512, 253.56), ("L", 14, 1024, 768, 638)]
)
def test_open_clips_sizes(size, patch, image, width, millions):
    """model_profile.csv of open_clip."""
    tower = ImageTower.clip(f"{size}/{patch}", pool="single", width=image, embed_dim=width)
    text = TextTower.clip(size, length=76, pool="cls", legacy_mask=True)
    head = Decoder(depth=12, heads=width // 64, mlp_dim=4 * width, mlps=2)
    assert count(Model(image=tower, text=text, decoder=head)) == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: model(heads=5), "model.decoder.heads"),
        (lambda: model(parallel=1.5), "model.decoder.parallel"),
        (lambda: dataclasses.replace(model(), text=dataclasses.replace(model().text, causal=False)), "model.text.causal"),
        (lambda: dataclasses.replace(model().image, pool_heads=5), "model.image.pool_heads"),
        (lambda: dataclasses.replace(model().image, queries=1, pool="single"), "model.image.queries"),
        (lambda: dataclasses.replace(model().image, embed_dim=None), "model.image.embed_dim"),
        (lambda: dataclasses.replace(model().text, pool="eot", legacy_mask=True), "model.text.legacy_mask"),
    ],
)
def test_impossible_heads_are_refused_by_name(make, field):
    with pytest.raises(ConfigError, match=f"^{field} = "):
        make()
