"""Small models with random weights, their inputs, and the comparison with an exported folder."""

import jax
import numpy as np

from clipjax.config import Decoder, ImageTower, Model, TextTower
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare.verify import verify
from clipjax.export.formats.table import flatten, unflatten
from clipjax.models.clip import init

WORDS = "woman man astronaut firefighter light dark medium skin tone waving hand red heart family: flag"
CAPTIONS = [
    "woman astronaut: dark skin tone",
    "A  Man waving\this hand",
    "flag",
    "family: man, woman, and a heart that is red, with a firefighter behind and more words than fit into the row",
    "œuvre d’été 🎈",
]
LENGTH = 16
TEXT = dict(width=32, depth=2, heads=2, mlp_dim=100, length=LENGTH, vocab_size=400)
IMAGE = dict(image_size=32, patch_size=8, width=48, depth=2, heads=3, mlp_dim=144)


def clip(image=None, text=None, **model) -> Model:
    words = TextTower(**TEXT | dict(embed_dim=24) | (text or {}))
    return Model(image=ImageTower(**IMAGE | dict(embed_dim=24) | (image or {})), text=words, **model)


def siglip(image=None, text=None, **model) -> Model:
    words = TextTower.siglip("B", **TEXT | dict(embed_dim=48) | (text or {}))
    return Model(image=ImageTower.siglip("B/16", **IMAGE | (image or {})), text=words, **dict(init_bias=-10.0) | model)


def coca(image=None, text=None, head=None, **model) -> Model:
    """In the only form that open_clip has."""
    tower, words = IMAGE | dict(embed_dim=32, pool="single", queries=7, pool_heads=2), TEXT | dict(embed_dim=32, pool="cls")
    return Model(
        image=ImageTower(**tower | (image or {})),
        text=TextTower(**words | dict(legacy_mask=True) | (text or {})),
        decoder=Decoder(**dict(depth=2, heads=4, mlp_dim=128, mlps=2) | (head or {})),
        **model,
    )


def parameters(model: Model) -> dict:
    """Random: as after training, no bias is zero and no scale is one."""
    rng = np.random.default_rng(0)
    centre = {"scale": 1.0, "log_scale": 2.0}

    def draw(path, leaf):
        std = model.image.width**-0.5 if "kernel" in path else 0.1
        return centre.get(path.split("/")[-1], 0.0) + std * rng.standard_normal(leaf.shape, np.float32)

    return unflatten({path: draw(path, leaf) for path, leaf in flatten(jax.eval_shape(lambda: init(model, 0)))})


def check(folder, to, model, params, tokenizer, images, resize="squash"):
    _, truncated = Tokenizer.load(tokenizer, LENGTH).encode(CAPTIONS)
    assert truncated.tolist() == [False, False, False, True, False]
    return verify(folder, to, model, params, tokenizer, resize, images, CAPTIONS)
