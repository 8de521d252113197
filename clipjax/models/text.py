"""The text tower: a transformer that can be CLIP's (causal, pooled at the end token) or SigLIP's (bidirectional, last token)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clipjax.config import TextTower
from clipjax.models.layers import Block, How, LayerNorm, Linear, Scope, normal


class TextTransformer(nnx.Module):
    def __init__(self, cfg: TextTower, scope: Scope) -> None:
        self.cfg = cfg
        self.dtype = scope.dtype
        d = cfg.width
        # The standard deviations are CLIP's (openai/CLIP model.py `initialize_parameters`).
        self.tokens = scope.param("tokens", normal(0.02), cfg.vocab_size, d)
        self.positions = scope.param("positions", normal(0.01), cfg.length, d)
        shape = dict(width=d, depth=cfg.depth, heads=cfg.heads, mlp_dim=cfg.mlp_dim)
        blocks = (scope / "blocks").stacked(cfg.depth)
        self.blocks = Block(blocks, **shape, activation=cfg.activation, eps=cfg.norm_eps, causal=cfg.causal)
        self.norm = LayerNorm(scope / "norm", d, cfg.norm_eps)
        if cfg.embed_dim is None:
            self.projection = None
        else:
            self.projection = Linear(scope / "projection", (d,), (cfg.embed_dim,), std=d**-0.5, bias=cfg.projection_bias)

    def __call__(self, tokens: Int[Array, "b t"], how: How) -> Float[Array, "b e"]:
        """Token ids [b, t] -> embeddings, not normalised."""
        x = (jnp.take(self.tokens[...], tokens, axis=0) + self.positions[...][None]).astype(self.dtype)
        x, tokens = (how.split(a, self.cfg.length) for a in (x, tokens))
        return how.join(how.each(self.pool, how.layers(self.blocks, x), tokens))

    def pool(self, x: Float[Array, "b t d"], tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
        if self.cfg.pool == "last":
            x = x[:, -1]
        else:  # the end token has the highest id, and what follows it is hidden by the causal mask
            x = jnp.take_along_axis(x, tokens.argmax(-1)[:, None, None], axis=1)[:, 0]
        x = self.norm(x)
        return x if self.projection is None else self.projection(x)
