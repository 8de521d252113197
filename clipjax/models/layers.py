"""What the towers are made of: named parameters, linear maps, norms, attention, blocks. clipjax.models.runner runs them.

Letters: b batch, t tokens, d width, h heads, k width of a head, f width of the MLP, e embedding, n patches, L layers.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from clipjax.config import Activation
from clipjax.models.runner import HIDDEN

Init = Callable[..., Array]
zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()


def normal(std: float) -> Init:
    return nnx.initializers.normal(std)


@dataclass(frozen=True)
class Scope:
    """Makes the parameters below one path. Each is drawn from `fold_in(key, path)`: adding a parameter changes no other one."""

    key: Array
    dtype: jnp.dtype  # of the arithmetic; parameters are float32
    path: str = ""
    layers: int | None = None  # the number of stacked layers: a leading axis of every parameter; None: no such axis

    def __truediv__(self, name: str) -> "Scope":
        return replace(self, path=f"{self.path}/{name}" if self.path else name)

    def stacked(self, layers: int) -> "Scope":
        return replace(self, layers=layers)

    def param(self, name: str, init: Init, *shape: int) -> nnx.Param:
        key = jax.random.fold_in(self.key, zlib.crc32(f"{self.path}/{name}".encode()))
        if self.layers is None:
            return nnx.Param(init(key, shape, jnp.float32))
        draw = jax.vmap(lambda k: init(k, shape, jnp.float32))
        return nnx.Param(draw(jax.random.split(key, self.layers)))


class Linear(nnx.Module):
    """A linear map from one group of axes to another: `Linear(scope, (d,), (h, k), std=s)` maps [..., d] to [..., h, k]."""

    def __init__(self, scope: Scope, inner: tuple[int, ...], outer: tuple[int, ...], *, std: float, bias: bool = True) -> None:
        self.inner = len(inner)
        self.dtype = scope.dtype
        self.kernel = scope.param("kernel", normal(std), *inner, *outer)
        self.bias = scope.param("bias", zeros, *outer) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        axes = (tuple(range(x.ndim - self.inner, x.ndim)), tuple(range(self.inner)))
        y = jax.lax.dot_general(x, self.kernel[...].astype(self.dtype), (axes, ((), ())))
        if self.bias is None:
            return y
        bias = self.bias[...].astype(self.dtype)
        return y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))


class LayerNorm(nnx.Module):
    """Layer normalisation. Its statistics are computed in float32, whatever the dtype."""

    def __init__(self, scope: Scope, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = scope.param("scale", ones, width)
        self.bias = scope.param("bias", zeros, width)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        scale, bias = (jnp.expand_dims(p[...], range(x.ndim - 1)) for p in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)


def activate(x: Array, name: Activation) -> Array:
    """GELU; its tanh approximation (in transformers: gelu_pytorch_tanh); or x sigmoid(1.702 x) (OpenAI's CLIP)."""
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


class MLP(nnx.Module):
    activation: Activation

    def __init__(self, scope: Scope, width: int, mlp_dim: int, activation: Activation, *, std: float, out_std: float) -> None:
        self.activation = activation
        self.up = Linear(scope / "up", (width,), (mlp_dim,), std=std)
        self.down = Linear(scope / "down", (mlp_dim,), (width,), std=out_std)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down(activate(checkpoint_name(self.up(x), HIDDEN), self.activation))


Mask = Bool[Array | np.ndarray, "..."]


def attend(
    q: Float[Array, "b h t k"], k: Float[Array, "b h s k"], v: Float[Array, "b h s k"], mask: Mask | None = None
) -> Float[Array, "b t h k"]:
    """Scaled dot-product attention. Scores and softmax are float32, whatever the dtype. `mask` broadcasts to [b, h, t, s]; it is
    true where a query may attend to a key.
    """
    scores = jnp.einsum("bhtk,bhsk->bhts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhts,bhsk->bthk", jax.nn.softmax(scores).astype(v.dtype), v)


# Keys and values of one layer for the tokens generated so far, of n captions an image; 0 at later positions.
Cache = tuple[Float[Array, "b n h t k"], Float[Array, "b n h t k"]]


class SelfAttention(nnx.Module):
    def __init__(self, scope: Scope, width: int, heads: int, *, causal: bool, std: float, out_std: float) -> None:
        self.causal = causal
        self.qkv = Linear(scope / "qkv", (width,), (3, heads, width // heads), std=std)
        self.out = Linear(scope / "out", (heads, width // heads), (width,), std=out_std)

    def __call__(self, x: Float[Array, "b t d"], mask: Mask | None = None) -> Float[Array, "b t d"]:
        """`mask` [b, t, t]: true where a token (axis 1) may attend to another (axis 2). None: all true, or lower-triangular if
        causal.
        """
        if mask is not None:
            mask = mask[:, None]
        elif self.causal:
            mask = np.tri(x.shape[1], dtype=bool)
        q, k, v = self.heads(x)
        return self.out(attend(q, k, v, mask))

    def heads(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b h t k"], ...]:
        """Queries, keys and values."""
        # Three products that each write [b, h, t, k] directly. One fused product has to be split and transposed, which cost a
        # tenth of the step's time on a CPU.
        assert self.qkv.bias is not None
        kernel, bias = (p[...].astype(x.dtype) for p in (self.qkv.kernel, self.qkv.bias))
        return tuple(jnp.einsum("btd,dhk->bhtk", x, kernel[:, i]) + bias[i][None, :, None] for i in range(3))

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


class CrossAttention(nnx.Module):
    """Attention of one sequence's tokens to those of another."""

    def __init__(self, scope: Scope, width: int, context: int, heads: int, *, std: float, out_std: float) -> None:
        shape = heads, width // heads
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
        """As a call, with the `keys` of the other sequence already computed."""
        return self.out(attend(einops.rearrange(self.query(x), "b t h k -> b h t k"), key, value))


class Block(nnx.Module):
    """A pre-norm transformer block. Built in a stacked scope it holds every layer of a tower, which `Runner.layers` runs."""

    def __init__(
        self, scope: Scope, *, width: int, depth: int, heads: int, mlp_dim: int, activation: Activation, eps: float, causal: bool
    ) -> None:
        # CLIP's initialisation (2103.00020, and openai/CLIP model.py `initialize_parameters`).
        std, out_std = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
        self.norm1 = LayerNorm(scope / "norm1", width, eps)
        self.attention = SelfAttention(scope / "attention", width, heads, causal=causal, std=std, out_std=out_std)
        self.norm2 = LayerNorm(scope / "norm2", width, eps)
        self.mlp = MLP(scope / "mlp", width, mlp_dim, activation, std=(2 * width) ** -0.5, out_std=out_std)

    def __call__(self, x: Float[Array, "b t d"], mask: Mask | None = None) -> Float[Array, "b t d"]:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))

    def step(self, x: Float[Array, "b n d"], cache: Cache, at: Array, mask: Bool[Array, "b n 1 t"]) -> tuple[Array, Cache]:
        """The same for one token of each caption, at position `at`; also that token's keys and values."""
        y, new = self.attention.step(self.norm1(x), cache, at, mask)
        x = x + y
        return x + self.mlp(self.norm2(x)), new


def unit(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Rows scaled to length 1, in float32. A zero row stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
