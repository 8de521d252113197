"""A trained run, ready to encode and to generate captions: what `clipjax.load` returns."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clipjax import config, sharding
from clipjax.checkpoint import TOKENIZER
from clipjax.config.start import split_name
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals import given
from clipjax.evals.encoder import Batch, CachedBatches, Encoder, Features, to_host
from clipjax.evals.given import ImageLike
from clipjax.files import resolve
from clipjax.generate import GREEDY, Captioner, Decoding
from clipjax.models.heads import Side
from clipjax.restore import load_params


class LoadedRun:
    """A run's weights, tokenizer and preprocessing on all devices. The weights are sharded as in training where that fits."""

    def __init__(self, name: str, dtype: Literal["float32", "bfloat16"] | None = None, features: Features = "embedding") -> None:
        """`name` is `RUN` or `RUN@STEP`. `dtype` of the arithmetic, None: as in training; the results are float32. `features`: as
        of `Encoder`.

        Raises ConfigError where there is no such run or checkpoint, and for another dtype.
        """
        self.workdir = split_name(name)[0]
        self.name = resolve(self.workdir).name
        self.mesh = mesh_for(config.from_json((self.workdir / "config.json").read_text(encoding="utf-8")).mesh)
        with _without_advice():
            run, self.params, self.step = load_params(name, self.mesh, heads=isinstance(features, tuple))
        self.run = run if dtype is None else replace(run, model=replace(run.model, dtype=dtype))
        self.encoder = Encoder(self.run.model, self.mesh, self.run.train.eval_batch_size, features)
        self._encoders: dict[int, Encoder] = {self.encoder.batch_size: self.encoder}
        self._captioners: dict[tuple[int, Decoding], Captioner] = {}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError for a model without a text tower."""
        self.run.model.require_towers("text")
        return Tokenizer.load(self.workdir / TOKENIZER, self.run.model.text.length, self.run.tokenizer.clean)

    def encode_image(self, images: Sequence[ImageLike]) -> Float[np.ndarray, "n e"]:
        """Unit vectors, float32, of images of any size: PIL images, uint8 arrays [h, w, 3] or files.

        Raises TypeError, ValueError or ConfigError, with its place in the list, for what is no image.
        """
        return self._encode("image", self._pixels(images))

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Unit vectors, float32. Texts are truncated to the model's length.

        Raises TypeError or ValueError, with its place in the list, for what is no text.
        """
        return self.encode_tokens(self.tokenizer.encode(given.texts(texts))[0])

    def encode_tokens(self, tokens: Int[np.ndarray, "n t"]) -> Float[np.ndarray, "n e"]:
        """Unit vectors, float32, of texts as `self.tokenizer.encode` gives them."""
        return self._encode("text", tokens)

    def caption(self, images: Sequence[ImageLike], decoding: Decoding = GREEDY) -> list[str]:
        """Generated captions of images of any size. Raises ConfigError for a model without a captioning head."""
        return [text for text, _ in self.captions(images, decoding)]

    def captions(self, images: Sequence[ImageLike], decoding: Decoding = GREEDY) -> list[tuple[str, float]]:
        """The same, each with its log-probability."""
        if not isinstance(decoding, Decoding):
            raise TypeError(
                f"decoding: is of type {type(decoding).__name__}; expected GREEDY, Sample or Beam of clipjax.generate"
            )
        pixels = self._pixels(images)
        captioner = self._captioner(len(pixels), decoding)

        def read() -> Iterator[Batch]:
            for numbers, real in captioner.rows(len(pixels)):
                yield {"image": pixels[numbers], "index": np.where(real, numbers, -1).astype(np.int32)}

        batches = CachedBatches(read, captioner.batch_count(len(pixels)), "caption", "images")
        results = [jax.tree.map(to_host, generated) for generated, _ in captioner.stream(self.params, batches)]
        rows = [(row, logprob) for generated in results for row, logprob in zip(*generated, strict=True)]
        return [(self.tokenizer.decode(row), float(logprob)) for row, logprob in rows[: len(pixels)]]

    def _captioner(self, images: int, decoding: Decoding) -> Captioner:
        size = self._batch_size(images)
        if (size, decoding) not in self._captioners:
            self._captioners[size, decoding] = Captioner(self.run.model, self.mesh, size, self.tokenizer, decoding)
        return self._captioners[size, decoding]

    def _encoder(self, rows: int) -> Encoder:
        size = self._batch_size(rows)
        if size not in self._encoders:
            self._encoders[size] = Encoder(self.run.model, self.mesh, size, self.encoder.features)
        return self._encoders[size]

    def _batch_size(self, rows: int) -> int:
        """The evaluation's. For fewer rows, the next power of two: one image must not cost what a full batch does."""
        return min(self.encoder.batch_size, 1 << max(rows - 1, 0).bit_length())

    def _pixels(self, images: Sequence[ImageLike]) -> np.ndarray:
        return given.pixels(images, self.run.model.image.image_size, self.run.data.resize)

    def _encode(self, kind: Side, rows: np.ndarray) -> np.ndarray:
        encoder = self._encoder(len(rows))

        def read() -> Iterator[Batch]:
            return ({kind: rows[numbers]} for numbers, _ in encoder.rows(len(rows)))

        batches = CachedBatches(read, encoder.batch_count(len(rows)), kind, f"{kind}s")
        results = [to_host(z) for z, _ in encoder.stream(self.params, batches)]
        return np.concatenate(results or [np.empty((0, self.run.model.embed_dim), np.float32)])[: len(rows)]


def mesh_for(trained: config.Mesh) -> Mesh:
    """The mesh of training over the devices of this machine; over `data` alone where its other axes do not fit them."""
    data = trained.data if -1 in (trained.fsdp, trained.tensor) else -1
    try:
        return sharding.make_mesh(replace(trained, data=data))
    except config.ConfigError:
        return sharding.make_mesh(config.Mesh())


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """For `with`: Orbax does not warn that what is opened to be read is only read."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
