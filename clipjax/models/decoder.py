"""CoCa's captioning head (2205.01917): layers on top of the text tower's that also attend to a picture's tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from clipjax.config import Activation, Model
from clipjax.models.layers import MLP, Cache, CrossAttention, How, LayerNorm, Scope, SelfAttention, normal
from clipjax.models.steps import Step


class CrossBlock(nnx.Module):
    """Cross-attention and an MLP, pre-norm, each added to what came in."""

    def __init__(
        self,
        scope: Scope,
        *,
        width: int,
        context: int,
        heads: int,
        mlp_dim: int,
        activation: Activation,
        eps: float,
        out_std: float,
    ) -> None:
        self.norm1 = LayerNorm(scope / "norm1", width, eps)
        self.norm_context = LayerNorm(scope / "norm_context", context, eps)
        self.attention = CrossAttention(scope / "attention", width, context, heads, std=width**-0.5, out_std=out_std)
        self.norm2 = LayerNorm(scope / "norm2", width, eps)
        self.mlp = MLP(scope / "mlp", width, mlp_dim, activation, std=(2 * width) ** -0.5, out_std=out_std)

    def __call__(self, x: Float[Array, "b t d"], context: Float[Array, "b m c"]) -> Float[Array, "b t d"]:
        return self.see(x, *self.keys(context))

    def keys(self, context: Float[Array, "b m c"]) -> tuple[Float[Array, "b h m k"], Float[Array, "b h m k"]]:
        """All that it needs to know of a picture, once however many tokens are written."""
        return self.attention.keys(self.norm_context(context))

    def see(self, x: Float[Array, "b t d"], key: Array, value: Array) -> Float[Array, "b t d"]:
        x = x + self.attention.see(self.norm1(x), key, value)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nnx.Module):
    """A multimodal layer: causal self-attention, with an MLP of its own in open_clip's form, then a CrossBlock."""

    def __init__(self, scope: Scope, cfg: Model) -> None:
        head, d, out_std = cfg.decoder, cfg.text.width, cfg.text.width**-0.5 * (2 * cfg.decoder.depth) ** -0.5
        shape = dict(width=d, heads=head.heads, mlp_dim=head.mlp_dim, activation=cfg.text.activation, eps=cfg.text.norm_eps)
        self.norm1 = LayerNorm(scope / "norm1", d, cfg.text.norm_eps)
        self.attention = SelfAttention(scope / "attention", d, head.heads, causal=True, std=d**-0.5, out_std=out_std)
        two, hidden = head.mlps == 2, dict(std=(2 * d) ** -0.5, out_std=out_std)
        self.norm2 = LayerNorm(scope / "norm2", d, cfg.text.norm_eps) if two else None
        self.mlp = MLP(scope / "mlp", d, head.mlp_dim, cfg.text.activation, **hidden) if two else None
        self.cross = CrossBlock(scope / "cross", **shape, context=cfg.image.seen[1], out_std=out_std)

    def __call__(
        self, x: Float[Array, "b t d"], context: Float[Array, "b m c"], mask: Bool[Array, "b t t"] | None = None
    ) -> Float[Array, "b t d"]:
        x = x + self.attention(self.norm1(x), mask)
        if self.mlp is not None:
            x = x + self.mlp(self.norm2(x))
        return self.cross(x, context)

    def step(
        self, x: Float[Array, "b n d"], cache: Cache, at: Array, mask: Bool[Array, "b n 1 t"], key: Array, value: Array
    ) -> tuple[Float[Array, "b n d"], Cache]:
        """The same for the tokens at position `at` of n captions, which see their picture's `cross.keys` together."""
        seen, new = self.attention.step(self.norm1(x), cache, at, mask)
        x = x + seen
        if self.mlp is not None:
            x = x + self.mlp(self.norm2(x))
        return self.cross.see(x, key, value), new


class Words(nnx.Module):
    """What a token's last state is met with: a row for each word, as in a table of tokens; else open_clip's initialisation."""

    def __init__(self, scope: Scope, count: int, width: int) -> None:
        self.kernel = scope.param("kernel", normal(width**-0.5), count, width)


class Decoder(nnx.Module):
    def __init__(self, cfg: Model, scope: Scope) -> None:
        head, d = cfg.decoder, cfg.text.width
        self.rows = cfg.text.length + cfg.image.seen[0]  # that a layer works on for each caption
        self.blocks = DecoderBlock((scope / "blocks").stacked(head.depth), cfg)
        self.norm = LayerNorm(scope / "norm", d, cfg.text.norm_eps)
        self.output = None if head.tied else Words(scope / "output", cfg.text.vocab_size, d)
        self.masks = scope.param("masks", normal(0.01), cfg.text.length - 1, d) if head.parallel else None

    def __call__(
        self, states: Float[Array, "b t d"], context: Float[Array, "b m c"], how: How, parallel: Bool[Array, " b"] | None = None
    ) -> Float[Array, "b t-1 d"]:
        """The text tower's states of a caption's tokens, and what is seen of its picture -> a state for each token but the
        last, from which the next one is foreseen (`losses.token_nll`).

        Where `parallel`, from the picture alone: learned states stand in for the text's, and see each other.
        """
        x, mask = states[:, :-1], None
        if parallel is not None:
            x = jnp.where(parallel[:, None, None], self.masks[...].astype(x.dtype), x)
            mask = np.tri(x.shape[1], dtype=bool)[None] | parallel[:, None, None]
        x, context, mask = (a if a is None else how.split(a, self.rows) for a in (x, context, mask))
        return how.join(how.each(self.norm, how.layers(self.blocks, x, context, mask)))

    def keys(self, context: Float[Array, "b m c"]) -> tuple[Float[Array, "L b h m k"], Float[Array, "L b h m k"]]:
        """What every layer needs to know of the pictures."""
        graphdef, stacked = nnx.split(self.blocks)
        return jax.lax.map(lambda weights: nnx.merge(graphdef, weights).cross.keys(context), stacked)

    def step(
        self, x: Float[Array, "b n d"], at: Array, mask: Bool[Array, "b n 1 t"], caches: Any, keys: Any, through: Step
    ) -> tuple[Float[Array, "b n d"], Any]:
        """From the text tower's states at position `at` those from which the next tokens are foreseen: `through` the blocks."""
        x, caches = through(x, caches, at, mask, keys)
        return self.norm(x), caches
