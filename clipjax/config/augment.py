"""Random changes of training examples: of the image, once or as several views, and of the caption."""

from dataclasses import dataclass

from clipjax.config.fields import SHARE, Strict, free, require


@dataclass(frozen=True, kw_only=True)
class Augment(Strict, prefix="data.augment"):
    """Random changes of a training image: a crop before it is resized, the others afterwards. Evaluations never use them."""

    crop: float = 1.0  # smallest share of the area that a random resized crop keeps; 1: no crop
    aspect: float = 4 / 3  # largest ratio of the sides of a crop, in either direction
    border: float = 0.0  # white that is added on each side before the crop, as a share of the image: it shifts and shrinks, too
    flip: bool = False  # mirror half of the images left to right; leave it off where captions speak of left and right
    brightness: float = 0.0  # x: brightness is multiplied by a factor drawn from [1 - x, 1 + x]
    contrast: float = 0.0  # the same for the contrast
    saturation: float = 0.0  # the same for the saturation
    hue: float = 0.0  # x: the hue is turned by a share of the circle drawn from [-x, x]
    jitter: float = 1.0  # probability that brightness, contrast, saturation and hue are changed, all four
    gray: float = 0.0  # probability that the image loses its colours
    blur: float = 0.0  # probability of a Gaussian blur, of a standard deviation drawn from [0.1, 2] pixels of the result

    def __post_init__(self) -> None:
        require(0 < self.crop <= 1, self.named("crop"), self.crop, "must lie in (0, 1]")
        require(self.aspect >= 1, self.named("aspect"), self.aspect, "must be at least 1")
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) < 1, self.named(name), getattr(self, name), "must lie in [0, 1)")
        require(0 <= self.hue <= 0.5, self.named("hue"), self.hue, "must lie in [0, 0.5]")
        for name in ("border", "jitter", "gray", "blur"):
            SHARE.require(self.named(name), getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class View(Augment, prefix="data.views"):
    """One of several views of a training image. Terms name it by its place."""

    name: str = free("")  # for the reader


@dataclass(frozen=True, kw_only=True)
class TextAugment(Strict, prefix="data.text_augment"):
    """Changed copies of a caption, word by word (two operations of EDA, 1901.11196). Evaluations never use them."""

    delete: float = 0.1  # share of the words that are left out; one at least stays
    swap: float = 0.1  # share of the words that change places with another word
    count: int = 0  # number of copies

    def __post_init__(self) -> None:
        for name in ("delete", "swap"):
            SHARE.require(self.named(name), getattr(self, name))
        require(self.count >= 0, self.named("count"), self.count, "must not be negative")
