"""Reads a folder of transformers', or a model of the hub: CLIP, SigLIP and SigLIP 2 of a fixed resolution, whole or a tower."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from tokenizers import models

from clipjax.config import Clean, Model, require
from clipjax.data.images.resize import Resize
from clipjax.data.tokenizer import Tokenizer, files_beside
from clipjax.export.formats import transformers, vocabulary, weights
from clipjax.export.formats.hub import folder_of
from clipjax.export.formats.table import Tensors, to_ours
from clipjax.export.formats.transformers_config import CONFIG, Config, Towers, make_model, read_config, read_pixels
from clipjax.export.found import Found, Options, check_tokenizer
from clipjax.models.clip import init
from clipjax.models.positions import resized_image

WEIGHTS = (transformers.WEIGHTS, "pytorch_model.bin")
FILES, PATTERNS = ("*.json", "*.txt", "*.model"), ("model*.safetensors", "pytorch_model*.bin")  # of the hub's
# A tower's tensors, and the one that a tower alone begins with where its names have no prefix.
PREFIXES: dict[Towers, tuple[str, ...]] = {
    "image": ("vision_model.", "visual_projection."),
    "text": ("text_model.", "text_projection."),
}
FIRST: dict[Towers, str] = {"image": "embeddings.patch_embedding.weight", "text": "embeddings.token_embedding.weight"}
POSITIONS = "vision_model.embeddings.position_embedding.weight"


def read(source: Path, options: Options) -> Found:
    """`source`: a folder, or a model of the hub as `openai/clip-vit-base-patch32`.

    Raises ConfigError, with field, value and remedy, for a missing or broken file and for a model that clipjax has not.
    """
    folder = folder_of(source, FILES, PATTERNS)
    config = _config(source, folder)
    file = weights.find(folder, WEIGHTS)
    require(file is not None, "SRC", str(source), f"has no weights as {' or '.join(WEIGHTS)}")
    assert file is not None
    tensors = _named(weights.read(file), config)
    weights.require_names(tensors, "transformers", file)
    towers = _towers(config, tensors, file)
    projected = _projected(config, towers, tensors)
    tensors, notes = _of_towers(tensors, towers, projected)
    model = make_model(config, towers, projected)
    resize: Resize = "squash"
    if towers != "text":
        pixels, unsaid = read_pixels(folder, config.family, model.image.image_size)
        resize, model = pixels.resize, replace(model, image=replace(model.image, mean=pixels.mean, std=pixels.std))
        model, tensors, resized = _at_size(model, tensors, options.image_size)
        notes += unsaid + resized
    table, shapes = transformers.table(model), jax.eval_shape(lambda: init(model, 0))
    words = None if towers == "image" else _tokenizer(source, folder, config, model, options)
    padding = "" if words is None else str(words.backend.id_to_token(words.pad_id))
    if len(padding) == 1:  # as in Stable Diffusion's folders
        notes.append(f"{padding!r} as the padding token in the midst of a text: there it is text, as for CLIP's own tokenizer")
    return Found(model, to_ours(table, tensors, shapes), words, resize, notes)


def _config(source: Path, folder: Path) -> Config:
    file, remedy = folder / CONFIG, f"has no {CONFIG}, which transformers writes beside weights"
    if (folder / "open_clip_config.json").is_file():
        remedy += "; it is a folder of open_clip's: use --from open_clip"
    require(file.is_file(), "SRC", str(source), remedy)
    return read_config(file)


def _named(tensors: Tensors, config: Config) -> Tensors:
    """Without buffers, with the names that a whole model has, and scalars in the shape that the family gives them.

    A tower alone has them without prefix since transformers 5, but for a class with a projection.
    """
    towers, shape = config.towers, (1,) if config.family == "siglip" else ()
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    if towers != "both" and FIRST[towers] in kept:
        known = tuple(prefix for prefixes in PREFIXES.values() for prefix in prefixes)
        kept = {name if name.startswith(known) else PREFIXES[towers][0] + name: tensor for name, tensor in kept.items()}
    scalars = [name for name in ("logit_scale", "logit_bias") if name in kept and kept[name].size == 1]
    return kept | {name: np.reshape(kept[name], shape) for name in scalars}


def _towers(config: Config, tensors: Tensors, file: Path) -> Towers:
    """The towers that the weights have, of those in config.json. Raises ConfigError for weights without."""
    wanted: list[Towers] = ["image", "text"] if config.towers == "both" else [config.towers]
    found: list[Towers] = [tower for tower in wanted if any(name.startswith(PREFIXES[tower][0]) for name in tensors)]
    remedy = f"has no tensors of the {' or '.join(wanted)} tower that {CONFIG} is of ({config.kind})"
    require(bool(found), "SRC", str(file), remedy)
    return "both" if len(found) == 2 else found[0]


def _projected(config: Config, towers: Towers, tensors: Tensors) -> bool:
    """Whether a tower of CLIP's projects: one alone does if its class does, or, where that is not said, if it has the tensor."""
    if towers == "both":
        return True
    if config.towers != "both" and config.architecture.endswith(("VisionModel", "TextModel")):
        return False
    return any(name.startswith(PREFIXES[towers][1]) for name in tensors)


def _of_towers(tensors: Tensors, towers: Towers, projected: bool) -> tuple[Tensors, list[str]]:
    """The tensors of these towers, and notes on what is left."""
    if towers == "both":
        return tensors, []
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIXES[towers][: 1 + projected])}
    left = len(tensors) - len(kept)
    return kept, [f"the weights have {left} more tensors than the {towers} tower, which is all that is read"] if left else []


def _at_size(model: Model, tensors: Tensors, size: int | None) -> tuple[Model, Tensors, list[str]]:
    """For images of another size: with resized positions, and a note. `size`, None: as it is."""
    image = model.image
    if size is None or size == image.image_size:
        return model, tensors, []
    new = replace(image, image_size=size)
    before = tensors.get(POSITIONS)
    if before is None:  # the table says that it is missing
        return model, tensors, []
    after = resized_image(np.asarray(before, np.float32), image.class_token, new.side)
    note = f"the positions of {image.image_size} pixels: they are resized to {size}, {len(before)} -> {len(after)}"
    return replace(model, image=new), tensors | {POSITIONS: after}, [note]


def _tokenizer(source: Path, folder: Path, config: Config, model: Model, options: Options) -> Tokenizer:
    """The tokenizer that the user names, else that of the folder, with the cleaning of transformers' class for it."""
    place, length = folder if options.tokenizer is None else options.tokenizer.parent, model.text.length
    clean, file = vocabulary.cleaning(place), options.tokenizer
    if file is None and clean == "siglip":  # whose class reads SentencePiece's model alone
        file = next((folder / name for name in vocabulary.MODELS if (folder / name).is_file()), None)
    words = vocabulary.from_folder(folder, length, clean) if file is None else vocabulary.from_file(file, length, clean)
    if config.family == "siglip" and clean == "none" and "tokenizer_class" not in files_beside(place):
        words = words.cleaning(_usual(words))
    check_tokenizer(words, model, source)
    return words


def _usual(words: Tokenizer) -> Clean:
    """The cleaning of SigLIP's tokenizers, where no file says it: the first has unigrams, SigLIP 2's bytes for rare letters."""
    model = words.backend.model
    if isinstance(model, models.Unigram):
        return "siglip"
    return "lower" if isinstance(model, models.BPE) and model.byte_fallback else "none"
