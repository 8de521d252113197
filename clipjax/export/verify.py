"""Loads an exported folder in PyTorch, as anyone would, and compares what it computes with what we do."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clipjax.config import ConfigError, Mesh, Model
from clipjax.data.image import fit
from clipjax.data.tokenizer import Tokenizer
from clipjax.export import open_clip_generate
from clipjax.export.folder import Format, Resize
from clipjax.generate import Captioner
from clipjax.models.clip import bind
from clipjax.sharding import make_mesh

LIMIT = 1e-4  # of an embedding's norm
PACKAGES = {
    "open_clip": ("torch", "torchvision", "timm", "transformers", "open_clip"),
    "transformers": ("torch", "torchvision", "transformers"),
}
INSTALL = "pip install torch torchvision timm transformers open_clip_torch==3.3.0, torch and torchvision from the same index"


@dataclass(frozen=True)
class Report:
    """The largest differences between our unit vectors and PyTorch's, float32, over the examples.

    `image` and `text` start from the same pixels and the same token ids, so they measure the weights and the arithmetic;
    `picture` and `caption` start from PIL pictures and strings, through each side's own preprocessing and tokenizer.
    `logits` and a captioning head's, `words`, are relative to the largest; `written` counts the pictures for which greedy
    captions differ.

    Two things no export can mend, so they are told and not judged. open_clip cleans strings before it encodes them (curly
    quotes become straight, HTML entities characters): `caption` compares with what we make of the cleaned string, `cleaned`
    counts those that get other ids by it. And transformers rounds an odd margin of a centre crop down, open_clip and we to
    even: with `crops_otherwise`, `picture` is not judged.
    """

    examples: int
    image: float
    text: float
    logits: float
    picture: float
    caption: float
    cleaned: int
    crops_otherwise: bool
    words: float | None = None  # where there is a captioning head
    written: int | None = None

    @property
    def failures(self) -> list[str]:
        """What is above LIMIT; empty when the export is faithful."""
        judged = ["image", "text", "logits", "caption"] + ["picture"] * (not self.crops_otherwise)
        judged += ["words"] * (self.words is not None)
        far = {name: getattr(self, name) for name in judged if not getattr(self, name) <= LIMIT}
        told = [f"{name} differs by {figure:.1e}, more than {LIMIT:.0e}" for name, figure in far.items()]
        return told + [f"greedy captions of {self.written} of {self.examples} pictures differ"] * bool(self.written)

    @property
    def figures(self) -> list[str]:
        """All that was compared, a line for each kind."""
        lines = [
            f"same pixels and ids: image {self.image:.1e}, text {self.text:.1e}; logits {self.logits:.1e}",
            f"from picture and string: image {self.picture:.1e}, text {self.caption:.1e}",
        ]
        if self.words is None:
            return lines
        same = self.examples - self.written
        return [*lines, f"captioning head: logits {self.words:.1e}; equal greedy captions {same} of {self.examples}"]

    @property
    def notes(self) -> list[str]:
        """What is told and not judged, where there is anything to tell."""
        cleaned = f"captions that open_clip's cleaning gives other ids than ours: {self.cleaned}"
        crops = "embeddings from a picture: transformers rounds the margins of a centre crop otherwise"
        return [cleaned] * bool(self.cleaned) + [crops] * self.crops_otherwise


class Encoded(NamedTuple):
    """Unit vectors [n, e], logits [n, n], and a captioning head's [n, t-1, v]; float32."""

    image: np.ndarray
    text: np.ndarray
    logits: np.ndarray
    words: np.ndarray | None = None


class Reference(NamedTuple):
    """An exported model in PyTorch with its own preprocessing: pictures to pixels, strings to ids, both to embeddings."""

    pixels: Callable[[Sequence[Image.Image]], Any]  # -> float tensor [n, 3, s, s], normalised
    ids: Callable[[Sequence[str]], Any]  # -> integer tensor [n, t]
    encode: Callable[[Any, Any], tuple[Any, ...]]  # pixels, ids -> Encoded, as tensors
    clean: Callable[[str], str]  # what it does to a string before its tokenizer sees it
    crops_otherwise: bool
    write: Callable[[Any, Tokenizer], np.ndarray] | None = None  # pixels, and the special tokens -> greedy captions, ids [n, t]


def verify(
    out: Path,
    to: Format,
    model: Model,
    params: Mapping[str, Any],
    tokenizer: Path,
    resize: Resize,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
) -> Report:
    """Compares what `export` made of its arguments with the arguments themselves, on n RGB pictures and n captions.

    Raises ConfigError where PyTorch or the library is missing, with the command that installs it.
    """
    theirs = load(out, to)
    import torch

    words = Tokenizer.load(tokenizer, model.text.length)
    images = np.stack([fit(picture, model.image.image_size, resize) for picture in pictures])
    tokens, clean = (words.encode(strings)[0] for strings in (texts, [theirs.clean(text) for text in texts]))
    ours_clean = encode(model, params, images, clean).text  # no more than that: words' logits may take half a gigabyte
    ours = encode(model, params, images, tokens)
    mean, std = (np.float32(c) for c in (model.image.mean, model.image.std))
    pixels = torch.from_numpy(((np.float32(images) / 255 - mean) / std).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        same = Encoded(*(x.numpy() for x in theirs.encode(pixels, torch.from_numpy(tokens).long())))
        own_image, own_text = (x.numpy() for x in theirs.encode(theirs.pixels(pictures), theirs.ids(texts))[:2])
    heard = {}
    if model.decoder is not None:
        captions = zip(write(model, params, images, words), theirs.write(pixels, words), strict=True)
        written = sum(_until_end(a, words) != _until_end(b, words) for a, b in captions)
        heard = dict(words=_of_largest(ours.words, same.words), written=written)
    return Report(
        examples=len(pictures),
        image=_difference(ours.image, same.image),
        text=_difference(ours.text, same.text),
        logits=_of_largest(ours.logits, same.logits),
        picture=_difference(ours.image, own_image),
        caption=_difference(ours_clean, own_text),
        cleaned=int((tokens != clean).any(axis=1).sum()),
        crops_otherwise=theirs.crops_otherwise,
        **heard,
    )


def encode(model: Model, params: Mapping[str, Any], images: np.ndarray, tokens: np.ndarray) -> Encoded:
    """What we compute, in float32 whatever `model.dtype`."""

    with jax.default_matmul_precision("highest"):
        return Encoded(*map(np.asarray, _encode(replace(model, dtype="float32"), params, images, tokens)))


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Model, params: Mapping[str, Any], images: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    m = bind(model, params)
    if m.decoder is None:
        image, text, words = m.encode_image(images), m.encode_text(tokens), ()
    else:
        image, text, states = m.encode_pairs(images, tokens)
        words = (states @ m.words.T,)
    logits = jnp.exp(m.log_scale[...]) * (image @ text.T)
    return image, text, logits if m.bias is None else logits + m.bias[...], *words


def write(model: Model, params: Mapping[str, Any], images: np.ndarray, words: Tokenizer) -> np.ndarray:
    """Our greedy captions, ids [n, t], in float32 whatever `model.dtype`."""
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    captioner = Captioner(replace(model, dtype="float32"), mesh, len(images), words)
    with jax.default_matmul_precision("highest"):
        return np.asarray(captioner.generate(jax.device_get(params), images, np.arange(len(images), dtype=np.int32)).tokens)


def _until_end(ids: np.ndarray, words: Tokenizer) -> list[int]:
    """Without what follows the end, or a padding that was written in its place: open_clip's `generate` stops there too."""
    stops = np.isin(ids, [words.end_id, words.pad_id]).nonzero()[0]
    return ids[: stops[0]].tolist() if len(stops) else ids.tolist()


def load(out: Path, to: Format) -> Reference:
    """The folder, loaded in PyTorch by the library it was written for. Raises ConfigError as `require_packages`."""
    require_packages(to)
    return _load_open_clip(out) if to == "open_clip" else _load_transformers(out)


def _load_open_clip(out: Path) -> Reference:
    import open_clip
    import torch

    name = f"local-dir:{out}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)

    def pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([preprocess(picture) for picture in pictures])

    def run(pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = model(pixels, ids)
        if isinstance(out, dict):  # CoCa's
            image, text, scale = (out[name] for name in ("image_features", "text_features", "logit_scale"))
            return image, text, scale * image @ text.T + out.get("logit_bias", 0), out["logits"]
        image, text, scale, *bias = out
        return image, text, scale * image @ text.T + sum(bias)

    model.eval()
    write = functools.partial(open_clip_generate.greedy, model)
    return Reference(pixels, lambda texts: tokenizer(list(texts)), run, tokenizer.clean_fn, crops_otherwise=False, write=write)


def _load_transformers(out: Path) -> Reference:
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = AutoModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    processor = AutoImageProcessor.from_pretrained(out, backend="pil")  # torchvision resizes otherwise, by up to one level

    def pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
        return processor(list(pictures), return_tensors="pt")["pixel_values"]

    def ids(texts: Sequence[str]) -> torch.Tensor:
        return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]

    def run(pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = model(input_ids=ids, pixel_values=pixels)
        return output.image_embeds, output.text_embeds, output.logits_per_image

    return Reference(pixels, ids, run, lambda text: text, crops_otherwise=bool(processor.do_center_crop))


def require_packages(to: Format) -> None:
    """Raises ConfigError, with the command that installs it, where a package is missing or can't load."""
    for package in PACKAGES[to]:
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as e:  # RuntimeError: torchvision built for another torch
            raise ConfigError(f"--verify: can't import {package} ({str(e).partition(chr(10))[0]}): {INSTALL}") from e


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest distance between two rows, relative to theirs."""
    return float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())


def _of_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two numbers, relative to the largest number."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())
