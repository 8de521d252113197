"""The text tower: a transformer. It can be CLIP's (causal, pooled at the end token), SigLIP's (bidirectional, pooled at the last
token) or CoCa's (causal, pooled at a class token that comes last: it attends to all others, and none to it)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from clipjax.config import TextTower
from clipjax.config.towers import held_layers, locked_layers
from clipjax.models import lora
from clipjax.models.block import Block
from clipjax.models.facts import BlockShape, Layout, TowerFacts
from clipjax.models.layers import LayerNorm, Linear, Scope, normal
from clipjax.models.runner import LookUp, Runner, look_up
from clipjax.models.steps import Step


class TextTransformer(nnx.Module):
    """From token ids [b, t] to embeddings [b, e], not normalised."""

    def __init__(self, cfg: TextTower, scope: Scope) -> None:
        self.cfg = cfg
        self.dtype = scope.dtype
        d = cfg.width
        # The standard deviations are CLIP's (openai/CLIP model.py `initialize_parameters`).
        self.tokens = scope.param("tokens", normal(0.02), cfg.vocab_size, d)
        self.class_token = scope.param("class_token", normal(0.01), d) if cfg.pool == "cls" else None
        self.positions = scope.param("positions", normal(0.01), cfg.positions, d)
        shape = dict(width=d, depth=cfg.depth, heads=cfg.heads, mlp_dim=cfg.mlp_dim)
        blocks = (scope / "blocks").stacked(cfg.depth, cfg.lora)
        self.blocks = Block(blocks, **shape, activation=cfg.activation, eps=cfg.norm_eps, causal=cfg.causal)
        self.norm = LayerNorm(scope / "norm", d, cfg.norm_eps)
        if cfg.embed_dim is None:
            self.projection = None
        else:
            self.projection = Linear(scope / "projection", (d,), (cfg.embed_dim,), std=d**-0.5, bias=cfg.projection_bias)

    @jax.named_scope("text")
    def __call__(
        self, tokens: Int[Array, "b t"], runner: Runner, states: bool = False, features: bool = False
    ) -> tuple[Float[Array, "b e"], Float[Array, "b t d"] | None, Float[Array, "b d"] | None]:
        """Token ids -> embeddings, not normalised. With `states`, also each token's state after the last layer; with `features`,
        vectors before the projection.
        """
        x, mask, count = self.embed(tokens, look_up=runner.placement.look_up), None, len(tokens)
        if self.class_token is not None:
            last = jnp.broadcast_to(self.class_token[...] + self.positions[...][-1], (len(x), 1, self.cfg.width))
            x, mask = jnp.concatenate([x, last.astype(self.dtype)], axis=1), self.mask(tokens)
        x, tokens = (runner.to_chunks(a, self.cfg.positions) for a in (x, tokens))
        mask = None if mask is None else runner.to_chunks(mask, self.cfg.positions)
        x = runner.layers(self.blocks, x, mask, locked=locked_layers(self.cfg))
        pool = functools.partial(TextTransformer.pool, features=features)
        z, feature = runner.from_chunks(runner.around_layers(pool, self, x, tokens), count)
        return z, runner.from_chunks(x[:, :, : self.cfg.length], count) if states else None, feature

    def embed(self, tokens: Int[Array, "b t"], start: int | Array = 0, look_up: LookUp = look_up) -> Float[Array, "b t d"]:
        """The first layer's input, of tokens at positions `start` and after."""
        positions = jax.lax.dynamic_slice_in_dim(self.positions[...], start, tokens.shape[1])
        return (look_up(self.tokens[...], tokens) + positions[None]).astype(self.dtype)

    def step(
        self, tokens: Int[Array, "b n t"], at: Array, caches: Any, layer_step: Step
    ) -> tuple[Float[Array, "b n d"], Any, Bool[Array, "1 1 1 t-1"]]:
        """The states of the tokens at position `at` of n captions an image, the caches with these tokens, and the mask of the
        positions up to `at`. Caches have all positions but the last. A caption is generated from left to right, so every token
        up to `at` is a real one, not padding.
        """
        one = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=2)
        x = self.embed(one.reshape(-1, 1), at).reshape(*one.shape[:2], self.cfg.width)
        mask = past = (jnp.arange(tokens.shape[2] - 1) <= at)[None, None, None]
        if self.cfg.legacy_mask:
            real = jnp.roll(tokens != 0, 1, axis=2).at[..., 0].set(True)[..., :-1]
            mask = past & real[:, :, None]
        return *layer_step(x, caches, at, mask, ()), past

    def mask(self, tokens: Int[Array, "b t"]) -> Bool[Array, "b t+1 t+1"]:
        """True where a position, the class token's included, may attend to another: to itself and earlier ones, not to padding.

        The legacy mask (open_clip 3.3, transformer.py `_build_additive_mask`) finds padding by its id, 0, and is one position
        late: the class token attends to the first padding token, and to itself only if there is no padding.
        """
        first = jnp.ones((len(tokens), 1), bool)
        if self.cfg.legacy_mask:
            real = jnp.concatenate([first, tokens != 0], axis=1)
        else:
            real = jnp.concatenate([np.arange(tokens.shape[1])[None] < lengths(tokens)[:, None], first], axis=1)
        return jnp.asarray(np.tri(self.cfg.positions, dtype=bool)[None] & real[:, None])

    def pool(
        self, x: Float[Array, "b t d"], tokens: Int[Array, "b t"], features: bool
    ) -> tuple[Float[Array, "b e"], Float[Array, "b d"] | None]:
        if self.cfg.pool == "eot":  # the causal mask hides the padding after it
            x = jnp.take_along_axis(x, lengths(tokens)[:, None, None] - 1, axis=1)[:, 0]
        elif self.cfg.pool == "eos":
            x = jnp.take_along_axis(x, (tokens == self.cfg.eos_id).argmax(-1)[:, None, None], axis=1)[:, 0]
        else:
            x = x[:, -1]
        x = self.norm(x)
        return x if self.projection is None else self.projection(x), x if features else None


def lengths(tokens: Int[Array, "b t"]) -> Int[Array, " b"]:
    """The number of real tokens of each text. The last of them is the end token, which has the highest id."""
    return tokens.argmax(-1) + 1


def facts(cfg: TextTower) -> TowerFacts:
    """The facts of the text tower, for one text."""
    layer = BlockShape(cfg.positions, cfg.width, cfg.heads, cfg.mlp_dim, cfg.activation, cfg.lora, cfg.pool == "cls")
    return TowerFacts(
        flops=cfg.depth * Block.flops(layer) + 2 * cfg.width * (cfg.embed_dim or 0),
        depth=cfg.depth,
        held=held_layers(cfg),
        tokens=layer.tokens,
        layer_weights=Block.weights(layer),
        kept=functools.partial(_kept, held_layers(cfg), layer),
        tensor_sizes={"heads": cfg.heads, "mlp_dim": cfg.mlp_dim},
        adapters=cfg.depth * lora.flops(layer),
        after_blocks=frozenset({"norm", "projection"}),
        per_caption=True,
    )


def _kept(depth: int, layer: BlockShape, policy: str, layout: Layout) -> int:
    return math.ceil(depth * Block.kept(policy, layout, layer))
