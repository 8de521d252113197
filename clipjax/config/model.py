"""The model's part of a configuration: two towers, a captioning head, heads of the objective's terms, scale and bias."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from clipjax.config.fields import COUNT, POSITIVE, Range, Strict, bounded, check_bounds, free, require
from clipjax.config.towers import ImageTower, TextTower, size

Attention = Literal["exact", "cudnn", "pallas"]
CLASS_ROWS = 1024  # the rows of the class matrix are a multiple of this: any power of two of devices, up to it, divides them


@dataclass(frozen=True, kw_only=True)
class Decoder(Strict, prefix="model.decoder"):
    """A captioning head (CoCa, 2205.01917): causal layers on top of the text tower, as wide, that also attend to the image."""

    depth: int = 12  # number of layers
    heads: int = 12  # attention heads of a layer
    mlp_dim: int = 3072  # width inside an MLP
    mlps: Literal[1, 2] = 1  # MLPs in a layer: at its end (the paper), or also between its two attentions (open_clip)
    tied: bool = False  # the output projection is the text tower's table of token vectors
    parallel: float = 0.0  # share of captions predicted all at once, from mask tokens in place of text (CapPa, 2306.07915: 0.75)

    def __post_init__(self) -> None:
        for part in ("depth", "heads", "mlp_dim"):
            require(getattr(self, part) > 0, f"model.decoder.{part}", getattr(self, part), "must be positive")
        require(0 <= self.parallel <= 1, "model.decoder.parallel", self.parallel, "must lie in [0, 1]")

    @classmethod
    def coca(cls, name: str, **changes: Any) -> "Decoder":
        """`Decoder.coca("B")`: CoCa's multimodal layers, 12 of the image tower's width."""
        own = {part: value for part, value in size(name).items() if part in ("heads", "mlp_dim")}
        return cls(**(dict[str, Any](depth=12) | own | changes))


@dataclass(frozen=True, kw_only=True)
class Head(Strict, prefix="model.heads"):
    """An MLP from a tower's pooled feature, as it is before the projection, to unit vectors that terms compare (SimCLR,
    2002.05709). Each layer but the last has a LayerNorm and the tower's activation; a BatchNorm would mix examples. Only training
    uses heads, and evaluations that name one.
    """

    name: str  # what terms call it, and its part of a parameter's path: heads/NAME/image/up/kernel
    side: Literal["both", "image", "text"] = "both"  # the towers that have it
    depth: int = bounded(Range(1, 4, "must be 1, 2 or 3"), 2)  # linear maps, 1 to 3
    hidden: int = bounded(COUNT, 4096)  # width between the linear maps
    width: int = bounded(COUNT, 256)  # of its vectors
    scale: float | None = bounded(POSITIVE, None)  # its own learned logit scale, at the start; None: the term's or the model's
    predictor: bool = False  # a second MLP on its output, of two linear maps, for the terms that compare predictions

    def __post_init__(self) -> None:
        fits = re.fullmatch(r"[a-z][a-z0-9_]*", self.name) is not None and self.name != "blocks"
        require(fits, "model.heads.name", self.name, "must be lower-case letters, digits and _, and not `blocks`")
        check_bounds(self, f"model.heads.{self.name}")

    @property
    def sides(self) -> tuple[str, ...]:
        """The towers that have it."""
        return ("image", "text") if self.side == "both" else (self.side,)


@dataclass(frozen=True, kw_only=True)
class Classes(Strict, prefix="model.classes"):
    """Vectors of classes, which terms of the objective compare embeddings with. They are for training alone."""

    count: int = bounded(COUNT)  # number of classes: labels are below it
    width: int | None = bounded(COUNT, None)  # numbers of a vector; None: as many as an embedding has

    def __post_init__(self) -> None:
        check_bounds(self, "model.classes")


@dataclass(frozen=True, kw_only=True)
class Model(Strict, prefix="model"):
    """Two towers, a captioning head where there is one, the logit scale and, for the sigmoid loss, the logit bias."""

    image: ImageTower = field(default_factory=ImageTower)  # from images to embeddings
    text: TextTower = field(default_factory=TextTower)  # from captions to embeddings
    decoder: Decoder | None = None  # the captioning head; None: the model has none
    heads: tuple[Head, ...] = ()  # beside the projection to the embedding, for the terms that name them
    classes: Classes | None = None  # vectors of classes for data.labels, in training alone; None: the model has none
    # The towers that it has. Only what is imported has one alone, without scale and bias: training needs both.
    towers: Literal["both", "image", "text"] = "both"
    init_scale: float = 1 / 0.07  # the logit scale t = 1/temperature at the start
    max_scale: float | None = 100.0  # t is clamped to [1, max_scale] after each update; None: never
    init_bias: float | None = None  # the logit bias at the start (SigLIP: -10); None: the model has none
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the towers' arithmetic; weights stay float32
    # What the backward pass recomputes: nothing (`none`), all but products (`dots`), all but the MLPs' first products (`mlp`), or
    # everything (`full`). `auto-memory`: as little as the chips' memory allows, and nothing where that is not known. `auto`: on
    # TPUs the fastest of what fits, by the TPU compiler's own estimates of time; elsewhere as `auto-memory`.
    remat: Literal["auto", "auto-memory", "none", "dots", "mlp", "full"] = free("auto")
    # Tokens of a device that go through a layer at once, with all policies but `none`. None: on TPUs what is fastest for the
    # chip and the towers' shapes by the same estimates; elsewhere 4,096.
    part: int | None = free(None)
    # How a training step computes attention. `exact`: scores are written to memory. `cudnn`: one kernel of NVIDIA's, on GPUs from
    # Ampere on, with towers in bfloat16; it keeps no scores. `pallas`: likewise, kernels for TPUs, where an example's scores fit
    # in vector memory (docs/performance.md). An explicit mask, as of CoCa's class token, is always `exact`.
    attention: Attention = free("exact")
    unroll: int = free(1)  # layers per iteration of the scan; more is faster on CPU and slower to compile

    def __post_init__(self) -> None:
        image, text = (tower.embed_dim or tower.width for tower in (self.image, self.text))
        fits = image == text or self.towers != "both"
        require(fits, "model.text.embed_dim", text, f"must equal the image tower's embedding width {image}")
        if self.decoder is not None:
            require(self.towers == "both", "model.towers", self.towers, "model.decoder needs both")
            heads, width = self.decoder.heads, self.text.width
            require(width % heads == 0, "model.decoder.heads", heads, f"must divide model.text.width = {width}")
            require(self.text.causal, "model.text.causal", False, "model.decoder generates from left to right: it must be causal")
        names = tuple(head.name for head in self.heads)
        require(len(set(names)) == len(names), "model.heads", names, "are their names, which must differ")
        require(not names or self.towers == "both", "model.heads", names, "are for training, which needs both towers")
        scales = {"model.init_scale": self.init_scale}
        scales |= {f"model.heads.{head.name}.scale": head.scale for head in self.heads if head.scale is not None}
        for name, scale in scales.items():
            require(scale > 0, name, scale, "must be positive")
            clamped = self.max_scale is None or 1 <= scale <= self.max_scale
            require(clamped, name, scale, f"must lie in [1, max_scale = {self.max_scale}]")
        require(self.part is None or self.part >= 1, "model.part", self.part, "must be a number of tokens, at least 1, or None")
        require(self.unroll >= 1, "model.unroll", self.unroll, "must be at least 1")

    @property
    def embed_dim(self) -> int:
        tower = self.text if self.towers == "text" else self.image
        return tower.embed_dim or tower.width

    @property
    def class_shape(self) -> tuple[int, int] | None:
        """Of the matrix of class vectors, on any mesh: rows after the last class are zeros, so that devices have equal parts."""
        found = self.classes
        return None if found is None else (-(-found.count // CLASS_ROWS) * CLASS_ROWS, found.width or self.embed_dim)

    def require_towers(self, *names: Literal["image", "text"]) -> None:
        """Raises ConfigError where the model has not all of these towers."""
        for name in names:
            remedy = f"there is no {name} tower; a run of both can start from this one, by init.{self.towers}"
            require(self.towers in ("both", name), "model.towers", self.towers, remedy)
