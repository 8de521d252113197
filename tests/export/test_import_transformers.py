"""Folders of transformers' as runs: the embeddings of its own classes, and a line for what clipjax has not."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.numpy

import clipjax
from clipjax import cli
from clipjax.config import ConfigError, ImageTower, TextTower
from clipjax.data.images.image import fit
from clipjax.data.tokenizer import Tokenizer
from clipjax.export import transformers_read
from clipjax.export.found import Options
from clipjax.models.clip import bind
from tests.export.models import CAPTIONS, LENGTH
from tests.export.standins_transformers import VISION, WORDS, change, clip, embeddings, made, siglip, torch, transformers, written

QUICK = dict(hidden_act="quick_gelu")
TANH = dict(hidden_act="gelu_pytorch_tanh")


def found_equals(model, folder, words, images=(), options=Options(), **tower):
    """Our embeddings in float32 equal those of the loaded model to 1e-5, from pixels and ids."""
    found = transformers_read.read(folder, options)
    ours = replace(found.model, dtype="float32")
    side, mean, std = ours.image.image_size, np.float32(ours.image.mean), np.float32(ours.image.std)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (5, side, side, 3), np.uint8)
    ids = None if found.tokenizer is None else found.tokenizer.encode(CAPTIONS)[0]
    normalised = ((np.float32(raw) / 255 - mean) / std).transpose(0, 3, 1, 2).copy()
    wanted = embeddings(model, normalised if ours.towers != "text" else None, ids)
    assert wanted.keys() == ({"image", "text"} if ours.towers == "both" else {ours.towers})
    with jax.default_matmul_precision("highest"):
        bound = bind(ours, found.params)
        if "image" in wanted:
            assert np.linalg.norm(np.asarray(bound.encode_image(raw)) - wanted["image"], axis=1).max() < 1e-5
        if "text" in wanted:
            assert np.linalg.norm(np.asarray(bound.encode_text(ids)) - wanted["text"], axis=1).max() < 1e-5
    return found


def test_clip(tmp_path, tokenizer):
    model = clip(QUICK, QUICK)
    folder = written(tmp_path / "clip", model, tokenizer)
    found = found_equals(model, folder, tokenizer)
    assert found.model.image == ImageTower(
        **dict(image_size=32, patch_size=6, width=24, depth=3, heads=4, mlp_dim=40, embed_dim=28, activation="quick_gelu")
    )
    assert found.model.text.pool == "eot"
    assert (found.resize, found.notes, found.model.init_bias) == ("crop", [], None)
    assert found.params["log_scale"].shape == ()
