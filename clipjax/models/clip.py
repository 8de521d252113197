"""Two towers, a captioning head, the scalars of the loss, and how their parameters are made and bound."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from clipjax.config import Decoder as Head
from clipjax.config import Model, TextTower
from clipjax.models.decoder import Decoder
from clipjax.models.layers import WHEREVER, How, Placement, Scope, unit
from clipjax.models.steps import apart, stepper
from clipjax.models.text import TextTransformer
from clipjax.models.vit import ViT

Params = dict[str, Any]  # nested by the parts of a path: params["image"]["blocks"]["norm1"]["scale"]


class Written(NamedTuple):
    """Keys and values of every layer: of n captions a picture as far as they are written, and of the pictures."""

    text: Any  # Cache [L, b, n, h, t, k], or a list of each layer's
    decoder: Any
    picture: Any  # [L, b, h, m, k]


Writer = Callable[[Array, Array, Written], tuple[Float[Array, "b n v"], Written]]


class CLIP(nnx.Module):
    def __init__(self, cfg: Model, key: Key[Array, ""]) -> None:
        self.cfg = cfg
        scope = Scope(key, jnp.dtype(cfg.dtype))
        self.image = ViT(cfg.image, scope / "image")
        self.text = TextTransformer(cfg.text, scope / "text")
        self.decoder = None if cfg.decoder is None else Decoder(cfg, scope / "decoder")
        # jnp.float32: a weakly typed scalar would make the train step compile again after the first update.
        self.log_scale = nnx.Param(jnp.float32(math.log(cfg.init_scale)))
        self.bias = None if cfg.init_bias is None else nnx.Param(jnp.float32(cfg.init_bias))

    def encode_image(
        self, images: UInt8[Array, "b s s 3"], keys: Key[Array, " b"] | None = None, place: Placement = WHEREVER
    ) -> Float[Array, "b e"]:
        """Unit vectors, float32. `keys`, one an example, turns what is random in training on."""
        return unit(self.image(images, keys, self._how(place))[0])

    def encode_text(self, tokens: Int[Array, "b t"], place: Placement = WHEREVER) -> Float[Array, "b e"]:
        """Unit vectors, float32."""
        return unit(self.text(tokens, self._how(place))[0])

    def encode_pairs(
        self,
        images: UInt8[Array, "b s s 3"],
        tokens: Int[Array, "bK t"],
        keys: Key[Array, " b"] | None = None,
        parallel: Bool[Array, " b"] | None = None,
        place: Placement = WHEREVER,
    ) -> tuple[Float[Array, "b e"], Float[Array, "bK e"], Float[Array, "bK t-1 d"]]:
        """`encode_image` and `encode_text`, and from the same pass the states from which each caption's next tokens are
        foreseen: of all but the last position, [bK, t-1, d], to be met with `words` in `losses.token_nll`. K captions a picture,
        one after the other. `parallel`: pictures whose captions are foreseen from them alone.
        """
        how, each = self._how(place), len(tokens) // len(images)
        image, seen = self.image(images, keys, how, seen=True)
        text, states = self.text(tokens, how, states=True)
        seen, parallel = (x if x is None or each == 1 else jnp.repeat(x, each, axis=0) for x in (seen, parallel))
        return unit(image), unit(text), self.decoder(states, seen, how, parallel)

    def begin(self, images: UInt8[Array, "b s s 3"], beams: int, place: Placement = WHEREVER) -> Written:
        """Nothing written yet of `beams` captions for each picture; what every layer sees of the picture is made here, once."""
        _, seen = self.image(images, None, self._how(place), seen=True)

        def room(part: TextTower | Head) -> Any:
            shape = part.depth, len(images), beams, part.heads, self.cfg.text.length - 1, self.cfg.text.width // part.heads
            return apart((jnp.zeros(shape, seen.dtype), jnp.zeros(shape, seen.dtype)), self.cfg.unroll)

        keys = apart(self.decoder.keys(seen), self.cfg.unroll)
        return Written(room(self.cfg.text), room(self.cfg.decoder), keys)

    def writer(self) -> Writer:
        """A function that gives the logits, float32 [b, n, v], of what follows position `at` of tokens [b, n, t], once all before
        it have been given in the same way. `encode_pairs` and `words` give the same of whole captions.
        """
        text, decoder = (stepper(part.blocks, self.cfg.unroll) for part in (self.text, self.decoder))
        words = self.words.astype(jnp.dtype(self.cfg.dtype))

        def step(tokens: Int[Array, "b n t"], at: Array, so_far: Written) -> tuple[Float[Array, "b n v"], Written]:
            x, own, mask = self.text.step(tokens, at, so_far.text, text)
            x, more = self.decoder.step(x, at, mask, so_far.decoder, so_far.picture, decoder)
            logits = jnp.einsum("bnd,vd->bnv", x, words, preferred_element_type=jnp.float32)
            return logits, Written(own, more, so_far.picture)

        return step

    @property
    def words(self) -> Float[Array, "v d"]:
        """The vectors that a token's last state is met with."""
        return (self.text.tokens if self.decoder.output is None else self.decoder.output.kernel)[...]

    def _how(self, place: Placement) -> How:
        remat = "none" if self.cfg.remat == "auto" else self.cfg.remat  # train.remat decides where there is a backward pass
        return How(remat, self.cfg.unroll, place)


def init(cfg: Model, seed: int) -> Params:
    """Fresh float32 parameters: a pure function of the configuration and the seed."""
    return nnx.to_pure_dict(nnx.state(CLIP(cfg, jax.random.key(seed))))


@functools.cache
def _graph(cfg: Model) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: CLIP(cfg, jax.random.key(0))))[0]


def bind(cfg: Model, params: Params) -> CLIP:
    """The model with these parameters, whichever arrays, tracers or shapes they are."""
    return nnx.merge(_graph(cfg), nnx.State(jax.tree.map(nnx.Param, params)))
