"""Reads a folder that `export` or open_clip itself wrote: the configuration as ours, the weights and the tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clipjax.config import ConfigError, Model, require
from clipjax.export.formats import open_clip_words, weights
from clipjax.export.formats.hub import folder_of
from clipjax.export.formats.open_clip import WEIGHTS, custom, refuse, table
from clipjax.export.formats.open_clip_config import model_of, preprocessing, resize_of
from clipjax.export.formats.table import Tensors, to_ours
from clipjax.export.found import Found, Options, check_tokenizer
from clipjax.models.clip import init
from clipjax.models.positions import resized_image, resized_text

CONFIG = "open_clip_config.json"
# In the order of open_clip's `_find_checkpoint_in_dir`: a folder may also hold the weights of transformers, under its own names.
NAMES = (
    *(WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
FILES = ("*.json", "*.txt", "*.model")  # of the hub's, beside weights
OTHERS = (".safetensors", *weights.PICKLED)
# Entries of a state_dict that are no weights: buffers, and sizes that OpenAI's files have.
NO_WEIGHTS = {"attn_mask", "position_ids", "input_resolution", "context_length", "vocab_size"}
TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection", "cls_emb")  # of a text tower


def read(source: Path, options: Options) -> Found:
    """`source`: a folder with open_clip_config.json and weights, a file of weights in such a folder or one below it, or a model
    of the hub.

    Raises ConfigError, with field, value and remedy, for a missing or broken file and for a model that clipjax has not."""
    folder, file = places(source)
    given, preprocess = _configuration(folder / CONFIG)
    pixels = preprocessing(preprocess)
    model = model_of(given, tuple(pixels["mean"]), tuple(pixels["std"]))
    refuse(model)
    notes = []
    if options.image_size is not None:
        model = replace(model, image=replace(model.image, image_size=options.image_size))
    elif pixels["size"] not in (None, model.image.image_size, [model.image.image_size] * 2):
        notes.append(
            f"preprocess_cfg.size = {pixels['size']}: open_clip takes the tower's {model.image.image_size}, and so does clipjax"
        )
    if pixels["interpolation"] == "bilinear":  # CLIPA's
        notes.append("preprocess_cfg.interpolation = 'bilinear': clipjax resizes bicubic, so embeddings of files differ a little")
    words = open_clip_words.read(folder, given["text_cfg"], model.text, options.tokenizer)
    check_tokenizer(words, model, source)
    tensors = weights.read(file)
    weights.require_names(tensors, "open_clip", file)
    tensors = _named(tensors, model, notes)
    _fit_positions(tensors, model, notes)
    params = to_ours(table(model), tensors, jax.eval_shape(lambda: init(model, 0)))
    return Found(model, params, words, resize_of(pixels), notes)


def places(source: Path) -> tuple[Path, Path]:
    """The folder of the configuration, and the file of the weights."""
    if source.is_file():
        require(source.suffix in OTHERS, "SRC", str(source), f"is no file of weights: name a folder with {CONFIG}")
        folder = next((folder for folder in source.resolve().parents[:2] if (folder / CONFIG).is_file()), None)
        remedy = (
            f"has no {CONFIG} beside it, which open_clip writes with `push_to_hf_hub`: what the model is, its tensors do not say"
        )
        require(folder is not None, "SRC", str(source), remedy)
        assert folder is not None
        return folder, source
    source = folder_of(source, FILES, NAMES)
    require((source / CONFIG).is_file(), "SRC", str(source), f"has no {CONFIG}, which open_clip writes beside weights")
    file = weights.find(source, NAMES)
    if file is None:
        others = sorted(path for path in source.iterdir() if path.suffix in OTHERS)
        require(len(others) > 0, "SRC", str(source), f"has no weights as {', '.join(NAMES)}")
        remedy = f"has several files of weights: name one of {', '.join(path.name for path in others)}"
        require(len(others) == 1, "SRC", str(source), remedy)
        file = others[0]
    return source, file


def _configuration(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg`."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return dict(config["model_cfg"]), dict(config.get("preprocess_cfg") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: is not a configuration of open_clip: {type(error).__name__}: {error}") from error


def _named(tensors: Mapping[str, np.ndarray], model: Model, notes: list[str]) -> Tensors:
    """The tensors under the names of the table, without what is no weight; scale and bias as scalars.

    A text tower's names begin with `text.` in a CustomTextCLIP, even if it is CLIP's, and in a CLIP they do not. Adds a note for
    a bias that is missing."""
    named = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("_orig_mod.").removeprefix("text.")  # of torch.compile
        if name.rpartition(".")[2] in NO_WEIGHTS:
            continue
        prefix = "text." if custom(model) and name.startswith(TEXT) else ""
        named[prefix + name] = tensor.reshape(()) if name in ("logit_scale", "logit_bias") and tensor.size == 1 else tensor
    if model.init_bias is not None and "logit_bias" not in named:
        notes.append("logit_bias is missing from the weights: it is 0, as in open_clip")
        named["logit_bias"] = np.zeros((), np.float32)
    return named


def _fit_positions(tensors: Tensors, model: Model, notes: list[str]) -> None:
    """Resizes the position embeddings to the sizes of the model, with a note for each."""
    image, text = model.image, model.text
    trunk = image.pool == "map"
    name = "visual.trunk.pos_embed" if trunk else "visual.positional_embedding"
    if name in tensors and tensors[name].shape[-2] != image.patches + image.class_token:
        old = tensors[name][0] if trunk else tensors[name]
        new = resized_image(old, image.class_token, image.side)
        notes.append(f"image positions: {len(old)} -> {len(new)}, resized for {image.image_size} px (bicubic, antialias)")
        tensors[name] = new[None] if trunk else new
    name = "text.positional_embedding" if custom(model) else "positional_embedding"
    if name in tensors and len(tensors[name]) != text.positions:
        old = tensors[name]
        new = tensors[name] = resized_text(old, text.length, text.pool == "cls")
        how = "interpolated" if len(new) > len(old) else "the first ones"
        notes.append(f"text positions: {len(old)} -> {len(new)}, {how}")
