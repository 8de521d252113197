"""The input's part of a configuration: dataset, augmentation, workers and tokenizer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from clipjax.config.fields import TAGGED, Strict, free, require


@dataclass(frozen=True, kw_only=True)
class Augment(Strict, prefix="data.augment"):
    """Random changes of a training image before it is resized. Evaluations never use them."""

    crop: float = 1.0  # smallest share of the area that a random resized crop keeps; 1: no crop
    aspect: float = 4 / 3  # largest ratio of the sides of a crop, in either direction
    flip: bool = False  # mirror half of the images left to right; leave it off where captions speak of left and right
    brightness: float = 0.0  # x: brightness is multiplied by a factor drawn from [1 - x, 1 + x]
    contrast: float = 0.0  # the same for the contrast
    saturation: float = 0.0  # the same for the saturation

    def __post_init__(self) -> None:
        require(0 < self.crop <= 1, "data.augment.crop", self.crop, "must lie in (0, 1]")
        require(self.aspect >= 1, "data.augment.aspect", self.aspect, "must be at least 1")
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) < 1, f"data.augment.{name}", getattr(self, name), "must lie in [0, 1)")


def check_spec(spec: str, name: str) -> None:
    """Raises ConfigError for a text that names no dataset. `name`: the field that holds it."""
    kind, _, rest = spec.partition(":")
    remedy = "must be emoji, tfds:NAME[/CONFIG][:VERSION] or tsv:FILE"
    remedy += f"; for this file tsv:{spec}" if spec.endswith(".tsv") else ""
    require(spec == "emoji" or (kind in ("tfds", "tsv") and bool(rest)), name, spec, remedy)


@dataclass(frozen=True, kw_only=True)
class Data(Strict, prefix="data"):
    """Where images and captions come from, and how they are read."""

    spec: str  # `emoji`, `tfds:NAME[/CONFIG][:VERSION]` or `tsv:FILE`
    split: str = "train"  # part of the dataset; a tsv has none
    image_field: str | None = None  # name of the image feature or column; None: the only image feature, `filepath` of a tsv
    # Name of the caption feature or column; None: `caption`, the only text feature, or the class names of the only label; `title`
    # of a tsv.
    text_field: str | None = None
    # 1: at each visit one of the captions at random. K: the main caption and K - 1 random others; if there are fewer, some twice.
    captions_per_image: int = 1
    # `caption`: examples with equal main captions share an id; case, punctuation and white space do not count. Pairs that share
    # an id are no negatives of each other.
    ids: Literal["caption"] | None = None
    teacher: str | None = None  # an .npz that `clipjax embed` wrote of these examples, for a Distillation term
    # To a square: `squash` resizes both sides, `crop` resizes the shorter side and crops the centre.
    resize: Literal["squash", "crop"] = "squash"
    augment: Augment = Augment()  # random changes of training images
    workers: int = free(4)  # number of threads or processes on each host that read, decode and augment
    # `processes` are faster if Python takes more of the time than decoding.
    worker_kind: Literal["threads", "processes"] = free("threads")

    def __post_init__(self) -> None:
        check_spec(self.spec, "data.spec")
        require(self.captions_per_image >= 1, "data.captions_per_image", self.captions_per_image, "must be at least 1")
        require(self.workers >= 1, "data.workers", self.workers, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class BPE(Strict, prefix="tokenizer"):
    """A byte-level BPE of at most model.text.vocab_size tokens, trained on the run's own captions."""

    kind: Literal["bpe"] = "bpe"
    lowercase: bool = True  # captions are changed to lower case


@dataclass(frozen=True, kw_only=True)
class TokenizerFile(Strict, prefix="tokenizer"):
    """A tokenizer.json of Hugging Face tokenizers."""

    path: str  # the tokenizer.json
    kind: Literal["file"] = "file"


Tokenizer = Annotated[BPE | TokenizerFile, TAGGED]
