"""Compares an imported run with its source, loaded in PyTorch by the library that it came from."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clipjax.config import Run, require
from clipjax.data.clean import clean
from clipjax.data.images.image import fit
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare import reference
from clipjax.export.compare.big_vision_reference import load_big_vision
from clipjax.export.compare.reference import Reference
from clipjax.export.compare.report import LIMIT, Report
from clipjax.export.compare.verify import compare, normalised
from clipjax.export.formats import open_clip_read, weights
from clipjax.export.found import Options
from clipjax.models.clip import Params, bind

TEXTS = ("a photo of a cat", "Two dogs!", "une tasse de café à Zürich, 3 euros", "猫")
SHAPES = ((136, 128), (50, 90), (21, 30), (300, 200))  # width and height


def require_comparable(origin: str, options: Options) -> None:
    """Raises ConfigError if what loads the source in PyTorch is missing, or can't load it at `options.image_size`."""
    reference.require_packages("transformers" if origin == "transformers" else "open_clip")
    remedy = "transformers has the source's own size only: leave it out to verify"
    require(options.image_size is None or origin != "transformers", "--image-size", options.image_size, remedy)


@dataclass(frozen=True)
class TowerReport:
    """The largest difference between our unit vectors of a tower alone and PyTorch's, from the same pixels or token ids."""

    examples: int
    tower: str
    largest: float

    @property
    def figures(self) -> list[str]:
        return [f"same pixels or ids: {self.tower} {self.largest:.1e}"]

    @property
    def notes(self) -> list[str]:
        return ["image files and strings: of a tower alone the embeddings are compared, not what comes before"]

    @property
    def failures(self) -> list[str]:
        return [] if self.largest <= LIMIT else [f"{self.tower} differs by {self.largest:.1e}, more than {LIMIT:.0e}"]


Comparison = Report | TowerReport


def verify_import(
    source: Path, origin: str, options: Options, run: Run, params: Params, words: Tokenizer | None
) -> tuple[Comparison, list[str]]:
    """The differences, and what is not compared. Raises ConfigError as `require_comparable`."""
    require_comparable(origin, options)
    if run.model.towers != "both" or words is None:
        require(origin != "big_vision", "--verify", str(source), "open_clip's reader takes two towers; this is one: leave it out")
        return _compare_tower(source, run, params, words), []
    notes: list[str] = []
    if origin == "big_vision":
        theirs = load_big_vision(source, run.model, params["image"].get("positions"), words, run.data.resize)
        notes.append("image files and strings: big_vision's own resizing and tokenizer are not in PyTorch")
    elif origin == "open_clip":
        theirs = _load_open_clip(source, options, run)
    else:
        theirs = reference.load(source, "transformers")
    if options.tokenizer is not None and origin != "big_vision":
        theirs = theirs._replace(ids=_ids(words), clean=str)
        notes.append("strings: the tokenizer is that of --tokenizer, not the source's")
    elif origin == "transformers" and words.clean == "lower":
        own = theirs.ids
        theirs = theirs._replace(ids=lambda texts: own([clean(text, "lower") for text in texts]))
        notes.append("capitals: transformers' Gemma tokenizer leaves lower case, which SigLIP 2 was trained on, to its user")
    return compare(theirs, run.model, params, words, run.data.resize, images(), TEXTS), notes


def _load_open_clip(source: Path, options: Options, run: Run) -> Reference:
    """As open_clip loads a folder, but also from a file of weights, and of a training; it resizes the positions itself."""
    import open_clip

    folder, file = open_clip_read.places(source)
    require(not file.name.endswith(weights.INDEX), "--verify", str(file), "open_clip reads no shards: leave it out")
    remedy = "timm's towers have their own size only: leave it out to verify"
    require(options.image_size is None or run.model.image.pool != "map", "--image-size", options.image_size, remedy)
    name = f"local-dir:{folder}"
    logging.disable(logging.WARNING)  # open_clip's, that the weights are random: they are loaded next
    try:
        loaded: Any = open_clip.create_model_and_transforms(name, load_weights=False, force_image_size=options.image_size)
    finally:
        logging.disable(logging.NOTSET)
    incompatible: Any = open_clip.load_checkpoint(loaded[0], str(file), strict=False)  # buffers of older releases are left
    require(not incompatible.missing_keys, "--verify", str(file), f"open_clip misses {', '.join(incompatible.missing_keys[:3])}")
    words: Any = open_clip.get_tokenizer(name) if options.tokenizer is None else SimpleNamespace(clean_fn=str)
    return reference.of_open_clip(loaded, words)


def _compare_tower(source: Path, run: Run, params: Params, words: Tokenizer | None) -> TowerReport:
    """A tower of transformers' alone."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])  # with a projection, AutoModel would not do
    theirs: Any = kind.from_pretrained(source).eval()
    model = bind(replace(run.model, dtype="float32"), params)
    with torch.inference_mode(), jax.default_matmul_precision("highest"):
        if run.model.towers == "text" and words is not None:
            tokens = words.encode(TEXTS)[0]
            ours, output = model.encode_text(jnp.asarray(tokens)), theirs(input_ids=torch.from_numpy(tokens).long())
        else:
            pixels = np.stack([fit(image, run.model.image.image_size, run.data.resize) for image in images()])
            ours = model.encode_image(jnp.asarray(pixels))
            output = theirs(pixel_values=torch.from_numpy(normalised(pixels, run.model)))
    found = output.get(f"{run.model.towers}_embeds", output.get("pooler_output")).numpy()
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    return TowerReport(len(found), run.model.towers, float(np.linalg.norm(np.asarray(ours) - found, axis=1).max()))


def images() -> list[Image.Image]:
    """Smooth images of several shapes, one for each of TEXTS."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (h // 8 + 2, w // 8 + 2, 3), np.uint8)) for w, h in SHAPES]
    return [image.resize(shape, Image.Resampling.BICUBIC) for image, shape in zip(coarse, SHAPES, strict=True)]


def _ids(words: Tokenizer) -> Callable[[Sequence[str]], Any]:
    import torch

    return lambda texts: torch.from_numpy(words.encode(texts)[0]).long()
