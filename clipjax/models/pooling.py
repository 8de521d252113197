"""Poolers: how an image's tokens become its embedding.

The table POOLERS has the functions from all tokens to one vector. CoCa's poolers also give the tokens that a decoder attends to.
"""

from collections.abc import Mapping
from typing import ClassVar

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.config import ImageTower
from clipjax.models.attention import CrossAttention, attend, attention_flops
from clipjax.models.facts import Layout
from clipjax.models.layers import MLP, Layer, LayerNorm, Linear, Scope, normal
from clipjax.models.runner import CHUNKED_POLICIES


class Pooler(Layer):
    """From all tokens of an image to one vector, after the tower's last norm."""

    def __init__(self, cfg: ImageTower, scope: Scope) -> None:
        pass

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        raise NotImplementedError

    @staticmethod
    def flops(cfg: ImageTower, tokens: int) -> int:
        """FLOPs of a forward pass on one image, dot products only. What is computed once for all images does not count."""
        return 0

    @staticmethod
    def kept(policy: str, layout: Layout, cfg: ImageTower, tokens: int) -> int:
        """Bytes kept for the backward pass, of one image."""
        return 0


class MeanPooling(Pooler):
    """The mean of the tokens."""

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        return x.mean(1)


class PatchMean(Pooler):
    """The mean of the patches: the class token, which comes first, is left out (open_clip's avg)."""

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        return x[:, 1:].mean(1)


class AttentionPooling(Pooler):
    """SigLIP's pooling head (2303.15343): a learned probe attends to all tokens, then a residual MLP."""

    TENSOR_AXES: ClassVar = CrossAttention.TENSOR_AXES

    def __init__(self, cfg: ImageTower, scope: Scope) -> None:
        d, heads, std = cfg.width, (cfg.heads, cfg.width // cfg.heads), cfg.width**-0.5
        self.probe = scope.param("probe", normal(std), d)
        self.query = Linear(scope / "query", (d,), heads, std=std)
        self.key_value = Linear(scope / "key_value", (d,), (2, *heads), std=std)
        self.out = Linear(scope / "out", heads, (d,), std=std)
        self.norm = LayerNorm(scope / "norm", d, cfg.norm_eps)
        self.mlp = MLP(scope / "mlp", d, cfg.mlp_dim, cfg.activation, std=(2 * d) ** -0.5, out_std=std)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        query = self.query(self.probe[...].astype(x.dtype)[None, None])  # once for all images
        key, value = jnp.moveaxis(self.key_value(x), 2, 0)
        with jax.named_scope("attention"):
            x = jax.nn.dot_product_attention(jnp.broadcast_to(query, (len(x), *query.shape[1:])), key, value)
        x = self.out(x)
        return (x + self.mlp(self.norm(x)))[:, 0]

    @staticmethod
    def flops(cfg: ImageTower, tokens: int) -> int:
        d = cfg.width
        return pool_flops(1, tokens, d, d) + MLP.flops(1, d, cfg.mlp_dim)

    @staticmethod
    def kept(policy: str, layout: Layout, cfg: ImageTower, tokens: int) -> int:
        return pool_kept(policy, layout, tokens, cfg.width)


POOLERS: Mapping[str, type[Pooler]] = {  # by config.ImageTower.pool, which is also the path of its parameters: image/map/...
    "mean": MeanPooling,
    "avg": PatchMean,
    "map": AttentionPooling,
}


class AttentionalPooler(Layer):
    """CoCa's pooler (2205.01917, section 3.2; its norms as in open_clip): learned queries attend to all tokens. The order of the
    tokens has no effect.
    """

    def __init__(self, scope: Scope, *, queries: int, width: int, context: int, heads: int, eps: float) -> None:
        self.queries = scope.param("queries", normal(1.0), queries, width)
        self.norm_query = LayerNorm(scope / "norm_query", width, eps)
        self.norm_context = LayerNorm(scope / "norm_context", context, eps)
        self.attention = CrossAttention(scope / "attention", width, context, heads, std=width**-0.5, out_std=width**-0.5)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b q d"]:
        query = self.attention.query(self.norm_query(self.queries[...].astype(x.dtype))[None])  # once for all images
        query = einops.repeat(query, "1 q h k -> b h q k", b=len(x))
        return self.attention.out(attend(query, *self.attention.keys(self.norm_context(x))))


def pool_flops(queries: int, tokens: int, context: int, width: int) -> int:
    """FLOPs of attention to an image's tokens, of width `context`: keys and values, scores and weighted values, the output.
    Queries are computed once for all images.
    """
    return 2 * tokens * context * 2 * width + attention_flops(queries, tokens, width) + 2 * queries * width**2


def pool_kept(policy: str, layout: Layout, tokens: int, context: int) -> int:
    """Bytes kept of attention to an image's tokens: their norm in float32, keys and values. In chunks, all is recomputed."""
    return 0 if policy in CHUNKED_POLICIES else 24 * context * layout.rows(tokens) + 6 * layout.bytes(tokens, context)
