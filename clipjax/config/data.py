"""The input's part of a configuration: dataset, augmentation, workers and tokenizer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from clipjax.config.fields import TAGGED, Strict, free, require


@dataclass(frozen=True, kw_only=True)
class Augment(Strict):
    """What is done to a training picture before it is resized. Evaluation never augments."""

    crop: float = 1.0  # smallest share of the area a random resized crop keeps; 1: no crop
    aspect: float = 4 / 3  # largest ratio of the sides of a crop, in either direction
    flip: bool = False  # mirror half of the pictures left to right; off where names speak of left and right
    brightness: float = 0.0  # each a factor drawn from [1 - x, 1 + x]
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.crop <= 1, "data.augment.crop", self.crop, "must lie in (0, 1]")
        require(self.aspect >= 1, "data.augment.aspect", self.aspect, "must be at least 1")
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) < 1, f"data.augment.{name}", getattr(self, name), "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Data(Strict):
    """Where pictures and captions come from: `emoji`, `tfds:NAME[/CONFIG][:VERSION]` or `tsv:FILE`."""

    spec: str = "emoji"
    split: str = "train"
    image_field: str | None = None  # None: the only image feature
    text_field: str | None = None  # None: `caption`, the only text feature, or the class names of the only label
    # K: the main caption and K - 1 others, drawn at each visit; an example that has fewer shows some twice. 1: any one, drawn
    captions_per_image: int = 1
    # caption: examples whose main captions are equal, but for case, punctuation and white space, share an id. The losses then
    # do not hold them against each other
    ids: Literal["caption"] | None = None
    teacher: str | None = None  # an .npz that `clipjax embed` wrote of these examples, for a distillation term
    resize: Literal["squash", "crop"] = "squash"  # to a square: by both sides, or by the shorter side and a centre crop
    augment: Augment = Augment()
    workers: int = free(4)  # that read, decode and augment, on each host
    worker_kind: Literal["threads", "processes"] = free("threads")  # processes where Python work outweighs decoding

    def __post_init__(self) -> None:
        require(self.captions_per_image >= 1, "data.captions_per_image", self.captions_per_image, "must be at least 1")
        require(self.workers >= 1, "data.workers", self.workers, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class BPE(Strict):
    """A byte-level BPE of at most model.text.vocab_size tokens, trained on the run's own captions."""

    kind: Literal["bpe"] = "bpe"
    lowercase: bool = True


@dataclass(frozen=True, kw_only=True)
class TokenizerFile(Strict):
    """A tokenizer.json of Hugging Face tokenizers."""

    path: str
    kind: Literal["file"] = "file"


Tokenizer = Annotated[BPE | TokenizerFile, TAGGED]
