"""Poolers: how an image's tokens become its embedding. SigLIP's attention-pooling head, and CoCa's attentional poolers."""

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clipjax.config import ImageTower
from clipjax.models.layers import MLP, CrossAttention, LayerNorm, Linear, Scope, attend, normal


class AttentionPooling(nnx.Module):
    """SigLIP's pooling head (2303.15343): a learned probe attends to all tokens, then a residual MLP."""

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
        x = self.out(jax.nn.dot_product_attention(jnp.broadcast_to(query, (len(x), *query.shape[1:])), key, value))
        return (x + self.mlp(self.norm(x)))[:, 0]


class AttentionalPooler(nnx.Module):
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
