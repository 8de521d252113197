"""The towers' part of a configuration: image and text transformers of published sizes, and low-rank adapters of their kernels."""

from dataclasses import dataclass
from typing import Any, Literal

from clipjax.config.fields import COUNT, POSITIVE, Strict, bounded, check_bounds, require

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]

# Width, depth, MLP width and heads of the sizes that the literature names (Zhai et al. 2106.04560, table 2; So400m: 2305.13035;
# gopt: SigLIP 2's giant, 2502.14786).
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
    "gopt": (1536, 40, 6144, 16),
}


def size(name: str) -> dict[str, Any]:
    """`size("B")`: the width, depth, mlp_dim and heads of a published size, as keyword arguments for a tower."""
    require(name in SIZES, "size", name, f"use one of {', '.join(SIZES)}")
    return dict(zip(("width", "depth", "mlp_dim", "heads"), SIZES[name], strict=True))


def _merged(*fields: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of all; the last ones win."""
    return {name: value for part in fields for name, value in part.items()}


def _size_and_patch(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The shape of "B/16". Every size was published with several patches (B/32 and B/16, CLIP L/14 and SigLIP L/16), so there
    is no default.
    """
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
    fits = tower.embed_dim is not None or not tower.projection_bias
    require(fits, f"{name}.projection_bias", tower.projection_bias, f"needs {name}.embed_dim: there is no projection")
    require(tower.width % tower.heads == 0, f"{name}.width", tower.width, f"must be a multiple of heads = {tower.heads}")
    if tower.unlock is not None:
        fits = 0 <= tower.unlock <= tower.depth
        require(fits, f"{name}.unlock", tower.unlock, f"must be a number of layers: 0 to {name}.depth = {tower.depth}")
        remedy = f"trains nothing of the tower, and {name}.lora its adapters: leave one of them out"
        require(tower.unlock > 0 or tower.lora is None, f"{name}.unlock", tower.unlock, remedy)
    if tower.lora is not None:
        check_bounds(tower.lora, f"{name}.lora")
        kernels = tower.lora.kernels
        distinct = len(kernels) > 0 and len(set(kernels)) == len(kernels)
        require(distinct, f"{name}.lora.kernels", kernels, "must name one kernel or more, each once")


def locked_layers(tower: "ImageTower | TextTower") -> int:
    """How many of the first layers `unlock` leaves as they are, in a tower of which something is trained."""
    return tower.depth - tower.unlock if tower.unlock else 0


def held_layers(tower: "ImageTower | TextTower") -> int:
    """How many layers' activations are in memory at once: of those with a backward pass, and of one where none has one."""
    return tower.depth if tower.unlock is None else max(1, tower.unlock)


KernelName = Literal["attention/qkv", "attention/out", "mlp/up", "mlp/down"]


@dataclass(frozen=True, kw_only=True)
class Lora(Strict, prefix="lora"):
    """Low-rank adapters of a tower's layers (LoRA, 2106.09685): x W + alpha / rank * x A B. They are all that is trained of the
    tower; with `unlock`, those of the last layers. Queries, keys and values have an A and a B each. Who reads the run gets
    W + alpha / rank * A B.
    """

    rank: int = bounded(COUNT, 8)  # columns of A and rows of B
    alpha: float = bounded(POSITIVE, 16.0)  # alpha / rank is the factor on A B
    kernels: tuple[KernelName, ...] = ("attention/qkv", "attention/out")  # the kernels of a layer that have adapters


@dataclass(frozen=True, kw_only=True)
class ImageTower(Strict, prefix="model.image"):
    """A vision transformer. The defaults are CLIP's; `siglip` gives SigLIP's."""

    # Side of the square input, pixels. Pixels at the right and at the bottom that fill no patch are not seen.
    image_size: int = 224
    patch_size: int = 16  # side of a patch, pixels
    width: int = 768  # width of a token
    depth: int = 12  # number of layers
    heads: int = 12  # attention heads of a layer
    mlp_dim: int = 3072  # width inside the MLP of a layer
    embed_dim: int | None = 512  # width of the embedding; None: no projection, the tower's own width
    projection_bias: bool = False  # a bias in the projection to the embedding
    # From tokens to one vector: the class token (`cls`), the mean of the patches, without a class token (`mean`) or beside one
    # (`avg`, CLIPA in open_clip), an attention-pooling head (`map`, SigLIP), or CoCa's poolers: a second one on top of the
    # first's outputs (`cascade`, the paper's choice), beside it (`parallel`), or the first output of a single one (`single`,
    # open_clip's).
    pool: Literal["cls", "mean", "avg", "map", "cascade", "parallel", "single"] = "cls"
    norm_pooled: bool = False  # with pool = "mean" or "avg": the last LayerNorm comes after the mean (CLIPA)
    queries: int = 256  # outputs of CoCa's first pooler, which a decoder attends to
    pool_heads: int = 8  # attention heads of CoCa's poolers, which are as wide as the embedding
    positions: Literal["learned", "sincos2d"] = "learned"  # position embeddings: learned, or fixed sines and cosines
    pre_norm: bool = True  # a LayerNorm before the first layer (CLIP)
    patch_bias: bool = False  # a bias in the patch embedding
    activation: Activation = "gelu"  # activation of the MLPs
    norm_eps: float = 1e-5  # epsilon of the LayerNorms
    patch_dropout: float = 0.0  # share of patches dropped in training (FLIP, 2212.00794)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # subtracted from red, green, blue in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)  # red, green and blue are then divided by these
    lora: Lora | None = None  # low-rank adapters, which are then all that is trained of the tower; None: it has none
    unlock: int | None = None  # train the last layers only, so many, and what follows them; 0: nothing of the tower; None: all

    def __post_init__(self) -> None:
        _check_tower(self, "model.image")
        for part in ("image_size", "patch_size", "queries", "pool_heads"):
            require(getattr(self, part) > 0, f"model.image.{part}", getattr(self, part), "must be positive")
        remedy = f"must be at least model.image.patch_size = {self.patch_size}"
        require(self.image_size >= self.patch_size, "model.image.image_size", self.image_size, remedy)
        fits = self.pool in ("mean", "avg") or not self.norm_pooled
        require(fits, "model.image.norm_pooled", self.norm_pooled, "applies to the means of model.image.pool = mean and avg")
        require(0 <= self.patch_dropout < 1, "model.image.patch_dropout", self.patch_dropout, "must lie in [0, 1)")
        require(min(self.std) > 0, "model.image.std", self.std, "must be positive: colours are divided by these")
        fits = self.positions == "learned" or self.width % 4 == 0
        require(fits, "model.image.width", self.width, "must be a multiple of 4 for sincos2d positions")
        if self.attentional:
            width, heads = self.embed_dim or 0, self.pool_heads
            require(width > 0, "model.image.embed_dim", None, "set it: it is the width of model.image.pool's poolers")
            remedy = f"must divide model.image.embed_dim = {width}"
            require(width % heads == 0, "model.image.pool_heads", heads, remedy)
            least = 2 if self.pool == "single" else 1
            require(self.queries >= least, "model.image.queries", self.queries, f"must be at least {least}")

    @property
    def side(self) -> int:
        """Patches in a row and in a column."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def class_token(self) -> bool:
        """Whether a class token comes before the patches."""
        return self.pool in ("cls", "avg", "single")

    @property
    def attentional(self) -> bool:
        """Whether CoCa's attentional poolers pool it."""
        return self.pool in ("cascade", "parallel", "single")

    @property
    def pooled_width(self) -> int:
        """The width of an image's vector before the projection."""
        return self.embed_dim or self.width if self.attentional else self.width

    @property
    def context(self) -> tuple[int, int]:
        """The number of an image's tokens that a decoder attends to, without patch dropout, and their width."""
        if not self.attentional:
            return self.patches, self.width
        return self.queries - (self.pool == "single"), self.embed_dim or self.width

    @classmethod
    def clip(cls, name: str, **changes: Any) -> "ImageTower":
        """`ImageTower.clip("B/16")`: a published CLIP tower."""
        shape = _size_and_patch(name, changes)
        embed_dim = {"B": 512, "L": 768, "H": 1024, "g": 1024, "G": 1280}.get(name.partition("/")[0], shape["width"])
        return cls(**_merged(shape, dict(embed_dim=embed_dim), changes))

    @classmethod
    def siglip(cls, name: str, **changes: Any) -> "ImageTower":
        """`ImageTower.siglip("B/16")`: a published SigLIP tower."""
        half = (0.5, 0.5, 0.5)
        family = dict(embed_dim=None, pool="map", pre_norm=False, patch_bias=True, norm_eps=1e-6, mean=half, std=half)
        return cls(**_merged(_size_and_patch(name, changes), family, changes))

    @classmethod
    def coca(cls, name: str, **changes: Any) -> "ImageTower":
        """`ImageTower.coca("B/18")`: a CoCa tower, at 288 px and as wide as its embedding (2205.01917)."""
        shape = _size_and_patch(name, changes)
        family = dict(image_size=288, embed_dim=shape["width"], pool="cascade", pool_heads=shape["heads"], pre_norm=False)
        return cls(**_merged(shape, family, dict(patch_bias=True), changes))


@dataclass(frozen=True, kw_only=True)
class TextTower(Strict, prefix="model.text"):
    """A text transformer. The defaults are CLIP's; `siglip` gives SigLIP's."""

    length: int = 77  # tokens a caption, padding and special tokens included
    vocab_size: int = 49408  # number of token vectors; the tokenizer may have fewer tokens
    width: int = 512  # width of a token
    depth: int = 12  # number of layers
    heads: int = 8  # attention heads of a layer
    mlp_dim: int = 2048  # width inside the MLP of a layer
    embed_dim: int | None = 512  # width of the embedding; None: no projection, the tower's own width
    projection_bias: bool = False  # a bias in the projection to the embedding
    causal: bool = True  # a token attends to itself and to those before it only
    # From tokens to one vector: the end-of-text token, which has the highest id (`eot`) or is the first with the id `eos_id`
    # (`eos`), the last position whatever it holds (`last`), or a learned class token after the last position (`cls`, CoCa).
    pool: Literal["eot", "eos", "last", "cls"] = "eot"
    eos_id: int = 2  # with pool = "eos": the id of the tokenizer's end-of-text token
    legacy_mask: bool = False  # with pool = "cls": open_clip's mask of padding, which is shifted by a token; for its weights
    activation: Activation = "gelu"  # activation of the MLPs
    norm_eps: float = 1e-5  # epsilon of the LayerNorms
    lora: Lora | None = None  # low-rank adapters, which are then all that is trained of the tower; None: it has none
    unlock: int | None = None  # train the last layers only, so many, and what follows them; 0: nothing of the tower; None: all

    def __post_init__(self) -> None:
        _check_tower(self, "model.text")
        require(self.length >= 3, "model.text.length", self.length, "must be at least 3 (start, a token, end)")
        require(
            self.vocab_size > 3, "model.text.vocab_size", self.vocab_size, "must leave room for tokens beside the special ones"
        )
        remedy = f"must be an id below model.text.vocab_size = {self.vocab_size}"
        require(0 <= self.eos_id < self.vocab_size, "model.text.eos_id", self.eos_id, remedy)
        fits = self.pool == "cls" or not self.legacy_mask
        require(fits, "model.text.legacy_mask", self.legacy_mask, "applies to the class token of model.text.pool = cls")

    @property
    def positions(self) -> int:
        """Rows of a layer's input: the tokens, and a class token after them."""
        return self.length + (self.pool == "cls")

    @classmethod
    def clip(cls, name: str, **changes: Any) -> "TextTower":
        """`TextTower.clip("B")`: CLIP's text tower beside an image tower of that size: two thirds of its width."""
        width = {"B": 512, "L": 768, "H": 1024, "g": 1024, "G": 1280}.get(name) or size(name)["width"]
        shape = dict(width=width, depth={"H": 24, "g": 24, "G": 32}.get(name, 12), heads=width // 64, mlp_dim=4 * width)
        return cls(**_merged(shape, dict(embed_dim=width), changes))

    @classmethod
    def siglip(cls, name: str, **changes: Any) -> "TextTower":
        """`TextTower.siglip("B")`: SigLIP's text tower, of the image tower's size."""
        family = dict(length=64, vocab_size=32000, embed_dim=size(name)["width"], projection_bias=True, norm_eps=1e-6)
        return cls(**_merged(size(name), family, dict(causal=False, pool="last"), changes))

    @classmethod
    def coca(cls, name: str, **changes: Any) -> "TextTower":
        """`TextTower.coca("B")`: CoCa's unimodal layers, 12 of the image tower's width."""
        family = dict(depth=12, length=76, vocab_size=64000, embed_dim=size(name)["width"], pool="cls")
        return cls(**_merged(size(name), family, changes))
