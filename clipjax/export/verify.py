"""Loads an exported folder in PyTorch, as any user would, and compares its results with ours."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clipjax.config import Clean, Mesh, Model
from clipjax.data.captions import whole
from clipjax.data.images.image import fit
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.captions import Agreement, agreement, may_differ
from clipjax.export.folder import Format, Resize
from clipjax.export.reference import Reference, load
from clipjax.generate import Captioner
from clipjax.models.clip import Params, bind
from clipjax.sharding import make_mesh

LIMIT = 1e-4  # of an embedding's norm


@dataclass(frozen=True)
class Report:
    """The largest differences between our unit vectors and PyTorch's, in float32, over the examples.

    `image` and `text` start from the same pixels and the same token ids: they measure the weights and the arithmetic.
    `image_file` and `string` start from PIL images and strings, with each side's own preprocessing and tokenizer. `logits`, and
    `token_logits` of a captioning head, are relative to the largest. `other_captions` counts the images with different greedy
    captions.

    No export can change two things, so they are reported but are no failures. open_clip cleans strings before it tokenizes them
    (curly quotes become straight, HTML entities become characters): `string` compares with our result for the cleaned string,
    `cleaned` counts the strings whose ids change by it. And transformers rounds an odd margin of a centre crop down, open_clip
    and clipjax to even: with `other_crop`, `image_file` is not judged.

    `captions` says how many of the run's own get equal ids there. Of `string`, those with other ids are left out where that is
    documented: `captions.may_differ`.
    """

    examples: int
    image: float
    text: float
    logits: float
    image_file: float
    string: float
    cleaned: int
    other_crop: bool
    captions: Agreement | None = None
    token_logits: float | None = None  # of a captioning head
    other_captions: int | None = None

    @property
    def failures(self) -> list[str]:
        """What is above LIMIT; empty if the export is faithful."""
        judged = ["image", "text", "logits", "string"] + ["image_file"] * (not self.other_crop)
        judged += ["token_logits"] * (self.token_logits is not None)
        large = {name: getattr(self, name) for name in judged if not getattr(self, name) <= LIMIT}
        failures = [f"{name} differs by {figure:.1e}, more than {LIMIT:.0e}" for name, figure in large.items()]
        captions = f"greedy captions of {self.other_captions} of {self.examples} images differ"
        return failures + [captions] * bool(self.other_captions)

    @property
    def figures(self) -> list[str]:
        """All differences, a line for each kind."""
        lines = [
            f"same pixels and ids: image {self.image:.1e}, text {self.text:.1e}; logits {self.logits:.1e}",
            f"from image file and string: image {self.image_file:.1e}, text {self.string:.1e}",
        ]
        lines += [] if self.captions is None else [self.captions.figure]
        if self.token_logits is None or self.other_captions is None:
            return lines
        same = self.examples - self.other_captions
        return [*lines, f"captioning head: logits {self.token_logits:.1e}; equal greedy captions {same} of {self.examples}"]

    @property
    def notes(self) -> list[str]:
        """Differences that are no failures; often empty."""
        cleaned = f"strings whose ids change when open_clip cleans them: {self.cleaned}"
        crop = "embeddings of an image file: transformers rounds the margins of a centre crop differently"
        special = [] if self.captions is None else self.captions.notes
        return [cleaned] * bool(self.cleaned) + [crop] * self.other_crop + special


class Encoded(NamedTuple):
    """Unit vectors [n, e], logits [n, n], and the token logits [n, t-1, v] of a captioning head; float32."""

    image: np.ndarray
    text: np.ndarray
    logits: np.ndarray
    token_logits: np.ndarray | None = None


def verify(
    out: Path,
    to: Format,
    model: Model,
    params: Params,
    tokenizer: Path,
    resize: Resize,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    clean: Clean = "none",
    captions: Iterable[str] = (),
) -> Report:
    """Compares the result of `export` with its arguments, on n RGB images and n captions. Of the first thousands of `captions`
    only the ids.

    Raises ConfigError, with the command that installs it, if PyTorch or the library is missing.
    """
    words = Tokenizer.load(tokenizer, model.text.length, clean)
    return compare(load(out, to), model, params, words, resize, images, texts, captions)


def compare(
    theirs: Reference,
    model: Model,
    params: Params,
    words: Tokenizer,
    resize: Resize,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    captions: Iterable[str] = (),
) -> Report:
    """As `verify`, with a model that is loaded already."""
    import torch

    texts = [whole(text) for text in texts]  # other tokenizers fail at half surrogates
    pixels = np.stack([fit(image, model.image.image_size, resize) for image in images])
    tokens, cleaned = (words.encode(strings)[0] for strings in (texts, [theirs.clean(text) for text in texts]))
    ours_cleaned = encode(model, params, pixels, cleaned).text  # the rest is freed: token logits may take half a gigabyte
    ours = encode(model, params, pixels, tokens)
    normalised = torch.from_numpy(_normalised(pixels, model))
    with torch.inference_mode():
        same = Encoded(*(x.numpy() for x in theirs.encode(normalised, torch.from_numpy(tokens).long())))
        ids = theirs.ids(texts)
        own_image, own_text = (x.numpy() for x in theirs.encode(theirs.pixels(images), ids)[:2])
    other = (cleaned != ids.numpy()).any(axis=1)
    judged = [i for i, text in enumerate(texts) if not (other[i] and may_differ(words, theirs.clean(text)))]
    other_captions = None
    if theirs.generate is not None and model.decoder is not None:
        other_captions = _unequal(generate(model, params, pixels, words), theirs.generate(normalised, words), words)
    both = ours.token_logits, same.token_logits
    return Report(
        examples=len(images),
        image=_difference(ours.image, same.image),
        text=_difference(ours.text, same.text),
        logits=_of_largest(ours.logits, same.logits),
        image_file=_difference(ours.image, own_image),
        string=_difference(ours_cleaned[judged], own_text[judged]),
        cleaned=int((tokens != cleaned).any(axis=1).sum()),
        other_crop=theirs.other_crop,
        captions=agreement(theirs.ids, words, captions),
        token_logits=None if both[0] is None or both[1] is None else _of_largest(both[0], both[1]),
        other_captions=other_captions,
    )


def _normalised(pixels: np.ndarray, model: Model) -> np.ndarray:
    """float32 [n, 3, s, s], as PyTorch's towers take them, of uint8 [n, s, s, 3]."""
    mean, std = np.array(model.image.mean, np.float32), np.array(model.image.std, np.float32)
    return ((np.float32(pixels) / 255 - mean) / std).transpose(0, 3, 1, 2).copy()


def encode(model: Model, params: Params, pixels: np.ndarray, tokens: np.ndarray) -> Encoded:
    """Our results, in float32 for any `model.dtype`. `pixels`: uint8 [n, s, s, 3]; `tokens`: [n, t]."""
    with jax.default_matmul_precision("highest"):
        return Encoded(*map(np.asarray, _encode(replace(model, dtype="float32"), params, pixels, tokens)))


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Model, params: Params, pixels: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    m = bind(model, params)
    if m.decoder is None:
        image, text, token_logits = m.encode_image(pixels), m.encode_text(tokens), ()
    else:
        image, text, states = m.encode_pairs(pixels, tokens)
        token_logits = (states @ m.words.T,)
    logits = jnp.exp(m.log_scale[...]) * (image @ text.T)
    return image, text, logits if m.bias is None else logits + m.bias[...], *token_logits


def generate(model: Model, params: Params, pixels: np.ndarray, words: Tokenizer) -> np.ndarray:
    """Our greedy captions, ids [n, t], in float32 for any `model.dtype`. `pixels`: uint8 [n, s, s, 3]."""
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    captioner = Captioner(replace(model, dtype="float32"), mesh, len(pixels), words)
    index = jnp.arange(len(pixels), dtype=jnp.int32)
    with jax.default_matmul_precision("highest"):
        return np.asarray(captioner.generate(jax.device_get(params), jnp.asarray(pixels), index).tokens)


def _unequal(ours: np.ndarray, theirs: np.ndarray, words: Tokenizer) -> int:
    """How many captions of two lists, ids [n, t], differ."""
    return sum(_until_end(a, words) != _until_end(b, words) for a, b in zip(ours, theirs, strict=True))


def _until_end(ids: np.ndarray, words: Tokenizer) -> list[int]:
    """The ids before the first end or padding token; open_clip's `generate` stops at either too."""
    stops = np.isin(ids, [words.end_id, words.pad_id]).nonzero()[0]
    return ids[: stops[0]].tolist() if len(stops) else ids.tolist()


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest distance between two rows, relative to the norm of theirs."""
    return float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max(initial=0.0))


def _of_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two entries, relative to the largest entry."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())
