"""Reads an .npz of big_vision's: SigLIP, SigLIP 2, LiT with a plain text transformer, and a vision transformer alone.

The file holds arrays and no configuration. Most of the model stands in their shapes; the rest is what big_vision has for all its
models: LayerNorms with epsilon 1e-6 and GELU by tanh (flax's defaults), pixels in [-1, 1], squashed images, and texts that are
pooled at the last token.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers.models import Unigram

from clipjax.config import Clean, ImageTower, Model, TextTower, require
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.formats.big_vision import table
from clipjax.export.formats.big_vision_file import PATCH, POSITIONS, load
from clipjax.export.formats.table import to_ours
from clipjax.export.formats.vocabulary import from_file
from clipjax.export.found import Found, Options, check_tokenizer
from clipjax.models.clip import init
from clipjax.models.positions import resized_image

EPS = 1e-6
HALF = (0.5, 0.5, 0.5)
# Image sizes of published models that are no multiple of the patch, by patches a side and pixels a patch.
PUBLISHED = {(27, 14): 384}  # So400m/14
TOKENIZERS = {
    16_000: "that beside the .npz on vit_models/lit, as LiT-L16S.model",
    32_000: "c4_en, or that of google/siglip-base-patch16-224 on the Hugging Face hub",
    250_000: "mc4, or that of google/siglip-base-patch16-256-multilingual on the Hugging Face hub",
    256_000: "Gemma's, or that of google/siglip2-base-patch16-224 on the Hugging Face hub",
}


# What is done to a text, by whether the tokenizer is SentencePiece's unigram model, and whether the model has a bias. SigLIP:
# big_vision cleans its prompts so (evaluators/proj/image_text/prompt_engineering.py), and open_clip and transformers every text.
# SigLIP 2, with Gemma's tokenizer: lower case alone (configs/proj/image_text/SigLIP2_demo.ipynb). LiT: as it is.
CLEAN: dict[tuple[bool, bool], Clean] = {
    (True, True): "canonicalize",
    (True, False): "none",
    (False, True): "lower",
    (False, False): "lower",
}


def read(source: Path, options: Options) -> Found:
    """Raises ConfigError, with field, value and remedy, for a file that is no such model and for a model that clipjax has not."""
    arrays, notes = load(source), list[str]()
    model = model_of({name: array.shape for name, array in arrays.items()}, options.image_size, notes)
    if model.image.positions == "learned":
        arrays[POSITIONS] = _positions(arrays[POSITIONS][0], model.image, notes)[None]
    params = to_ours(table(model), arrays, jax.eval_shape(lambda: init(model, 0)))
    words = _tokenizer(options.tokenizer, model, source, notes) if model.towers == "both" else None
    if words is None:
        notes.append("a classifier (head), where the image tower has one: the embedding is what comes before it")
    notes.append("big_vision resizes images bilinearly, without antialias; clipjax bicubically, as open_clip and transformers do")
    return Found(model, params, words, "squash", notes)


def model_of(shapes: Mapping[str, tuple[int, ...]], image_size: int | None, notes: list[str]) -> Model:
    """Our model for big_vision's arrays, named as `big_vision_file.load` does. Adds to `notes` what the shapes leave open.

    Raises ConfigError for shapes from which the model does not follow.
    """
    image = _image(shapes, image_size, notes)
    if not any(name.startswith("txt/") for name in shapes):
        return Model(towers="image", image=image)
    siglip: dict[str, Any] = dict(init_scale=10.0, init_bias=-10.0) if "b" in shapes else {}
    return Model(image=image, text=_text(shapes), **siglip)


def _image(shapes: Mapping[str, tuple[int, ...]], image_size: int | None, notes: list[str]) -> ImageTower:
    vectors = len(shapes.get(PATCH, ())) == 2
    require(not vectors, PATCH, shapes.get(PATCH), "is NaFlex's, for images of any shape: take a model of one resolution")
    patch, other, colours, width = _shape(shapes, PATCH, 4)
    square = patch == other and colours == 3
    require(square, PATCH, shapes[PATCH], "clipjax has square patches of three colours")
    pool = "map" if "img/MAPHead_0/probe" in shapes else "cls" if "img/cls" in shapes else "mean"
    if pool == "mean":
        notes.append("pooling: an .npz does not say it. Without class token and attention head it is taken for the mean ('gap')")
    encoder = _encoder(shapes, "img/Transformer")
    if pool == "map":
        heads = _shape(shapes, "img/MAPHead_0/MultiHeadDotProductAttention_0/query/kernel", 3)[1]
        require(heads == encoder["heads"], "heads of img/MAPHead_0", heads, f"must be the tower's {encoder['heads']}")
    learned = POSITIONS in shapes
    require(learned or image_size is not None, "--image-size", image_size, "give it: fixed positions (sincos2d) do not say it")
    side = image_size or _image_size(_side(_shape(shapes, POSITIONS, 3)[1], pool == "cls"), patch, notes)
    require(side >= patch, "--image-size", side, f"must be at least a patch of {patch} pixels")
    return ImageTower(
        **dict(image_size=side, patch_size=patch, width=width, pool=pool, pre_norm=False, patch_bias=True),
        **dict(positions="learned" if learned else "sincos2d", embed_dim=_head(shapes, "img"), activation="gelu_tanh"),
        **dict(projection_bias="img/head/bias" in shapes, norm_eps=EPS, mean=HALF, std=HALF),
        **encoder,
    )


def _text(shapes: Mapping[str, tuple[int, ...]]) -> TextTower:
    vocab_size, width = _shape(shapes, "txt/Embed_0/embedding", 2)
    length, embed_dim = _shape(shapes, "txt/pos_embedding", 3)[1], _head(shapes, "txt")
    return TextTower(
        **dict(length=length, vocab_size=vocab_size, width=width, embed_dim=embed_dim, causal=False, pool="last"),
        **dict(projection_bias="txt/head/bias" in shapes, activation="gelu_tanh", norm_eps=EPS),
        **_encoder(shapes, "txt/Encoder_0"),
    )


def _encoder(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    """Depth, heads and MLP width of a tower."""
    depth, _, heads, _ = _shape(shapes, f"{prefix}/encoderblock/MultiHeadDotProductAttention_0/query/kernel", 4)
    return dict(depth=depth, heads=heads, mlp_dim=_shape(shapes, f"{prefix}/encoderblock/MlpBlock_0/Dense_0/kernel", 3)[2])


def _head(shapes: Mapping[str, tuple[int, ...]], tower: str) -> int | None:
    """The width of a tower's embedding; None: it has no projection."""
    return _shape(shapes, f"{tower}/head/kernel", 2)[1] if f"{tower}/head/kernel" in shapes else None


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, axes: int) -> tuple[int, ...]:
    require(name in shapes, "SRC", name, "is missing: this is not a whole two-tower model of big_vision's")
    require(len(shapes[name]) == axes, name, shapes[name], f"must have {axes} axes: this is not a model of big_vision's")
    return shapes[name]


def _side(rows: int, class_token: bool) -> int:
    """Patches a side. Before 2022 the class token had a position too."""
    side = math.isqrt(rows)
    fits = side**2 == rows or (class_token and side**2 + 1 == rows)
    require(fits, POSITIONS, rows, "must be a square of positions: clipjax has square images only")
    return side


def _image_size(side: int, patch: int, notes: list[str]) -> int:
    """Pixels a side for this many patches: a multiple of the patch, but for published models."""
    size = PUBLISHED.get((side, patch), side * patch)
    if size != side * patch:
        smallest, largest = side * patch, (side + 1) * patch - 1
        notes.append(f"image size: {size}, as published; {side} x {side} patches also fit {smallest} to {largest} (--image-size)")
    return size


def _positions(theirs: np.ndarray, tower: ImageTower, notes: list[str]) -> np.ndarray:
    """Ours [n, d], the class token's row first, for theirs, which may have no such row."""
    side, wanted = _side(len(theirs), tower.class_token), tower.image_size // tower.patch_size
    if tower.class_token and len(theirs) == side**2:
        theirs = np.concatenate([np.zeros_like(theirs[:1]), theirs])
    if side == wanted:
        return theirs
    notes.append(f"position embeddings: resized from {side} x {side} patches to {wanted} x {wanted}")
    return resized_image(theirs, tower.class_token, wanted)


def _tokenizer(file: Path | None, model: Model, source: Path, notes: list[str]) -> Tokenizer:
    """big_vision's texts have no start token and padding on the right, which with SentencePiece's unigrams is the end token."""
    size, length = model.text.vocab_size, model.text.length
    remedy = f"name the tokenizer of its {size:,} tokens, a SentencePiece model or a tokenizer.json: an .npz does not hold it"
    require(file is not None, "--tokenizer", None, f"{remedy}. It is {TOKENIZERS[size]}" if size in TOKENIZERS else remedy)
    assert file is not None
    words = from_file(file, length)
    unigram = isinstance(words.backend.model, Unigram)
    how = CLEAN[unigram, model.init_bias is not None]
    words = from_file(file, length, how, words.end_id if unigram else None).padded("right")  # whatever transformers' files say
    check_tokenizer(words, model, source)
    remedy = "puts a start token before a text, which big_vision's models do not have: give one without"
    require(words.start_id is None, "--tokenizer", str(file), remedy)
    if words.vocab_size != size:
        notes.append(
            f"the tokenizer has {words.vocab_size:,} tokens, the text tower {size:,}: make sure that it is the model's own"
        )
    if how == "canonicalize":
        notes.append(
            "big_vision removes punctuation from prompts and class names only; tokenizer.clean = canonicalize does so always"
        )
    return words
