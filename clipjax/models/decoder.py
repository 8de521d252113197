"""CoCa's captioning head (2205.01917): layers on top of the text tower's, which also attend to an image's tokens."""

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from clipjax import config
from clipjax.models.attention import AttentionMask, Cache, CrossAttention, SelfAttention
from clipjax.models.block import Block
from clipjax.models.facts import BlockShape, Layout, TowerFacts
from clipjax.models.layers import MLP, Layer, LayerNorm, Scope, normal
from clipjax.models.runner import Runner
from clipjax.models.steps import Step


class CrossBlock(nnx.Module):
    """Cross-attention and an MLP, pre-norm, each added to its input."""

    def __init__(
        self,
        scope: Scope,
        *,
        width: int,
        context: int,
        heads: int,
        mlp_dim: int,
        activation: config.Activation,
        eps: float,
        out_std: float,
    ) -> None:
        self.norm1 = LayerNorm(scope / "norm1", width, eps)
        self.norm_context = LayerNorm(scope / "norm_context", context, eps)
        self.attention = CrossAttention(scope / "attention", width, context, heads, std=width**-0.5, out_std=out_std)
        self.norm2 = LayerNorm(scope / "norm2", width, eps)
        self.mlp = MLP(scope / "mlp", width, mlp_dim, activation, std=(2 * width) ** -0.5, out_std=out_std)

    def __call__(self, x: Float[Array, "b t d"], context: Float[Array, "b m c"]) -> Float[Array, "b t d"]:
        return self.attend(x, *self.keys(context))

    def keys(self, context: Float[Array, "b m c"]) -> tuple[Float[Array, "b h m k"], Float[Array, "b h m k"]]:
        """Keys and values of an image's tokens: computed once for all tokens of a caption."""
        return self.attention.keys(self.norm_context(context))

    def attend(self, x: Float[Array, "b t d"], key: Array, value: Array) -> Float[Array, "b t d"]:
        """The same as a call, but with the image's keys and values, which `keys` has computed."""
        x = x + self.attention.attend(self.norm1(x), key, value)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nnx.Module):
    """A multimodal layer: causal self-attention, with an MLP of its own in open_clip's form, then a CrossBlock."""

    def __init__(self, scope: Scope, cfg: config.Decoder, text: config.TextTower, context: int) -> None:
        d, eps, activation, out_std = text.width, text.norm_eps, text.activation, text.width**-0.5 * (2 * cfg.depth) ** -0.5
        self.norm1 = LayerNorm(scope / "norm1", d, eps)
        self.attention = SelfAttention(scope / "attention", d, cfg.heads, causal=True, std=d**-0.5, out_std=out_std)
        two, mlp = cfg.mlps == 2, dict(std=(2 * d) ** -0.5, out_std=out_std)
        self.norm2 = LayerNorm(scope / "norm2", d, eps) if two else None
        self.mlp = MLP(scope / "mlp", d, cfg.mlp_dim, activation, **mlp) if two else None
        shape = dict(width=d, heads=cfg.heads, mlp_dim=cfg.mlp_dim, context=context)
        self.cross = CrossBlock(scope / "cross", **shape, activation=activation, eps=eps, out_std=out_std)

    def __call__(
        self, x: Float[Array, "b t d"], context: Float[Array, "b m c"], mask: AttentionMask | None = None
    ) -> Float[Array, "b t d"]:
        return self.cross(self._own_mlp(x + self.attention(self.norm1(x), mask)), context)

    def step(
        self, x: Float[Array, "b n d"], cache: Cache, at: Array, mask: Bool[Array, "b n 1 t"], key: Array, value: Array
    ) -> tuple[Float[Array, "b n d"], Cache]:
        """The same for one token of each of n captions, at position `at`. `key` and `value` are their image's `cross.keys`."""
        y, new = self.attention.step(self.norm1(x), cache, at, mask)
        return self.cross.attend(self._own_mlp(x + y), key, value), new

    def _own_mlp(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return x if self.mlp is None or self.norm2 is None else x + self.mlp(self.norm2(x))


class OutputProjection(nnx.Module):
    """A row for each word of the vocabulary: a state times a row is that word's logit. Initialised as open_clip's."""

    def __init__(self, scope: Scope, count: int, width: int) -> None:
        self.kernel = scope.param("kernel", normal(width**-0.5), count, width)


class Decoder(Layer):
    """From the text tower's states and an image's tokens to states that predict the next tokens."""

    TENSOR_AXES: ClassVar = {"output/kernel": -2}  # words

    def __init__(self, cfg: config.Decoder, text: config.TextTower, image: config.ImageTower, scope: Scope) -> None:
        d, (tokens, context) = text.width, image.context
        self.rows = text.length + tokens  # of a layer's inputs, for one caption
        self.blocks = DecoderBlock((scope / "blocks").stacked(cfg.depth), cfg, text, context)
        self.norm = LayerNorm(scope / "norm", d, text.norm_eps)
        self.output = None if cfg.tied else OutputProjection(scope / "output", text.vocab_size, d)
        self.masks = scope.param("masks", normal(0.01), text.length - 1, d) if cfg.parallel else None

    @jax.named_scope("decoder")
    def __call__(
        self,
        states: Float[Array, "b t d"],
        context: Float[Array, "b m c"],
        runner: Runner,
        parallel: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b t-1 d"]:
        """The text tower's states of a caption's tokens, and its image's tokens -> for each token but the last, the state that
        predicts the next one (`losses.token_nll`).

        Where `parallel`, from the image alone: learned mask tokens replace the text's states, and attend to each other.
        """
        x, mask = states[:, :-1], None
        if parallel is not None:
            assert self.masks is not None
            x = jnp.where(parallel[:, None, None], self.masks[...].astype(x.dtype), x)
            mask = jnp.asarray(np.tri(x.shape[1], dtype=bool)[None] | parallel[:, None, None])
        x, context = (runner.to_chunks(a, self.rows) for a in (x, context))
        mask = None if mask is None else runner.to_chunks(mask, self.rows)
        return runner.from_chunks(runner.map_chunks(self.norm, runner.layers(self.blocks, x, context, mask)), len(states))

    def keys(self, context: Float[Array, "b m c"]) -> tuple[Float[Array, "L b h m k"], Float[Array, "L b h m k"]]:
        """Every layer's keys and values of the images' tokens."""
        graphdef, stacked = nnx.split(self.blocks)
        return jax.lax.map(lambda weights: nnx.merge(graphdef, weights).cross.keys(context), stacked)

    def step(
        self, x: Float[Array, "b n d"], at: Array, mask: Bool[Array, "b n 1 t"], caches: Any, keys: Any, layer_step: Step
    ) -> tuple[Float[Array, "b n d"], Any]:
        """The text tower's states at position `at` -> the states that predict the next tokens, and the caches with these."""
        x, caches = layer_step(x, caches, at, mask, keys)
        return self.norm(x), caches


def facts(cfg: config.Decoder, text: config.TextTower, image: config.ImageTower) -> TowerFacts:
    """The facts of the captioning head, with its output projection, for one caption."""
    d, context, tokens = text.width, image.context, text.length - 1
    mlps = cfg.mlps * cfg.mlp_dim  # as one
    layer = BlockShape(tokens, d, cfg.heads, mlps, text.activation, masked=cfg.parallel > 0)
    flops = cfg.depth * (Block.flops(layer) + CrossAttention.flops(tokens, d, context)) + 2 * tokens * d * text.vocab_size
    return TowerFacts(
        flops=flops,
        depth=cfg.depth,
        held=cfg.depth,
        tokens=tokens + context[0],
        layer_weights=Block.weights(layer) + CrossAttention.weights(d, context[1]),
        kept=functools.partial(_kept, cfg.depth, layer, context),
        tensor_sizes={"heads": cfg.heads, "mlp_dim": cfg.mlp_dim},
        after_blocks=frozenset({"norm", "output"}),
        per_caption=True,
    )


def _kept(depth: int, layer: BlockShape, context: tuple[int, int], policy: str, layout: Layout) -> int:
    of_layer = Block.kept(policy, layout, layer) + CrossAttention.kept(policy, layout, layer, context)
    return math.ceil(depth * of_layer + 2 * layout.bytes(*context))  # the context, which all layers share, and its gradient
