"""Loads an exported folder in PyTorch, as any user would, and compares its results with ours."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clipjax.config import Clean, Mesh, Model
from clipjax.data.captions import whole
from clipjax.data.images.image import decode, fit
from clipjax.data.tokenizer import Tokenizer
from clipjax.export.compare import drawn
from clipjax.export.compare.captions import agreement
from clipjax.export.compare.reference import Reference, load
from clipjax.export.compare.report import Report
from clipjax.export.compare.unjudged import Strings, compared, image_reasons
from clipjax.export.folder import Format, Resize, with_learned_positions
from clipjax.export.formats.table import Precision
from clipjax.generate import Captioner
from clipjax.models.clip import Params, bind
from clipjax.sharding import make_mesh


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
    dtype: Precision = "float32",
) -> Report:
    """Compares the result of `export` with its arguments, on n RGB images and n captions, and on what `drawn` adds. Of the first
    thousands of `captions` only the ids.

    Raises ConfigError, with the command that installs it, if PyTorch or the library is missing.
    """
    words = Tokenizer.load(tokenizer, model.text.length, clean)
    model, learned = with_learned_positions(model, params)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32).astype(jnp.dtype(dtype)).astype(np.float32), dict(learned))
    unrounded = None if dtype == "float32" else dict(learned)
    return compare(load(out, to), model, rounded, words, resize, images, texts, captions, unrounded)


def compare(
    theirs: Reference,
    model: Model,
    params: Params,
    words: Tokenizer,
    resize: Resize,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    captions: Iterable[str] = (),
    unrounded: Params | None = None,
) -> Report:
    """As `verify`, with a model that is loaded already. `unrounded`: the parameters before they were rounded to `params`."""
    import torch

    extra, written = drawn.images(model.image.image_size), drawn.captions(words)
    shown = [*images, *(decode(image.stored) for image in extra)]
    opened = [*images, *(image.opened() for image in extra)]
    texts = [whole(text) for text in (*texts, *written.values())]  # other tokenizers fail at half surrogates
    pixels = np.stack([fit(image, model.image.image_size, resize) for image in shown])
    tokens, cleaned = (words.encode(strings)[0] for strings in (texts, [theirs.clean(text) for text in texts]))
    ours_cleaned = encode(model, params, pixels, cleaned).text  # the rest is freed: token logits may take half a gigabyte
    ours = encode(model, params, pixels, tokens)
    exact = None if unrounded is None else encode(model, unrounded, pixels, tokens)
    inputs = torch.from_numpy(normalised(pixels, model))
    with torch.inference_mode():
        same = Encoded(*(x.numpy() for x in theirs.encode(inputs, torch.from_numpy(tokens).long())))
        ids = theirs.ids(texts)
        own_image, own_text = (x.numpy() for x in theirs.encode(theirs.pixels(opened), ids)[:2])
    other_captions = None
    if theirs.generate is not None and model.decoder is not None:
        other_captions = _unequal(generate(model, params, pixels, words), theirs.generate(inputs, words), words)
    distances, judged = _distances(ours.image, own_image), _distances(ours_cleaned, own_text)
    reasons = image_reasons(theirs, resize, model.image.image_size, shown, extra)
    strings = Strings(texts, tokens, cleaned, ids.numpy()).reasons(theirs, words)
    both = ours.token_logits, same.token_logits
    return Report(
        examples=len(images),
        image=_distance(ours.image, same.image),
        text=_distance(ours.text, same.text),
        logits=_of_largest(ours.logits, same.logits),
        images=compared(distances, distances, reasons, [image.what for image in extra]),
        strings=compared(_distances(ours.text, own_text), judged, strings, list(written)),
        captions=agreement(theirs.ids, words, captions),
        token_logits=None if both[0] is None or both[1] is None else _of_largest(both[0], both[1]),
        other_captions=other_captions,
        rounding=None if exact is None else (_distance(exact.image, ours.image), _distance(exact.text, ours.text)),
    )


def normalised(pixels: np.ndarray, model: Model) -> np.ndarray:
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
        *vectors, states = m.encode_pairs(pixels, tokens)
        image, text, token_logits = vectors[0].embedding, vectors[1].embedding, (states @ m.words.T,)
    assert m.log_scale is not None
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


def _distances(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of each pair of rows, relative to the norm of theirs."""
    return np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest of two rows."""
    return float(_distances(ours, theirs).max())


def _of_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two entries, relative to the largest entry."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())
