"""An exported folder in PyTorch, as open_clip or transformers load it."""

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from clipjax.config import ConfigError
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare import open_clip_generate
from clipjax.export.folder import Format

PACKAGES = {
    "open_clip": ("torch", "torchvision", "timm", "transformers", "open_clip"),
    "transformers": ("torch", "torchvision", "transformers"),
}
INSTALL = "pip install torch torchvision timm transformers open_clip_torch==3.3.0, torch and torchvision from the same index"


class Reference(NamedTuple):
    """An exported model in PyTorch with its own preprocessing: images to pixels, strings to ids, both to embeddings."""

    pixels: Callable[[Sequence[Image.Image]], Any]  # -> float tensor [n, 3, s, s], normalised
    ids: Callable[[Sequence[str]], Any]  # -> integer tensor [n, t]
    encode: Callable[[Any, Any], tuple[Any, ...]]  # pixels, ids -> Encoded, as tensors
    clean: Callable[[str], str]  # what it does to a string before it tokenizes it
    other_crop: bool  # it rounds the margins of a centre crop differently from us
    generate: Callable[[Any, Tokenizer], np.ndarray] | None = None  # pixels, special tokens -> greedy captions, ids [n, t]
    bilinear: bool = False  # it resizes images bilinearly, we bicubically


def load(out: Path, to: Format) -> Reference:
    """The folder, loaded in PyTorch by the library of its format. Raises ConfigError as `require_packages`."""
    require_packages(to)
    if to == "transformers":
        return _load_transformers(out)
    import open_clip

    return of_open_clip(open_clip.create_model_and_transforms(f"local-dir:{out}"), open_clip.get_tokenizer(f"local-dir:{out}"))


def of_open_clip(loaded: Any, tokenizer: Any) -> Reference:
    """For what open_clip's `create_model_and_transforms` and `get_tokenizer` return."""
    import torch

    model, _, preprocess = loaded

    def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([preprocess(image) for image in images])

    def run(pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = model(pixels, ids)
        if isinstance(out, dict):  # CoCa's
            image, text, scale = (out[name] for name in ("image_features", "text_features", "logit_scale"))
            return image, text, scale * image @ text.T + out.get("logit_bias", 0), out["logits"]
        image, text, scale, *bias = out
        return image, text, scale * image @ text.T + sum(bias)

    model.eval()
    generate = functools.partial(open_clip_generate.greedy, model)
    bilinear = any("bilinear" in str(getattr(step, "interpolation", "")).lower() for step in preprocess.transforms)
    return Reference(pixels, lambda texts: tokenizer(list(texts)), run, tokenizer.clean_fn, False, generate, bilinear)


def _load_transformers(out: Path) -> Reference:
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = AutoModel.from_pretrained(out, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(out)
    processor = AutoImageProcessor.from_pretrained(out, backend="pil")  # torchvision's resize differs, by up to one level of 255

    def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
        return processor(list(images), return_tensors="pt")["pixel_values"]

    def ids(texts: Sequence[str]) -> torch.Tensor:
        return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]

    def run(pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = model(input_ids=ids, pixel_values=pixels)
        return output.image_embeds, output.text_embeds, output.logits_per_image

    bilinear = processor.resample == Image.Resampling.BILINEAR
    return Reference(pixels, ids, run, lambda text: text, other_crop=bool(processor.do_center_crop), bilinear=bilinear)


def require_packages(to: Format) -> None:
    """Raises ConfigError, with the command that installs it, if a package is missing or can't be loaded."""
    for package in PACKAGES[to]:
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as e:  # RuntimeError: torchvision built for another torch
            raise ConfigError(f"--verify: can't import {package} ({str(e).partition(chr(10))[0]}): {INSTALL}") from e
