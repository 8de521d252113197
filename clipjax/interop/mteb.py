"""MTEB, and with it the image benchmarks MIEB, evaluates a workdir as it is: `mteb.evaluate(Model("runs/emoji"), tasks)`.

The towers run in JAX as in `clipjax eval`; what is done with their vectors is MTEB's. Needs the extra `interop`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from mteb.models.abs_encoder import AbsEncoder  # pyright: ignore[reportMissingImports]  (of the extra `interop`)
from mteb.models.model_meta import ModelMeta, ScoringFunction  # pyright: ignore[reportMissingImports]

import clipjax
from clipjax.evals.store import checksum


class Model(AbsEncoder):
    """A run as the encoder that MTEB calls."""

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, **kwargs: Any) -> None:
        """`model_name` is RUN or RUN@STEP. The other arguments are MTEB's, and change nothing: the devices are JAX's.

        Raises ConfigError where there is no such run.
        """
        self.run = clipjax.load(model_name)
        weights = checksum(self.run.params, self.run.mesh)[:12]
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"clipjax/{self.run.name}",
                "revision": f"step-{self.run.step}-{weights}",  # by which MTEB finds results that it has
                "modalities": ["image", "text"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": self.run.run.model.embed_dim,
                "max_tokens": self.run.run.model.text.length,
                "framework": ["JAX"],
            }
        )

    def encode(self, inputs: Iterable[Mapping[str, Any]], **kwargs: Any) -> Float[np.ndarray, "n e"]:
        """A vector for each example: its image's, its text's, or the sum of both, as MTEB's own CLIP models have it.

        `inputs` are batches with `image`, `text` or both. The other arguments say of which task they are.
        """
        return np.concatenate([self._of_batch(batch) for batch in inputs])

    def _of_batch(self, batch: Mapping[str, Any]) -> Float[np.ndarray, "b e"]:
        encoders = {"image": self.run.encode_image, "text": self.run.encode_text}
        return np.sum([encode(batch[kind]) for kind, encode in encoders.items() if kind in batch], axis=0)
