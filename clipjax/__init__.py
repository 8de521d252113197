"""clipjax trains CLIP-style image-text models with JAX on TPU and GPU meshes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipjax.evals.loaded import Loaded

__version__ = "0.2.0"


def load(run: str) -> "Loaded":
    """The model of `RUN` or `RUN@STEP`, for `encode_image(images)` and `encode_text(texts)`: unit vectors, float32 [n, e]."""
    from clipjax.evals.loaded import Loaded  # here: `import clipjax` and `clipjax --help` stay instant

    return Loaded(str(run))
