"""The model's part of a configuration: two towers of published sizes, scale and bias."""

from dataclasses import dataclass, field
from typing import Any, Literal

from clipjax.config.fields import Strict, free, require

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]

# Width, depth, MLP width and heads by the field's names (Zhai et al. 2106.04560, table 2; So400m: 2305.13035).
SIZES = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
}


def size(name: str) -> dict[str, int]:
    """`size("B")`: the width, depth, mlp_dim and heads of a published size, as keyword arguments for a tower."""
    require(name in SIZES, "size", name, f"use one of {', '.join(SIZES)}")
    return dict(zip(("width", "depth", "mlp_dim", "heads"), SIZES[name], strict=True))


def _size_and_patch(name: str, changes: dict[str, Any]) -> dict[str, int]:
    """Of "B/16". No size has one published patch (B/32 and B/16, CLIP L/14 and SigLIP L/16), so there is no default."""
    letter, slash, patch = name.partition("/")
    if not slash and "patch_size" in changes:
        return size(letter)
    shape = size(letter)
    require(patch.isdecimal(), "size", name, "must name the patch too, in pixels: as B/16")
    return shape | dict(patch_size=int(patch))


def _check_tower(tower: "ImageTower | TextTower", name: str) -> None:
    for part in ("width", "depth", "heads", "mlp_dim"):
        require(getattr(tower, part) > 0, f"{name}.{part}", getattr(tower, part), "must be positive")
    require(tower.norm_eps >= 0, f"{name}.norm_eps", tower.norm_eps, "must not be negative")
    require(tower.embed_dim is None or tower.embed_dim > 0, f"{name}.embed_dim", tower.embed_dim, "must be positive or None")
    require(tower.width % tower.heads == 0, f"{name}.width", tower.width, f"must be a multiple of heads = {tower.heads}")


@dataclass(frozen=True, kw_only=True)
class ImageTower(Strict):
    """A vision transformer. The defaults are CLIP's; `siglip` gives SigLIP's."""

    image_size: int = 224  # side of the square input, pixels
    patch_size: int = 16  # side of a patch, pixels
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    embed_dim: int | None = 512  # width of the joint space; None: no projection, the tower's own width
    pool: Literal["cls", "mean", "map"] = "cls"  # class token, mean of the patches, or an attention-pooling head
    positions: Literal["learned", "sincos2d"] = "learned"
    pre_norm: bool = True  # a LayerNorm before the first block (CLIP)
    patch_bias: bool = False
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    patch_dropout: float = 0.0  # share of patches dropped in training (FLIP, 2212.00794)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        _check_tower(self, "model.image")
        for part in ("image_size", "patch_size"):
            require(getattr(self, part) > 0, f"model.image.{part}", getattr(self, part), "must be positive")
        remedy = f"must be a multiple of model.image.patch_size = {self.patch_size}"
        require(self.image_size % self.patch_size == 0, "model.image.image_size", self.image_size, remedy)
        require(0 <= self.patch_dropout < 1, "model.image.patch_dropout", self.patch_dropout, "must lie in [0, 1)")
        fits = self.positions == "learned" or self.width % 4 == 0
        require(fits, "model.image.width", self.width, "must be a multiple of 4 for sincos2d positions")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def clip(cls, name: str, **changes: Any) -> "ImageTower":
        """`ImageTower.clip("B/16")`: a published CLIP tower."""
        shape = _size_and_patch(name, changes)
        embed_dim = {"B": 512, "L": 768, "H": 1024, "g": 1024, "G": 1280}.get(name.partition("/")[0], shape["width"])
        return cls(**(shape | dict(embed_dim=embed_dim) | changes))

    @classmethod
    def siglip(cls, name: str, **changes: Any) -> "ImageTower":
        """`ImageTower.siglip("B/16")`: a published SigLIP tower."""
        half = (0.5, 0.5, 0.5)
        family = dict(embed_dim=None, pool="map", pre_norm=False, patch_bias=True, norm_eps=1e-6, mean=half, std=half)
        return cls(**(_size_and_patch(name, changes) | family | changes))


@dataclass(frozen=True, kw_only=True)
class TextTower(Strict):
    """A text transformer. The defaults are CLIP's; `siglip` gives SigLIP's."""

    length: int = 77  # tokens a caption, padding and special tokens included
    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_dim: int = 2048
    embed_dim: int | None = 512
    projection_bias: bool = False
    causal: bool = True
    pool: Literal["eot", "last"] = "eot"  # the end-of-text token, or the last position whatever it holds
    activation: Activation = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_tower(self, "model.text")
        require(self.length >= 3, "model.text.length", self.length, "must be at least 3 (start, a token, end)")
        require(
            self.vocab_size > 3, "model.text.vocab_size", self.vocab_size, "must leave room for tokens beside the special ones"
        )
        fits = self.embed_dim is not None or not self.projection_bias
        require(fits, "model.text.projection_bias", self.projection_bias, "needs model.text.embed_dim: there is no projection")

    @classmethod
    def clip(cls, name: str, **changes: Any) -> "TextTower":
        """`TextTower.clip("B")`: CLIP's text tower beside an image tower of that size: two thirds of its width."""
        width = {"B": 512, "L": 768, "H": 1024, "g": 1024, "G": 1280}.get(name, size(name)["width"])
        shape = dict(width=width, depth={"H": 24, "g": 24, "G": 32}.get(name, 12), heads=width // 64, mlp_dim=4 * width)
        return cls(**(shape | dict(embed_dim=width) | changes))

    @classmethod
    def siglip(cls, name: str, **changes: Any) -> "TextTower":
        """`TextTower.siglip("B")`: SigLIP's text tower, of the image tower's size."""
        family = dict(length=64, vocab_size=32000, embed_dim=size(name)["width"], projection_bias=True, norm_eps=1e-6)
        return cls(**(size(name) | family | dict(causal=False, pool="last") | changes))


@dataclass(frozen=True, kw_only=True)
class Model(Strict):
    """Two towers, the logit scale and, for the sigmoid loss, the logit bias."""

    image: ImageTower = field(default_factory=ImageTower)
    text: TextTower = field(default_factory=TextTower)
    init_scale: float = 1 / 0.07  # the logit scale t = 1/temperature at the start
    max_scale: float | None = 100.0  # t is clamped to [1, max_scale] after each update; None: never
    init_bias: float | None = None  # the logit bias at the start (SigLIP: -10); None: the model has none
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the towers' arithmetic; weights stay float32
    remat: Literal["none", "dots", "full"] = free("none")  # what the backward pass makes again: nothing, all but dots, all
    unroll: int = free(1)  # layers per iteration of the scan; more is faster on CPU and slower to compile

    def __post_init__(self) -> None:
        image = self.image.embed_dim or self.image.width
        text = self.text.embed_dim or self.text.width
        require(image == text, "model.text.embed_dim", text, f"must equal the image tower's embedding width {image}")
        require(self.init_scale > 0, "model.init_scale", self.init_scale, "must be positive")
        clamped = self.max_scale is None or 1 <= self.init_scale <= self.max_scale
        require(clamped, "model.init_scale", self.init_scale, f"must lie in [1, max_scale = {self.max_scale}]")
        require(self.unroll >= 1, "model.unroll", self.unroll, "must be at least 1")

    @property
    def embed_dim(self) -> int:
        return self.image.embed_dim or self.image.width
