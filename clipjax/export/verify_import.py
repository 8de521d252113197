"""Compares an imported run with its source, loaded in PyTorch by the library that it came from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipjax.config import Run, require
from clipjax.data.tokenizer import Tokenizer
from clipjax.export import reference
from clipjax.export.big_vision_reference import load_big_vision
from clipjax.export.found import Options
from clipjax.export.verify import Report, compare
from clipjax.models.clip import Params

# Short and long, with punctuation, capitals, signs that are cleaned, and other scripts.
TEXTS = (
    "a photo of a cat.",
    "Two dogs!",
    "A red, red heart: “curly” & 3 quotes",
    "une tasse de café à Zürich",
    "a picture of a laptop with the lockscreen on, a cup of coffee, salt and pepper grinders, and the mountains behind it " * 3,
    "猫",
)
SHAPES = ((136, 128), (128, 136), (50, 90), (64, 64), (21, 30), (300, 200))  # width and height


def require_comparable(origin: str, options: Options) -> None:
    """Raises ConfigError if what loads the source in PyTorch is missing, or can't load it at `options.image_size`."""
    reference.require_packages("transformers" if origin == "transformers" else "open_clip")
    remedy = "the original library has the source's own size only: leave it out to verify"
    possible = options.image_size is None or origin == "big_vision"
    require(possible, "--image-size", options.image_size, remedy)


def verify_import(
    source: Path, origin: str, options: Options, run: Run, params: Params, words: Tokenizer
) -> tuple[Report, list[str]]:
    """The differences, and what is not compared. Raises ConfigError as `require_comparable`."""
    require_comparable(origin, options)
    notes: list[str] = []
    if origin == "big_vision":
        theirs = load_big_vision(source, run.model, params["image"].get("positions"), words, run.data.resize)
        notes.append("image files and strings: big_vision's own resizing and tokenizer are not in PyTorch")
    else:
        theirs = reference.load(source, "open_clip" if origin == "open_clip" else "transformers")
        if options.tokenizer is not None:
            theirs = theirs._replace(ids=_ids(words))
            notes.append("strings: the tokenizer is that of --tokenizer, not the source's")
    return compare(theirs, run.model, params, words, run.data.resize, images(), TEXTS), notes


def images() -> list[Image.Image]:
    """Smooth images of several shapes, one for each of TEXTS."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (h // 8 + 2, w // 8 + 2, 3), np.uint8)) for w, h in SHAPES]
    return [image.resize(shape, Image.Resampling.BICUBIC) for image, shape in zip(coarse, SHAPES, strict=True)]


def _ids(words: Tokenizer) -> Callable[[Sequence[str]], Any]:
    import torch

    return lambda texts: torch.from_numpy(words.encode(texts)[0]).long()
