"""A trained run, ready to encode and to generate captions: what `clipjax.load` returns."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from PIL import Image

from clipjax import config, sharding
from clipjax.checkpoint import TOKENIZER, load_params, split_name
from clipjax.data.image import decode, fit, rgb
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import Batch, CachedBatches, Encoder, to_host
from clipjax.files import resolve
from clipjax.generate import GREEDY, Captioner, Decoding

ImageLike = Image.Image | np.ndarray | str | Path  # an array is uint8 [h, w, 3]


class LoadedRun:
    """A run's weights, tokenizer and preprocessing on all devices. The weights are sharded as in training where that fits."""

    def __init__(self, name: str) -> None:
        """`name` is `RUN` or `RUN@STEP`. Raises ConfigError where there is no such run or checkpoint."""
        self.workdir = split_name(name)[0]
        self.name = resolve(self.workdir).name
        self.mesh = mesh_for(config.from_json((self.workdir / "config.json").read_text(encoding="utf-8")).mesh)
        self.run, self.params, self.step = load_params(name, self.mesh)
        self.tokenizer = Tokenizer.load(self.workdir / TOKENIZER, self.run.model.text.length)
        self.encoder = Encoder(self.run.model, self.mesh, self.run.train.eval_batch_size)
        self._captioners: dict[tuple[int, Decoding], Captioner] = {}

    def encode_image(self, images: Sequence[ImageLike]) -> Float[np.ndarray, "n e"]:
        """Unit vectors, float32, of images of any size: PIL images, uint8 arrays [h, w, 3] or files."""
        return self._encode("image", self._pixels(images))

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Unit vectors, float32. Texts are truncated to the model's length."""
        return self._encode("text", self.tokenizer.encode(list(_checked_list(texts)))[0])

    def caption(self, images: Sequence[ImageLike], decoding: Decoding = GREEDY) -> list[str]:
        """Generated captions of images of any size. Raises ConfigError for a model without a captioning head."""
        return [text for text, _ in self.captions(images, decoding)]

    def captions(self, images: Sequence[ImageLike], decoding: Decoding = GREEDY) -> list[tuple[str, float]]:
        """The same, each with its log-probability."""
        captioner = self._captioner(len(_checked_list(images)), decoding)
        pixels = self._pixels(images)

        def read() -> Iterator[Batch]:
            for numbers, real in captioner.rows(len(pixels)):
                yield {"image": pixels[numbers], "index": np.where(real, numbers, -1).astype(np.int32)}

        batches = CachedBatches(read, captioner.batch_count(len(pixels)), "caption", "images")
        results = [jax.tree.map(to_host, generated) for generated, _ in captioner.stream(self.params, batches)]
        rows = [(row, logprob) for generated in results for row, logprob in zip(*generated, strict=True)]
        return [(self.tokenizer.decode(row), float(logprob)) for row, logprob in rows[: len(pixels)]]

    def _captioner(self, images: int, decoding: Decoding) -> Captioner:
        """The captioner for batches of the evaluation's size. For fewer images, of the next power of two."""
        size = min(self.encoder.batch_size, 1 << max(images - 1, 0).bit_length())
        if (size, decoding) not in self._captioners:
            self._captioners[size, decoding] = Captioner(self.run.model, self.mesh, size, self.tokenizer, decoding)
        return self._captioners[size, decoding]

    def _pixels(self, images: Sequence[ImageLike]) -> np.ndarray:
        size, resize = self.run.model.image.image_size, self.run.data.resize
        pixels = [fit(_open(image), size, resize) for image in _checked_list(images)]
        return np.reshape(pixels, (len(pixels), size, size, 3))

    def _encode(self, kind: str, rows: np.ndarray) -> np.ndarray:
        def read() -> Iterator[Batch]:
            return ({kind: rows[numbers]} for numbers, _ in self.encoder.rows(len(rows)))

        batches = CachedBatches(read, self.encoder.batch_count(len(rows)), kind, f"{kind}s")
        results = [to_host(z) for z, _ in self.encoder.stream(self.params, batches)]
        return np.concatenate([np.empty((0, self.run.model.embed_dim), np.float32), *results])[: len(rows)]


def mesh_for(trained: config.Mesh) -> Mesh:
    """The mesh of training over the devices of this machine; over `data` alone where its other axes do not fit them."""
    data = trained.data if -1 in (trained.fsdp, trained.tensor) else -1
    try:
        return sharding.make_mesh(replace(trained, data=data))
    except config.ConfigError:
        return sharding.make_mesh(config.Mesh())


def _checked_list(items: Sequence) -> Sequence:
    if isinstance(items, str | Path):
        raise TypeError(f"{str(items)!r} is one: give a list")  # and do not take a string's letters one by one
    return items


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, np.ndarray):
        return rgb(Image.fromarray(image))
    if isinstance(image, Image.Image):
        return rgb(image)
    try:
        return decode(Path(image))
    except Exception as error:  # a decoder may raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"is no image that can be read: {error}"
        raise config.ConfigError(f"{image}: {reason}") from error
