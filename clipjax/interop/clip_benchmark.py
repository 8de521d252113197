"""CLIP_benchmark evaluates a workdir as it is, by its own code: `python -m clipjax.interop.clip_benchmark eval --pretrained RUN`.

The towers run in JAX as in `clipjax eval`; what is done with their vectors is CLIP_benchmark's. Needs the extra `interop`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import clip_benchmark.models  # pyright: ignore[reportMissingImports]  (of the extra `interop`)
import torch
from clip_benchmark.metrics import zeroshot_classification  # pyright: ignore[reportMissingImports]
from PIL import Image

import clipjax
from clipjax.config import ConfigError
from clipjax.evals import given
from clipjax.evals.loaded import LoadedRun
from clipjax.status import WRONG_USE_STATUS

TYPE = "clipjax"
# Without --no_amp CLIP_benchmark compares vectors in bfloat16. Its readers are forked processes, which are not safe beside JAX's
# threads. Its own name of the output would hold the path of the run.
OPTIONS = ("--model_type", TYPE, "--model", TYPE, "--no_amp", "--num_workers", "0", "--output", "{dataset}_{task}.json")


class Towers(torch.nn.Module):
    """A run as the model that CLIP_benchmark calls. It has no weights in PyTorch."""

    def __init__(self, run: LoadedRun) -> None:
        super().__init__()
        self.run = run

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors, float32 [n, e], of uint8 [n, s, s, 3] as `Fit` makes them."""
        return torch.tensor(self.run.encode_image(list(images.cpu().numpy())), device=images.device)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit vectors, float32 [n, e], of int [n, t] as `Tokens` makes them."""
        return torch.tensor(self.run.encode_tokens(tokens.cpu().numpy()), device=tokens.device)


@dataclass(frozen=True)
class Fit:
    """The run's own preprocessing, of one PIL image. It knows nothing of JAX, so that other processes may have it."""

    size: int
    resize: Literal["squash", "crop"]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """uint8 [s, s, 3]."""
        return torch.from_numpy(given.pixels([image], self.size, self.resize)[0])


@dataclass(frozen=True)
class Tokens:
    """The run's own tokenizer, with its cleaning."""

    run: LoadedRun

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """int32 [n, t]."""
        return torch.from_numpy(self.run.tokenizer.encode(given.texts(texts))[0])


def load(model_name: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu") -> tuple[Towers, Fit, Tokens]:
    """(model, transform, tokenizer) of `pretrained`, which is RUN or RUN@STEP. The other arguments are CLIP_benchmark's.

    Raises ConfigError where there is no such run.
    """
    run = clipjax.load(pretrained)
    return Towers(run), Fit(run.run.model.image.image_size, run.run.data.resize), Tokens(run)


def accuracy(logits: torch.Tensor, labels: torch.Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """What CLIP_benchmark's `accuracy` returns: that of 1.6.2 takes a number from an array of one, which NumPy 2.4 refuses."""
    hits = logits.topk(max(topk)).indices == labels[:, None]
    return [hits[:, :k].sum().item() / len(labels) for k in topk]


def register() -> None:
    """Makes CLIP_benchmark know the model type `clipjax`. To do it twice changes nothing."""
    zeroshot_classification.accuracy = accuracy
    clip_benchmark.models.TYPE2FUNC[TYPE] = load
    if TYPE not in clip_benchmark.models.MODEL_TYPES:
        clip_benchmark.models.MODEL_TYPES.append(TYPE)


def main() -> None:
    """CLIP_benchmark's own command line. Options of the user come after OPTIONS, and so replace them."""
    from clip_benchmark import cli  # pyright: ignore[reportAttributeAccessIssue]  (it takes this file for the package)

    register()
    if sys.argv[1:2] == ["eval"]:
        sys.argv[2:2] = OPTIONS
    try:
        cli.main()
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(WRONG_USE_STATUS)


if __name__ == "__main__":
    main()
