"""Attention of a sequence to itself (all tokens at once, or token by token with a cache), and to another sequence."""

from typing import ClassVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from clipjax.config import Attention
from clipjax.models import cudnn, tpu_attention
from clipjax.models.facts import BlockShape, Layout
from clipjax.models.layers import Layer, LayerNorm, Linear, Scope

AttentionMask = Bool[Array | np.ndarray, "..."]


@jax.named_scope("attention")
def attend(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b h s k"],
    v: Float[Array, "b h s k"],
    mask: AttentionMask | None = None,
    *,
    causal: bool = False,
    kind: Attention = "exact",
) -> Float[Array, "b t h k"]:
    """Scaled dot-product attention. Scores and softmax are float32, whatever the dtype. `mask` broadcasts to [b, h, t, s]; it is
    true where a query may attend to a key. Without a mask it may attend to all, or, if `causal`, to those up to its own place.

    `kind`: how it is computed. With a mask always as `exact`: cuDNN would read it as numbers, and write their gradient. Without
    one it gives an odd t one row more. Cut that off after what follows: cut off here, the backward pass would keep both.
    """
    if kind == "cudnn" and mask is None:
        return cudnn.attend(q, k, v, causal)
    if causal and mask is None:
        mask = np.tri(q.shape[2], dtype=bool)
    scores = jnp.einsum("bhtk,bhsk->bhts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhts,bhsk->bthk", jax.nn.softmax(scores).astype(v.dtype), v)


# Keys and values of one layer for the tokens generated so far, of n captions an image; 0 at later positions.
Cache = tuple[Float[Array, "b n h t k"], Float[Array, "b n h t k"]]


def attention_flops(queries: int, keys: int, width: int) -> int:
    """FLOPs of a forward pass: scores and weighted values, without the linear maps."""
    return 2 * 2 * queries * keys * width


def _kept_scores(layout: Layout, shape: BlockShape, keys: int, masked: bool = False) -> int:
    """Bytes of one example's scores and weights; cuDNN keeps a number of each query instead."""
    if layout.attention == "cudnn" and not masked:
        return 4 * shape.heads * shape.tokens
    return shape.heads * layout.rows(shape.tokens) * layout.lanes(keys) * (4 + layout.size)


class SelfAttention(Layer):
    """Attention of a sequence's tokens to each other."""

    # heads
    TENSOR_AXES: ClassVar = {"qkv/kernel": -2, "qkv/bias": -2, "qkv/lora_b": -2, "out/kernel": -3, "out/lora_a": -3}

    def __init__(self, scope: Scope, width: int, heads: int, *, causal: bool, std: float, out_std: float) -> None:
        self.causal, self.count = causal, heads
        self.kind: Attention = scope.attention
        self.qkv = Linear(scope / "qkv", (width,), (3, heads, width // heads), std=std)
        self.out = Linear(scope / "out", (heads, width // heads), (width,), std=out_std)

    def __call__(self, x: Float[Array, "b t d"], mask: AttentionMask | None = None) -> Float[Array, "b t d"]:
        """`mask` [b, t, t]: true where a token (axis 1) may attend to another (axis 2). None: all true, or lower-triangular if
        causal.
        """
        by_kernel = self.kind == "pallas" and mask is None and self.qkv.lora_a is None
        if by_kernel and tpu_attention.lanes(x.shape[1], x.shape[2], self.count):
            return self._by_kernel(x)
        mask = None if mask is None else mask[:, None]
        q, k, v = self.heads(x)
        return self.out(attend(q, k, v, mask, causal=self.causal, kind=self.kind))[:, : x.shape[1]]

    def _by_kernel(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The same by a kernel for TPUs, which takes queries, keys and values as one product makes them."""
        assert self.qkv.bias is not None
        kernel, bias = (p[...].astype(x.dtype) for p in (self.qkv.kernel, self.qkv.bias))
        qkv = jnp.einsum("btd,dse->sbte", x, einops.rearrange(kernel, "d s h k -> d s (h k)"))
        y: Array = tpu_attention.attend(qkv, einops.rearrange(bias, "s h k -> s (h k)"), self.count, self.causal)
        return self.out(einops.rearrange(y, "b t (h k) -> b t h k", h=self.count))

    def heads(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b h t k"], ...]:
        """Queries, keys and values."""
        # Three products that each write [b, h, t, k] directly. One fused product has to be split and transposed, which cost a
        # tenth of the step's time on a CPU.
        assert self.qkv.bias is not None
        kernel, bias = (p[...].astype(x.dtype) for p in (self.qkv.kernel, self.qkv.bias))
        parts = tuple(jnp.einsum("btd,dhk->bhtk", x, kernel[:, i]) + bias[i][None, :, None] for i in range(3))
        if self.qkv.lora_a is None or self.qkv.lora_b is None:
            return parts
        a, b = (p[...].astype(x.dtype) for p in (self.qkv.lora_a, self.qkv.lora_b))
        low = jnp.einsum("btd,dsr->sbtr", x, a)
        return tuple(y + self.qkv.factor * jnp.einsum("btr,rhk->bhtk", low[i], b[i]) for i, y in enumerate(parts))

    def step(self, x: Float[Array, "b n d"], cache: Cache, at: Array, mask: Bool[Array, "b n 1 t"]) -> tuple[Array, Cache]:
        """One token of each caption, at position `at`: the attention's output, and the new token's keys and values.

        The cache holds the earlier tokens and is 0 at `at`. It is only read here, so XLA need not copy it.
        """
        q, k, v = (einops.rearrange(y, "b h n k -> b n h k") for y in self.heads(x))
        q, own = q * q.shape[-1] ** -0.5, (jnp.arange(mask.shape[-1]) == at)[None, None, None]
        scores = jnp.einsum("bnhk,bnhtk->bnht", q, cache[0], preferred_element_type=jnp.float32)
        scores = scores + own * jnp.einsum("bnhk,bnhk->bnh", q, k, preferred_element_type=jnp.float32)[..., None]
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)).astype(v.dtype)
        out = jnp.einsum("bnht,bnhtk->bnhk", weights, cache[1]) + (weights * own).sum(-1, keepdims=True) * v
        return self.out(out), (k[..., None, :], v[..., None, :])

    @staticmethod
    def flops(tokens: int, width: int) -> int:
        """FLOPs of a forward pass on one example. Causal attention counts in full, as it is computed."""
        return tokens * 2 * 4 * width**2 + attention_flops(tokens, tokens, width)

    @staticmethod
    def kept(policy: str, layout: Layout, shape: BlockShape) -> float:
        """Bytes kept for the backward pass, of one example."""
        x = layout.bytes(shape.tokens, shape.width)
        if policy == "dots":
            return x + 3 * x / layout.tensor  # its output; queries, keys and values
        if policy != "none":
            return 0
        by_kernel = layout.attention == "pallas" and tpu_attention.lanes(shape.tokens, shape.width, shape.heads)
        scores = 0 if by_kernel and not shape.masked else _kept_scores(layout, shape, shape.tokens, shape.masked)
        norm = LayerNorm.kept(policy, layout, shape.tokens, shape.width)
        return norm + x + (scores + 4 * x) / layout.tensor


class CrossAttention(Layer):
    """Attention of one sequence's tokens to those of another."""

    TENSOR_AXES: ClassVar = {"query/kernel": -2, "query/bias": -2, "key_value/kernel": -2, "key_value/bias": -2, "out/kernel": -3}

    def __init__(self, scope: Scope, width: int, context: int, heads: int, *, std: float, out_std: float) -> None:
        shape = heads, width // heads
        self.kind: Attention = scope.attention
        self.query = Linear(scope / "query", (width,), shape, std=std)
        self.key_value = Linear(scope / "key_value", (context,), (2, *shape), std=context**-0.5)
        self.out = Linear(scope / "out", shape, (width,), std=out_std)

    def __call__(self, x: Float[Array, "b t d"], context: Float[Array, "b s c"]) -> Float[Array, "b t d"]:
        return self.attend(x, *self.keys(context))

    def keys(self, context: Float[Array, "b s c"]) -> tuple[Float[Array, "b h s k"], Float[Array, "b h s k"]]:
        """Keys and values of the other sequence."""
        key, value = einops.rearrange(self.key_value(context), "b s two h k -> two b h s k")
        return key, value

    def attend(self, x: Float[Array, "b t d"], key: Array, value: Array) -> Float[Array, "b t d"]:
        """The same as a call, but with the other sequence's keys and values, which `keys` has computed."""
        query = einops.rearrange(self.query(x), "b t h k -> b h t k")
        return self.out(attend(query, key, value, kind=self.kind))[:, : x.shape[1]]

    @staticmethod
    def flops(tokens: int, width: int, context: tuple[int, int]) -> int:
        """FLOPs of a forward pass on one example. `context`: tokens and width of the other sequence."""
        keys_values = 2 * context[0] * context[1] * 2 * width
        return tokens * 2 * 2 * width**2 + keys_values + attention_flops(tokens, context[0], width)

    @staticmethod
    def weights(width: int, context: int) -> int:
        """Numbers in its kernels. `context`: the width of the other sequence."""
        return 2 * width * (width + context)

    @staticmethod
    def kept(policy: str, layout: Layout, shape: BlockShape, context: tuple[int, int]) -> float:
        """Bytes kept for the backward pass, of one example."""
        (tokens, width), (others, other_width) = shape[:2], context
        x, key = layout.bytes(tokens, width), layout.bytes(others, width)
        if policy == "dots":
            return x + (x + 2 * key) / layout.tensor  # its output; queries, keys and values
        if policy != "none":
            return 0
        scores = _kept_scores(layout, shape, others)
        norms = LayerNorm.kept(policy, layout, tokens, width) + LayerNorm.kept(policy, layout, others, other_width)
        return norms + x + layout.bytes(others, other_width) + (scores + 2 * x + 2 * key) / layout.tensor
