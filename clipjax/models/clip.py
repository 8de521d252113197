"""The model: two towers, a captioning head, terms' heads, scale and bias; how parameters are initialised and bound to it."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from clipjax import config
from clipjax.models import decoder, text, vit
from clipjax.models.decoder import Decoder
from clipjax.models.facts import TowerFacts
from clipjax.models.heads import Heads, Side, TowerOutput
from clipjax.models.layers import Scope, unit
from clipjax.models.runner import DEFAULT_PART, ONE_DEVICE, Placement, Runner
from clipjax.models.steps import make_layer_step, unstack_layers
from clipjax.models.text import TextTransformer
from clipjax.models.vit import ViT

CLASSES = "classes"  # the parameter that holds the class vectors, which only the loss reads
HEADS = "heads"  # the part of the parameters that evaluations read only where they name a head
Params = dict[str, Any]  # nested by the parts of a path: params["image"]["blocks"]["norm1"]["scale"]


class CaptionCache(NamedTuple):
    """Keys and values of every layer: of the tokens generated so far, n captions an image, and of the images' own tokens.

    Each is a pair of arrays with a leading axis of layers, or a list of each layer's pair (`steps.unstack_layers`).
    """

    text: Any  # Cache [L, b, n, h, t, k]
    decoder: Any  # Cache [L, b, n, h, t, k]
    image: Any  # [L, b, h, m, k]


DecodeStep = Callable[[Array, Array, CaptionCache], tuple[Float[Array, "b n v"], CaptionCache]]


class CLIP(nnx.Module):
    """Both towers, the captioning head and the terms' heads where there are some, and the logit scale and bias."""

    def __init__(self, cfg: config.Model, key: Key[Array, ""], attention: config.Attention = "exact") -> None:
        self.cfg = cfg
        scope = Scope(key, jnp.dtype(cfg.dtype), attention)
        self.image = None if cfg.towers == "text" else ViT(cfg.image, scope / "image")
        self.text = None if cfg.towers == "image" else TextTransformer(cfg.text, scope / "text")
        self.decoder = None if cfg.decoder is None else Decoder(cfg.decoder, cfg.text, cfg.image, scope / "decoder")
        self.heads = Heads(cfg, scope / HEADS) if cfg.heads else None
        # jnp.float32: a weakly typed scalar would make the train step compile again after the first update.
        both = cfg.towers == "both"
        self.log_scale = nnx.Param(jnp.float32(math.log(cfg.init_scale))) if both else None
        self.bias = nnx.Param(jnp.float32(cfg.init_bias)) if both and cfg.init_bias is not None else None

    def encode_image(
        self, images: UInt8[Array, "b s s 3"], keys: Key[Array, " b"] | None = None, placement: Placement = ONE_DEVICE
    ) -> Float[Array, "b e"]:
        """Unit vectors, float32. `keys`, one an example, turn on what is random in training. Raises ConfigError without tower."""
        return self.vectors("image", images, placement, keys).embedding

    def encode_text(self, tokens: Int[Array, "b t"], placement: Placement = ONE_DEVICE) -> Float[Array, "b e"]:
        """Unit vectors, float32. Raises ConfigError without tower."""
        return self.vectors("text", tokens, placement).embedding

    def vectors(
        self, side: Side, rows: Array, placement: Placement = ONE_DEVICE, keys: Array | None = None, feature: bool = False
    ) -> TowerOutput:
        """All vectors of images or tokens, from one pass, `keys` as of `encode_image`. `feature`: also before the projection."""
        runner, features = self._runner(placement), feature or self.heads is not None
        tower = functools.partial(self._image_tower, keys=keys) if side == "image" else self._text_tower
        z, _, x = tower(rows, runner=runner, features=features)
        return self._output(side, z, x, runner, feature)

    def encode_pairs(
        self,
        images: UInt8[Array, "bV s s 3"],
        tokens: Int[Array, "bK t"],
        keys: Key[Array, " bV"] | None = None,
        parallel: Bool[Array, " b"] | None = None,
        placement: Placement = ONE_DEVICE,
        views: int = 1,
    ) -> tuple[TowerOutput, TowerOutput, Float[Array, "bK t-1 d"]]:
        """What `vectors` gives of both towers, and the captioning head's states [bK, t-1, d] from the same pass.

        Each state predicts the next token (`losses.token_nll` of the states and `words`). The K captions of an image come one
        after the other, and so do its V views, of which the captioning head sees the first. `parallel`: true for images whose
        captions are predicted from the image alone.
        """
        runner, captions, features = self._runner(placement), len(tokens) * views // len(images), self.heads is not None
        image, context, image_feature = self._image_tower(images, keys, runner, tokens=True, features=features)
        text, states, text_feature = self._text_tower(tokens, runner, states=True, features=features)
        assert context is not None
        assert states is not None
        if views > 1:
            context = context.reshape(-1, views, *context.shape[1:])[:, 0]
        if captions > 1:
            context = jnp.repeat(context, captions, axis=0)
            parallel = None if parallel is None else jnp.repeat(parallel, captions, axis=0)
        vectors = self._output("image", image, image_feature, runner), self._output("text", text, text_feature, runner)
        return *vectors, self._head(states, context, runner, parallel)

    def start_captions(self, images: UInt8[Array, "b s s 3"], beams: int, placement: Placement = ONE_DEVICE) -> CaptionCache:
        """An empty cache for `beams` captions of each image, with every layer's keys and values of the image's tokens."""
        _, context, _ = self._image_tower(images, None, self._runner(placement), tokens=True)
        assert context is not None
        assert self.cfg.decoder is not None

        def empty(part: config.TextTower | config.Decoder) -> Any:
            shape = part.depth, len(images), beams, part.heads, self.cfg.text.length - 1, self.cfg.text.width // part.heads
            return unstack_layers((jnp.zeros(shape, context.dtype), jnp.zeros(shape, context.dtype)), self.cfg.unroll)

        keys = unstack_layers(self._head.keys(context), self.cfg.unroll)
        return CaptionCache(empty(self.cfg.text), empty(self.cfg.decoder), keys)

    def decode_step(self) -> DecodeStep:
        """A function that gives the logits, float32 [b, n, v], of the token after position `at` of tokens [b, n, t].

        Call it for every position, from left to right. The logits equal those of `encode_pairs` and `words` on the full caption.
        """
        text, decoder = (make_layer_step(part.blocks, self.cfg.unroll) for part in (self._text_tower, self._head))
        words = self.words.astype(jnp.dtype(self.cfg.dtype))

        def step(tokens: Int[Array, "b n t"], at: Array, cache: CaptionCache) -> tuple[Float[Array, "b n v"], CaptionCache]:
            x, in_text, mask = self._text_tower.step(tokens, at, cache.text, text)
            x, in_decoder = self._head.step(x, at, mask, cache.decoder, cache.image, decoder)
            logits = jnp.einsum("bnd,vd->bnv", x, words, preferred_element_type=jnp.float32)
            return logits, CaptionCache(in_text, in_decoder, cache.image)

        return step

    @property
    def words(self) -> Float[Array, "v d"]:
        """The output projection: a state of the captioning head times a row is the logit of that token of the vocabulary."""
        return (self._text_tower.tokens if self._head.output is None else self._head.output.kernel)[...]

    def _output(self, side: Side, z: Float[Array, "b e"], x: Array | None, runner: Runner, feature: bool = False) -> TowerOutput:
        of_heads = ({}, {}) if self.heads is None or x is None else self.heads(side, x, runner)
        return TowerOutput(unit(z), *of_heads, unit(x) if feature and x is not None else None)

    @property
    def _image_tower(self) -> ViT:
        self.cfg.require_towers("image")
        assert self.image is not None
        return self.image

    @property
    def _text_tower(self) -> TextTransformer:
        self.cfg.require_towers("text")
        assert self.text is not None
        return self.text

    @property
    def _head(self) -> Decoder:
        assert self.decoder is not None, "a model without a captioning head has no captions"
        return self.decoder

    def _runner(self, placement: Placement) -> Runner:
        # Where there is a backward pass, train.remat has decided.
        remat = "none" if self.cfg.remat.startswith("auto") else self.cfg.remat
        return Runner(remat, self.cfg.unroll, self.cfg.part or DEFAULT_PART, placement)


def facts(cfg: config.Model) -> dict[str, TowerFacts]:
    """The facts of each tower, by its name in a parameter's path and in the configuration."""
    towers = {"image": vit.facts(cfg.image), "text": text.facts(cfg.text)}
    if cfg.towers != "both":
        return {cfg.towers: towers[cfg.towers]}
    return towers if cfg.decoder is None else towers | {"decoder": decoder.facts(cfg.decoder, cfg.text, cfg.image)}


def init(cfg: config.Model, seed: int) -> Params:
    """Fresh float32 parameters: a pure function of the configuration and the seed."""
    key = jax.random.key(seed)
    params = nnx.to_pure_dict(nnx.state(CLIP(cfg, key)))
    if cfg.classes is None or cfg.class_shape is None:
        return params
    drawn = jax.random.normal(jax.random.fold_in(key, zlib.crc32(CLASSES.encode())), cfg.class_shape)
    is_class = jnp.arange(len(drawn))[:, None] < cfg.classes.count
    return params | {CLASSES: jnp.where(is_class, drawn / math.sqrt(cfg.class_shape[1]), 0)}


def without_classes(params: Params) -> Params:
    """The parameters without the class vectors: what the towers and evaluations read."""
    return {part: below for part, below in params.items() if part != CLASSES}


@functools.cache
def _graph(cfg: config.Model, attention: config.Attention) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: CLIP(cfg, jax.random.key(0), attention)))[0]


def bind(cfg: config.Model, params: Params, attention: config.Attention = "exact") -> CLIP:
    """The model with these parameters: arrays, tracers or shapes. `attention`: `cfg.attention` in a training step; all else, as
    an evaluation, runs on any device. Without heads where the parameters have none. Class vectors are no part of it.
    """
    cfg = cfg if HEADS in params else dataclasses.replace(cfg, heads=())
    return nnx.merge(_graph(cfg, attention), nnx.State(jax.tree.map(nnx.Param, without_classes(params))))
