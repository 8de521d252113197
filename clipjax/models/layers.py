"""What the towers are made of: named parameters, linear maps, norms, MLPs.

Letters: b batch, t tokens, d width, h heads, k width of a head, f width of the MLP, e embedding, n patches, L layers.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from clipjax.config import Activation, Attention, Lora
from clipjax.models import lora
from clipjax.models.facts import BlockShape, Layout
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
    attention: Attention = "exact"  # how layers compute it
    path: str = ""
    layers: int | None = None  # the number of stacked layers: a leading axis of every parameter; None: no such axis
    lora: Lora | None = None  # adapters of the kernels that it names, below this path

    def __truediv__(self, name: str) -> "Scope":
        return replace(self, path=f"{self.path}/{name}" if self.path else name)

    def stacked(self, layers: int, lora: Lora | None = None) -> "Scope":
        return replace(self, layers=layers, lora=lora)

    def param(self, name: str, init: Init, *shape: int) -> nnx.Param:
        key = jax.random.fold_in(self.key, zlib.crc32(f"{self.path}/{name}".encode()))
        if self.layers is None:
            return nnx.Param(init(key, shape, jnp.float32))
        draw = jax.vmap(lambda k: init(k, shape, jnp.float32))
        return nnx.Param(draw(jax.random.split(key, self.layers)))


TENSOR_AXES: dict[str, int] = {}  # of all layers: the last two parts of a parameter's path -> Layer.TENSOR_AXES


class Layer(nnx.Module):
    """A module that says which of its parameters are sharded over the mesh axis `tensor`.

    Defining a subclass adds its TENSOR_AXES to those of all layers. Raises TypeError where two layers contradict each other.
    """

    # A parameter, as "out/kernel" -> its axis that is sharded, counted from the end. Others are not sharded over `tensor`.
    TENSOR_AXES: ClassVar[Mapping[str, int]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, axis in cls.TENSOR_AXES.items():
            if name.count("/") != 1 or TENSOR_AXES.setdefault(name, axis) != axis:
                raise TypeError(f"{cls.__name__}.TENSOR_AXES: {name!r} must have two parts, and one axis in all layers")


class Linear(nnx.Module):
    """A linear map from one group of axes to another: `Linear(scope, (d,), (h, k), std=s)` maps [..., d] to [..., h, k]."""

    def __init__(self, scope: Scope, inner: tuple[int, ...], outer: tuple[int, ...], *, std: float, bias: bool = True) -> None:
        self.inner = len(inner)
        self.dtype = scope.dtype
        self.kernel = scope.param("kernel", normal(std), *inner, *outer)
        self.bias = scope.param("bias", zeros, *outer) if bias else None
        name = "/".join(scope.path.split("/")[-2:])
        adapted = scope.lora if scope.lora is not None and name in scope.lora.kernels else None
        a, b = ((), ()) if adapted is None else lora.shapes(adapted, name, inner, outer)
        self.factor = 0.0 if adapted is None else lora.factor(adapted)
        self.lora_a = scope.param(lora.LORA_A, normal(math.prod(inner) ** -0.5), *a) if adapted else None
        self.lora_b = scope.param(lora.LORA_B, zeros, *b) if adapted else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = self._times(x, self.kernel, self.inner)
        if self.lora_a is not None and self.lora_b is not None:
            y = y + self.factor * self._times(self._times(x, self.lora_a, self.inner), self.lora_b, 1)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(self.dtype)
        return y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))

    def _times(self, x: Array, weights: nnx.Param, inner: int) -> Array:
        """The product over the last `inner` axes of x and the first of the weights."""
        axes = (tuple(range(x.ndim - inner, x.ndim)), tuple(range(inner)))
        return jax.lax.dot_general(x, weights[...].astype(self.dtype), (axes, ((), ())))


class LayerNorm(nnx.Module):
    """Layer normalisation. Its statistics are computed in float32, whatever the dtype.

    Those of bfloat16 take one pass: the variance is mean(x^2) - mean(x)^2. That errs by some 2^-24 mean(x)^2; the rounding of x
    to bfloat16 before has added noise of a variance of 2^-20 mean(x)^2, so nothing is lost.
    """

    def __init__(self, scope: Scope, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = scope.param("scale", ones, width)
        self.bias = scope.param("bias", zeros, width)

    @staticmethod
    def kept(policy: str, layout: Layout, tokens: int, width: int) -> int:
        """Bytes kept for the backward pass, of one example: its input, or of float32 three steps."""
        return (layout.size if layout.size == 2 else 3 * 4) * width * layout.rows(tokens) if policy == "none" else 0

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale, bias = (jnp.expand_dims(p[...], range(x.ndim - 1)) for p in (self.scale, self.bias))
        if x.dtype == jnp.bfloat16:  # the backward pass makes the float32 steps again: they have twice the bytes of x
            return jax.checkpoint(self._by_one_pass, prevent_cse=False)(x, scale, bias)
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)

    def _by_one_pass(self, x: Array, scale: Array, bias: Array) -> Array:
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.maximum(jnp.square(y).mean(-1, keepdims=True) - jnp.square(mean), 0)
        return ((y - mean) * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


def activate(x: Array, name: Activation) -> Array:
    """GELU; its tanh approximation (in transformers: gelu_pytorch_tanh); or x sigmoid(1.702 x) (OpenAI's CLIP)."""
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    return 0.5 * x * erfc(-x * np.sqrt(0.5, dtype=np.float32)) if x.dtype == jnp.float32 else coarse_gelu(x)


@jax.custom_jvp
def erfc(x: Array) -> Array:
    """`jax.lax.erfc` with its derivative, -2 / sqrt(pi) exp(-x^2). JAX 0.12.0 refuses to differentiate its own in a shard_map."""
    return jax.lax.erfc(x)


@erfc.defjvp
def _erfc_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    [x], [dx] = primals, tangents
    return erfc(x), -2 / math.sqrt(math.pi) * (dx * jnp.exp(-jnp.square(x)))


@jax.custom_vjp
def coarse_gelu(x: Array) -> Array:
    """GELU to 1e-7, for bfloat16. 1 + erf costs a TPU less than half of erfc; the backward pass needs nothing but x."""
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


def _coarse_gelu_gradient(x: Array, dy: Array) -> tuple[Array]:
    y = x.astype(jnp.float32)
    slope = _normal_cdf(y) + y * (math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * jnp.square(y)))
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


def _normal_cdf(x: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(math.sqrt(0.5) * x)


coarse_gelu.defvjp(lambda x: (coarse_gelu(x), x), _coarse_gelu_gradient)


class MLP(Layer):
    """Two linear maps with an activation between them."""

    # hidden units
    TENSOR_AXES: ClassVar = {"up/kernel": -1, "up/bias": -1, "up/lora_b": -1, "down/kernel": -2, "down/lora_a": -2}

    activation: Activation

    def __init__(self, scope: Scope, width: int, mlp_dim: int, activation: Activation, *, std: float, out_std: float) -> None:
        self.activation = activation
        self.up = Linear(scope / "up", (width,), (mlp_dim,), std=std)
        self.down = Linear(scope / "down", (mlp_dim,), (width,), std=out_std)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down(activate(checkpoint_name(self.up(x), HIDDEN), self.activation))

    @staticmethod
    def flops(tokens: int, width: int, mlp_dim: int) -> int:
        """FLOPs of a forward pass on one example."""
        return tokens * 2 * 2 * width * mlp_dim

    @staticmethod
    def kept(policy: str, layout: Layout, shape: BlockShape) -> float:
        """Bytes kept for the backward pass, of one example: hidden units, and the input with its norm."""
        hidden = layout.bytes(shape.tokens, shape.mlp_dim) / layout.tensor
        if policy != "none":
            return 0 if policy == "full" else hidden
        steps = 6 if shape.activation == "gelu_tanh" else 4  # of the function between the two products
        if shape.activation == "gelu" and layout.size == 2:
            steps = 2  # what it takes and gives
        x = layout.bytes(shape.tokens, shape.width)
        return LayerNorm.kept(policy, layout, shape.tokens, shape.width) + x + steps * hidden


def unit(x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Rows scaled to length 1, in float32. A zero row stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
