"""Several views of an image in a step: rows of the image tower, on any mesh and with any number of micro-batches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from clipjax import config, placement
from clipjax.models import clip
from clipjax.train.state import weight_specs
from clipjax.train.step import Trainable, _encode, example_keys
from tests.train import tiny

VIEWS = (config.View(), config.View(crop=0.5), config.View(crop=0.3))
DROPPED = dataclasses.replace(tiny.CLIP, image=dataclasses.replace(tiny.CLIP.image, image_size=32, patch_dropout=0.5))


def run_of(model, **data):
    return tiny.run(model, data=config.Data(spec="emoji", **data))


@functools.cache
def params_of(model):
    return clip.init(model, 0)


def rows_of(run):
    (rows,) = tiny.batches(run, 1)
    return rows | {"keys": example_keys(0, "patch_dropout", 0, rows["index"])}


def encoded(run, rows):
    """What the step makes of rows, on one device."""
    return jax.device_get(program(run)(Trainable(params_of(run.model), {}), rows))


@functools.cache
def program(run):
    mesh = tiny.mesh_of()
    towers = placement.towers(mesh, run.model.dtype, Trainable(weight_specs(run, mesh), jax.sharding.PartitionSpec()))
    return jax.jit(functools.partial(_encode, run, towers))


def test_views_are_rows_of_the_tower():
    """They drop patches by keys of their own, which are the example's, whatever is beside it."""
    run = run_of(DROPPED, views=VIEWS)
    rows = rows_of(run)
    assert rows["image"].shape == (16, 3, 32, 32, 3)
    rows["image"] = np.repeat(rows["image"][:, :1], 3, 1)
    got = encoded(run, rows)
    assert got.image.embedding.shape == (16, 3, 16)
    assert got.text.embedding.shape == (16, 16)
    for v in range(2):
        assert np.all(np.abs(got.image.embedding[:, v] - got.image.embedding[:, v + 1]).max(1) > 1e-3)
    rolled = encoded(run, jax.tree.map(lambda x: jax.numpy.roll(x, 5, 0), rows))
    np.testing.assert_allclose(rolled.image.embedding, np.roll(got.image.embedding, 5, 0), atol=1e-6)


def test_captions_are_predicted_from_the_first_view_and_changed_copies_are_not_predicted():
    several = dict(captions_per_image=2)
    run = run_of(tiny.COCA, views=VIEWS, text_augment=config.TextAugment(count=1), **several)
    rows = rows_of(run)
    assert rows["text"].shape == (16, 3, 8)
    got = encoded(run, rows)
    for v in range(3):
        plain = rows | {"image": rows["image"][:, v], "text": rows["text"][:, :2]}
        want = encoded(run_of(tiny.COCA, **several), plain)
        np.testing.assert_allclose(got.image.embedding[:, v], want.image.embedding, atol=1e-6)
        assert np.allclose(got.nll, want.nll, rtol=1e-5) == (v == 0)


@pytest.mark.parametrize("side", ["image", "text"])
def test_embeddings_stand_for_a_tower_without_views_or_copies(side):
    model = dataclasses.replace(tiny.CLIP, **{side: dataclasses.replace(getattr(tiny.CLIP, side), unlock=0)})
    fields = {
        "image": dict(views=VIEWS),
        "text": dict(text_augment=config.TextAugment(count=1)),
    }[side]
    name = {"image": r"data\.views = 3", "text": r"data\.text_augment\.count = 1"}[side]
    with pytest.raises(config.ConfigError, match=f"^{name}: data.embeddings "):
        run_of(model, embeddings="a.npz", **fields)
