"""clipjax trains CLIP-style image-text models with JAX on TPU and GPU meshes."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from clipjax.evals.loaded import LoadedRun

__version__ = "0.2.0"


def load(
    run: str,
    dtype: Literal["float32", "bfloat16"] | None = None,
    features: Literal["embedding", "tower"] | tuple[str, ...] = "embedding",
) -> "LoadedRun":
    """The model of `RUN` or `RUN@STEP`, for `encode_image(images)` and `encode_text(texts)`: unit vectors, float32 [n, e].

    `dtype` of the towers' arithmetic, `float32` or `bfloat16`; None: as in training. `features`: the vectors that it gives:
    embeddings, those before the projection, or of the heads of these names as one, whose cosines are the mean of theirs.
    """
    from clipjax import environment  # here: `import clipjax` and `clipjax --help` stay instant

    environment.quiet()
    from clipjax.evals.loaded import LoadedRun

    return LoadedRun(str(run), dtype, features)


def register(
    config_class: type,
    implementation: Callable[..., Any],
    *,
    flops: Callable[..., float] | None = None,
    check: Callable[..., None] | None = None,
) -> None:
    """Adds a config class of yours, for a config file that brings a loss or an evaluation of its own (docs/extending.md).

    `config_class` is a frozen dataclass with a field `kind: Literal["NAME"] = "NAME"`. What it derives from says what it is:

    - `clipjax.config.Term`, a term of the objective. `implementation(term, rows, scale, bias, axis)` returns a
      `clipjax.losses.TermResult`; `flops(term, sizes)` returns what a step costs (`clipjax.losses.Sizes`), and is for
      `clipjax plan`; `check(term, name, model, data)` raises a ConfigError where the model or the data can't serve the term.
    - `clipjax.config.TrainingEvaluation`, an evaluation during training. `implementation` is its class.

    Raises ConfigError for a class that is none of these, and for a kind that another class has. To register a class again from
    the same file replaces it.
    """
    from clipjax.config import ConfigError, Term, TrainingEvaluation  # here: `import clipjax` stays instant
    from clipjax.config.term import Binding

    source = sys._getframe(1).f_code.co_filename
    if isinstance(config_class, type) and issubclass(config_class, Term):
        Term.register(config_class, Binding(implementation, flops, check), source)
    elif isinstance(config_class, type) and issubclass(config_class, TrainingEvaluation):
        TrainingEvaluation.register(config_class, implementation, source)
    else:
        name = getattr(config_class, "__qualname__", repr(config_class))
        bases = "clipjax.config.Term or clipjax.config.TrainingEvaluation"
        raise ConfigError(f"clipjax.register = {name!r}: must be a class that derives from {bases}")
