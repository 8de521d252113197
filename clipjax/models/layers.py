"""What both towers are made of: named parameters, linear maps, norms, attention, blocks, and how all of these are run.

Letters: b batch, t tokens, d width, h heads, k width of a head, f width of the MLP, e embedding, n patches, L layers.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Shaped

from clipjax.config import Activation

Init = Callable[..., Array]
PART = 4096  # tokens a device puts through a layer at once where all is made again for the gradient: plenty for a matrix unit
WHOLE, HIDDEN = "whole weights", "hidden"  # the former are never kept for the backward pass
POLICIES = {  # of config.Model.remat: what is kept
    "none": jax.checkpoint_policies.save_anything_except_these_names(WHOLE),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names(HIDDEN),
    "full": jax.checkpoint_policies.nothing_saveable,
}
PARTED = ("mlp", "full")  # of these, those that make enough again to see a batch in parts
zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()


def normal(std: float) -> Init:
    return nnx.initializers.normal(std)


@dataclass(frozen=True)
class Scope:
    """Where a parameter lives. It is drawn from `fold_in(key, path)`, so no parameter depends on which others exist."""

    key: Array
    dtype: jnp.dtype  # of the arithmetic; parameters are float32
    path: str = ""
    layers: int | None = None  # with a number, every parameter gets a leading axis of that length

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
    """A linear map between groups of axes, as `Linear(scope, "btd,dhk->bthk", (d,), (h, k))`."""

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
    """Layer normalisation; its statistics are float32 whatever the dtype."""

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
    """GELU, its tanh approximation (transformers: gelu_pytorch_tanh), or x sigmoid(1.702 x) (OpenAI's CLIP)."""
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


class MLP(nnx.Module):
    def __init__(self, scope: Scope, width: int, mlp_dim: int, activation: Activation, *, std: float, out_std: float) -> None:
        self.activation = activation
        self.up = Linear(scope / "up", (width,), (mlp_dim,), std=std)
        self.down = Linear(scope / "down", (mlp_dim,), (width,), std=out_std)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down(activate(checkpoint_name(self.up(x), HIDDEN), self.activation))


def attend(
    q: Float[Array, "b h t k"], k: Float[Array, "b h s k"], v: Float[Array, "b h s k"], mask: Bool[Array, "..."] | None = None
) -> Float[Array, "b t h k"]:
    """Scaled dot-product attention; scores and softmax are float32 whatever the dtype. `mask`, to [b h t s]: what is seen."""
    scores = jnp.einsum("bhtk,bhsk->bhts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhts,bhsk->bthk", jax.nn.softmax(scores).astype(v.dtype), v)


Cache = tuple[Float[Array, "b n h t k"], Float[Array, "b n h t k"]]  # keys and values of n captions a picture, as far as written


class SelfAttention(nnx.Module):
    def __init__(self, scope: Scope, width: int, heads: int, *, causal: bool, std: float, out_std: float) -> None:
        self.causal = causal
        self.qkv = Linear(scope / "qkv", (width,), (3, heads, width // heads), std=std)
        self.out = Linear(scope / "out", (heads, width // heads), (width,), std=out_std)

    def __call__(self, x: Float[Array, "b t d"], mask: Bool[Array, "b t t"] | None = None) -> Float[Array, "b t d"]:
        """`mask`: what each token sees; where there is none, all, or what comes no later than itself."""
        if mask is not None:
            mask = mask[:, None]
        elif self.causal:
            mask = np.tri(x.shape[1], dtype=bool)
        return self.out(attend(*self.heads(x), mask))

    def heads(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b h t k"], ...]:
        """Queries, keys and values."""
        # Three products that each write [b, h, t, k] outright: one fused product has to be taken apart and transposed
        # again, which cost a tenth of the whole step on a CPU.
        kernel, bias = (p[...].astype(x.dtype) for p in (self.qkv.kernel, self.qkv.bias))
        return tuple(jnp.einsum("btd,dhk->bhtk", x, kernel[:, i]) + bias[i][None, :, None] for i in range(3))

    def step(self, x: Float[Array, "b n d"], cache: Cache, at: Array, mask: Bool[Array, "b n 1 t"]) -> tuple[Array, Cache]:
        """For the tokens at position `at` of n captions a picture, what they see of those before and of themselves; and their
        keys and values, which the cache does not hold yet: it is 0 there. Only read here, it need not be copied.
        """
        q, k, v = (einops.rearrange(y, "b h n k -> b n h k") for y in self.heads(x))
        q, own = q * q.shape[-1] ** -0.5, (jnp.arange(mask.shape[-1]) == at)[None, None, None]
        scores = jnp.einsum("bnhk,bnhtk->bnht", q, cache[0], preferred_element_type=jnp.float32)
        scores = scores + own * jnp.einsum("bnhk,bnhk->bnh", q, k, preferred_element_type=jnp.float32)[..., None]
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)).astype(v.dtype)
        seen = jnp.einsum("bnht,bnhtk->bnhk", weights, cache[1]) + (weights * own).sum(-1, keepdims=True) * v
        return self.out(seen), (k[..., None, :], v[..., None, :])


class CrossAttention(nnx.Module):
    """Attention of tokens to those of another sequence."""

    def __init__(self, scope: Scope, width: int, context: int, heads: int, *, std: float, out_std: float) -> None:
        shape = heads, width // heads
        self.query = Linear(scope / "query", (width,), shape, std=std)
        self.key_value = Linear(scope / "key_value", (context,), (2, *shape), std=context**-0.5)
        self.out = Linear(scope / "out", shape, (width,), std=out_std)

    def __call__(self, x: Float[Array, "b t d"], context: Float[Array, "b s c"]) -> Float[Array, "b t d"]:
        return self.see(x, *self.keys(context))

    def keys(self, context: Float[Array, "b s c"]) -> tuple[Float[Array, "b h s k"], Float[Array, "b h s k"]]:
        """Keys and values: all that it needs to know of the other sequence."""
        key, value = einops.rearrange(self.key_value(context), "b s two h k -> two b h s k")
        return key, value

    def see(self, x: Float[Array, "b t d"], key: Array, value: Array) -> Float[Array, "b t d"]:
        return self.out(attend(einops.rearrange(self.query(x), "b t h k -> b h t k"), key, value))


class Block(nnx.Module):
    """A pre-norm transformer block. Built in a stacked scope it holds every layer of a tower; `How.layers` runs them."""

    def __init__(
        self, scope: Scope, *, width: int, depth: int, heads: int, mlp_dim: int, activation: Activation, eps: float, causal: bool
    ) -> None:
        # CLIP's initialisation (2103.00020, and openai/CLIP model.py `initialize_parameters`).
        std, out_std = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
        self.norm1 = LayerNorm(scope / "norm1", width, eps)
        self.attention = SelfAttention(scope / "attention", width, heads, causal=causal, std=std, out_std=out_std)
        self.norm2 = LayerNorm(scope / "norm2", width, eps)
        self.mlp = MLP(scope / "mlp", width, mlp_dim, activation, std=(2 * width) ** -0.5, out_std=out_std)

    def __call__(self, x: Float[Array, "b t d"], mask: Bool[Array, "b t t"] | None = None) -> Float[Array, "b t d"]:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))

    def step(self, x: Float[Array, "b n d"], cache: Cache, at: Array, mask: Bool[Array, "b n 1 t"]) -> tuple[Array, Cache]:
        """The same for the tokens at position `at`; and their keys and values."""
        seen, new = self.attention.step(self.norm1(x), cache, at, mask)
        x = x + seen
        return x + self.mlp(self.norm2(x)), new


Gather = Callable[[nnx.State], nnx.State] | None  # one layer's weights, whole where they were divided; None: they are whole
Keep = Callable[[Array], Array]  # activations [p, t, d], where the batch's rows lie
Seen = tuple[Array | None, ...]  # what every layer sees beside x, with the same leading axes: masks, the other modality
Body = Callable[[Gather, Keep, nnx.State, Array, Seen], Array]  # all layers of stacked weights and x


def here(body: Body, stacked: nnx.State, x: Array, seen: Seen) -> Array:
    """Runs layers where weights are whole."""
    return body(None, lambda x: x, stacked, x, seen)


@dataclass(frozen=True)
class Placement:
    """How the rows of a batch and a tower's weights lie on devices; clipjax.placement tells it for a mesh."""

    devices: int = 1  # that the rows of arrays [b, ...] are divided over
    run: Callable[[Body, nnx.State, Array, Seen], Array] = here  # a body on stacked weights and x [n, p, t, d]


WHEREVER = Placement()


@dataclass(frozen=True)
class How:
    """How towers are run. A batch is [n, p, ...] here: n parts, seen one after the other, of p rows each."""

    remat: str = "none"  # what the backward pass makes again (config.Model.remat, decided)
    unroll: int = 1  # layers per iteration of the scan
    place: Placement = WHEREVER

    def split(self, x: Shaped[Array, "b ..."], tokens: int) -> Shaped[Array, "n p ..."]:
        """A batch in parts. What is made again of a layer, many times its input, then exists for `PART` tokens at a time on each
        device.
        """
        own, n = len(x) // self.place.devices, 1
        if self.remat in PARTED:
            n = next(n for n in range(1, own + 1) if own % n == 0 and (own // n * tokens <= PART or n == own))
        return einops.rearrange(x, "(d n p) ... -> n (d p) ...", d=self.place.devices, n=n)

    def join(self, x: Any) -> Any:
        """The parts of `split`, arrays [n, p, ...] or a tree of them, as a batch again."""
        return jax.tree.map(lambda x: einops.rearrange(x, "n (d p) ... -> (d n p) ...", d=self.place.devices), x)

    def each(self, fn: Callable[..., Any], *x: Any) -> Any:
        """`fn` of one part after the other: from trees of arrays [n, p, ...] to such."""
        n = len(jax.tree.leaves(x)[0])
        if self.remat in PARTED:
            fn = jax.checkpoint(fn, prevent_cse=n == 1, policy=POLICIES[self.remat])
        if n == 1:
            return jax.tree.map(lambda y: y[None], fn(*jax.tree.map(lambda x: x[0], x)))
        return jax.lax.map(lambda part: fn(*part), x)

    def layers(self, blocks: nnx.Module, x: Float[Array, "n p t d"], *seen: Array | None) -> Float[Array, "n p t d"]:
        """x through every layer of a stacked Block, each of which also gets its part of `seen` [n, p, ...]."""
        graphdef, stacked = nnx.split(blocks)
        depth = len(jax.tree.leaves(stacked)[0])
        loop = self.unroll >= depth

        def body(gather: Gather, keep: Keep, stacked: nnx.State, x: Array, seen: Seen) -> Array:
            def layer(x: Array, weights: nnx.State) -> tuple[Array, None]:
                whole = checkpoint_name(gather(weights), WHOLE) if gather else weights
                return self.each(lambda part, *more: keep(nnx.merge(graphdef, whole)(part, *more)), x, *seen), None

            if self.remat != "none" or gather:
                layer = jax.checkpoint(layer, prevent_cse=loop, policy=POLICIES[self.remat])
            if not loop:
                return jax.lax.scan(layer, x, stacked, unroll=self.unroll)[0]
            for i in range(depth):  # not a scan unrolled `depth` times: that would still stack what the backward pass needs
                x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], stacked))
            return x

        return self.place.run(body, stacked, x, seen)


def unit(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Rows scaled to length 1 in float32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
